"""Figures of keeping: what ignores the given picture stands at chance, what returns it is perfect."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from aai.keeping import as_pixels, colours, contours, given_nearer, outside_distance
from aai.toy.draw import draw_scene
from aai.toy.grammar import AMBIENCES, OBJECTS, Scene

RNG = np.random.default_rng(0)
GIVEN = RNG.random((12, 64, 64, 3)).astype(np.float32)
ROWS, KEPT = list(range(12)), ["night" if i % 2 else "rain" for i in range(12)]


def test_the_given_picture_itself_is_always_nearer() -> None:
    assert given_nearer(GIVEN, GIVEN, ROWS, KEPT) == 1
    faint = 0.8 * GIVEN + 0.2 * RNG.random(GIVEN.shape).astype(np.float32)
    assert given_nearer(faint, GIVEN, ROWS, KEPT) == 1


def test_pictures_of_the_right_labels_alone_are_at_chance() -> None:
    kinds = RNG.random((2, 64, 64, 3)).astype(np.float32)
    given = np.concatenate([kinds[i % 2][None] + 0.1 * RNG.standard_normal((1, 64, 64, 3)) for i in range(60)])
    painted = np.concatenate([kinds[i % 2][None] + 0.1 * RNG.standard_normal((1, 64, 64, 3)) for i in range(60)])
    found = given_nearer(painted, given, list(range(60)), [i % 2 for i in range(60)])
    assert found == pytest.approx(0.5, abs=0.12)
    assert given_nearer(painted, given, list(range(60)), [0] * 60) > 0.7  # labels that differ would make it easy


def test_only_other_pictures_of_the_same_labels_count() -> None:
    assert given_nearer(GIVEN, GIVEN, ROWS, ROWS) is None
    assert given_nearer(GIVEN, GIVEN, [0] * 12, KEPT) is None
    swapped = GIVEN[[1, 0, *range(2, 12)]]  # two results change places, of different labels
    assert given_nearer(swapped, GIVEN, ROWS, KEPT) == pytest.approx(1, abs=0.12)
    same = np.zeros_like(GIVEN)
    assert given_nearer(same, same, ROWS, KEPT) == 0.5


def test_others_that_have_what_is_wanted_already_do_not_count() -> None:
    given = GIVEN[:3]
    painted = given[[1, 1, 1]]  # the first was to become like the second, and did
    rows, kept = [0, 1, 2], ["photo"] * 3
    changed, wanted = ["rain", "night", "rain"], ["night", "snow", "night"]
    assert given_nearer(painted[:1], given, rows, kept) == 0.5  # farther from its own than from the second
    assert given_nearer(painted[:1], given, rows, kept, changed, wanted) == float(
        np.abs(as_pooled(given[0]) - as_pooled(given[1])).mean()
        < np.abs(as_pooled(given[2]) - as_pooled(given[1])).mean()
    )


def as_pooled(pixels: np.ndarray) -> np.ndarray:
    return pixels.reshape(16, 4, 16, 4, 3).mean((1, 3))


def test_a_perfect_stylization_is_nearer_to_its_own_picture_by_contours_not_by_colours() -> None:
    """The same scenes drawn in another ambience; beside them other scenes of the same labels in that ambience."""
    rng = np.random.default_rng(1)
    scenes = [Scene(OBJECTS[i % 2], AMBIENCES[i % 4], "photo", rng.random(), i, rng.random(), rng.random())
              for i in range(60)]  # fmt: skip
    wanted = [AMBIENCES[(i % 4 + 1 + i % 3) % 4] for i in range(60)]
    styled = [replace(scene, ambience=name) for scene, name in zip(scenes, wanted, strict=True)]
    others = [replace(scene, seed=100 + scene.seed, size=rng.random(), rate=rng.random()) for scene in styled]
    given, perfect, noise = (np.stack([as_pixels(draw_scene(one)) for one in kind])
                             for kind in (scenes, styled, others))  # fmt: skip
    labels = list(range(60)), [scene.obj for scene in scenes], [scene.ambience for scene in scenes], wanted
    assert given_nearer(perfect, given, *labels, by=contours) > 0.9  # type: ignore[operator]
    assert given_nearer(noise, given, *labels, by=contours) == pytest.approx(0.5, abs=0.1)
    assert given_nearer(perfect, given, *labels, by=colours) < 0.8  # type: ignore[operator]
    assert given_nearer(given, given, *labels, by=contours) == 1


def test_contours_do_not_see_colours_and_bear_flat_pictures() -> None:
    image = np.zeros((2, 64, 64, 3), np.float32)
    image[0, 16:48, 16:48] = (0.8, 0.1, 0.3)
    image[1, 16:48, 16:48] = (0.1, 0.3, 0.8)
    found = contours(image)
    assert found.shape == (2, 256)
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)
    np.testing.assert_allclose(found.mean(1), 1, atol=1e-5)
    assert (found[0].reshape(16, 16)[6:10, 6:10] == 0).all()
    np.testing.assert_allclose(contours(0.5 * image + 0.2), found, atol=1e-4)
    np.testing.assert_allclose(contours(image.swapaxes(1, 2)), found, atol=1e-5)
    level = np.zeros((1, 64, 64, 3), np.float32)
    level[:, 34:] = 1  # an edge from left to right
    lines = contours(level).reshape(16, 16)
    assert (lines[8] == 16).all()
    assert (np.delete(lines, 8, axis=0) == 0).all()
    assert (contours(np.full((1, 64, 64, 3), 0.4, np.float32)) == 0).all()


def test_distance_outside_the_region() -> None:
    painted, region = GIVEN.copy(), "25 50 75 100"
    painted[:, 32:, 16:48] = 0
    assert outside_distance(painted, GIVEN, [region] * 12) == 0
    painted[:, :32] += 0.3
    assert outside_distance(painted, GIVEN, [region] * 12) == pytest.approx(0.3 * 2 / 3, abs=1e-5)
    assert outside_distance(painted, GIVEN, ["0 0 100 100"] * 12) is None
    assert outside_distance(painted, GIVEN, ["0 0 100 100"] * 11 + [region]) == pytest.approx(0.2, abs=1e-5)


def test_pictures_of_any_size_are_held_against_each_other() -> None:
    image = Image.new("L", (200, 100), 255)
    assert as_pixels(image).shape == (64, 64, 3)
    assert as_pixels(image).max() == 1
