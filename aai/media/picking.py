"""Which frames of a video to decode: chosen from the times and key frame marks of its packets, nothing decoded yet.

Packets come in the order of decoding; a frame may be shown before one that is decoded earlier.
"""

from fractions import Fraction

import numpy as np


def seconds(ticks: int, time_base: Fraction) -> float:
    """A time stamp in seconds; ten times as fast as the product of fractions, and as exact."""
    return ticks * time_base.numerator / time_base.denominator


def on_show(times_s: np.ndarray, targets_s: np.ndarray) -> np.ndarray:
    """For each target [K] the place in `times_s` [N] of the frame on show then; before the first one, the first."""
    order = np.argsort(times_s, kind="stable")
    return order[np.maximum(np.searchsorted(times_s[order], targets_s, "right") - 1, 0)]


def pick(
    times_s: np.ndarray, keys: np.ndarray, targets_s: np.ndarray, policy: str, max_time_error_s: float
) -> np.ndarray:
    """The packet for each target: int [K], places in `times_s`.

    times_s: float [N] when each packet's frame is shown (NaN: never); keys: bool [N]; targets_s: float [K].
    policy: `DecodeConfig.policy`. At least one packet must have a time.
    """
    shown = np.flatnonzero(~np.isnan(times_s))
    exact = shown[on_show(times_s[shown], targets_s)]
    marks = shown[keys[shown]]
    if policy == "exact" or not len(marks):
        return exact
    error_s = np.abs(times_s[marks, None] - targets_s)
    nearest = error_s.argmin(axis=0)
    if policy == "keyframe":
        return marks[nearest]
    return np.where(error_s.min(axis=0) <= max_time_error_s, marks[nearest], exact)


def spans(picked: np.ndarray, times_s: np.ndarray, keys: np.ndarray) -> list[tuple[int, int]]:
    """The ranges [first, last) of packets to decode so that the picked ones come out.

    Each begins at a key frame, and at the one before it for frames that are shown before their key frame: those
    of an open group of pictures refer to the group before it.
    """
    starts = np.flatnonzero(keys)
    parts = []
    for index in set(picked.tolist()):
        group = int(np.searchsorted(starts, index, "right")) - 1
        if group > 0 and not times_s[index] >= times_s[starts[group]]:
            group -= 1
        parts.append((int(starts[group]) if group >= 0 else 0, index + 1))
    merged: list[tuple[int, int]] = []
    for first, last in sorted(parts):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return merged
