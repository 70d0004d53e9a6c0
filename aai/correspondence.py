"""Do a clip's sound and pictures belong together? A threshold from what chance looks like, not from taste.

Sound and pictures of *different* clips, paired at random, form a null distribution of the similarity. The threshold is
where only a stated share of such false pairs would pass (its false-accept rate). Pairs of clips with the same label are
no false pairs and are left out.
"""

from collections.abc import Sequence

import numpy as np

SAMPLE = 2048
"""Clips that the null is made of, at most: four million pairs."""
MIN_CLIPS = 50


def sample(keys: Sequence[str], size: int = SAMPLE) -> np.ndarray:
    """Places [n] of an even sample of `keys` (hashes) that does not depend on their order."""
    return np.argsort(np.array(keys), kind="stable")[:size]


def shuffled_null(audio: np.ndarray, image: np.ndarray, labels: Sequence[str]) -> np.ndarray:
    """Similarities [M] of all false pairs of unit embeddings audio [N, D] and image [N, D].

    labels [N]: what is heard; two clips with the same, non-empty label are not a false pair.
    """
    names = np.array(labels)
    same = (names[:, None] == names) & (names != "")
    np.fill_diagonal(same, True)
    return np.asarray((audio.astype(np.float32) @ image.astype(np.float32).T)[~same])


def threshold(null: np.ndarray, false_accept_rate: float) -> float:
    """The similarity that a share of `false_accept_rate` of the false pairs reaches."""
    return float(np.quantile(null, 1 - false_accept_rate))
