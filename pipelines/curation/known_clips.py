"""Where clips of earlier runs lie by their content, so that files that were moved or copied are not decoded again."""

from bisect import bisect_right
from collections.abc import Collection
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aai import storage
from aai.media.measure import MeasuredRow
from pipelines.curation.layout import KNOWN, MEASURED, shard_file, shard_of
from pipelines.engine.columns import open_parquet, read_columns

GROUP_ROWS = 4096
"""Rows of a row group of the table: what is read to find a clip."""


def write_known(out: str, shards: Collection[str]) -> None:
    """Notes where the good clips of these measured shards lie; of equal ones the last."""
    files = storage.file_sizes(storage.join(out, MEASURED), ".parquet")
    files = {file: size for file, size in files.items() if shard_of(file) in shards}
    parts = [pa.table({"clip_id": pa.array([], pa.string()), "shard": pa.array([], pa.string()), "row": _rows(0)})]
    for file, table in zip(files, read_columns(files, ["clip_id", "code"]), strict=True):
        table = table.append_column("row", _rows(len(table)))
        good = table.filter(pc.and_(table["clip_id"].is_valid(), table["code"].is_null()))
        shard = pa.array([shard_of(file)] * len(good), pa.string())
        parts.append(good.select(["clip_id", "row"]).add_column(1, "shard", shard))
    found = pa.concat_tables(parts).combine_chunks()
    found = found.append_column("order", _rows(len(found)))
    found = found.sort_by([("clip_id", "ascending"), ("order", "ascending")])
    ids = found["clip_id"]
    is_last = np.append(np.asarray(pc.not_equal(ids[:-1], ids[1:])), True) if len(ids) else np.empty(0, bool)
    found = found.filter(pa.array(is_last)).drop_columns("order")
    storage.write_table(storage.join(out, KNOWN), found, row_group_size=GROUP_ROWS)


def _rows(count: int) -> pa.Array:
    return pa.array(np.arange(count), pa.int64())


class KnownClips:
    """Looks clips up in what `write_known` wrote; holds one row group of it, and one of the measured tables."""

    def __init__(self, out: str) -> None:
        self.out = out
        self._table = _Groups("")
        self._measured = _Groups("")

    @cached_property
    def _firsts(self) -> list[str]:
        """The first clip of each row group; empty where nothing is known, or a table of before is not in order."""
        where = storage.join(self.out, KNOWN)
        if not storage.exists(where):
            return []
        self._table = _Groups(where)
        metadata = self._table.file.metadata
        if not metadata.num_rows:
            return []
        columns = [metadata.row_group(number).column(0) for number in range(metadata.num_row_groups)]
        firsts = [column.statistics.min for column in columns]
        return firsts if firsts == sorted(firsts) else []

    def find(self, clip_id: str) -> MeasuredRow | None:
        """The measured row of a clip that an earlier run could decode."""
        group = bisect_right(self._firsts, clip_id) - 1
        if group < 0:
            return None
        table = self._table.read(group)
        place = pc.index(table["clip_id"], clip_id).as_py()
        if place < 0:
            return None
        shard, row = table["shard"][place].as_py(), table["row"][place].as_py()
        file = shard_file(self.out, MEASURED, shard)
        if self._measured.uri != file:
            self._measured = _Groups(file)
        found: MeasuredRow = self._measured.row(row)
        return found


class _Groups:
    """A Parquet file of which the last row group that was read is kept."""

    def __init__(self, uri: str) -> None:
        self.uri, self._kept = uri, (-1, pa.table({}))

    @cached_property
    def file(self) -> pq.ParquetFile:
        return open_parquet(self.uri)

    def read(self, group: int) -> pa.Table:
        if self._kept[0] != group:
            self._kept = group, self.file.read_row_group(group)
        return self._kept[1]

    def row(self, row: int) -> dict[str, Any]:
        for group in range(self.file.num_row_groups):
            size = self.file.metadata.row_group(group).num_rows
            if row < size:
                found: dict[str, Any] = self.read(group).slice(row, 1).to_pylist()[0]
                return found
            row -= size
        raise IndexError(f"{self.uri} has no such row")
