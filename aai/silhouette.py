"""Which pixels of a picture are its object's: a coarse map of where it likely is, cut out along the picture's edges.

The latents of a diffusion model are coarser than shapes. So what is found there only says where to begin; a graph cut
over the picture's colours ends at the outline (GrabCut, Rother et al. 2004, doi 10.1145/1015706.1015720, of OpenCV).
"""

import numpy as np

SURELY_NOT = 0.4
"""Below this the map says that a pixel is none of the object's; at least a fifth of all pixels is not."""
EDGE_PX, ROUNDS = 256, 5
"""Longest edge at which is cut, and iterations of colour model and cut."""
FEWEST_PX = 16
"""Of either side, from which a colour model can be made."""
LOST, FLOODED = 0.1, 0.6
"""A cut below this share of where it began has lost the object, one above that share of the picture its outline."""


def silhouette(picture: np.ndarray, likely: np.ndarray, threshold: float) -> np.ndarray:
    """bool [H, W] of a picture uint8 [H, W, 3]: True where its object is.

    likely: float32 [h, w] in 0..1; threshold: from which on a place is taken for the object's at the beginning; at 0
    all is the object's. Where the colours tell nothing apart it stays with these places. Cut is at 256 px at most: a
    larger picture's outline is as exact as that. Needs no GPU; some 10 ms at 64 px, 200 ms from 256 px on.
    """
    import cv2

    if threshold <= 0:
        return np.ones(picture.shape[:2], bool)
    height, width = picture.shape[:2]
    shrink = min(1.0, EDGE_PX / max(height, width))
    size = max(1, round(width * shrink)), max(1, round(height * shrink))
    small = cv2.resize(np.ascontiguousarray(picture), size, interpolation=cv2.INTER_AREA)
    there = cv2.resize(np.ascontiguousarray(likely, np.float32), size, interpolation=cv2.INTER_CUBIC).clip(0, 1)
    begun = there > threshold
    found = begun
    marks = np.where(begun, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    marks[(there < min(SURELY_NOT, threshold)) | (there <= np.quantile(there, 0.2))] = cv2.GC_BGD
    sides = marks == cv2.GC_PR_FGD, marks != cv2.GC_PR_FGD
    if min(side.sum() for side in sides) >= FEWEST_PX:
        cv2.setRNGSeed(0)  # its colour models begin at random
        models = np.zeros((1, 65)), np.zeros((1, 65))
        cv2.grabCut(small, marks, None, *models, ROUNDS, cv2.GC_INIT_WITH_MASK)
        cut = (marks == cv2.GC_FGD) | (marks == cv2.GC_PR_FGD)
        found = cut if cut.sum() >= LOST * begun.sum() and cut.mean() <= FLOODED else begun
    whole = cv2.resize(found.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    return np.asarray(whole > 0.5)


def grown(mask: np.ndarray, share: float) -> np.ndarray:
    """float32 [H, W] of a mask bool [H, W]: 1 there, and a margin that fades to 0, of this share of the longer edge."""
    import cv2

    margin = round(share * max(mask.shape))
    kernel = np.ones((2 * margin + 1, 2 * margin + 1), np.uint8)
    wide = cv2.dilate(mask.astype(np.uint8), kernel)
    inwards = cv2.distanceTransform(cv2.copyMakeBorder(wide, 1, 1, 1, 1, cv2.BORDER_REPLICATE), cv2.DIST_L2, 3)
    fading = np.clip(inwards[1:-1, 1:-1] / max(1.0, margin / 3), 0, 1)
    return np.asarray(np.where(mask, 1, fading), np.float32)
