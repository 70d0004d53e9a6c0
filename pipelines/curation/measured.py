"""What the driver reads of the measured tables: each of them once, small columns into memory, prints onto its disk."""

from collections.abc import Collection, Iterator, Mapping

import pyarrow as pa
import pyarrow.compute as pc

from aai import storage
from aai.media.measure import MEASURED_ROW
from pipelines.curation.clip_keys import ClipKeys
from pipelines.curation.layout import MEASURED, shard_file, shard_of
from pipelines.curation.ledger import Ledger
from pipelines.curation.near import HASHED
from pipelines.curation.spilled import SpilledTables
from pipelines.curation.table_slices import TableSlices
from pipelines.engine.columns import read_columns

_LARGE = ("audio", "frames", "frame_pts_s")
SMALL = [name for name in MEASURED_ROW.names if name not in (*_LARGE, *HASHED)]
"""The columns that judging needs, but for those that duplicates are told by."""
MEASURED_TABLE = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        *(MEASURED_ROW.field(name) for name in (*SMALL, *HASHED, *_LARGE)),
    ]
)
"""The small columns first: together they are read in one go."""
_KEPT = ["key", *(name for name in SMALL if name != "content_hash")]  # which only `exclude` asks for


class MeasuredTables:
    """The measured tables of an output folder. compares: whether duplicates will be looked for, by `prints`."""

    def __init__(self, out: str, compares: bool = False) -> None:
        self.out, self._names = out, [*_KEPT, *(HASHED if compares else ())]
        self._early, self._are_early = TableSlices(), set[str]()
        self.prints = SpilledTables()
        """key and HASHED by shard, of all clips of the tables that were read."""

    def of_the_plan(self, ledger: Ledger) -> set[str]:
        """The shards whose table is there, and of the clips that the plan has under this name."""
        there = storage.shard_names(storage.join(self.out, MEASURED))
        planned = {name: keys for name, keys in ledger.keys_by_shard() if name in there}
        for name, table in self._read(planned):
            if ClipKeys.of_column(table["key"]) == planned[name]:
                self._early.add(name, table)
                self._are_early.add(name)
        return set(self._are_early)

    def wanted(self, shards: Mapping[str, ClipKeys]) -> Iterator[tuple[str, pa.Table]]:
        """Each shard, in the order of the plan, with its rows of these keys. For once: what was taken is let go."""
        late = self._read([name for name in shards if name not in self._are_early])
        for name, keys in shards.items():
            if name in self._are_early:
                table = self._early[name]
                self._early.drop_before(name)
            else:
                _, table = next(late)
            wanted = pa.array([key.decode() for key in keys.packed.tolist()], pa.string())
            yield name, table.filter(pc.is_in(table["key"], wanted))

    def _read(self, names: Collection[str]) -> Iterator[tuple[str, pa.Table]]:
        """The small columns of tables; their prints are put aside."""
        sizes = storage.file_sizes(storage.join(self.out, MEASURED), ".parquet") if names else {}
        files = {file: sizes[file] for file in (shard_file(self.out, MEASURED, name) for name in names)}
        for file, table in zip(files, read_columns(files, self._names), strict=True):
            name, table = shard_of(file), _whole(table, self._names)
            if HASHED[0] in self._names:
                self.prints.add(name, table.select(["key", *HASHED]))
            yield name, table.select(_KEPT)


def _whole(table: pa.Table, names: Collection[str]) -> pa.Table:
    """The table with these columns; those that an earlier version did not write are null."""
    for name in names:
        if name not in table.column_names:
            table = table.append_column(name, pa.nulls(len(table), MEASURED_TABLE.field(name).type))
    return table
