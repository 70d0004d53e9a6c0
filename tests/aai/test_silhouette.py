"""The silhouette of an object, from a coarse map: it ends at the outline, and bears what tells nothing apart."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from aai.silhouette import EDGE_PX, grown, silhouette


def scene(edge_px: int = 64) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A red disc on a noisy green ground, where it is, and a map of 8 x 8 that says where to look."""
    rng = np.random.default_rng(0)
    image = Image.new("RGB", (edge_px, edge_px), (40, 160, 60))
    box = [int(edge_px * part) for part in (0.3, 0.35, 0.7, 0.75)]
    ImageDraw.Draw(image).ellipse(box, fill=(210, 40, 30))
    truth = np.asarray(image)[..., 0] > 100
    noisy = np.clip(np.asarray(image, int) + rng.normal(0, 8, (edge_px, edge_px, 3)), 0, 255).astype(np.uint8)
    coarse = np.full((8, 8), 0.1, np.float32)
    coarse[2:7, 2:6] = 0.5
    coarse[3:5, 3:5] = 1.0
    return noisy, truth, coarse


def overlap(found: np.ndarray, truth: np.ndarray) -> float:
    return float((found & truth).sum() / (found | truth).sum())


@pytest.mark.parametrize("edge_px", [64, 100, EDGE_PX, 2 * EDGE_PX])
def test_it_ends_at_the_outline(edge_px: int) -> None:
    picture, truth, coarse = scene(edge_px)
    found = silhouette(picture, coarse, 0.7)
    assert found.shape == truth.shape
    assert found.dtype == bool
    assert overlap(found, truth) > 0.93
    begun = np.asarray(Image.fromarray(coarse > 0.7).resize((edge_px, edge_px)))
    assert overlap(begun, truth) < 0.6, "the map alone is far from it"
    assert np.array_equal(found, silhouette(picture, coarse, 0.7)), "one picture, one silhouette"


def test_of_two_things_of_one_colour_that_is_cut_out_where_the_map_points() -> None:
    picture, truth, coarse = scene()
    picture[2:14, 2:14] = (210, 40, 30)
    assert overlap(silhouette(picture, coarse, 0.7), truth) > 0.93
    assert not silhouette(picture, coarse, 0.7)[:14, :14].any()


def test_where_colours_tell_nothing_the_map_stands() -> None:
    flat = np.full((64, 64, 3), 90, np.uint8)
    _, _, coarse = scene()
    found = silhouette(flat, coarse, 0.7)
    assert 0.02 < found.mean() < 0.3
    assert found[24:48, 24:40].mean() > 0.5
    assert silhouette(flat, np.ones((8, 8), np.float32), 0.7).all()
    assert not silhouette(flat, np.zeros((8, 8), np.float32), 0.7).any()
    assert silhouette(scene()[0], coarse, 0.0).all(), "asked for everything"
    one = np.zeros((8, 8), np.float32)
    one[0, 0] = 0.72  # fewer pixels than a colour model can be made of
    assert silhouette(flat, one, 0.7).sum() < 64


@pytest.mark.parametrize("kind", ["flat", "noise", "gradient"])
def test_a_cut_that_floods_the_picture_is_none(kind: str) -> None:
    """Where no place is surely not the object's: all of a picture without contours would be taken for it."""
    picture = np.full((64, 64, 3), 200, np.uint8)
    if kind == "noise":
        picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    elif kind == "gradient":
        picture = np.repeat(np.arange(0, 256, 4, np.uint8)[:, None, None], 64, 1) * np.ones(3, np.uint8)
    for seed in range(5):
        likely = np.random.default_rng(seed).uniform(0.43, 1, (8, 8)).astype(np.float32)
        found = silhouette(picture, likely, 0.7)
        assert 0.02 < found.mean() < 0.75, seed  # where the map begins, at most


@pytest.mark.parametrize("share", [0.1, 0.5, 0.85, 0.95])
def test_a_map_that_is_nearly_the_same_everywhere_is_no_error(share: float) -> None:
    """With no pixel left for one of its sides the graph cut would raise."""
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    for low, high in ((0.5, 1.0), (0.0, 0.72), (0.71, 1.0)):
        likely = np.full(64, low, np.float32)
        likely[: int(64 * share)] = high
        found = silhouette(picture, likely.reshape(8, 8), 0.7)
        assert found.shape == (64, 64)
        assert found.any()


def test_a_wide_picture_keeps_its_shape() -> None:
    picture, truth, coarse = scene()
    wide = np.asarray(Image.fromarray(picture).resize((160, 64)))
    found = silhouette(wide, coarse, 0.7)
    assert found.shape == (64, 160)
    assert overlap(found, np.asarray(Image.fromarray(truth).resize((160, 64)))) > 0.9


def test_a_margin_is_a_share_of_the_edge_and_fades() -> None:
    mask = np.zeros((40, 80), bool)
    mask[20, 40] = True
    found = grown(mask, 0.1)
    assert found.shape == mask.shape
    assert np.argwhere(found).min(0).tolist() == [12, 32]
    assert np.argwhere(found).max(0).tolist() == [28, 48]
    assert found[20, 40:50].tolist() == pytest.approx([1, 1, 1, 1, 1, 1, 1, 0.75, 0.375, 0], abs=0.05)
    assert np.array_equal(grown(mask, 0.0), mask)
    assert (grown(np.ones((8, 8), bool), 0.5) == 1).all(), "it does not fade towards the picture's edge"
    assert not grown(np.zeros((8, 8), bool), 0.1).any()
