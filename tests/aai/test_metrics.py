import numpy as np
import pytest

from aai.metrics import bootstrap_ci, first_hit_ranks, retrieval, spearman


def unit(rows: int, dim: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_perfect_and_random_retrieval() -> None:
    x = unit(200, 16)
    perfect = retrieval(x, x)
    assert perfect["r1"] == 1.0
    assert perfect["median_rank"] == 1
    assert perfect["chance"] == pytest.approx(1 / 200)
    assert perfect["gallery"] == perfect["queries"] == 200
    assert perfect["ci95"] == [1.0, 1.0]
    random = retrieval(unit(200, 16, 1), x)
    assert random["r1"] < 0.05
    assert 60 < random["median_rank"] < 140
    assert random["ci95"][0] <= random["r1"] <= random["ci95"][1]


def test_ranks_by_hand() -> None:
    gallery = np.eye(3, dtype=np.float32)
    queries = np.array([[0.9, 0.3, 0.1], [0.9, 0.3, 0.1], [0.9, 0.3, 0.1]], np.float32)
    keys = np.arange(3)
    assert first_hit_ranks(queries, gallery, keys, keys).tolist() == [1, 2, 3]
    labels = np.array([7, 8, 8])
    assert first_hit_ranks(queries, gallery, labels, labels).tolist() == [1, 2, 2]


def test_collapsed_embeddings_gain_nothing() -> None:
    same = np.tile(unit(1, 8), (50, 1))
    found = retrieval(same, same)
    assert found["r1"] == found["r10"] == 0.0
    assert found["median_rank"] == 50


def test_chance_counts_all_matches() -> None:
    x, keys = unit(12, 4), np.repeat(np.arange(3), 4)
    assert retrieval(x, x, keys, keys)["chance"] == pytest.approx(1 / 3)


def test_chunks_change_nothing_and_orphans_are_an_error() -> None:
    a, b, keys = unit(70, 8, 1), unit(70, 8, 2), np.arange(70)
    whole = first_hit_ranks(a, b, keys, keys)
    assert (first_hit_ranks(a, b, keys, keys, chunk=7) == whole).all()
    with pytest.raises(ValueError, match="no match"):
        first_hit_ranks(a, b, keys + 1, keys)


def test_bootstrap_interval_covers_the_mean() -> None:
    hits = np.random.default_rng(0).random(400) < 0.3
    low, high = bootstrap_ci(hits)
    assert low < hits.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.3 * 0.7 / 400), rel=0.15)


def test_spearman() -> None:
    x = np.arange(10.0)
    assert spearman(x, np.exp(x)) == pytest.approx(1)
    assert spearman(x, -x) == pytest.approx(-1)
    with pytest.raises(ValueError, match="not all equal"):
        spearman(x, np.ones(10))
