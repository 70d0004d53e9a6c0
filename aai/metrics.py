"""Figures of merit: retrieval with confidence intervals, and rank correlation."""

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

TIE = 1e-6
"""Similarities closer than this count as equal."""


def first_hit_ranks(
    queries: np.ndarray,
    gallery: np.ndarray,
    query_keys: np.ndarray,
    gallery_keys: np.ndarray,
    chunk: int = 64,
) -> np.ndarray:
    """Rank (1 = best) of each query's most similar match in the gallery; int [N].

    queries [N, D] and gallery [M, D] of unit norm; an item matches a query when their keys are equal. A tie with a
    wrong item counts against the query, so that collapsed or duplicated embeddings gain nothing. Raises ValueError
    for a query without a match. Memory: chunk x M.
    """
    queries, gallery = np.asarray(queries, np.float32), np.asarray(gallery, np.float32)
    query_keys, gallery_keys = np.asarray(query_keys), np.asarray(gallery_keys)
    ranks = np.empty(len(queries), np.int64)
    for start in range(0, len(queries), chunk):
        part = slice(start, start + chunk)
        similarity = queries[part] @ gallery.T
        match = query_keys[part, None] == gallery_keys[None, :]
        if not match.any(axis=1).all():
            raise ValueError("a query has no match in the gallery")
        best = np.where(match, similarity, -np.inf).max(axis=1, keepdims=True)
        ranks[part] = 1 + ((similarity >= best - TIE) & ~match).sum(axis=1)
    return ranks


def nearest(queries: np.ndarray, gallery: np.ndarray, chunk: int = 64) -> np.ndarray:
    """Place int [N] of the gallery item [M, D] most similar to each query [N, D]. Memory: chunk x M."""
    parts = [(queries[start : start + chunk] @ gallery.T).argmax(1) for start in range(0, len(queries), chunk)]
    return np.concatenate([np.empty(0, np.int64), *parts])


def retrieval(
    queries: np.ndarray,
    gallery: np.ndarray,
    query_keys: np.ndarray | None = None,
    gallery_keys: np.ndarray | None = None,
    ks: tuple[int, ...] = (1, 5, 10),
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Recall@k, median rank, 95 % interval of recall@1, chance and gallery size.

    queries [N, D], gallery [M, D] of unit norm. Without keys, query i matches gallery item i alone. `chance` is what a
    random ranking reaches at recall@1. draws: of the bootstrap, 0 leaves `ci95` out. See `first_hit_ranks` for ties
    and errors.
    """
    query_keys = np.arange(len(queries)) if query_keys is None else np.asarray(query_keys)
    gallery_keys = np.arange(len(gallery)) if gallery_keys is None else np.asarray(gallery_keys)
    ranks = first_hit_ranks(queries, gallery, query_keys, gallery_keys)
    keys, counts = np.unique(gallery_keys, return_counts=True)
    matches = counts[np.searchsorted(keys, query_keys)]
    interval = {"ci95": list(bootstrap_ci(ranks <= 1, draws, seed))} if draws else {}
    return {
        **{f"r{k}": float((ranks <= k).mean()) for k in ks},
        "median_rank": float(np.median(ranks)),
        **interval,
        "chance": float((matches / len(gallery)).mean()),
        "gallery": len(gallery),
        "queries": len(queries),
    }


def label_oracle(labels: Sequence[Hashable], ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """Recall@k of one who knows each item's label and nothing else: expected, since it draws among equal labels."""
    counts = Counter(labels)
    equal = np.array([counts[label] for label in labels])
    return {f"r{k}": float((np.minimum(k, equal) / equal).mean()) for k in ks}


def own_above_same_label(queries: np.ndarray, gallery: np.ndarray, labels: np.ndarray, chunk: int = 64) -> float | None:
    """Mean share of the other gallery items of a query's label that are less similar to it than its own item.

    Query i belongs to item i; [N, D] of unit norm, labels [N]. Chance is 0.5; a tie counts against the query. None when
    no label occurs twice.
    """
    shares: list[float] = []
    for start in range(0, len(queries), chunk):
        rows = np.arange(start, min(start + chunk, len(queries)))
        similarity = queries[rows] @ gallery.T
        same = labels[rows, None] == labels[None, :]
        same[np.arange(len(rows)), rows] = False
        below = (similarity < similarity[np.arange(len(rows)), rows][:, None] - TIE) & same
        some = same.any(axis=1)
        shares += (below.sum(axis=1)[some] / same.sum(axis=1)[some]).tolist()
    return float(np.mean(shares)) if shares else None


def bootstrap_ci(values: np.ndarray, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean (Efron 1979) of values [N]."""
    values = np.asarray(values, np.float64)
    if len(values) == 0:
        raise ValueError("no values")
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(draws)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def paired_difference(ours: np.ndarray, theirs: np.ndarray, draws: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Mean difference of two series [N] over the same items, with the 95 % interval of a paired bootstrap.

    Raises ValueError for series of different lengths, or none.
    """
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        raise ValueError(f"{len(ours)} items cannot be paired with {len(theirs)}")
    difference = ours - theirs
    interval = bootstrap_ci(difference, draws, seed)
    return {
        "difference": float(difference.mean()),
        "ci95": list(interval),
        "pairs": len(difference),
    }


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of two series [N]. Raises ValueError when one is constant or too short."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        raise ValueError("rank correlation needs three values or more that are not all equal")
    from scipy.stats import spearmanr  # only here: a training's processes start sooner without it

    return float(spearmanr(a, b).statistic)
