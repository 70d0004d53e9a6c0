"""What the driver knows of the tables is what stands in them."""

from pathlib import Path

import numpy as np
import pytest

from aai import storage
from pipelines import curate
from pipelines.curation.card_data import Rows, read_rows
from pipelines.curation.outcome import JudgedTables
from tests import scale
from tests.pipelines.conftest import run_shards_here


@pytest.fixture(autouse=True)
def split_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables are written in this process."""
    monkeypatch.setattr(curate, "run_shards", run_shards_here)


@pytest.mark.parametrize("flag_only", [False, True])
def test_the_tables_need_not_be_read_back(flag_only: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, told = str(tmp_path / "out"), list[Rows]()
    scale.write_measured(out, 600, 50)
    kept = JudgedTables.rows
    monkeypatch.setattr(JudgedTables, "rows", lambda self: told.append(kept(self)) or told[0])
    storage.remove(f"{out}/_started.json")
    storage.write_json(f"{out}/_started.json", scale.settings(out, flag_only=flag_only).fitted()[0].digests())
    result = curate.run(scale.settings(out, flag_only=flag_only))
    assert 400 < result["accepted"] < 600
    assert set(result["by_code"]) >= {"UNREADABLE", *(() if flag_only else ("SILENT", "NEAR_DUPLICATE"))}
    assert bool(result["flagged"]) == flag_only
    read = read_rows(out)
    for name in ("files", "sizes", "codes", "stages", "labels", "splits", "duplicates"):
        assert getattr(told[0], name) == getattr(read, name), name
    for name in ("starts", "accepted", "marks", "stage", "transient"):
        assert np.array_equal(getattr(told[0], name), getattr(read, name)), name
    for name, values in read.values.items():
        assert np.array_equal(told[0].values[name], values, equal_nan=True), name
    assert told[0].ids.to_pylist() == read.ids.to_pylist()
    assert result["hours"] == read.hours(read.accepted)


def test_a_table_that_lost_its_rows_is_noticed(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    scale.write_measured(out, 200, 50)
    curate.run(scale.settings(out))
    storage.remove(f"{out}/curate.json")
    file = f"{out}/accepted/shard-00001.parquet"
    storage.write_table(file, storage.read_table(file).slice(3))
    with pytest.raises(RuntimeError, match="200 rows in"):
        curate.run(scale.settings(out))
