"""What a card tells of a manifest's further columns."""

from pathlib import Path

import pyarrow as pa
import pytest

from aai import storage
from pipelines.curation import card_columns
from pipelines.curation.card_columns import columns


@pytest.fixture
def out(tmp_path: Path) -> str:
    for folder, licences, scores in (
        ("accepted/0", ["CC0", "CC0", None], [1.0, 2.0, None]),
        ("accepted/1", ["CC-BY"], [4.0]),
        ("rejected/0", ["CC-BY", "?", None], [None, None, 8.0]),
    ):
        table = pa.table({"license": pa.array(licences, pa.string()), "score": pa.array(scores, pa.float64())})
        storage.write_table(f"{tmp_path}/{folder}.parquet", table)
    return str(tmp_path)


def test_values_are_counted_by_table(out: str) -> None:
    licence, score = columns(out, {"license": "text", "score": "number"})
    assert licence == {
        "column": "license", "kind": "text", "empty": {"accepted": 1, "rejected": 1},
        "distinct": 3, "is_complete": True,
        "values": [
            {"value": "CC0", "accepted": 2, "rejected": 0},
            {"value": "CC-BY", "accepted": 1, "rejected": 1},
            {"value": "?", "accepted": 0, "rejected": 1},
        ],
    }  # fmt: skip
    ends = [score[name] for name in ("low", "median", "high")]
    assert (ends, score["empty"]) == ([1.0, 3.0, 8.0], {"accepted": 1, "rejected": 2})
    assert columns(out, {}) == []


def test_ids_are_counted_and_not_listed(tmp_path: Path) -> None:
    for folder, first in (("accepted", 0), ("rejected", 10)):
        table = pa.table({"source_id": [f"v{first + i}" for i in range(9)]})
        storage.write_table(f"{tmp_path}/{folder}/0.parquet", table)
    (found,) = columns(str(tmp_path), {"source_id": "text"})
    assert (found["distinct"], found["values"]) == (18, [])


def test_a_column_of_ids_is_not_kept_in_memory(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card_columns, "MAX_DISTINCT", 1)
    monkeypatch.setattr(card_columns, "SHOWN", 1)
    (licence,) = columns(out, {"license": "text"})
    assert (licence["distinct"], licence["is_complete"]) == (2, False)
    assert len(licence["values"]) == 1
