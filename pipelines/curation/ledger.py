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

import pyarrow as pa

from aai import storage
from aai.errors import UserError
from pipelines.curation.layout import PLAN
from pipelines.manifests.row import ManifestRow

BATCH_TABLE = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("start_s", pa.float64()),
        pa.field("end_s", pa.float64()),
        pa.field("shard", pa.string(), nullable=False),
    ]
)


def row_keys(rows: Sequence[ManifestRow]) -> list[str]:
    """One key per manifest row; a clip that is listed twice has two."""
    stamps = storage.stamps([row.uri for row in rows])
    seen: Counter[str] = Counter()
    keys = []
    for row in rows:
        text = json.dumps([row.uri, row.start_s, row.end_s, stamps[row.uri]])
        keys.append(hashlib.sha256(f"{text}{seen[text] or ''}".encode()).hexdigest()[:24])
        seen[text] += 1
    return keys


@dataclass(frozen=True, slots=True)
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
        for file in storage.list_files(storage.join(out, PLAN), ".parquet"):
            self._take(storage.read_table(file))

    def _take(self, batch: pa.Table) -> None:
        self.batches += 1
        columns = [batch[name].to_pylist() for name in BATCH_TABLE.names]
        for key, uri, start_s, end_s, shard in zip(*columns, strict=True):
            self.shards.setdefault(shard, []).append(Entry(key, uri, start_s, end_s))
            self.shard_of[key] = shard

    def add(self, entries: Sequence[Entry], rows_per_shard: int) -> list[str]:
        """Gives clips to new shards, and keeps that; returns the shards' names.

        Raises UserError when another ledger of this folder has written the batch.
        """
        if not entries:
            return []
        first = len(self.shards)
        columns = {
            "key": [entry.key for entry in entries],
            "uri": [entry.uri for entry in entries],
            "start_s": [entry.start_s for entry in entries],
            "end_s": [entry.end_s for entry in entries],
            "shard": [f"shard-{first + number // rows_per_shard:05d}" for number in range(len(entries))],
        }
        table = pa.table(columns, schema=BATCH_TABLE)
        batch = storage.join(self.out, PLAN, f"batch-{self.batches:05d}.parquet")
        try:
            if storage.exists(batch):  # asked first, since not every S3 server knows conditional writes
                raise FileExistsError(batch)
            storage.write_table(batch, table, new=True)
        except FileExistsError as error:
            if storage.read_table(batch).equals(table):  # a write that was sent twice: the first one had arrived
                self._take(table)
                return list(self.shards)[first:]
            rule = f"another run has planned {PLAN}/batch-{self.batches:05d}.parquet meanwhile"
            raise UserError("out", self.out, rule, "wait for its end, then run this again") from error
        self._take(table)
        return list(self.shards)[first:]

    def missing(self, keys: Sequence[str]) -> Iterator[int]:
        """Places of the keys that no shard holds yet."""
        return (place for place, key in enumerate(keys) if key not in self.shard_of)

    def valid(self, keys: set[str]) -> dict[str, list[Entry]]:
        """Shards with those of their clips that are wanted and were not tried again in a later shard."""
        valid: dict[str, list[Entry]] = {}
        for name, entries in self.shards.items():
            wanted = [entry for entry in entries if entry.key in keys and self.shard_of[entry.key] == name]
            if wanted:
                valid[name] = wanted
        return valid
