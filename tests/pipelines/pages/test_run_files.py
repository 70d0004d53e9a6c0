"""What the report reads of a run: a file or figure that is not there is Missing, never an empty one."""

from pathlib import Path

import pyarrow as pa
import pytest

from aai import storage
from pipelines.pages.run_files import Missing, RunFiles, find, need, spread


def test_files_are_read_and_absent_ones_are_missing(tmp_path: Path) -> None:
    run = RunFiles(str(tmp_path), {})
    (tmp_path / "history.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    storage.write_json(f"{tmp_path}/a.json", {"b": 1})
    assert run.json("history.jsonl") == [{"step": 1}, {"step": 2}]
    assert run.json("a.json") == {"b": 1}
    with pytest.raises(Missing, match=r"c\.json is not there"):
        run.json("c.json")


def test_a_table_without_rows_or_files_is_missing(tmp_path: Path) -> None:
    run = RunFiles(str(tmp_path), {})
    (tmp_path / "none").mkdir()
    storage.write_table(f"{tmp_path}/empty/a.parquet", pa.table({"x": pa.array([], pa.int64())}))
    storage.write_table(f"{tmp_path}/full/a.parquet", pa.table({"x": [1, 2], "y": [3, 4]}))
    assert run.table("full", ["x"]).to_pydict() == {"x": [1, 2]}
    for name, rule in (("none", "holds no tables"), ("empty", "has no rows")):
        with pytest.raises(Missing, match=rule):
            run.table(name, ["x"])


def test_figures_by_dotted_name() -> None:
    tree = {"a": {"b": 0, "c": {}}}
    assert (find(tree, "a.b"), find(tree, "a.x"), find(tree, "a.b.c")) == (0, None, None)
    assert need(tree, "a.b") == 0
    for name in ("a.c", "a.x"):
        with pytest.raises(Missing, match=name):
            need(tree, name)


def test_spread_keeps_order_and_takes_from_the_whole() -> None:
    assert spread(list(range(100)), 4) == [0, 25, 50, 75]
    assert spread([1, 2], 4) == [1, 2]
    assert spread([], 4) == []
