"""Grades against values worked out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from aai.grading import accuracy, clip_mmd, kept, similarity_rank, zero_shot

TRUTH = [
    {"object": "dog", "ambience": "rain", "medium": "photo"},
    {"object": "bell", "ambience": "night", "medium": "sketch"},
    {"object": "clock", "ambience": "night", "medium": "photo"},
    {"object": "dog", "ambience": "snow", "medium": "photo"},
]
READ = [
    {"object": "dog", "ambience": "rain", "medium": "photo"},
    {"object": "bell", "ambience": "rain", "medium": "sketch"},
    {"object": "clock", "ambience": "rain", "medium": "sketch"},
    {"object": "bell", "ambience": "snow", "medium": "photo"},
]


def test_accuracy_counts_rows_that_agree() -> None:
    assert accuracy(READ, TRUTH, "object") == 0.75
    assert accuracy(READ, TRUTH, "ambience") == 0.5
    with pytest.raises(ValueError, match="argument"):
        accuracy(READ, TRUTH[:3], "object")


def test_kept_needs_every_attribute() -> None:
    assert kept(READ, TRUTH, ["object"]) == 0.75
    assert kept(READ, TRUTH, ["object", "ambience"]) == 0.25
    assert kept(READ, TRUTH, ["object", "medium"]) == 0.5
    with pytest.raises(ValueError, match="argument"):
        kept(READ, TRUTH[:3], ["object"])


def test_similarity_rank_is_the_share_of_others_less_similar_than_the_own() -> None:
    own = torch.eye(2)
    query = torch.tensor([[0.8, 0.6], [0.6, 0.8]])
    others = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.8, 0.6], [0.0, -1.0]])
    # Row 0: 0.8 against 0.6, 0.8 (a tie is not less), 1.0, -0.6; row 1: 0.8 against 0.8, 0.6, 0.96, -0.8.
    assert similarity_rank(query, own, others) == pytest.approx((2 + 2) / 8)
    assert similarity_rank(own, own, torch.tensor([[0.6, 0.8], [0.8, 0.6], [-1.0, 0.0]])) == 1.0
    assert similarity_rank(own, -own, own) == 0.0


def test_zero_shot_is_the_share_of_right_nearest_classes() -> None:
    classes = torch.eye(3)
    images = F.normalize(torch.tensor([[3.0, 1, 1], [1.0, 3, 1], [1.0, 3, 1], [1.0, 1, 3]]), dim=-1)
    assert zero_shot(images, classes, [0, 1, 2, 2]) == 0.75
    assert zero_shot(images, classes, [1, 2, 0, 0]) == 0.0


def test_clip_mmd_by_hand() -> None:
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    # |a - b|^2 = 2 and sigma = 10: each kernel mean is 1, or exp(-2 / 200) across.
    assert clip_mmd(a, b) == pytest.approx(1000 * (2 - 2 * math.exp(-0.01)), rel=1e-4)
    assert clip_mmd(a, b, sigma=1.0) == pytest.approx(1000 * (2 - 2 * math.exp(-1)), rel=1e-4)
    two = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    within, across = (1 + math.exp(-2)) / 2, math.exp(-1)
    assert clip_mmd(two, b, sigma=1.0) == pytest.approx(1000 * (within + 1 - 2 * across), rel=1e-4)
    assert clip_mmd(two, two) == pytest.approx(0, abs=1e-3)
    many = two.repeat(1025, 1)  # more than are compared at a time
    assert clip_mmd(many, b, sigma=1.0) == pytest.approx(1000 * (within + 1 - 2 * across), rel=1e-4)
