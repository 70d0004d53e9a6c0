"""Edited copies of clips: the sound agrees at some shift in time and the pictures in some view, or the pictures alone.

Near-linear: only clips with an equal word in the prints of their sounds are compared, each with a few that share it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
import pydantic

from aai.config import Config
from aai.media.prints import STEP_S, VIEWS

PICTURES = 4
"""Pictures of a clip, evenly spaced."""
PICTURE_PRINT_BYTES = 8 * ((VIEWS + 1) * PICTURES - 1)
ALONE_OVERLAP = 0.9
"""Share of the shorter sound that has to overlap at least where no pictures bear witness."""
_PARTNERS = 8
"""With how many clips that have the same word a clip is compared: the next ones, and as many of the first ones."""
_MIN_WORDS = 8
_CHUNK = 4_000_000
_SHIFTS = 2 * 4096  # more than a print has words, either way
_UNSHIFTED = 2
"""Words: what a codec's delay may shift a sound."""
_APART, _LIKELY_BITS = 5, 9
"""Words that a quick look compares lie so far apart that they say different things, and differ in so many bits."""
_MIRROR = np.packbits(np.arange(1, 65) % 9 % 2).view(np.uint64)[0]
"""The bits of `picture_bits` that turn over when a picture is mirrored: waves that are odd from left to right."""
_VIEWS = ((0, 0), (1, 1), *((1, part) for part in range(2, VIEWS + 1)), *((part, 1) for part in range(2, VIEWS + 1)))
"""Views of two pictures that are compared: whole, within borders, and either one's parts with the other."""


class EditedConfig(Config):
    """Copies that were cut, cropped, mirrored, given bars, a logo or another sound; by prints made with the signals."""

    enabled: bool = True
    """Look for them."""
    max_sound_error: float = pydantic.Field(0.17, ge=0, le=0.5)
    """Share of bits in which the sounds may differ where they overlap at some shift; unrelated ones differ in half."""
    min_overlap: float = pydantic.Field(0.5, gt=0, le=1)
    """Share of the shorter sound that has to overlap."""
    max_picture_bits: float = pydantic.Field(17, ge=0, le=32)
    """Bits of 64 in which two pictures of about the same time may differ, in the view that fits best, if sounds agree;
    unrelated pictures differ in 25."""
    max_motion_bits: int = pydantic.Field(30, ge=0, le=96)
    """Bits of 192 in which the motion of clips of one length may differ: pictures then agree if sounds do, and if they
    agree as wholes, sounds need not. Unrelated motion differs in 96."""
    max_video_bits: int = pydantic.Field(31, ge=0, le=31)
    """Largest Hamming distance of the 256-bit video hashes where sounds do not agree."""


@dataclass(frozen=True, kw_only=True)
class Prints:
    """What N clips are compared by. A clip whose prints are not known has no words, and pictures of 0."""

    video: np.ndarray  # uint64 [N, 4], `video_hash`
    audio: np.ndarray  # uint64 [N, 4], `audio_hash`
    pictures: np.ndarray  # uint64 [N, 27], `picture_print`
    words: np.ndarray  # uint32 [M], `sound_print` of all clips
    starts: np.ndarray  # int64 [N + 1], where each clip's words begin
    duration_s: np.ndarray  # float [N]
    group: np.ndarray  # int64 [N], clips of one file and split: their manifest cut them, and may let them overlap
    is_video: np.ndarray  # bool [N]; of others the sounds count alone

    @cached_property
    def heard(self) -> np.ndarray:
        """int64 [N]: words of each clip that are not silence."""
        return np.diff(np.concatenate([[0], np.cumsum(self.words != 0)])[self.starts])

    def both_videos(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """bool [P]: whether two clips are both of videos."""
        both: np.ndarray = self.is_video[left] & self.is_video[right]
        return both

    def same_motion(self, left: np.ndarray, right: np.ndarray, cfg: EditedConfig) -> np.ndarray:
        """Whether the pictures of two clips move alike; never where one of them stands still."""
        motion = self.pictures[:, VIEWS * PICTURES :]
        bits = np.bitwise_count(motion[left] ^ motion[right]).sum(axis=1)
        return (bits <= cfg.max_motion_bits) & (motion[left] != 0).all(axis=1) & (motion[right] != 0).all(axis=1)

    def near_words_alike(
        self, left: np.ndarray, right: np.ndarray, at_left: np.ndarray, at_right: np.ndarray
    ) -> np.ndarray:
        """Whether the words a little before and after two places differ in less bits than chance has it; a quick look
        that spares most pairs the whole comparison. All int64 [P]."""
        counts, bits, seen = np.diff(self.starts), np.zeros(len(left), np.int64), np.zeros(len(left), np.int64)
        for step in (-_APART, 0, _APART):
            one, other = at_left + step, at_right + step
            there = (np.minimum(one, other) >= 0) & (one < counts[left]) & (other < counts[right])
            pair = [self.words[np.where(there, self.starts[of] + at, 0)] for of, at in ((left, one), (right, other))]
            bits += np.bitwise_count(pair[0] ^ pair[1]) * there
            seen += there
        return bits <= _LIKELY_BITS * seen

    def sounds_alike(self, left: np.ndarray, right: np.ndarray, shift: np.ndarray, cfg: EditedConfig) -> np.ndarray:
        """Whether the right sounds, begun `shift` words later, agree with the left ones. All int64 [P]."""
        counts = np.diff(self.starts)
        begin = np.maximum(shift, 0)
        length = np.minimum(counts[left], counts[right] + shift) - begin
        steps = np.arange(max(1, int(length.max(initial=0))))
        there = steps < length[:, None]
        first = self.starts[left] + begin, self.starts[right] + begin - shift
        one, other = (self.words[np.where(there, start[:, None] + steps, 0)] for start in first)
        there &= (one != 0) & (other != 0)
        heard = there.sum(axis=1)
        errors = (np.bitwise_count(one ^ other) * there).sum(axis=1)
        alone = max(cfg.min_overlap, ALONE_OVERLAP)
        overlap = np.where(self.both_videos(left, right), cfg.min_overlap, alone)
        needed = np.maximum(_MIN_WORDS, overlap * np.minimum(self.heard[left], self.heard[right]))
        return (heard >= needed) & (errors <= cfg.max_sound_error * 32 * heard)

    def picture_bits(self, left: np.ndarray, right: np.ndarray, shift_s: np.ndarray) -> np.ndarray:
        """float [P]: bits of 64 that differ between pictures of about the same time, in the view that fits best.

        Of the six pairs of pictures that are the nearest in time the two most alike count, for a cut may lie between
        pictures of nearly the same time.
        """
        middle = (np.arange(PICTURES) + 0.5) / PICTURES
        times = self.duration_s[left, None] * middle, self.duration_s[right, None] * middle + shift_s[:, None]
        apart_s = np.abs(times[0][:, :, None] - times[1][:, None, :]).reshape(-1, PICTURES**2)
        near = np.argsort(apart_s, axis=1)[:, :6]
        views = np.concatenate([self.video, self.pictures], axis=1)
        best = np.full(len(left), 64.0)
        for (of_left, of_right), mirror in product(_VIEWS, (np.uint64(0), _MIRROR)):
            one = views[left[:, None], PICTURES * of_left + near // PICTURES]
            other = views[right[:, None], PICTURES * of_right + near % PICTURES] ^ mirror
            bits = np.sort(np.bitwise_count(one ^ other), axis=1)[:, :2]
            best = np.minimum(best, bits.mean(axis=1))
        return best


def _matches(
    prints: Prints, drop: int, part: int, parts: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Words that two clips have in common but for byte `drop`: the clips, the earlier one first, and the words' places
    in them. Of the words that fall to this part."""
    words = prints.words & ~np.uint32(0xFF << 8 * drop)
    order = np.flatnonzero((prints.words != 0) & (words % parts == part))
    order = order[np.argsort(words[order], kind="stable")]
    words, owner = words[order], np.searchsorted(prints.starts, order, "right") - 1
    fresh = np.ones(len(order), bool)  # a word that a clip repeats counts once
    fresh[1:] = (words[1:] != words[:-1]) | (owner[1:] != owner[:-1])
    words, owner = words[fresh], owner[fresh]
    place = order[fresh] - prints.starts[owner]
    rows = np.arange(len(words))
    first = np.searchsorted(words, words)  # where those with the same word begin
    for step in range(1, _PARTNERS + 1):
        right = rows[step:][words[step:] == words[:-step]]
        yield owner[right - step], owner[right], place[right - step], place[right]
    for step in range(_PARTNERS):
        right = rows[rows - first > _PARTNERS + step]
        left = first[right] + step
        yield owner[left], owner[right], place[left], place[right]


def edited_pairs_of(prints: Prints, cfg: EditedConfig, part: int = 0, parts: int = 1) -> np.ndarray:
    """Index pairs int64 [P, 2] of clips whose sounds agree at some shift and whose pictures do in some view.

    Unless both are of videos, their sounds count alone. Pairs of videos are found only if `cfg.enabled`.
    part of parts: the share of the work that is done here, of the words that clips may have in common.
    """
    clips, found = len(prints.video), [np.zeros((0, 2), np.int64)]
    for drop in range(4):
        tried = [np.zeros(0, np.int64)]
        for left, right, at_left, at_right in _matches(prints, drop, part, parts):
            likely = prints.group[left] != prints.group[right]
            likely &= prints.near_words_alike(left, right, at_left, at_right)
            packed = (left * clips + right) * _SHIFTS + at_left - at_right + _SHIFTS // 2
            tried.append(np.unique(packed[likely]))
        pair, shift = np.divmod(np.unique(np.concatenate(tried)), _SHIFTS)
        found += _agreeing(prints, np.stack([*np.divmod(pair, clips), shift - _SHIFTS // 2], axis=1), cfg)
    return np.unique(np.concatenate(found), axis=0)


def _agreeing(prints: Prints, tried: np.ndarray, cfg: EditedConfig) -> Iterator[np.ndarray]:
    """Which of the (left, right, shift) [P, 3] are the same clip: [Q, 2], in chunks of memory."""
    size = max(1, _CHUNK // max(1, int(np.diff(prints.starts).max(initial=1))))
    for start in range(0, len(tried), size):
        left, right, shift = tried[start : start + size].T
        alike = prints.sounds_alike(left, right, shift, cfg)
        if not cfg.enabled:
            alike &= ~prints.both_videos(left, right)
        left, right, shift = left[alike], right[alike], shift[alike]
        alike = prints.picture_bits(left, right, shift * STEP_S) <= cfg.max_picture_bits
        alike |= (np.abs(shift) <= _UNSHIFTED) & prints.same_motion(left, right, cfg)
        alike |= ~prints.both_videos(left, right)
        yield np.stack([left[alike], right[alike]], axis=1)
