"""Many manifest rows in little memory: columns of Arrow, of which rows are made as they are asked for."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, Field, fields
from functools import lru_cache
from itertools import islice
from typing import Any, overload

import pyarrow as pa

from pipelines.manifests.extras import Extra
from pipelines.manifests.row import ManifestRow

BLOCK_ROWS = 256
"""Rows that are made at once; the last few blocks are kept, since neighbours are asked for one after the other."""
BLOCKS_KEPT = 4
_PACK_ROWS = 16_384
_TABLE = pa.schema(
    [
        pa.field("uri", pa.string()),
        pa.field("start_s", pa.float64()),
        pa.field("end_s", pa.float64()),
        pa.field("caption", pa.string()),
        pa.field("labels", pa.list_(pa.string())),
        pa.field("split", pa.dictionary(pa.int32(), pa.string())),
        pa.field("others", pa.string()),  # JSON of further fields that differ from their defaults
    ]
)


class PackedRows(Sequence[ManifestRow]):
    """The rows as a sequence. Neither it nor its rows can be changed."""

    def __init__(self, rows: Iterable[ManifestRow]) -> None:
        others = [field for field in fields(ManifestRow) if field.name not in _TABLE.names]
        source, batches = iter(rows), []
        while part := list(islice(source, _PACK_ROWS)):
            batches.append(_batch(part, others))
        self.table = pa.Table.from_batches(batches, _TABLE)
        self._starts = [0]
        for batch in batches:
            self._starts.append(self._starts[-1] + batch.num_rows)
        self._block = lru_cache(BLOCKS_KEPT)(self._made)
        self._last = -1

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @overload
    def __getitem__(self, place: int) -> ManifestRow: ...
    @overload
    def __getitem__(self, place: slice) -> list[ManifestRow]: ...
    def __getitem__(self, place: int | slice) -> ManifestRow | list[ManifestRow]:
        if isinstance(place, slice):
            return [self[i] for i in range(len(self))[place]]
        place = range(len(self))[place]  # counts from the end, and knows where that is
        is_far, self._last = abs(place - self._last) > BLOCK_ROWS, place
        if is_far:  # a manifest that was put in another order is asked for all over the place
            return _rows(self.table.slice(place, 1))[0]
        return self._block(place // BLOCK_ROWS)[place % BLOCK_ROWS]

    def __iter__(self) -> Iterator[ManifestRow]:
        for start in range(0, len(self), _PACK_ROWS):
            yield from _rows(self.table.slice(start, _PACK_ROWS))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def _made(self, block: int) -> list[ManifestRow]:
        return _rows(self.table.slice(block * BLOCK_ROWS, BLOCK_ROWS))


def extras_of(rows: Sequence[ManifestRow]) -> Iterator[Extra]:
    """The further columns of those rows that have any; of packed ones no others are made."""
    if isinstance(rows, PackedRows):
        for others in rows.table["others"].drop_null().to_pylist():
            yield json.loads(others).get("extra", {})
    else:
        yield from (row.extra for row in rows if row.extra)


def have_images(rows: Sequence[ManifestRow]) -> bool:
    """Whether any row names a still picture; of packed ones none is made."""
    if isinstance(rows, PackedRows):
        return any("image_uri" in json.loads(others) for others in rows.table["others"].drop_null().to_pylist())
    return any(row.image_uri is not None for row in rows)


def _batch(rows: Sequence[ManifestRow], others: Sequence["Field[Any]"]) -> pa.RecordBatch:
    columns = {name: [getattr(row, name) for row in rows] for name in _TABLE.names[:-1]}
    columns["others"] = [_others(row, others) for row in rows]
    columns["split"] = pa.array(columns["split"], pa.string()).dictionary_encode()
    return pa.RecordBatch.from_pydict(columns, schema=_TABLE)


def _others(row: ManifestRow, others: Sequence["Field[Any]"]) -> str | None:
    found = {}
    for field in others:
        usual = field.default if field.default_factory is MISSING else field.default_factory()
        if (value := getattr(row, field.name)) != usual:
            found[field.name] = value
    return json.dumps(found) if found else None


def _rows(table: pa.Table) -> list[ManifestRow]:
    rows = []
    for values in table.to_pylist():
        others, values["labels"] = values.pop("others"), tuple(values["labels"])
        rows.append(ManifestRow(**values, **(json.loads(others) if others else {})))
    return rows
