"""Exact and near duplicates by content: which of them stays is decided by split, then by id."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pydantic

from aai.config import Config
from aai.media.edited import PICTURE_PRINT_BYTES, EditedConfig, Prints, edited_pairs_of

BANDS = 16
"""Parts of a video hash by which near duplicates are looked for, each on its own."""
_BAND_BITS = 16
EXCLUDED, EXCLUDED_SPLIT = "EXCLUDED", "excluded"
"""Code of clips that are like one to leave out, and the split of that one: it is never dropped itself."""
SPLIT_RANK = {EXCLUDED_SPLIT: -1, "test": 0, "val": 1}
"""Held-out data wins: a clip of test is never dropped for one of train. Any other split ranks as train."""


def split_rank(split: str) -> int:
    """Which of several splits keeps what stands in all of them: the lowest."""
    return SPLIT_RANK.get(split, len(SPLIT_RANK))


def rank_of(split: str, is_video: bool) -> int:
    """Of clips that are alike the one with the lowest rank is kept: by split, then videos first."""
    return 2 * split_rank(split) + (not is_video)


class WholeConfig(Config):
    """How alike two clips have to be as wholes; both sound and picture must agree."""

    enabled: bool = True
    """Look for duplicates at all."""
    max_video_bits: int = pydantic.Field(24, ge=0, le=2 * BANDS - 1)
    """Largest Hamming distance of the 256-bit video hashes (the search is exact up to 31)."""
    max_audio_bits: int = pydantic.Field(64, ge=0, le=128)
    """Largest Hamming distance of the 256-bit audio hashes; unrelated sounds differ in about 128."""


class DuplicateConfig(WholeConfig):
    """How alike two clips have to be: as wholes, or as an edited copy is like its original."""

    edited: EditedConfig = EditedConfig()


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedClip:
    """What decides which of several clips is kept."""

    clip_id: str
    """Clips of the same bytes and window have the same."""
    uri: str
    split: str
    is_video: bool = True
    """Else its sound counts alone, whatever it shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HashedClip(NamedClip):
    """What duplicates are told by: the hash of the content, and prints of what is seen and heard."""

    video_hash: bytes
    """256 bits."""
    audio_hash: bytes
    """256 bits."""
    duration_s: float = 0.0
    picture_print: bytes | None = None
    """None: not measured, as in tables of earlier versions."""
    sound_print: bytes | None = None


def words(hashes: Sequence[bytes]) -> np.ndarray:
    """Hashes of one length as uint64 [N, W]: W = 4 for 256 bits."""
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


def near_pairs_of(prints: Prints, cfg: DuplicateConfig, band: int, part: int = 0, parts: int = 1) -> np.ndarray:
    """Index pairs int64 [P, 2] of clips that are alike as a whole and agree in one band of the video hash up to a bit.

    part of parts: the share of the work that is done here. By the pigeonhole principle every pair with up to 31
    differing bits is found in one of the bands.
    """
    keys = prints.video.view(np.uint16).reshape(-1, BANDS)[:, band]
    order = np.argsort(keys, kind="stable")
    order = order[prints.is_video[order]]
    keys, video, audio = keys[order], prints.video[order], prints.audio[order]  # what is compared lies together
    found = [np.zeros((0, 2), np.int64)]
    word = np.ascontiguousarray(video[:, (band // 4 + 1) % 4])  # another than the band's: a quick look at a quarter
    most = max(cfg.max_video_bits, cfg.edited.max_video_bits) if cfg.edited.enabled else cfg.max_video_bits
    for left, right in _candidates(keys, part, parts):
        close = np.bitwise_count(word[left] ^ word[right]) <= most
        left, right = left[close], right[close]
        bits = hamming(video[left], video[right])
        left, right, bits = (values[bits <= most] for values in (left, right, bits))
        close = (bits <= cfg.max_video_bits) & (hamming(audio[left], audio[right]) <= cfg.max_audio_bits)
        left, right = order[left], order[right]
        if cfg.edited.enabled:
            close |= (bits <= cfg.edited.max_video_bits) & prints.same_motion(left, right, cfg.edited)
        found.append(np.stack([left[close], right[close]], axis=1))
    return np.unique(np.sort(np.concatenate(found), axis=1), axis=0)


def compares_sounds(prints: Prints, cfg: DuplicateConfig) -> bool:
    """Whether clips are looked for whose sounds agree: edited copies, or what has no video to be told by."""
    return cfg.edited.enabled or not bool(prints.is_video.all())


Search = Callable[[Prints, DuplicateConfig], np.ndarray]
"""Prints of N clips -> index pairs [P, 2] that are alike."""


def near_pairs(prints: Prints, cfg: DuplicateConfig) -> np.ndarray:
    """All pairs that are alike, found in this process."""
    found = [near_pairs_of(prints, cfg, band) for band in range(BANDS)]
    if compares_sounds(prints, cfg):
        found.append(edited_pairs_of(prints, cfg.edited))
    return np.unique(np.concatenate(found), axis=0)


def find_duplicates(
    clips: Sequence[HashedClip], cfg: DuplicateConfig, search: Search = near_pairs
) -> dict[int, tuple[str, str]]:
    """Which clips to drop: {index: (code, message naming the kept clip)}.

    clips: those that passed the filters. Codes: EXACT_DUPLICATE (same clip_id, that is same bytes and window),
    NEAR_DUPLICATE, CROSS_SPLIT_DUPLICATE (the kept one is of another split), EXCLUDED (it is one to leave out). Test
    is kept before val before train; within a split a video before what is none, then the first by clip_id, then by
    index. Unless both are of videos, clips resemble one another when their sounds do. Only clips that resemble a *kept*
    clip are dropped: chains of resemblance do not eat a whole data set.
    """
    if not cfg.enabled or len(clips) < 2:
        return {}
    return dropped(clips, _neighbours(clips, cfg, search))


def dropped(clips: Sequence[NamedClip], near: Mapping[str, Iterable[int]]) -> dict[int, tuple[str, str]]:
    """As `find_duplicates`, where it is known already what is alike.

    near: {clip_id: places in `clips` of those like it}; of copies of one clip the one that is kept first stands there.
    """
    kept_ids: dict[str, int] = {}
    kept: set[int] = set()
    found: dict[int, tuple[str, str]] = {}
    rank = partial(_rank, clips)
    for index in sorted(range(len(clips)), key=rank):
        clip = clips[index]
        same = kept_ids.get(clip.clip_id)
        alike = [same] if same is not None else sorted(kept.intersection(near.get(clip.clip_id, ())), key=rank)
        if not alike or clip.split == EXCLUDED_SPLIT:
            kept.add(index)
            kept_ids.setdefault(clip.clip_id, index)
            continue
        other = clips[alike[0]]
        code = "EXACT_DUPLICATE" if same is not None else "NEAR_DUPLICATE"
        if other.split != clip.split:
            code = EXCLUDED if other.split == EXCLUDED_SPLIT else "CROSS_SPLIT_DUPLICATE"
        found[index] = (code, f"same clip as {other.uri} ({other.clip_id}) of split {other.split}")
    return found


def _rank(clips: Sequence[NamedClip], index: int) -> tuple[int, str, int]:
    """What is kept first."""
    clip = clips[index]
    return rank_of(clip.split, clip.is_video), clip.clip_id, index


def _neighbours(clips: Sequence[HashedClip], cfg: DuplicateConfig, search: Search) -> dict[str, list[int]]:
    """{clip_id: clips alike}. Copies of one clip are compared once: a thousand of them are no million pairs."""
    first_of: dict[str, int] = {}
    for index in sorted(range(len(clips)), key=partial(_rank, clips)):
        first_of.setdefault(clips[index].clip_id, index)
    first = list(first_of.values())  # what wins comes first: where many share a word, it is compared with all of them
    near: dict[str, list[int]] = defaultdict(list)
    for left, right in search(_prints_of([clips[index] for index in first]), cfg).tolist():
        near[clips[first[left]].clip_id].append(first[right])
        near[clips[first[right]].clip_id].append(first[left])
    return near


def _prints_of(clips: Sequence[HashedClip]) -> Prints:
    sounds = [np.frombuffer(clip.sound_print or b"", np.uint32) for clip in clips]
    pictures = [clip.picture_print or bytes(PICTURE_PRINT_BYTES) for clip in clips]
    return Prints(
        video=words([clip.video_hash for clip in clips]),
        audio=words([clip.audio_hash for clip in clips]),
        pictures=words(pictures),
        words=np.concatenate(sounds),
        starts=np.cumsum([0, *map(len, sounds)]),
        duration_s=np.array([clip.duration_s for clip in clips]),
        group=np.unique([f"{clip.split} {clip.uri}" for clip in clips], return_inverse=True)[1],
        is_video=np.array([clip.is_video for clip in clips]),
    )
