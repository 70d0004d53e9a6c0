"""Which tables hold a clip, and which clips a training read."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aai import storage
from aai.errors import UserError
from aai.features import FeatureManifest
from pipelines.curation.layout import ACCEPTED, MEASURED, REJECTED
from pipelines.registry.origins import TrainingRun

COLUMNS = ("clip_id", "content_hash", "uri", "split")
CLIPS = pa.schema([(name, pa.string()) for name in COLUMNS])
LEARNED_FROM = ("train", "val")
"""Splits that reach the weights: those of val decide which are kept."""


@dataclass(frozen=True)
class Holding:
    """A table and the clips in it that were asked for."""

    kind: str
    """features, embeddings, accepted, rejected or measured."""
    uri: str
    clips: tuple[tuple[str, str], ...] = ()
    """(clip_id, split) of each; empty where the table knows none."""
    hashes: frozenset[str] = frozenset()
    """Their content hashes."""
    asked: frozenset[str] = frozenset()
    """By which of the names that were asked for they were found."""

    def by_split(self) -> dict[str, int]:
        """How many, by split."""
        return dict(Counter(split for _, split in self.clips))


def rows_of(uri: str, wanted: Iterable[str] | None = None) -> pa.Table:
    """clip_id, content_hash, uri and split of a table, or of its rows that `wanted` names by one of the first three.

    A column that the table lacks is null. uri: folder, s3:// prefix or file. No other column is read.
    """
    names = pa.array(sorted(wanted), pa.string()) if wanted is not None else None
    found = []
    for file in storage.list_files(uri, ".parquet"):
        fs, path = storage.filesystem(file)
        with pq.ParquetFile(path, filesystem=fs) as opened:
            there = [name for name in COLUMNS if name in opened.schema_arrow.names]
            table = opened.read(there)
        for name in COLUMNS:
            if name not in there:
                table = table.append_column(name, pa.nulls(len(table), pa.string()))
        table = table.select(list(COLUMNS)).cast(CLIPS)
        if names is not None:
            masks = [pc.is_in(table[name], names) for name in COLUMNS[:3]]
            table = table.filter(pc.or_(pc.or_(masks[0], masks[1]), masks[2]))
        found.append(table)
    return pa.concat_tables(found) if found else CLIPS.empty_table()


def changed(training: TrainingRun) -> str:
    """Why the table that a training read can no longer be looked at; empty when it can."""
    try:
        manifest = FeatureManifest.read(training.features)
    except (UserError, OSError) as error:
        return f"{training.features} is gone ({getattr(error, 'rule', error)})"
    if manifest.fingerprint != training.fingerprint:
        return f"{training.features} holds other clips or features than it did"
    return ""


def search(features: Iterable[str], aligned: Iterable[str], wanted: frozenset[str]) -> list[Holding]:
    """All tables that hold clips named in `wanted` (clip ids, content hashes, URIs).

    features: FeatureTables, or folders that `aai curate` wrote; what they were made from is looked at too. aligned:
    folders of embeddings, which know clips by their ids alone. Tables that are not there are left out.
    """
    found: list[Holding] = []
    folders = _unique(features)
    curations = _unique(_curations(folders))
    for uri in folders:
        holding = Holding("features", uri) if uri in curations else _holding(uri, wanted)
        found += [holding] if holding.clips else []
    for curated in curations:
        for kind in (ACCEPTED, REJECTED):
            holding = _holding(storage.join(curated, kind), wanted, kind)
            found += [holding] if holding.clips else []
        names = wanted | _ids(found)
        holding = _holding(storage.join(curated, MEASURED), names, "measured")
        found += [holding] if holding.clips else []
    for uri in _unique(aligned):
        holding = _holding(uri, wanted | _ids(found), "embeddings")
        found += [holding] if holding.clips else []
    return found


def _holding(uri: str, wanted: frozenset[str], kind: str = "features") -> Holding:
    rows = rows_of(uri, wanted)
    pairs = zip(rows["clip_id"].to_pylist(), rows["split"].to_pylist(), strict=True)
    clips = [(clip or "", split or "") for clip, split in pairs]
    hashes = frozenset(filter(None, rows["content_hash"].to_pylist()))
    names = {name for column in COLUMNS[:3] for name in rows[column].to_pylist()}
    return Holding(kind, uri, tuple(clips), hashes, wanted & names)


def _ids(holdings: Iterable[Holding]) -> frozenset[str]:
    return frozenset(clip for holding in holdings for clip, _ in holding.clips if clip)


def _curations(folders: Iterable[str]) -> Iterator[str]:
    """Folders of `aai curate`: those among the given ones, and those that FeatureTables were made from."""
    for folder in folders:
        if storage.exists(storage.join(folder, ACCEPTED)):
            yield folder
            continue
        try:
            source = FeatureManifest.read(folder).input
        except (UserError, OSError):
            continue
        if source.rstrip("/").endswith(f"/{ACCEPTED}"):
            yield os.path.dirname(source.rstrip("/"))


def _unique(uris: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(uri.rstrip("/") for uri in uris if uri))
