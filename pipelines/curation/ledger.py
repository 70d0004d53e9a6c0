"""The ledger of a curation: which clip is in which shard, so that a later run does only what is missing.

OUT/_plan/batch-00000.parquet, batch-00001.parquet, ... are written once each, before their shards are measured. A row's
key is the hash of (uri, start_s, end_s, stamp of the file), and of a still picture's URI and stamp where it has one: a
file that changed is another clip. A key that stands in
several batches was tried again; its last shard holds the valid result.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, KeysView, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa

from aai import storage
from aai.errors import UserError
from pipelines.curation.clip_keys import ClipKeys
from pipelines.curation.layout import PLAN
from pipelines.curation.stamps import Stamps
from pipelines.engine.columns import read_columns
from pipelines.manifests.row import ManifestRow

KEYED_AT_ONCE = 65_536
BATCH_TABLE = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("start_s", pa.float64()),
        pa.field("end_s", pa.float64()),
        pa.field("shard", pa.string(), nullable=False),
    ]
)
IMAGE = pa.field("image_uri", pa.string())
"""What a batch has besides where any of its clips has a still picture."""


def row_keys(rows: Sequence[ManifestRow]) -> ClipKeys:
    """One key per manifest row; a clip that is listed twice has two."""
    stamps, parts = Stamps(), []
    for start in range(0, len(rows), KEYED_AT_ONCE):
        parts.append(_keys(rows[start : start + KEYED_AT_ONCE], stamps))
    keys = ClipKeys.joined(parts)
    again = np.flatnonzero(keys.places(keys) != np.arange(len(keys)))
    return _numbered(keys, again, rows, stamps) if len(again) else keys


def _texts(rows: Sequence[ManifestRow], stamps: Stamps) -> list[str]:
    """What a key is the hash of, but for the number of a clip that is listed again."""
    found = stamps.of([row.uri for row in rows])
    images = [row.image_uri for row in rows if row.image_uri is not None]
    of_image = iter(stamps.of(images))
    texts = []
    for row, stamp in zip(rows, found, strict=True):
        image = [] if row.image_uri is None else [row.image_uri, next(of_image)]
        texts.append(json.dumps([row.uri, row.start_s, row.end_s, stamp, *image]))
    return texts


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _keys(rows: Sequence[ManifestRow], stamps: Stamps) -> ClipKeys:
    return ClipKeys(_hash(text) for text in _texts(rows, stamps))


def _numbered(keys: ClipKeys, again: np.ndarray, rows: Sequence[ManifestRow], stamps: Stamps) -> ClipKeys:
    """The keys, with one of its own for each further listing of a clip."""
    packed, seen = keys.packed.copy(), Counter[str]()  # what was asked so far knows their order
    for start in range(0, len(again), KEYED_AT_ONCE):
        places = again[start : start + KEYED_AT_ONCE].tolist()
        for place, text in zip(places, _texts([rows[place] for place in places], stamps), strict=True):
            seen[text] += 1
            packed[place] = _hash(f"{text}{seen[text]}").encode()
    return ClipKeys(packed)


@dataclass(frozen=True, slots=True)
class Entry:
    """One clip of a shard."""

    key: str
    uri: str
    start_s: float | None
    end_s: float | None
    image_uri: str | None = None


class _Shards(Mapping[str, list[Entry]]):
    """The clips of each shard, in the order of the batches; objects only as they are asked for."""

    def __init__(self) -> None:
        self._batches: list[pa.Table] = []
        self._places: dict[str, tuple[int, int, int]] = {}

    def take(self, batch: pa.Table) -> None:
        """Adds a batch, in which the clips of a shard stand together."""
        names = batch["shard"].combine_chunks().dictionary_encode()
        starts = np.flatnonzero(np.diff(names.indices.to_numpy(), prepend=-1)).tolist()
        for start, end in pairwise([*starts, len(batch)]):
            self._places[names[start].as_py()] = (len(self._batches), start, end - start)
        self._batches.append(batch.drop_columns("shard"))

    def rows(self, name: str) -> int:
        """How many clips a shard has."""
        return self._places[name][2]

    def keys(self) -> KeysView[str]:
        """The shards' names."""
        return self._places.keys()

    def __getitem__(self, name: str) -> list[Entry]:
        batch, start, size = self._places[name]
        return [Entry(**row) for row in self._batches[batch].slice(start, size).to_pylist()]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class Ledger:
    """The plan of one output folder."""

    def __init__(self, out: str) -> None:
        """Reads the batches that are there."""
        self.out = out
        self.shards = _Shards()
        self._parts: list[ClipKeys] = []
        self.batches = 0
        files = storage.file_sizes(storage.join(out, PLAN), ".parquet")
        for batch in read_columns(files, [*BATCH_TABLE.names, IMAGE.name]):
            self._take(batch)

    def _take(self, batch: pa.Table) -> None:
        self.batches += 1
        self.shards.take(batch)
        self._parts.append(ClipKeys.of_column(batch["key"]))

    @property
    def keys(self) -> ClipKeys:
        """Of all clips of all shards, in their order; those that were tried again stand there twice."""
        return ClipKeys.joined(self._parts)

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
        if any(images := [entry.image_uri for entry in entries]):
            table = table.append_column(IMAGE, pa.array(images, IMAGE.type))
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

    def missing(self, keys: ClipKeys) -> Iterator[int]:
        """Places of the keys that no shard holds yet."""
        return iter(np.flatnonzero(self.keys.places(keys) < 0).tolist())

    def keys_by_shard(self) -> Iterator[tuple[str, ClipKeys]]:
        """Each shard with the keys of all of its clips."""
        mine, start = self.keys, 0
        for name in self.shards:
            yield name, mine[start : (start := start + self.shards.rows(name))]

    def valid(self, keys: ClipKeys) -> dict[str, ClipKeys]:
        """Shards with the keys of those of their clips that are wanted and were not tried again in a later shard."""
        mine = self.keys
        wanted = (keys.places(mine) >= 0) & mine.are_last()
        valid, start = {}, 0
        for name in self.shards:
            part = slice(start, start := start + self.shards.rows(name))
            if wanted[part].any():
                valid[name] = ClipKeys(mine.packed[part][wanted[part]])
        return valid
