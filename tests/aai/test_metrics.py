import numpy as np
import pytest

from aai import metrics
from aai.metrics import bootstrap_ci, first_hit_ranks, nearest, paired_difference, retrieval, spearman


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


def test_shares_of_ranks_by_hand() -> None:
    """Ranks 1, 2 and 3 in a gallery of three; 1, 2, 2 when the last two are alike."""
    gallery = np.eye(3, dtype=np.float32)
    queries = np.array([[0.9, 0.3, 0.1]] * 3, np.float32)
    found = retrieval(queries, gallery, ks=(1, 2, 3), draws=0)
    assert found == {
        "r1": pytest.approx(1 / 3),
        "r2": pytest.approx(2 / 3),
        "r3": 1.0,
        "median_rank": 2.0,
        "chance": pytest.approx(1 / 3),
        "gallery": 3,
        "queries": 3,
    }
    labels = np.array([7, 8, 8])
    found = retrieval(queries, gallery, labels, labels)
    assert {"r1", "r5", "r10", "ci95"} <= found.keys()
    assert found["chance"] == pytest.approx((1 + 2 + 2) / 9)
    more = np.concatenate([gallery, -gallery])
    wide = retrieval(queries[:1], more, np.array([0]), np.array([0, 1, 2, 0, 1, 2]), draws=0)
    assert (wide["chance"], wide["gallery"], wide["queries"]) == (pytest.approx(2 / 6), 6, 1)


def test_a_tie_within_rounding_counts_against_the_query() -> None:
    query, keys = np.array([[1.0, 0.0]], np.float32), np.array([0, 1])

    def rank(other: float) -> int:
        gallery = np.array([[0.5, 0.0], [other, 0.0]], np.float32)
        return int(first_hit_ranks(query, gallery, keys[:1], keys)[0])

    assert rank(0.5) == rank(0.5 - 5e-7) == rank(0.6) == 2
    assert rank(0.5 - 5e-6) == 1


def test_the_bootstrap_of_retrieval_is_seeded() -> None:
    a, b = unit(30, 4, 1), unit(30, 4, 1) + 0.5 * unit(30, 4, 2)
    b /= np.linalg.norm(b, axis=1, keepdims=True)
    found = retrieval(a, b, draws=200)
    hits = first_hit_ranks(a, b, np.arange(30), np.arange(30)) <= 1
    assert 0 < hits.mean() < 1
    assert found["ci95"] == list(bootstrap_ci(hits, 200, 0))
    assert found["ci95"] != retrieval(a, b, draws=200, seed=1)["ci95"]


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


def test_nearest_by_hand_and_in_chunks() -> None:
    gallery = np.eye(3, dtype=np.float32)
    queries = np.array([[0.1, 0.9, 0.3], [0.9, 0.1, 0.3], [0.1, 0.2, 0.3]], np.float32)
    for chunk in (1, 2, 3, 1024):
        assert nearest(queries, gallery, chunk).tolist() == [1, 0, 2]
    assert nearest(queries[:0], gallery).shape == (0,)


def test_bootstrap_interval_covers_the_mean() -> None:
    hits = np.random.default_rng(0).random(400) < 0.3
    low, high = bootstrap_ci(hits)
    assert low < hits.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.3 * 0.7 / 400), rel=0.15)
    rng = np.random.default_rng(3)
    means = [hits[rng.integers(400, size=400)].mean() for _ in range(50)]
    assert bootstrap_ci(hits, 50, 3) == (np.percentile(means, 2.5), np.percentile(means, 97.5))
    values = np.random.default_rng(1).standard_normal(50)
    assert bootstrap_ci(values) == bootstrap_ci(values, 1000, 0)
    assert bootstrap_ci(np.ones(1)) == (1.0, 1.0)
    with pytest.raises(ValueError, match="no values"):
        bootstrap_ci(np.zeros(0))


def test_spearman() -> None:
    x = np.arange(10.0)
    assert spearman(x, np.exp(x)) == pytest.approx(1)
    assert spearman(x, -x) == pytest.approx(-1)
    assert spearman(np.array([1, 2, 3]), np.array([1, 3, 2])) == pytest.approx(0.5)
    for a, b in ((x, np.ones(10)), (np.ones(10), x), (x[:2], x[:2])):
        with pytest.raises(ValueError, match="three values or more that are not all equal"):
            spearman(a, b)


def test_an_oracle_draws_among_equal_labels() -> None:
    found = metrics.label_oracle(["a", "a", "a", "b"], ks=(1, 2, 5))
    assert found == pytest.approx({"r1": (3 / 3 + 1) / 4, "r2": (3 * 2 / 3 + 1) / 4, "r5": 1.0})
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 200)
    ranks = []
    for i in range(200):  # drawn for once, in place of the expectation
        same = rng.permutation(np.flatnonzero(labels == labels[i]))
        ranks.append(int(np.flatnonzero(same == i)[0]) + 1)
    drawn = np.mean(np.array(ranks) <= 5)
    assert metrics.label_oracle(labels.tolist())["r5"] == pytest.approx(drawn, abs=0.1)


def test_own_above_those_of_the_same_label() -> None:
    gallery = np.eye(4, dtype=np.float32)
    queries = np.array([[1, 0.5, 0, 0], [0.9, 0.1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], np.float32)
    labels = np.array(["a", "a", "b", "c"])
    assert metrics.own_above_same_label(queries, gallery, labels) == 0.5  # the second is nearer to the first
    assert metrics.own_above_same_label(queries, gallery, labels, chunk=1) == 0.5
    assert metrics.own_above_same_label(np.ones((4, 4), np.float32), np.ones((4, 4), np.float32), labels) == 0.0
    assert metrics.own_above_same_label(queries, gallery, np.arange(4)) is None


def test_a_paired_difference_is_narrower_than_two_intervals() -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(400)  # what both find easy or hard
    ours, theirs = hard < 0.65, hard < 0.6
    found = paired_difference(ours, theirs)
    assert found["difference"] == pytest.approx(ours.mean() - theirs.mean())
    assert found["pairs"] == 400
    assert 0 < found["ci95"][0] < found["difference"] < found["ci95"][1]
    alone = bootstrap_ci(ours)
    assert found["ci95"][1] - found["ci95"][0] < 0.6 * (alone[1] - alone[0])
    assert paired_difference(ours, ours)["ci95"] == [0, 0]
    with pytest.raises(ValueError, match="400 items cannot be paired with 399"):
        paired_difference(ours, theirs[1:])
