"""Edited copies: a sample of real edits, and the search among many prints."""

from dataclasses import replace

import numpy as np
import pytest

from aai.media.decode import decode_clip
from aai.media.duplicates import DuplicateConfig, HashedClip, find_duplicates
from aai.media.edited import EditedConfig, Prints, edited_pairs_of
from aai.media.limits import DecodeConfig
from aai.media.prints import picture_print, sound_print
from aai.media.signals import audio_hash, video_hash
from aai.toy.roster import plain_clip
from aai.toy.writer import render_clip
from tests.edits import KINDS, edited, opened

CFG = EditedConfig()
RNG = np.random.default_rng(0)


def printed(name: str, data: bytes, split: str = "train") -> HashedClip:
    """A file as duplicates are told by."""
    clip = decode_clip(data, None, None, DecodeConfig())
    return HashedClip(
        clip_id=name,
        uri=name,
        split=split,
        video_hash=video_hash(clip.hash_luma),
        audio_hash=audio_hash(clip.audio, 16_000),
        duration_s=clip.duration_s,
        picture_print=picture_print(clip.hash_luma),
        sound_print=sound_print(clip.audio, 16_000),
    )


def test_every_kind_of_edit_is_known_and_another_take_is_not() -> None:
    clip = plain_clip(1, 5)
    data, other = render_clip(clip), opened(render_clip(plain_clip(4, 5)))
    clips = [printed("source", data, "test")]
    clips += [printed(kind, edited(kind, data, other, np.random.default_rng(1))) for kind in KINDS]
    for take in range(3):
        scene = replace(clip.scene, seed=take)
        clips.append(printed(f"take {take}", render_clip(replace(clip, scene=scene, sound=scene))))
    dropped = {clips[index].uri: code for index, (code, _) in find_duplicates(clips, DuplicateConfig()).items()}
    assert dropped == dict.fromkeys(KINDS, "CROSS_SPLIT_DUPLICATE")
    before = DuplicateConfig(edited=EditedConfig(enabled=False))
    assert 1 < len(find_duplicates(clips, before)) < len(KINDS)
    unprinted = [replace(clip, picture_print=None, sound_print=None) for clip in clips]
    assert find_duplicates(unprinted, DuplicateConfig()) == find_duplicates(clips, before)


# ---------------------------------------------------------------- the search


def prints(sounds: list[np.ndarray], group: np.ndarray | None = None, pictures_of: int = 1) -> Prints:
    """Clips with these words, whose pictures never change; each `pictures_of` successive clips look alike."""
    count = len(sounds)
    looks = RNG.integers(0, 2**64, (-(-count // pictures_of), 4), dtype=np.uint64).repeat(pictures_of, axis=0)[:count]
    views = looks.repeat(8, axis=1)[:, :31]
    return Prints(
        video=views[:, :4],
        audio=RNG.integers(0, 2**64, (count, 4), dtype=np.uint64),
        pictures=views[:, 4:],
        words=np.concatenate(sounds),
        starts=np.cumsum([0, *map(len, sounds)]),
        duration_s=np.full(count, 10.0),
        group=np.arange(count) if group is None else group,
        is_video=np.ones(count, bool),
    )


def test_what_is_of_no_video_is_known_by_its_sound_alone() -> None:
    sounds = [random_words(60) for _ in range(40)]
    sounds += [sounds[i][10:] for i in range(20)]  # 40 to 59 are cuts of 0 to 19, and look like nothing else
    data = prints(sounds)
    strict = EditedConfig(max_picture_bits=0)  # random pictures are alike by chance at times
    assert edited_pairs_of(data, strict).tolist() == []
    half = prints([sounds[0], np.concatenate([sounds[0][30:], random_words(30)])])
    assert len(edited_pairs_of(replace(half, pictures=np.zeros_like(half.pictures)), CFG)) == 1
    assert len(edited_pairs_of(replace(half, is_video=np.array([True, False])), CFG)) == 0, "nothing but half a sound"
    moves = np.ones(60, bool)
    moves[[0, 1, 41, 42, 30]] = False  # of pair 0 the original, of pair 1 both, of pair 2 the cut
    bare = replace(data, is_video=moves)
    for cfg in (strict, EditedConfig(enabled=False)):
        assert edited_pairs_of(bare, cfg).tolist() == [[0, 40], [1, 41], [2, 42]]
    parts = [edited_pairs_of(bare, strict, part, 3) for part in range(3)]
    assert np.unique(np.concatenate(parts), axis=0).tolist() == [[0, 40], [1, 41], [2, 42]]


def random_words(count: int) -> np.ndarray:
    return RNG.integers(1, 2**32, count, dtype=np.uint32)


def noisy(words: np.ndarray, share: float) -> np.ndarray:
    """The words with some of their bits turned over."""
    flips = np.packbits(RNG.random((len(words), 32)) < share, axis=1).view(np.uint32)[:, 0]
    return words ^ flips


def test_shifted_sounds_are_found_and_shares_of_the_work_add_up() -> None:
    sounds = [random_words(150) for _ in range(500)]
    pairs = []
    for number, sound in enumerate(sounds):
        pairs += [sound, noisy(sound[number % 60 :], 0.1)]
    data = prints(pairs, pictures_of=2)
    found = edited_pairs_of(data, CFG)
    assert found.tolist() == [[2 * i, 2 * i + 1] for i in range(500)]
    shares = np.concatenate([edited_pairs_of(data, CFG, part, 5) for part in range(5)])
    assert np.array_equal(np.unique(shares, axis=0), found)
    assert len(edited_pairs_of(prints(pairs), CFG)) < 10, "the pictures must agree, too"


@pytest.mark.parametrize(("start", "alike"), [(60, True), (120, False)])
def test_enough_of_the_shorter_sound_must_overlap(start: int, alike: bool) -> None:
    film = random_words(270)
    data = prints([film[:150], film[start : start + 150]], pictures_of=2)
    assert len(edited_pairs_of(data, CFG)) == alike


def test_windows_that_a_manifest_cuts_from_one_file_may_overlap() -> None:
    film = random_words(300)
    windows = [film[:150], film[50:200], film[:150]]
    data = prints(windows, group=np.array([0, 0, 1]), pictures_of=3)
    assert edited_pairs_of(data, CFG).tolist() == [[0, 2], [1, 2]]


def test_what_everybody_has_costs_little_and_hides_nothing() -> None:
    """Three hundred copies of one clip, and a hum that as many others share."""
    clip, hum = random_words(100), random_words(20)
    sounds = [noisy(clip, 0.02) for _ in range(300)] + [np.r_[hum, random_words(80)] for _ in range(300)]
    data = prints(sounds)
    same = np.zeros(300, int)
    data = replace(data, video=np.r_[data.video[same], data.video[300:]])
    data = replace(data, pictures=np.r_[data.pictures[same], data.pictures[300:]])
    found = edited_pairs_of(data, CFG)
    assert found.max() < 300
    assert len(np.unique(found[found[:, 0] == 0])) == 300, "each is compared with the first"
    assert len(edited_pairs_of(prints([np.zeros(0, np.uint32)] * 3), CFG)) == 0
