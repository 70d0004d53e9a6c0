"""Which clips are evaluated, and where they lie: an index of the tables' small columns, never their content."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aai import storage
from aai.errors import UserError
from aai.schema import NO_PICTURE, PICTURE
from pipelines.engine.shards import Shard

log = logging.getLogger(__name__)

MIN_CLIPS = 10
ALONE = 64
TRAIN_SAMPLES = 256
"""Training clips whose captions are looked up and whose sounds give the mean embedding."""


@dataclass(frozen=True)
class ClipPlace:
    """One clip: `row`, its number among the evaluated clips, and where its features and pictures are."""

    row: int
    at: int
    """Row of its features in the shard's file."""
    clips_file: str | None = None
    """File of the ClipTable with its pictures; empty for a training clip, which is only heard."""
    clips_at: int = -1
    painted: bool = False
    """Whether any picture needs its sound or its frame."""


ByFile = dict[str, list[ClipPlace]]
"""Clips by the file of the FeatureTable that holds them."""


@dataclass(frozen=True, kw_only=True)
class ListenShard(Shard):
    """Clips of one file of the FeatureTable, and maybe texts to embed."""

    features: str
    clips: list[ClipPlace]
    texts: list[str] = field(default_factory=list)
    alone: int = 0
    """So many clips are also embedded one by one: an embedding must not depend on its batch."""


@dataclass(frozen=True)
class EvaluatedClips:
    """The held-out clips in order of clip_id, and the training clips they must not overlap with."""

    test: pa.Table
    """clip_id, content_hash, caption, labels, file, at, clips_file, clips_at."""
    train: pa.Table
    """clip_id, content_hash, file, at, in order of clip_id."""

    @property
    def labels(self) -> list[list[str]]:
        """The labels of each held-out clip."""
        return list(self.test["labels"].to_pylist())

    def overlap(self) -> int:
        """How many ids and content hashes of held-out clips are those of training clips."""
        known = pa.concat_arrays([self.train[name].combine_chunks() for name in ("clip_id", "content_hash")])
        found = [pc.is_in(self.test[name], value_set=known) for name in ("clip_id", "content_hash")]
        return sum(int(pc.sum(column).as_py() or 0) for column in found)


def index(uri: str, columns: list[str]) -> pa.Table:
    """Small columns of all rows of a table, each with `file` and its row `at` there."""
    parts = []
    for file in storage.list_files(uri, ".parquet"):
        table = storage.read_table(file, columns)
        table = table.append_column("file", pa.array([file] * len(table), pa.string()))
        parts.append(table.append_column("at", pa.array(np.arange(len(table)), pa.int64())))
    if not parts:
        raise UserError("table", uri, "holds no Parquet files", "run the stage that writes it first")
    return pa.concat_tables(parts)


def _has_kinds(uri: str) -> bool:
    """Whether a table, all files of which have the same columns, tells of what kind its clips are."""
    for file in storage.list_files(uri, ".parquet")[:1]:
        fs, path = storage.filesystem(file)
        return PICTURE in pq.read_schema(path, filesystem=fs).names
    return False


def find_clips(features: str, clips: str, split: str, max_clips: int) -> EvaluatedClips:
    """The first `max_clips` clips of a split that have a picture, in order of clip_id.

    Raises UserError when they are too few or unknown.
    """
    columns, without = ["clip_id", "content_hash", "split", "caption", "labels"], 0
    if _has_kinds(features):
        columns.append(PICTURE)
    table = index(features, columns).sort_by("clip_id")
    test = table.filter(pc.field("split") == split)
    if PICTURE in columns:
        held_out, test = len(test), test.filter(pc.field(PICTURE) != NO_PICTURE).drop_columns(PICTURE)
        without = held_out - len(test)
        log.info("evaluate: %d of %d clips of %s have no picture and are left out", without, held_out, split)
    test = test.slice(0, max_clips)
    if len(test) < MIN_CLIPS:
        known = ", ".join(sorted(set(table["split"].to_pylist())))
        seen = f" with a picture, besides {without} without," if without else ""
        rule = f"has {len(test)} clips{seen} in {features}, at least {MIN_CLIPS} are needed"
        raise UserError("split", split, rule, f"give another split (there: {known})")
    pictures = index(clips, ["clip_id"])
    place = pc.index_in(test["clip_id"], value_set=pictures["clip_id"].combine_chunks())
    if place.null_count:
        rule = "does not hold the clips of the FeatureTable"
        raise UserError("clips", clips, rule, "give the ClipTable it came from")
    found = pictures.take(place)
    test = test.append_column("clips_file", found["file"]).append_column("clips_at", found["at"])
    train = table.filter(pc.field("split") == "train").select(["clip_id", "content_hash", "file", "at"])
    return EvaluatedClips(test, train)


def listen_shards(
    clips: EvaluatedClips, clips_per_shard: int, texts: list[str], painted: set[int]
) -> list[ListenShard]:
    """Units of listening: clips of one file each, in order of their rows there; the first one also embeds `texts`.

    painted: rows of the held-out clips whose sound or frame a picture needs.
    """
    held_out: ByFile = {}
    for row, place in enumerate(clips.test.select(["file", "at", "clips_file", "clips_at"]).to_pylist()):
        held_out.setdefault(place.pop("file"), []).append(ClipPlace(row=row, painted=row in painted, **place))
    train: ByFile = {}
    for row, place in enumerate(clips.train.select(["file", "at"]).slice(0, TRAIN_SAMPLES).to_pylist()):
        train.setdefault(place["file"], []).append(ClipPlace(row=row, at=place["at"]))
    shards: list[ListenShard] = []
    for kind, places in (("test", held_out), ("train", train)):
        for number, (file, part) in enumerate(_parts(places, clips_per_shard)):
            name = f"{kind}-{number:05d}"
            shards.append(ListenShard(name=name, rows=len(part), features=file, clips=part))
    return [replace(shards[0], texts=texts, alone=ALONE), *shards[1:]]


def _parts(places: ByFile, size: int) -> Iterator[tuple[str, list[ClipPlace]]]:
    """At most `size` clips of one file at a time, in order of their rows there."""
    for file, found in sorted(places.items()):
        found.sort(key=lambda place: place.at)
        for start in range(0, len(found), size):
            yield file, found[start : start + size]
