import pyarrow as pa
import pytest

from pipelines.curation import table_slices
from pipelines.curation.table_slices import TableSlices


def test_each_table_comes_back_out_of_a_few_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_slices, "GROUP_ROWS", 10)
    slices = TableSlices()
    tables = {f"t{number}": pa.table({"x": [number] * (number % 4), "y": ["a"] * (number % 4)}) for number in range(30)}
    for name, table in tables.items():
        slices.add(name, table.replace_schema_metadata({"of": name}))
        assert slices[name].equals(table)  # also in the middle of it
    assert dict(slices) == tables
    assert len(slices) == 30
