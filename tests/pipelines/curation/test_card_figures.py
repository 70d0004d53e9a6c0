import pyarrow as pa

from pipelines.curation.card_data import NUMBERS, _Gathered
from pipelines.curation.card_figures import labels


def test_splits_without_end_are_summed_up() -> None:
    rows = _Gathered()
    names = [f"s{i}" for i in range(20)] + ["train"] * 30
    columns = {name: pa.array([1.0] * 50) for name in NUMBERS}
    columns |= {"labels": pa.array([["a", "b"]] * 50), "split": pa.array(names), "flags": pa.array([["F"]] * 50)}
    rows.add(pa.table(columns))
    found = labels(rows.rows(["x"]))
    assert len(found["splits"]) == 9
    assert sum(part["accepted"] for part in found["splits"].values()) == 50
    assert found["rows"][0]["splits"]["train"] == 30
    assert sum(found["rows"][1]["splits"].values()) == 50
