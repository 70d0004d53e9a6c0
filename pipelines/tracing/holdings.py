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
    """features, embeddings, accepted, rejected, measured, or clips (another table that features were made from)."""
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
    """All tables that hold clips of the files that `wanted` names (by clip id, content hash or URI).

    A file is meant wherever it lies: what is found names contents, and these are looked for until there is no new one.
    features: FeatureTables, or folders that `aai curate` wrote; what they were made from is looked at too. aligned:
    folders of embeddings, which know clips by their ids alone. Tables that are not there are left out.
    """
    folders, embeddings, names = _unique(features), _unique(aligned), wanted
    places = [(kind, uri) for folder in folders for kind, uri in _tables_of(folder)]
    places = list(dict.fromkeys([*places, *(("embeddings", uri) for uri in embeddings)]))
    while True:
        found = [holding for kind, uri in places if (holding := _holding(uri, names, kind)).clips]
        more = names.union(*(holding.hashes for holding in found), _ids(found))
        if more == names:
            return found
        names = more


def _tables_of(folder: str) -> Iterator[tuple[str, str]]:
    """(kind, folder) of a FeatureTable and the clips that it was made from, or of a folder of `aai curate`."""
    if storage.exists(storage.join(folder, ACCEPTED)):
        yield from _curated(folder)
        return
    yield "features", folder
    try:
        source = FeatureManifest.read(folder).input.rstrip("/")
    except (UserError, OSError):
        return
    if source.endswith(f"/{ACCEPTED}"):
        yield from _curated(os.path.dirname(source))
    elif source:
        yield "clips", source


def _curated(folder: str) -> Iterator[tuple[str, str]]:
    for kind, name in (("accepted", ACCEPTED), ("rejected", REJECTED), ("measured", MEASURED)):
        yield kind, storage.join(folder, name)


def silent(features: Iterable[str]) -> list[str]:
    """FeatureTables of older releases, which do not tell what they were made from."""
    told = []
    for folder in _unique(features):
        try:
            known = FeatureManifest.read(folder).input
        except (UserError, OSError):  # told elsewhere, or no FeatureTable
            continue
        if not known:
            told.append(f"{folder} does not tell which curation it was made from: name that in `tables`")
    return told


def _holding(uri: str, wanted: frozenset[str], kind: str) -> Holding:
    rows = rows_of(uri, wanted)
    pairs = zip(rows["clip_id"].to_pylist(), rows["split"].to_pylist(), strict=True)
    clips = [(clip or "", split or "") for clip, split in pairs]
    hashes = frozenset(filter(None, rows["content_hash"].to_pylist()))
    names = {name for column in COLUMNS[:3] for name in rows[column].to_pylist()}
    return Holding(kind, uri, tuple(clips), hashes, wanted & names)


def _ids(holdings: Iterable[Holding]) -> frozenset[str]:
    return frozenset(clip for holding in holdings for clip, _ in holding.clips if clip)


def _unique(uris: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(uri.rstrip("/") for uri in uris if uri))
