"""Tables that wait in a file without a name."""

from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.curation.spilled import SpilledTables


def test_tables_come_back_and_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    spilled = SpilledTables()
    assert (len(spilled), "a" in spilled) == (0, False)
    tables = {str(size): pa.table({"x": list(range(size)), "y": [b"\0" * size] * size}) for size in (0, 1, 300)}
    for name, table in tables.items():
        spilled.add(name, table.slice(0))
    assert dict(spilled) == tables
    assert list(tmp_path.iterdir()) == []
    spilled.add("1", tables["300"])
    assert spilled["1"] == tables["300"]
    assert spilled["300"] == tables["300"]
    assert list(spilled) == ["0", "1", "300"]
    with pytest.raises(KeyError):
        spilled["2"]
