from dataclasses import replace

import numpy as np
import pytest

from aai.errors import UserError
from aai.media.duplicates import (
    BANDS,
    EXCLUDED,
    EXCLUDED_SPLIT,
    DuplicateConfig,
    HashedClip,
    _prints_of,
    find_duplicates,
    near_pairs_of,
)
from aai.media.edited import PICTURE_PRINT_BYTES, EditedConfig

RNG = np.random.default_rng(0)
CFG = DuplicateConfig()


def row(name: str, split: str = "train", video: bytes | None = None, audio: bytes | None = None) -> HashedClip:
    hashes = {"video_hash": video or RNG.bytes(32), "audio_hash": audio or RNG.bytes(32)}
    return HashedClip(clip_id=name, uri=f"/{name}.mp4", split=split, **hashes)


def flip(value: bytes, count: int) -> bytes:
    bits = np.unpackbits(np.frombuffer(value, np.uint8))
    bits[RNG.choice(256, count, replace=False)] ^= 1
    return np.packbits(bits).tobytes()


def copy(of: HashedClip, name: str, video_bits: int, audio_bits: int, split: str = "train") -> HashedClip:
    return row(name, split, flip(of.video_hash, video_bits), flip(of.audio_hash, audio_bits))


def test_every_near_pair_within_the_limits_is_found_and_no_other() -> None:
    rows = [row(f"a{i:04d}") for i in range(400)]
    near = [copy(rows[i], f"b{i:04d}", i % 25, i % 65) for i in range(200)]
    far = [copy(rows[i], f"c{i:04d}", 25 + i % 40, 0) for i in range(200, 300)]
    other_sound = [copy(rows[i], f"d{i:04d}", 0, 65 + i % 60) for i in range(300, 400)]
    dropped = find_duplicates([*rows, *near, *far, *other_sound], CFG)
    assert sorted(dropped) == list(range(400, 600))
    assert {code for code, _ in dropped.values()} == {"NEAR_DUPLICATE"}
    assert "/a0007.mp4" in dropped[407][1]


@pytest.mark.parametrize(("motion_bits", "alike"), [(26, True), (40, False), (56, False)])
def test_with_another_sound_it_must_move_as_the_other_does(motion_bits: int, alike: bool) -> None:
    """Copies with another sound differ in 8 bits at most; dark scenes that only look alike did from 40 on."""
    video, pictures = RNG.bytes(32), RNG.integers(1, 2**64, PICTURE_PRINT_BYTES // 8, np.uint64)
    other = pictures.copy()
    for word in range(3):  # the last three are the motion
        other[word - 3] ^= np.uint64(2 ** (motion_bits // 3 + (word < motion_bits % 3)) - 1)
    clips = [replace(row("a", video=video), picture_print=pictures.tobytes()),
             replace(row("b", video=flip(video, 24)), picture_print=other.tobytes())]  # fmt: skip
    assert len(find_duplicates(clips, CFG)) == alike


def test_held_out_splits_win() -> None:
    train = row("a")
    rows = [train, copy(train, "z", 2, 5, "test"), copy(train, "m", 2, 5, "val"), row("q")]
    assert {i: code for i, (code, _) in find_duplicates(rows, CFG).items()} == {
        0: "CROSS_SPLIT_DUPLICATE", 2: "CROSS_SPLIT_DUPLICATE",
    }  # fmt: skip


def test_equal_ids_are_exact_duplicates_and_the_first_stays() -> None:
    first = row("same")
    rows = [row("x"), first, replace(first, uri="/copy.mp4"), replace(first, uri="/held.mp4", split="test")]
    dropped = find_duplicates(rows, CFG)
    assert {i: code for i, (code, _) in dropped.items()} == {
        1: "CROSS_SPLIT_DUPLICATE", 2: "CROSS_SPLIT_DUPLICATE",
    }  # fmt: skip
    assert find_duplicates(rows[:3], CFG)[2][0] == "EXACT_DUPLICATE"


def test_a_chain_loses_only_what_resembles_a_kept_clip() -> None:
    a = row("a")
    b = copy(a, "b", 20, 0)
    c = copy(b, "c", 20, 0)
    distance = sum((x ^ y).bit_count() for x, y in zip(a.video_hash, c.video_hash, strict=True))
    assert distance > CFG.max_video_bits
    assert sorted(find_duplicates([a, b, c], CFG)) == [1]


def test_order_of_rows_does_not_matter() -> None:
    rows = [row(f"a{i}") for i in range(50)]
    rows += [copy(rows[i], f"b{i}", 3, 9, "test" if i % 2 else "train") for i in range(50)]
    shuffled = [rows[i] for i in RNG.permutation(100)]
    names = [{data[i].clip_id for i in find_duplicates(data, CFG)} for data in (rows, shuffled)]
    assert names[0] == names[1]
    assert len(names[0]) == 50


def test_settings() -> None:
    first = row("a")
    assert find_duplicates([first, first], DuplicateConfig(enabled=False)) == {}
    assert find_duplicates([], CFG) == {}
    with pytest.raises(UserError, match="max_video_bits"):
        DuplicateConfig.parse({"max_video_bits": 32})


def test_all_that_is_like_an_excluded_clip_goes_whatever_it_is_like_besides() -> None:
    first = row("b", EXCLUDED_SPLIT)
    second = copy(first, "c", 12, 0, EXCLUDED_SPLIT)
    like_second = row("a", "test", flip(second.video_hash, 20), second.audio_hash)
    same_as_first = replace(first, split="test", uri="/other.mp4")
    dropped = find_duplicates([like_second, second, first, same_as_first], CFG)
    assert {index: code for index, (code, _) in dropped.items()} == {0: EXCLUDED, 3: EXCLUDED}


def sound(name: str, words: np.ndarray, split: str = "train", of_video: bool = False) -> HashedClip:
    made = replace(row(name, split), sound_print=words.astype(np.uint32).tobytes(), duration_s=0.064 * len(words))
    return made if of_video else replace(made, uri=f"/{name}.wav", is_video=False)


def test_clips_without_a_video_are_told_by_their_sounds() -> None:
    """A picture that many share makes none of them a duplicate; a video stays where it is doubled."""
    heard = RNG.integers(1, 2**32, (8, 40))
    clips = [sound(f"m{i}", words) for i, words in enumerate(heard)]
    assert find_duplicates(clips, CFG) == {}
    clips += [sound("a", heard[0]), sound("b", heard[1][5:]), sound("z", heard[2], of_video=True)]
    clips += [sound("t", heard[3], "test"), sound("c", RNG.integers(1, 2**32, 40), of_video=True)]
    for cfg in (CFG, DuplicateConfig(edited=EditedConfig(enabled=False))):
        dropped = {clips[i].clip_id: (code, why.split()[3]) for i, (code, why) in find_duplicates(clips, cfg).items()}
        assert dropped == {
            "m0": ("NEAR_DUPLICATE", "/a.wav"),
            "m1": ("NEAR_DUPLICATE", "/b.wav"),
            "m2": ("NEAR_DUPLICATE", "/z.mp4"),
            "m3": ("CROSS_SPLIT_DUPLICATE", "/t.wav"),
        }


def test_a_shared_still_costs_no_comparison_of_all_with_all() -> None:
    count = 3000
    clips = [sound(f"{i:04d}", words) for i, words in enumerate(RNG.integers(1, 2**32, (count, 20)))]
    clips = [
        replace(clip, video_hash=bytes(32), audio_hash=bytes(32)) for clip in clips
    ]  # as what has none is compared
    pairs = sum(len(near_pairs_of(_prints_of(clips), CFG, band)) for band in range(BANDS))
    assert pairs == 0
    assert find_duplicates([*clips, sound("x", np.frombuffer(clips[7].sound_print or b"", np.uint32))], CFG).keys() == {
        3000
    }
