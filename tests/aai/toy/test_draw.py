"""Pictures of scenes: each attribute changes what it should, and nothing else."""

from dataclasses import replace

import numpy as np
import pytest

from aai.toy import draw
from aai.toy.draw import draw_scene, region
from aai.toy.grammar import AMBIENCES, COLOURS, COUNTS, MEDIA, OBJECTS, PLACES, Scene, random_scene

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


PITCHES = tuple((i + 0.3) / len(COLOURS) for i in range(len(COLOURS)))
RATES = tuple((i + 0.3) / len(COUNTS) for i in range(len(COUNTS)))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("obj", OBJECTS),
        ("ambience", AMBIENCES),
        ("medium", MEDIA),
        ("pitch", PITCHES),
        ("rate", RATES),
        ("place", PLACES),
        ("second", (None, *OBJECTS)),
    ],
)
def test_every_value_of_an_attribute_looks_different(name: str, values: tuple[object, ...]) -> None:
    pictures = [pixels(replace(SCENE, **{name: value})) for value in values]  # type: ignore[arg-type]
    for i, one in enumerate(pictures):
        assert min(changed(one, other).mean() for other in pictures[:i] + pictures[i + 1 :]) > 0.03, values[i]


def test_what_is_heard_alone_is_not_seen() -> None:
    for same in ({"timbre": 2}, {"pitch": SCENE.pitch + 0.1}, {"rate": SCENE.rate + 0.1}):
        assert np.array_equal(pixels(SCENE), pixels(replace(SCENE, **same)))  # type: ignore[arg-type]


def test_the_first_of_two_objects_stands_on_the_left() -> None:
    both = pixels(replace(SCENE, second="frog"))
    left, right = (
        changed(both, pixels(replace(SCENE, obj=a, second=b))) for a, b in (("bell", "frog"), ("car", "bell"))
    )
    assert left[:, 32:].sum() < 0.15 * left.sum() > 0
    assert right[:, :32].sum() < 0.15 * right.sum() > 0


def test_each_clip_has_a_look_of_its_own() -> None:
    """The same attributes by another seed: more of the picture differs than any one attribute changes at least."""
    others = [changed(pixels(SCENE), pixels(replace(SCENE, seed=seed))).mean() for seed in range(20)]
    assert np.median(others) > 0.2


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
    """A painting has a golden frame, a sketch less colour."""
    photo, sketch, painting = (pixels(replace(SCENE, medium=name)) for name in ("photo", "sketch", "painting"))
    assert np.abs(painting[0] - [0xD9, 0xA4, 0x37]).max() < 2
    colour = [np.ptp(picture, axis=-1).mean() for picture in (photo, sketch)]
    assert colour[1] < 0.7 * colour[0]


def test_no_object_leaves_its_region() -> None:
    """Two objects at the same places in the same scene differ within the box alone."""
    rng = np.random.default_rng(5)
    for _ in range(60):
        scene = random_scene(rng)
        other = replace(scene, obj=OBJECTS[(OBJECTS.index(scene.obj) + 1) % 10])
        left, top, right, bottom = (round(part * 1.28) for part in region(scene))
        for level in (0.0, 1.0):
            a, b = (np.asarray(draw_scene(s, 128, level=level), np.int16) for s in (scene, other))
            changed = np.abs(a - b).max(-1)
            assert changed[top:bottom, left:right].max() > 0
            changed[top:bottom, left:right] = 0
            assert changed.max() == 0, (scene, region(scene))


def test_a_leaning_object_keeps_its_shape() -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        shapes = draw._object("clock", (0.4, 0.6, 0.2), 100, (200, 0, 0), night=False, rng=rng)
        assert {(shape.centre, shape.half) for shape in shapes} == {(0.6, 0.2)}
        face, hand = (np.reshape(shapes[i].corners, (-1, 2)) for i in (0, 2))
        # a circle, and a bar from 0.62 above the centre to 0.06 below
        np.testing.assert_allclose(np.linalg.norm(face - (40, 0), axis=1), 20)
        np.testing.assert_allclose(np.linalg.norm(hand[0] - hand[3]), 20 * 0.68)
        assert hand[0, 1] < 0 < hand[3, 1]


def test_frames_of_a_scene_do_not_depend_on_what_was_drawn_before() -> None:
    """Shapes and backdrop are kept between frames."""
    scenes = [Scene("dog", "rain", "photo", 0.5, seed, place=place) for seed, place in ((1, "arch"), (2, "open"))]
    fresh = []
    for scene in scenes:
        draw._shapes.cache_clear()
        draw._backdrop.cache_clear()
        fresh.append(np.asarray(draw.draw_scene(scene, 64, time_s=0.3, level=0.7)))
    for _ in range(2):
        for scene, frame in zip(scenes, fresh, strict=True):
            draw.draw_scene(scene, 32)
            draw.draw_scene(scene, 64, time_s=1.0)
            np.testing.assert_array_equal(draw.draw_scene(scene, 64, time_s=0.3, level=0.7), frame)
