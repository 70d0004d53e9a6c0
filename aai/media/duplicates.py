"""Exact and near duplicates by content: which of them stays is decided by split, then by id."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pydantic

from aai.config import Config

BANDS = 16
"""Parts of a video hash by which near duplicates are looked for, each on its own."""
_BAND_BITS = 16
EXCLUDED, EXCLUDED_SPLIT = "EXCLUDED", "excluded"
"""Code of clips that are like one to leave out, and the split of that one: it is never dropped itself."""
SPLIT_RANK = {EXCLUDED_SPLIT: -1, "test": 0, "val": 1}
"""Held-out data wins: a clip of test is never dropped for one of train. Any other split ranks as train."""


class DuplicateConfig(Config):
    """How alike two clips have to be; both sound and picture must agree."""

    enabled: bool = True
    """Look for duplicates at all."""
    max_video_bits: int = pydantic.Field(24, ge=0, le=2 * BANDS - 1)
    """Largest Hamming distance of the 256-bit video hashes (the search is exact up to 31)."""
    max_audio_bits: int = pydantic.Field(64, ge=0, le=128)
    """Largest Hamming distance of the 256-bit audio hashes; unrelated sounds differ in about 128."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HashedClip:
    """What duplicates are told by: the hash of the content, and those of what is seen and heard."""

    clip_id: str
    uri: str
    split: str
    video_hash: bytes
    """256 bits."""
    audio_hash: bytes
    """256 bits."""


def words(hashes: Sequence[bytes]) -> np.ndarray:
    """256-bit hashes as uint64 [N, 4]."""
    return np.frombuffer(b"".join(hashes), np.uint64).reshape(len(hashes), -1)


def hamming(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Bits that differ, per row, of packed hashes uint64 [N, 4]."""
    return np.bitwise_count(left ^ right).sum(axis=-1)


def _candidates(keys: np.ndarray, part: int, parts: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Places (i, j), i < j, in the sorted uint16 `keys` whose values differ in at most a bit; one of `parts` shares."""
    own = np.arange(len(keys) * part // parts, len(keys) * (part + 1) // parts)
    begin = np.searchsorted(keys, np.arange(2**_BAND_BITS + 1))  # where each value starts
    for flip in (0, *(1 << bit for bit in range(_BAND_BITS))):
        wanted = (keys[own] ^ np.uint16(flip)).astype(np.int64)
        yield from _expand(own, np.maximum(begin[wanted], own + 1), begin[wanted + 1])


def _expand(own: np.ndarray, first: np.ndarray, last: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The pairs (own[i], j) with first[i] <= j < last[i], in chunks of memory."""
    counts = np.maximum(last - first, 0)
    chunk = np.cumsum(counts) // 500_000
    for number in np.unique(chunk[counts > 0]):
        rows = np.flatnonzero((chunk == number) & (counts > 0))
        left = np.repeat(rows, counts[rows])
        within = np.arange(len(left)) - np.repeat(np.cumsum(counts[rows]) - counts[rows], counts[rows])
        yield own[left], np.repeat(first[rows], counts[rows]) + within


def near_pairs_of(
    video: np.ndarray, audio: np.ndarray, cfg: DuplicateConfig, band: int, part: int = 0, parts: int = 1
) -> np.ndarray:
    """Index pairs int64 [P, 2] that are alike and agree in one band of the video hash up to a bit.

    video, audio: uint64 [N, 4]. part of parts: the share of the work that is done here. By the pigeonhole principle
    every pair with up to 31 differing bits is found in one of the bands.
    """
    keys = video.view(np.uint16).reshape(len(video), BANDS)[:, band]
    order = np.argsort(keys, kind="stable")
    keys, video, audio = keys[order], video[order], audio[order]  # what is compared lies together
    found = [np.zeros((0, 2), np.int64)]
    word = np.ascontiguousarray(video[:, (band // 4 + 1) % 4])  # another than the band's: a quick look at a quarter
    for left, right in _candidates(keys, part, parts):
        close = np.bitwise_count(word[left] ^ word[right]) <= cfg.max_video_bits
        left, right = left[close], right[close]
        close = hamming(video[left], video[right]) <= cfg.max_video_bits
        left, right = left[close], right[close]
        close = hamming(audio[left], audio[right]) <= cfg.max_audio_bits
        found.append(np.stack([order[left[close]], order[right[close]]], axis=1))
    return np.unique(np.sort(np.concatenate(found), axis=1), axis=0)


Search = Callable[[np.ndarray, np.ndarray, DuplicateConfig], np.ndarray]
"""video and audio hashes uint64 [N, 4] -> index pairs [P, 2] that are alike."""


def near_pairs(video: np.ndarray, audio: np.ndarray, cfg: DuplicateConfig) -> np.ndarray:
    """All pairs that are alike, found in this process."""
    return np.unique(np.concatenate([near_pairs_of(video, audio, cfg, band) for band in range(BANDS)]), axis=0)


def find_duplicates(
    clips: Sequence[HashedClip], cfg: DuplicateConfig, search: Search = near_pairs
) -> dict[int, tuple[str, str]]:
    """Which clips to drop: {index: (code, message naming the kept clip)}.

    clips: those that passed the filters. Codes: EXACT_DUPLICATE (same clip_id, that is same bytes and window),
    NEAR_DUPLICATE, CROSS_SPLIT_DUPLICATE (the kept one is of another split), EXCLUDED (it is one to leave out). Test
    is kept before val before train; within a split the first by clip_id, then by index. Only clips that resemble a
    *kept* clip are dropped: chains of resemblance do not eat a whole data set.
    """
    if not cfg.enabled or len(clips) < 2:
        return {}

    def rank(index: int) -> tuple[int, str, int]:
        clip = clips[index]
        return SPLIT_RANK.get(clip.split, len(SPLIT_RANK)), clip.clip_id, index

    order = sorted(range(len(clips)), key=rank)
    near = _neighbours(clips, order, cfg, search)
    kept_ids: dict[str, int] = {}
    kept: set[int] = set()
    dropped: dict[int, tuple[str, str]] = {}
    for index in order:
        clip = clips[index]
        same = kept_ids.get(clip.clip_id)
        alike = [same] if same is not None else sorted(kept.intersection(near[clip.clip_id]), key=rank)
        if not alike or clip.split == EXCLUDED_SPLIT:
            kept.add(index)
            kept_ids.setdefault(clip.clip_id, index)
            continue
        other = clips[alike[0]]
        code = "EXACT_DUPLICATE" if same is not None else "NEAR_DUPLICATE"
        if other.split != clip.split:
            code = EXCLUDED if other.split == EXCLUDED_SPLIT else "CROSS_SPLIT_DUPLICATE"
        dropped[index] = (code, f"same clip as {other.uri} ({other.clip_id}) of split {other.split}")
    return dropped


def _neighbours(
    clips: Sequence[HashedClip], order: Sequence[int], cfg: DuplicateConfig, search: Search
) -> dict[str, list[int]]:
    """{clip_id: clips alike}. Copies of one clip are compared once: a thousand of them are no million pairs."""
    first_of = {clips[index].clip_id: index for index in reversed(order)}
    first = list(first_of.values())
    video = words([clips[index].video_hash for index in first])
    audio = words([clips[index].audio_hash for index in first])
    near: dict[str, list[int]] = defaultdict(list)
    for left, right in search(video, audio, cfg).tolist():
        near[clips[first[left]].clip_id].append(first[right])
        near[clips[first[right]].clip_id].append(first[left])
    return near
