"""An output folder belongs to one input and its settings."""

from pathlib import Path

import pytest

from aai import storage
from aai.errors import UserError
from pipelines.engine.resume import finished

SETTINGS = {"input": "abc", "rows_per_file": 5}


def test_a_run_starts_goes_on_and_is_finished(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert finished(out, "compact", SETTINGS) is None
    storage.write_bytes(f"{out}/part-00000.parquet", b"half of it")
    assert finished(out, "compact", SETTINGS) is None
    storage.write_json(f"{out}/compact.json", {"rows": 3})
    assert finished(out, "compact", SETTINGS) == {"rows": 3}


def test_what_belongs_to_another_run_is_left_alone(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    finished(out, "compact", SETTINGS)
    storage.write_json(f"{out}/compact.json", {"rows": 3})
    with pytest.raises(UserError, match="holds the compact of another input or size"):
        finished(out, "compact", SETTINGS | {"rows_per_file": 6})
    with pytest.raises(UserError, match="is not empty"):
        finished(out, "export", SETTINGS)
    assert sorted(path.name for path in Path(out).iterdir()) == ["_compact.json", "compact.json"]
    storage.write_bytes(f"{tmp_path}/mine/thesis.txt", b"mine")
    with pytest.raises(UserError, match="is not empty"):
        finished(f"{tmp_path}/mine", "compact", SETTINGS)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
