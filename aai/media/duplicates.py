"""Exact and near duplicates by content: which of them stays is decided by split, then by id."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pydantic

from aai.config import Config

BANDS = 16
"""Parts of a video hash by which near duplicates are looked for, each on its own."""
_BAND_BITS = 16
SPLIT_RANK = {"test": 0, "val": 1}
"""Held-out data wins: a clip of test is never dropped for one of train. Any other split ranks as train."""


class DuplicateConfig(Config):
    """How alike two clips have to be; both sound and picture must agree."""

    enabled: bool = True
    """Look for duplicates at all."""
    max_video_bits: int = pydantic.Field(24, ge=0, le=2 * BANDS - 1)
    """Largest Hamming distance of the 256-bit video hashes (the search is exact up to 31)."""
    max_audio_bits: int = pydantic.Field(64, ge=0, le=128)
    """Largest Hamming distance of the 256-bit audio hashes; unrelated sounds differ in about 128."""


def words(hashes: Sequence[bytes]) -> np.ndarray:
    """256-bit hashes as uint64 [N, 4]."""
    return np.frombuffer(b"".join(hashes), np.uint64).reshape(len(hashes), -1)


def hamming(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Bits that differ, per row, of packed hashes uint64 [N, 4]."""
    return np.bitwise_count(left ^ right).sum(axis=-1)


def _candidates(video: np.ndarray, band: int, part: int, parts: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Index pairs whose hashes agree in a band of 16 bits up to one bit; of `parts` equal shares of them, one."""
    values = video.view(np.uint16).reshape(len(video), BANDS)[:, band]
    order = np.argsort(values, kind="stable")
    keys = values[order]
    begin, end = len(keys) * part // parts, len(keys) * (part + 1) // parts
    own = np.arange(begin, end)
    for flip in (0, *(1 << bit for bit in range(_BAND_BITS))):
        wanted = keys[own] ^ np.uint16(flip)
        first, last = np.searchsorted(keys, wanted, "left"), np.searchsorted(keys, wanted, "right")
        yield from _expand(order, own, np.maximum(first, own + 1), last)


def _expand(
    order: np.ndarray, own: np.ndarray, first: np.ndarray, last: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The pairs (order[own[i]], order[j]) with first[i] <= j < last[i], in chunks of memory."""
    counts = np.maximum(last - first, 0)
    chunk = np.cumsum(counts) // 2_000_000
    for number in np.unique(chunk[counts > 0]):
        rows = np.flatnonzero((chunk == number) & (counts > 0))
        left = np.repeat(rows, counts[rows])
        within = np.arange(len(left)) - np.repeat(np.cumsum(counts[rows]) - counts[rows], counts[rows])
        yield order[own[left]], order[np.repeat(first[rows], counts[rows]) + within]


def near_pairs_of(
    video: np.ndarray, audio: np.ndarray, cfg: DuplicateConfig, band: int, part: int = 0, parts: int = 1
) -> np.ndarray:
    """Index pairs int64 [P, 2] that are alike and agree in one band of the video hash up to a bit.

    video, audio: uint64 [N, 4]. part of parts: the share of the work that is done here. By the pigeonhole principle
    every pair with up to 31 differing bits is found in one of the bands.
    """
    found = [np.zeros((0, 2), np.int64)]
    for left, right in _candidates(video, band, part, parts):
        close = hamming(video[left], video[right]) <= cfg.max_video_bits
        left, right = left[close], right[close]
        close = hamming(audio[left], audio[right]) <= cfg.max_audio_bits
        found.append(np.stack([left[close], right[close]], axis=1))
    return np.unique(np.sort(np.concatenate(found), axis=1), axis=0)


Search = Callable[[np.ndarray, np.ndarray, DuplicateConfig], np.ndarray]
"""video and audio hashes uint64 [N, 4] -> index pairs [P, 2] that are alike."""


def near_pairs(video: np.ndarray, audio: np.ndarray, cfg: DuplicateConfig) -> np.ndarray:
    """All pairs that are alike, found in this process."""
    return np.unique(np.concatenate([near_pairs_of(video, audio, cfg, band) for band in range(BANDS)]), axis=0)


def find_duplicates(
    rows: Sequence[Mapping[str, Any]], cfg: DuplicateConfig, search: Search = near_pairs
) -> dict[int, tuple[str, str]]:
    """Which rows to drop: {row index: (code, message naming the kept clip)}.

    rows: `clip_id, uri, split, video_hash, audio_hash` of clips that passed the filters. Codes: EXACT_DUPLICATE
    (same clip_id, that is same bytes and window), NEAR_DUPLICATE, CROSS_SPLIT_DUPLICATE (the kept one is of
    another split). Test is kept before val before train; within a split the first by clip_id, then by row. Only
    clips that resemble a *kept* clip are dropped: chains of resemblance do not eat a whole data set.
    """
    if not cfg.enabled or len(rows) < 2:
        return {}

    def rank(index: int) -> tuple[int, str, int]:
        return SPLIT_RANK.get(rows[index]["split"], len(SPLIT_RANK)), rows[index]["clip_id"], index

    order = sorted(range(len(rows)), key=rank)
    near = _neighbours(rows, order, cfg, search)
    kept_ids: dict[str, int] = {}
    kept: set[int] = set()
    dropped: dict[int, tuple[str, str]] = {}
    for index in order:
        row = rows[index]
        same = kept_ids.get(row["clip_id"])
        alike = [same] if same is not None else sorted(kept.intersection(near[row["clip_id"]]), key=rank)
        if not alike:
            kept.add(index)
            kept_ids[row["clip_id"]] = index
            continue
        other = rows[alike[0]]
        code = "EXACT_DUPLICATE" if same is not None else "NEAR_DUPLICATE"
        if other["split"] != row["split"]:
            code = "CROSS_SPLIT_DUPLICATE"
        dropped[index] = (code, f"same clip as {other['uri']} ({other['clip_id']}) of split {other['split']}")
    return dropped


def _neighbours(
    rows: Sequence[Mapping[str, Any]], order: Sequence[int], cfg: DuplicateConfig, search: Search
) -> dict[str, list[int]]:
    """{clip_id: rows alike}. Copies of one clip are compared once: a thousand of them are no million pairs."""
    first = list({rows[index]["clip_id"]: index for index in reversed(order)}.values())
    video, audio = (words([rows[index][name] for index in first]) for name in ("video_hash", "audio_hash"))
    near: dict[str, list[int]] = defaultdict(list)
    for left, right in search(video, audio, cfg).tolist():
        near[rows[first[left]]["clip_id"]].append(first[right])
        near[rows[first[right]]["clip_id"]].append(first[left])
    return near
