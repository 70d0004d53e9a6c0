"""Pictures of scenes: each attribute changes what it should, and nothing else."""

from dataclasses import replace

import numpy as np
import pytest

from aai.toy.draw import draw_scene
from aai.toy.grammar import AMBIENCES, MEDIA, OBJECTS, Scene

SCENE = Scene("car", "clear", "photo", 0.5, 4)


def pixels(scene: Scene, **when: float) -> np.ndarray:
    return np.asarray(draw_scene(scene, 64, **when), float)


def changed(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """bool [H, W]: where two pictures differ."""
    return np.abs(a - b).max(axis=-1) > 8


def test_the_same_scene_and_time_give_the_same_picture_at_the_asked_size() -> None:
    image = draw_scene(SCENE, 96, time_s=0.3, level=0.5)
    assert (image.size, image.mode) == ((96, 96), "RGB")
    assert np.array_equal(np.asarray(image), np.asarray(draw_scene(SCENE, 96, time_s=0.3, level=0.5)))
    assert changed(pixels(SCENE), pixels(replace(SCENE, seed=5))).mean() > 0.1


@pytest.mark.parametrize(("name", "values"), [("obj", OBJECTS), ("ambience", AMBIENCES), ("medium", MEDIA)])
def test_every_value_of_an_attribute_looks_different(name: str, values: tuple[str, ...]) -> None:
    pictures = [pixels(replace(SCENE, **{name: value})) for value in values]  # type: ignore[arg-type]
    for i, one in enumerate(pictures):
        assert min(changed(one, other).mean() for other in pictures[:i] + pictures[i + 1 :]) > 0.03, values[i]


def test_another_object_leaves_the_background() -> None:
    """Else objects could be told apart by the sky."""
    differs = changed(pixels(SCENE), pixels(replace(SCENE, obj="frog")))
    assert not differs[:8].any()
    assert not differs[:, :3].any()


def test_a_big_object_covers_more_than_a_small_one() -> None:
    covered = []
    for size in (0.0, 0.5, 1.0):
        scene = replace(SCENE, size=size)
        covered.append(changed(pixels(scene), pixels(replace(scene, obj="clock"))).sum())
    assert covered[0] * 1.5 < covered[1] < covered[2] / 1.2


@pytest.mark.parametrize(("ambience", "moves"), [("clear", False), ("night", False), ("rain", True), ("snow", True)])
def test_weather_moves_with_time_and_nothing_else_does(ambience: str, moves: bool) -> None:
    scene = replace(SCENE, ambience=ambience)
    assert changed(pixels(scene), pixels(scene, time_s=0.3)).any() == moves


def test_a_loud_instant_lifts_the_object() -> None:
    still, lifted = pixels(SCENE), pixels(SCENE, level=1.0)
    dark = [np.flatnonzero((picture.max(axis=-1) < 60).any(axis=1)).max() for picture in (still, lifted)]
    assert dark[0] - dark[1] >= 2  # the lowest dark rows are the wheels'


def test_media_have_their_marks() -> None:
    """A painting has a golden frame, a sketch hardly any colour."""
    photo, sketch, painting = (pixels(replace(SCENE, medium=name)) for name in ("photo", "sketch", "painting"))
    assert np.abs(painting[0] - [0xD9, 0xA4, 0x37]).max() < 2
    colour = [np.ptp(picture, axis=-1).mean() for picture in (photo, sketch)]
    assert colour[1] < 0.6 * colour[0]
