"""What a world is to hold: kinds, shares, splits and duplicates, before anything is written."""

from collections import Counter

import pytest

from aai.toy.roster import KINDS, NOVELTY_SHARES, SPLITS, Clip, plan_world


def _named(clips: list[Clip]) -> dict[str, Clip]:
    return {clip.name: clip for clip in clips}


def test_plan_has_about_12_percent_defects_and_6_percent_oddities() -> None:
    count = Counter(clip.kind for clip in plan_world(2400, 1))
    defects = sum(n for kind, n in count.items() if kind != "plain" and KINDS[kind].code)
    oddities = sum(n for kind, n in count.items() if kind != "plain" and not KINDS[kind].code)
    assert set(count) == {"plain", *KINDS}
    assert 0.11 * 2400 <= defects <= 0.13 * 2400
    assert 0.05 * 2400 <= oddities <= 0.07 * 2400
    assert count["wrong_audio"] == 24


def test_every_kind_occurs_from_100_clips_on() -> None:
    assert {clip.kind for clip in plan_world(100, 5)} == {"plain", *KINDS}


@pytest.mark.parametrize("num_clips", [0, 1, 7])
def test_small_worlds_can_be_planned(num_clips: int) -> None:
    assert len(plan_world(num_clips, 3)) == num_clips


def test_plan_follows_from_size_and_seed() -> None:
    assert plan_world(150, 4) == plan_world(150, 4)
    assert plan_world(150, 4) != plan_world(150, 5)


def test_splits_and_media_have_their_shares() -> None:
    clips = plan_world(4000, 2)
    splits = Counter(clip.split for clip in clips)
    for name, share in SPLITS:
        seen = share * NOVELTY_SHARES["seen"] + (name == "test") * (1 - NOVELTY_SHARES["seen"])
        assert splits[name] / 4000 == pytest.approx(seen, abs=0.03)
    media = Counter(clip.scene.medium for clip in clips)
    assert media["photo"] / 4000 == pytest.approx(0.5, abs=0.03)


def test_names_are_unique_and_duplicates_point_at_ordinary_clips() -> None:
    clips = plan_world(1000, 6)
    named = _named(clips)
    assert len(named) == 1000
    originals = [clip.pair for clip in clips if clip.pair]
    assert len(set(originals)) == len(originals) == sum("duplicate" in clip.kind for clip in clips)
    for clip in clips:
        if clip.pair:
            original = named[clip.pair]
            assert original.kind == "plain"
            assert original.scene == clip.scene
            crossing = clip.kind == "cross_split_duplicate"
            assert (original.split, clip.split) == (("test", "train") if crossing else (clip.split,) * 2)


def test_what_is_new_is_tested_alone() -> None:
    clips = plan_world(4000, 2)
    count = Counter(clip.scene.novelty for clip in clips)
    for name, share in NOVELTY_SHARES.items():
        assert count[name] / 4000 == pytest.approx(share, abs=0.02)
    assert {clip.scene.novelty for clip in clips if clip.split != "test"} - {"seen"} == {
        clip.scene.novelty for clip in clips if clip.kind == "cross_split_duplicate"
    } - {"seen"}, "but for copies that curation rejects"
    assert {clip.sound.novelty for clip in clips if clip.kind == "wrong_audio"} == {"seen"}


def test_wrong_audio_is_of_another_object_and_ambience() -> None:
    for clip in plan_world(600, 7):
        if clip.kind == "wrong_audio":
            assert clip.sound.obj not in (clip.scene.obj, clip.scene.second)
            assert clip.sound.ambience != clip.scene.ambience
        else:
            assert clip.sound == clip.scene
