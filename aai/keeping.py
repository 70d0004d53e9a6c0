"""Whether a changed picture is still the given one: figures that its labels alone cannot reach.

A picture painted from nothing but the right labels is no nearer to the given picture than to another one that has these
labels too: it stands at chance in `given_nearer`, which an edit must beat.

What another ambience leaves of a picture is its contours, hardly a colour: a stylization is held against the given
picture by these. By colours a perfect one (the same scene of the toy world, drawn in the other ambience) is nearer to
its own picture in 0.69 only, and who changes too little would win.
"""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

EDGE_PX, POOLED = 64, 4
"""Edge at which pictures are compared, and of the squares whose mean colours are held against one another."""


def as_pixels(image: Image.Image) -> np.ndarray:
    """float32 [64, 64, 3] in 0..1."""
    small = image.convert("RGB").resize((EDGE_PX, EDGE_PX), Image.Resampling.BICUBIC)
    return np.asarray(small, np.float32) / 255


def _pooled(values: np.ndarray) -> np.ndarray:
    """Means over squares of values [N, 64, 64, C] -> [N, 16 x 16 x C]."""
    count, squares = len(values), EDGE_PX // POOLED
    return values.reshape(count, squares, POOLED, squares, POOLED, -1).mean((2, 4)).reshape(count, -1)


def colours(pixels: np.ndarray) -> np.ndarray:
    """Mean colours of the squares of pictures [N, 64, 64, 3] -> [N, 16 x 16 x 3]."""
    return _pooled(pixels)


def contours(pixels: np.ndarray) -> np.ndarray:
    """How much of the change in brightness of pictures [N, 64, 64, 3] is in each square -> [N, 16 x 16], mean 1."""
    down, across = np.gradient(pixels.mean(-1), axis=(1, 2))
    found = _pooled((np.abs(down) + np.abs(across))[..., None])
    return found / np.maximum(found.mean(1, keepdims=True), 1e-6)


def given_nearer(
    painted: np.ndarray,
    given: np.ndarray,
    rows: Sequence[int],
    kept: Sequence[object],
    changed: Sequence[object] = (),
    wanted: Sequence[object] = (),
    by: Callable[[np.ndarray], np.ndarray] = colours,
) -> float | None:
    """Mean share of other given pictures with the same kept labels that a painted one is farther from than its own.

    painted, given: [N, 64, 64, 3]; rows: which clip each given picture is of; kept: its labels that must stay;
    changed: its label that must not, wanted: what that becomes. Others that have the wanted label already are left out:
    the own picture never has it, and would be farther for that alone. by: `colours` or `contours`, whose mean
    difference is the distance. Chance is 0.5, a tie counts half. None when no picture has another one to be held
    against.
    """
    ours, theirs = by(painted), by(given)
    shares = []
    for i, own in enumerate(ours):
        others = [j for j in range(len(rows)) if rows[j] != rows[i] and kept[j] == kept[i]]
        others = [j for j in others if not wanted or changed[j] != wanted[i]]
        if not others:
            continue
        distance = np.abs(theirs[[i, *others]] - own).mean(1)
        shares.append(float((distance[1:] > distance[0]).mean() + 0.5 * (distance[1:] == distance[0]).mean()))
    return float(np.mean(shares)) if shares else None


def outside_distance(painted: np.ndarray, given: np.ndarray, regions: Sequence[str]) -> float | None:
    """Mean L1 of the pixels, in 0..1, outside the region of each given picture's object.

    painted, given: [N, 64, 64, 3]; regions: "left top right bottom" in percent of the edge. Pictures whose region is
    nearly all of them are left out; None where no other is.
    """
    distances = []
    for ours, theirs, region in zip(painted, given, regions, strict=True):
        left, top, right, bottom = (round(int(part) * EDGE_PX / 100) for part in region.split())
        outside = np.ones((EDGE_PX, EDGE_PX), bool)
        outside[top:bottom, left:right] = False
        if outside.mean() > 0.05:
            distances.append(float(np.abs(ours - theirs)[outside].mean()))
    return float(np.mean(distances)) if distances else None
