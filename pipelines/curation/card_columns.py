"""The part of a data card about columns that were not measured here: licences and sources of the manifest, signals."""

from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from aai import storage
from pipelines.curation.layout import ACCEPTED, REJECTED
from pipelines.manifests.extras import TEXT

SHOWN = 40
"""Values of a column that the card lists."""
FEW = 8
"""Values that are listed even where they all differ."""
MAX_DISTINCT = 20_000
"""A column with more values, such as an id, is only counted."""
_THREADS = 16

Entry = dict[str, Any]


class _Column:
    """What the files read so far have in one column."""

    def __init__(self, name: str, kind: str) -> None:
        self.name, self.kind = name, kind
        self.empty = {ACCEPTED: 0, REJECTED: 0}
        self.counts: Counter[tuple[str, str]] = Counter()
        self.is_open = kind == TEXT
        self.numbers: list[np.ndarray] = []

    def add(self, folder: str, column: pa.ChunkedArray) -> None:
        """Adds the column of one file of accepted/ or rejected/."""
        self.empty[folder] += column.null_count
        if self.kind != TEXT:
            self.numbers.append(column.drop_null().to_numpy())
        elif self.is_open:
            for found in pc.value_counts(column.drop_null()).to_pylist():
                self.counts[found["values"], folder] += found["counts"]
            self.is_open = len(self.counts) <= MAX_DISTINCT

    def describe(self) -> Entry:
        """For card.json: the commonest values of a text, the range of a number."""
        entry: Entry = {"column": self.name, "kind": self.kind, "empty": self.empty}
        if self.kind != TEXT:
            values = np.concatenate([np.empty(0), *self.numbers])
            ends = np.quantile(values, [0, 0.5, 1]).tolist() if len(values) else [None] * 3
            return entry | dict(zip(("low", "median", "high"), ends, strict=True))
        texts = {text for text, _ in self.counts}
        rows: list[Entry] = [
            {"value": text, **{folder: self.counts[text, folder] for folder in self.empty}} for text in texts
        ]
        rows.sort(key=lambda row: (-row[ACCEPTED], -row[REJECTED], row["value"]))
        if len(rows) > FEW and max(self.counts.values()) == 1:  # ids: to list some tells nothing
            rows = []
        return entry | {"distinct": len(texts), "is_complete": self.is_open, "values": rows[:SHOWN]}


def columns(out: str, kinds: Mapping[str, str]) -> list[Entry]:
    """What OUT/accepted and OUT/rejected hold in the manifest's further columns ({name: number or text}).

    Only these columns are read, file by file.
    """
    if not kinds:
        return []
    found = {name: _Column(name, kind) for name, kind in kinds.items()}
    jobs = []
    for folder in (ACCEPTED, REJECTED):
        jobs += [(folder, file) for file in storage.list_files(storage.join(out, folder), ".parquet")]
    with ThreadPoolExecutor(_THREADS) as pool:  # on S3 nearly all the time is waiting
        tables = pool.map(lambda job: storage.read_table(job[1], list(kinds)), jobs)
        for (folder, _), table in zip(jobs, tables, strict=True):
            for name, column in found.items():
                column.add(folder, table[name])
    return [column.describe() for column in found.values()]
