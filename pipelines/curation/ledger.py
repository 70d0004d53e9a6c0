"""The ledger of a curation: which clip is in which shard, so that a later run does only what is missing.

OUT/_plan/batch-00000.parquet, batch-00001.parquet, ... are written once each, before their shards are measured. A row's
key is the hash of (uri, start_s, end_s, stamp of the file): a file that changed is another clip. A key that stands in
several batches was tried again; its last shard holds the valid result.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from aai import storage
from aai.errors import UserError
from pipelines.manifests.table import Row

FOLDER = "_plan"
BATCH_TABLE = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("start_s", pa.float64()),
        pa.field("end_s", pa.float64()),
        pa.field("shard", pa.string(), nullable=False),
    ]
)


def row_keys(rows: Sequence[Row]) -> list[str]:
    """One key per manifest row; a clip that is listed twice has two."""
    stamps = storage.stamps([row["uri"] for row in rows])
    seen: Counter[str] = Counter()
    keys = []
    for row in rows:
        text = json.dumps([row["uri"], row["start_s"], row["end_s"], stamps[row["uri"]]])
        keys.append(hashlib.sha256(f"{text}{seen[text] or ''}".encode()).hexdigest()[:24])
        seen[text] += 1
    return keys


@dataclass(frozen=True)
class Entry:
    """One clip of a shard."""

    key: str
    uri: str
    start_s: float | None
    end_s: float | None


class Ledger:
    """The plan of one output folder."""

    def __init__(self, out: str) -> None:
        """Reads the batches that are there."""
        self.out = out
        self.shards: dict[str, list[Entry]] = {}
        self.shard_of: dict[str, str] = {}
        self.batches = 0
        for file in storage.list_files(storage.join(out, FOLDER), ".parquet"):
            self._take(storage.read_table(file).to_pylist())

    def _take(self, rows: Sequence[dict[str, Any]]) -> None:
        self.batches += 1
        for row in rows:
            shard = row.pop("shard")
            self.shards.setdefault(shard, []).append(Entry(**row))
            self.shard_of[row["key"]] = shard

    def add(self, entries: Sequence[Entry], rows_per_shard: int) -> list[str]:
        """Gives clips to new shards, and keeps that; returns the shards' names.

        Raises UserError when another ledger of this folder has written the batch.
        """
        first = len(self.shards)
        rows = [
            {**vars(entry), "shard": f"shard-{first + number // rows_per_shard:05d}"}
            for number, entry in enumerate(entries)
        ]
        if not rows:
            return []
        table = pa.Table.from_pylist(rows, schema=BATCH_TABLE)
        batch = storage.join(self.out, FOLDER, f"batch-{self.batches:05d}.parquet")
        try:
            if storage.exists(batch):  # asked first, since not every S3 server knows conditional writes
                raise FileExistsError(batch)
            storage.write_table(batch, table, new=True)
        except FileExistsError as error:
            rule = f"another run has planned {FOLDER}/batch-{self.batches:05d}.parquet meanwhile"
            raise UserError("out", self.out, rule, "wait for its end, then run this again") from error
        self._take(rows)
        return list(self.shards)[first:]

    def missing(self, keys: Sequence[str]) -> Iterator[int]:
        """Places of the keys that no shard holds yet."""
        return (place for place, key in enumerate(keys) if key not in self.shard_of)

    def valid(self, keys: set[str]) -> dict[str, list[Entry]]:
        """Shards with those of their clips that are wanted and were not tried again in a later shard."""
        valid = {
            name: [entry for entry in entries if entry.key in keys and self.shard_of[entry.key] == name]
            for name, entries in self.shards.items()
        }
        return {name: entries for name, entries in valid.items() if entries}
