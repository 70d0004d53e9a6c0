"""The grammar: captions say what a scene is, and no more than they are told."""

from collections import Counter

import numpy as np
import pytest

from aai.toy.grammar import AMBIENCES, MEDIA, OBJECTS, Scene, caption, full_caption, partial_caption, random_scene

SCENE = Scene("dog", "rain", "sketch", 0.9, 1)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("dog", "rain", "sketch", "big"), "a sketch of a big dog in the rain"),
        (("bell", "night", "photo", "medium"), "a photo of a bell at night"),
        ((None, "snow"), "a photo of a thing in the snow"),
        (("clock",), "a photo of a clock"),
    ],
)
def test_captions(words: tuple[str | None, ...], expected: str) -> None:
    assert caption(*words) == expected  # type: ignore[arg-type]


def test_sizes_are_thirds_and_the_largest_is_big() -> None:
    names = [Scene("dog", "rain", "photo", size, 1).size_name for size in (0.0, 0.33, 0.34, 0.66, 0.67, 1.0)]
    assert names == ["small", "small", "medium", "medium", "big", "big"]
    assert SCENE.labels == ["dog", "rain", "sketch", "big"]


def test_half_of_peoples_captions_are_complete_and_the_others_leave_something_open() -> None:
    rng = np.random.default_rng(0)
    texts = Counter(partial_caption(SCENE, rng) for _ in range(1000))
    assert full_caption(SCENE) == "a sketch of a big dog in the rain"
    assert texts[full_caption(SCENE)] == pytest.approx(500 + 500 * 0.8 * 0.6 * 0.5, abs=50)
    known = {"a", "sketch", "of", "big", "dog", "thing", "in", "the", "rain"}
    assert {word for text in texts for word in text.split()} == known
    assert len(texts) == 2**3  # object, ambience and size are left open independently


def test_random_scenes_draw_everything() -> None:
    rng = np.random.default_rng(0)
    scenes = [random_scene(rng) for _ in range(1200)]
    for drawn, names in (
        ([scene.obj for scene in scenes], OBJECTS),
        ([scene.ambience for scene in scenes], AMBIENCES),
        ([scene.medium for scene in scenes], MEDIA),
    ):
        counts = Counter(drawn)
        assert set(counts) == set(names)
        assert min(counts.values()) > 0.6 * len(scenes) / len(names)
    assert len({scene.seed for scene in scenes}) == len(scenes)
    both = Counter((scene.obj, scene.ambience) for scene in scenes)
    assert len(both) == len(OBJECTS) * len(AMBIENCES)
