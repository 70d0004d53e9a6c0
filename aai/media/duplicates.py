"""Exact and near duplicates by content: which of them stays is decided by split, then by id."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pydantic

from aai.config import Config

_BANDS, _BAND_BITS = 16, 16
SPLIT_RANK = {"test": 0, "val": 1}
"""Held-out data wins: a clip of test is never dropped for one of train. Any other split ranks as train."""


class DuplicateConfig(Config):
    """How alike two clips have to be; both sound and picture must agree."""

    enabled: bool = True
    """Look for duplicates at all."""
    max_video_bits: int = pydantic.Field(24, ge=0, le=2 * _BANDS - 1)
    """Largest Hamming distance of the 256-bit video hashes (the search is exact up to 31)."""
    max_audio_bits: int = pydantic.Field(64, ge=0, le=128)
    """Largest Hamming distance of the 256-bit audio hashes; unrelated sounds differ in about 128."""


def _words(hashes: Sequence[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(hashes), np.uint64).reshape(len(hashes), -1)


def hamming(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Bits that differ, per row, of packed hashes uint64 [N, 4]."""
    return np.bitwise_count(left ^ right).sum(axis=-1)


def _candidates(words: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Index pairs that share one of 16 bands of 16 bits up to one bit.

    By the pigeonhole principle every pair with up to 31 differing bits is among them.
    """
    bands = words.view(np.uint16).reshape(len(words), _BANDS)
    for band in range(_BANDS):
        order = np.argsort(bands[:, band], kind="stable")
        keys = bands[order, band]
        for flip in (0, *(1 << bit for bit in range(_BAND_BITS))):
            probe = keys ^ np.uint16(flip)
            first, last = np.searchsorted(keys, probe, "left"), np.searchsorted(keys, probe, "right")
            yield from _expand(order, first, last)


def _expand(order: np.ndarray, first: np.ndarray, last: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The pairs (order[i], order[j]) with first[i] <= j < last[i] and i < j, in chunks of memory."""
    first = np.maximum(first, np.arange(len(order)) + 1)
    counts = np.maximum(last - first, 0)
    chunk = np.cumsum(counts) // 2_000_000
    for part in np.unique(chunk[counts > 0]):
        rows = np.flatnonzero((chunk == part) & (counts > 0))
        left = np.repeat(rows, counts[rows])
        within = np.arange(len(left)) - np.repeat(np.cumsum(counts[rows]) - counts[rows], counts[rows])
        yield order[left], order[np.repeat(first[rows], counts[rows]) + within]


def _near_pairs(rows: Sequence[Mapping[str, Any]], cfg: DuplicateConfig) -> set[tuple[int, int]]:
    video, audio = _words([row["video_hash"] for row in rows]), _words([row["audio_hash"] for row in rows])
    pairs: set[tuple[int, int]] = set()
    for left, right in _candidates(video):
        close = hamming(video[left], video[right]) <= cfg.max_video_bits
        left, right = left[close], right[close]
        close = hamming(audio[left], audio[right]) <= cfg.max_audio_bits
        pairs.update(zip(left[close].tolist(), right[close].tolist(), strict=True))
    return pairs


def find_duplicates(rows: Sequence[Mapping[str, Any]], cfg: DuplicateConfig) -> dict[int, tuple[str, str]]:
    """Which rows to drop: {row index: (code, message naming the kept clip)}.

    rows: `clip_id, uri, split, video_hash, audio_hash` of clips that passed the filters. Codes: EXACT_DUPLICATE
    (same clip_id, that is same bytes and window), NEAR_DUPLICATE, CROSS_SPLIT_DUPLICATE (the kept one is of
    another split). Test is kept before val before train; within a split the first by clip_id, then by row. Only
    clips that resemble a *kept* clip are dropped: chains of resemblance do not eat a whole data set.
    """
    if not cfg.enabled or len(rows) < 2:
        return {}
    near: dict[int, list[int]] = defaultdict(list)
    for left, right in _near_pairs(rows, cfg):
        near[left].append(right)
        near[right].append(left)

    def rank(index: int) -> tuple[int, str, int]:
        return SPLIT_RANK.get(rows[index]["split"], len(SPLIT_RANK)), rows[index]["clip_id"], index

    kept_ids: dict[str, int] = {}
    kept: set[int] = set()
    dropped: dict[int, tuple[str, str]] = {}
    for index in sorted(range(len(rows)), key=rank):
        row = rows[index]
        same = kept_ids.get(row["clip_id"])
        alike = [same] if same is not None else sorted(kept.intersection(near[index]), key=rank)
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
