import numpy as np
import pytest

from aai.media.picking import on_show, pick, spans

# Two groups in decoding order, the second one open: its first two frames are shown before its key frame.
TIMES_S = np.array([0.0, 0.3, 0.1, 0.2, 0.6, 0.4, 0.5, 0.7])
KEYS = np.array([True, False, False, False, True, False, False, False])


def test_on_show() -> None:
    assert on_show(TIMES_S, np.array([-1, 0, 0.1, 0.19, 0.45, 9])).tolist() == [0, 0, 2, 2, 5, 7]


@pytest.mark.parametrize(
    ("policy", "bound_s", "places"),
    [
        ("exact", 0.0, [0, 2, 5, 7]),
        ("keyframe", 0.0, [0, 0, 4, 4]),
        ("auto", 0.12, [0, 2, 5, 4]),
        ("auto", 0.0, [0, 2, 5, 7]),
    ],
)
def test_pick(policy: str, bound_s: float, places: list[int]) -> None:
    assert pick(TIMES_S, KEYS, np.array([0.0, 0.15, 0.45, 0.71]), policy, bound_s).tolist() == places


def test_frames_that_are_never_shown_are_not_picked() -> None:
    times_s = np.where(np.arange(8) == 2, np.nan, TIMES_S)
    assert pick(times_s, KEYS, np.array([0.15]), "exact", 0).tolist() == [0]
    assert pick(TIMES_S, np.zeros(8, bool), np.array([0.15]), "keyframe", 0).tolist() == [2]


@pytest.mark.parametrize(
    ("picked", "ranges"),
    [
        ([0], [(0, 1)]),
        ([4], [(4, 5)]),
        ([2, 7], [(0, 3), (4, 8)]),
        ([3, 4], [(0, 5)]),
        ([5], [(0, 6)]),  # refers to the group before
        ([4, 6], [(0, 7)]),
    ],
)
def test_spans(picked: list[int], ranges: list[tuple[int, int]]) -> None:
    assert spans(np.array(picked), TIMES_S, KEYS) == ranges
