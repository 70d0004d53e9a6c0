"""Figures of a data card from columns made by hand: what is counted, moved and compared."""

import pyarrow as pa

from pipelines.curation.card_data import NUMBERS, Gathered, Rows
from pipelines.curation.card_figures import Rule, borderline, correspondence, labels, moves, rules


def test_splits_without_end_are_summed_up() -> None:
    rows = Gathered()
    names = [f"s{i}" for i in range(20)] + ["train"] * 30
    columns = {name: pa.array([1.0] * 50) for name in NUMBERS}
    columns |= {"labels": pa.array([["a", "b"]] * 50), "split": pa.array(names), "flags": pa.array([["F"]] * 50)}
    columns["clip_id"] = pa.array(["c"] * 50)
    rows.add(pa.table(columns))
    found = labels(rows.rows({"x": 1}))
    assert len(found["splits"]) == 9
    assert sum(part["accepted"] for part in found["splits"].values()) == 50
    assert found["rows"][0]["splits"]["train"] == 30
    assert sum(found["rows"][1]["splits"].values()) == 50


SMALL = {name: pa.float64() for name in NUMBERS} | {
    "clip_id": pa.string(),
    "labels": pa.list_(pa.string()),
    "split": pa.string(),
}
TAKEN = pa.schema(SMALL | {"flags": pa.list_(pa.string())})
TEXTS = dict.fromkeys(("stage", "code", "message"), pa.string())
DROPPED = pa.schema(SMALL | TEXTS | {"transient": pa.bool_()})


def rows_of(rms_db: list[float], num_dropped: int) -> Rows:
    """Accepted clips of these levels, all else alike; and silent ones at -70 dB."""
    same = dict.fromkeys(NUMBERS, 1.0) | {"clip_id": "c", "labels": ["a"], "split": "t", "flags": []}
    same |= {"stage": "filter", "code": "SILENT", "message": "low", "transient": False}
    rows = Gathered()
    rows.add(pa.Table.from_pylist([same | {"rms_db": level} for level in rms_db], TAKEN))
    rows.add(pa.Table.from_pylist([same | {"rms_db": -70.0}] * num_dropped, DROPPED))
    return rows.rows({"x": 1, "y": 1})


QUIET = Rule("SILENT", "rms_db", "silent_rms_db", "dBFS", +1, -60.0)


def test_a_moved_threshold_gains_and_loses_what_lies_between() -> None:
    rows = rows_of([-58.0, -40.0, -20.0], 2)
    move = moves(rows, [QUIET])["silent_rms_db"]
    tried = {t["limit"]: (t["gained"], t["lost"]) for t in move["tried"]}
    assert tried == {-80: (2, 0), -70: (2, 0), -65: (0, 0), -55: (0, 1), -50: (0, 1), -40: (0, 1)}
    assert move["quiet"] == [-70.0, -58.0]
    assert borderline(rows, QUIET, 1) == ([3], [0])
    assert borderline(rows, QUIET, 9) == ([3, 4], [0, 1, 2])
    loudest = Rule("SILENT", "rms_db", "loudest", "dBFS", -1, -75.0)  # at most
    assert moves(rows_of([-90.0, -80.0], 1), [loudest])["loudest"]["quiet"] == [-80.0, -70.0]


def test_what_was_not_measured_fails_but_a_similarity_nobody_asked_for_passes() -> None:
    rows = rows_of([-58.0, float("nan")], 0)
    assert QUIET.passes(rows).tolist() == [True, False]
    rows.values["av_similarity"][:] = [0.2, float("nan")]
    alike = Rule("WRONG_AUDIO", "av_similarity", "correspondence.threshold", "", +1, 0.3)
    assert alike.passes(rows).tolist() == [False, True]
    assert alike.passes(rows, 0.2).tolist() == [True, True]


def test_rules_are_those_in_force() -> None:
    assert rules({"silent_rms_db": None}, {}) == []
    found = rules({"silent_rms_db": -60}, {"correspondence": {"threshold": 0.1}})
    assert [(rule.code, rule.limit, rule.sign) for rule in found] == [("SILENT", -60, 1), ("WRONG_AUDIO", 0.1, 1)]


def test_true_pairs_and_shuffled_ones_stand_on_common_edges() -> None:
    assert correspondence({}) is None
    assert correspondence({"correspondence": {"null": [], "matched": [1]}}) is None
    found = correspondence({"correspondence": {"null": [0.0, 0.1], "matched": [0.1, 1.0]}})
    assert found is not None
    assert (found["edges"][0], found["edges"][-1], len(found["edges"])) == (0, 1, 41)
    assert (found["null"][0], found["null"][4], found["matched"][4], found["matched"][-1]) == (1, 1, 1, 1)
