"""Figures of keeping: what ignores the given picture stands at chance, what returns it is perfect."""

import numpy as np
import pytest
from PIL import Image

from aai.keeping import as_pixels, given_nearer, outside_distance

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


def test_distance_outside_the_region() -> None:
    painted, region = GIVEN.copy(), "25 50 75 100"
    painted[:, 32:, 16:48] = 0
    assert outside_distance(painted, GIVEN, [region] * 12) == 0
    painted[:, :32] += 0.3
    assert outside_distance(painted, GIVEN, [region] * 12) == pytest.approx(0.3 * 2 / 3, abs=1e-5)
    assert np.isnan(outside_distance(painted, GIVEN, ["0 0 100 100"] * 12))
    assert outside_distance(painted, GIVEN, ["0 0 100 100"] * 11 + [region]) == pytest.approx(0.2, abs=1e-5)


def test_pictures_of_any_size_are_held_against_each_other() -> None:
    image = Image.new("L", (200, 100), 255)
    assert as_pixels(image).shape == (64, 64, 3)
    assert as_pixels(image).max() == 1
