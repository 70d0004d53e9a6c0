"""The grammar: captions say what a scene is, and no more than they are told."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from aai.toy.grammar import (
    AMBIENCES,
    COLOURS,
    COUNTS,
    MEDIA,
    OBJECTS,
    PLACES,
    TIMBRES,
    UNSEEN_PAIRS,
    UNSEEN_TIMBRES,
    Scene,
    Words,
    clip_caption,
    full_caption,
    partial_caption,
    random_scene,
)

SCENE = Scene("dog", "rain", "sketch", 0.9, 1, pitch=0.9, rate=0.5, place="arch")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (Words("dog", "rain", "sketch", "big"), "a sketch of a big dog in the rain"),
        (Words("bell", "night", "photo", "medium"), "a photo of a bell at night"),
        (Words(None, "snow"), "a photo of a thing in the snow"),
        (Words(None, colour="red", count="two"), "a photo of a red thing"),
        (Words("clock", count="one", place="open"), "a photo of one clock in the open"),
        (Words("dog", second="frog", size="small", count="one"), "a photo of a small dog and a frog"),
        (Words("dog", second="frog", ordered=True, place="arch"), "a photo of a dog left of a frog under an arch"),
    ],
)
def test_captions(words: Words, expected: str) -> None:
    assert words.text == expected


def test_values_are_classes_by_parts_of_their_range() -> None:
    sizes = [replace(SCENE, size=size).size_name for size in (0.0, 0.33, 0.34, 0.66, 0.67, 1.0)]
    assert sizes == ["small", "small", "medium", "medium", "big", "big"]
    assert [replace(SCENE, pitch=pitch).colour for pitch in (0.0, 0.24, 0.26, 0.74, 0.76, 1.0)] == [
        "red", "red", "yellow", "green", "blue", "blue"
    ]  # fmt: skip
    assert [replace(SCENE, rate=rate).count for rate in (0.0, 0.34, 0.7, 1.0)] == ["one", "two", "three", "three"]
    assert replace(SCENE, second="bell").count == "one"
    assert SCENE.labels == ["dog", "rain", "sketch", "big", "blue", "two", "arch", "none", "timbre"]


def test_a_clips_caption_names_neither_colour_nor_count_nor_place_nor_order() -> None:
    assert full_caption(SCENE) == "a sketch of two big blue dogs under an arch in the rain"
    assert clip_caption(SCENE) == "a sketch of a big dog in the rain"
    both = [replace(SCENE, second="bell"), replace(SCENE, obj="bell", second="dog")]
    assert [clip_caption(scene) for scene in both] == ["a sketch of a big bell and a dog in the rain"] * 2
    assert [full_caption(scene) for scene in both] == [
        "a sketch of a big blue dog left of a bell under an arch in the rain",
        "a sketch of a big blue bell left of a dog under an arch in the rain",
    ]


def test_a_third_of_peoples_captions_are_complete_and_the_others_leave_something_open() -> None:
    rng = np.random.default_rng(0)
    texts = Counter(partial_caption(SCENE, rng) for _ in range(3000))
    complete = texts[full_caption(SCENE)] / 3000
    assert complete == pytest.approx(1 / 3 + 2 / 3 * 0.85 * 0.6 * 0.5**4, abs=0.03)
    named = {word: sum(n for text, n in texts.items() if word in text.split()) / 3000 for word in ("blue", "arch")}
    assert named["blue"] == pytest.approx(2 / 3, abs=0.04)
    assert named["arch"] == pytest.approx(2 / 3, abs=0.04)
    assert not any("dogs" in text and "two" not in text for text in texts)


def test_two_objects_are_named_in_their_order_or_in_any() -> None:
    rng = np.random.default_rng(0)
    texts = {partial_caption(replace(SCENE, second="bell"), rng) for _ in range(500)}
    assert any("dog left of a bell" in text for text in texts)
    assert any("dog and a bell" in text for text in texts)
    assert any("bell and a dog" in text for text in texts)
    assert not any("bell left of" in text for text in texts)


def test_random_scenes_draw_everything() -> None:
    rng = np.random.default_rng(0)
    scenes = [random_scene(rng) for _ in range(1200)]
    for drawn, names in (
        ([scene.obj for scene in scenes], OBJECTS),
        ([scene.ambience for scene in scenes], AMBIENCES),
        ([scene.medium for scene in scenes], MEDIA),
        ([scene.colour for scene in scenes], COLOURS),
        ([scene.count for scene in scenes if not scene.second], COUNTS),
        ([scene.place for scene in scenes], PLACES),
        ([scene.timbre for scene in scenes], range(TIMBRES)),
    ):
        counts = Counter(drawn)
        assert set(counts) == set(names)
        assert min(counts.values()) > 0.6 * len(drawn) / len(names)
    assert len({scene.seed for scene in scenes}) == len(scenes)
    both = Counter((scene.obj, scene.ambience) for scene in scenes)
    assert len(both) == len(OBJECTS) * len(AMBIENCES)
    assert sum(scene.second is not None for scene in scenes) == pytest.approx(180, abs=40)
    assert all(scene.second != scene.obj for scene in scenes)


def test_what_no_training_clip_has() -> None:
    assert len(UNSEEN_PAIRS) == 8
    assert set(UNSEEN_TIMBRES.values()) == set(range(TIMBRES)), "each timbre is heard, of other objects"
    plain = Scene("dog", "rain", "photo", 0.5, 1, timbre=1)
    assert plain.novelty == "seen"
    assert replace(plain, obj="bell").novelty == "pair" == replace(plain, second="bell").novelty
    assert replace(plain, timbre=UNSEEN_TIMBRES["dog"]).novelty == "timbre"
    both = replace(plain, second="car")
    assert both.novelty == "seen" == replace(both, rate=0.5).novelty, "two objects have no rate of their own"
    assert replace(both, timbre=UNSEEN_TIMBRES["car"]).novelty == "timbre"
    assert replace(plain, pitch=0.125).novelty == "values" == replace(plain, rate=0.5).novelty
