"""The walk from a bundle back to its clips, and from clips on to what was made of them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipelines.registry.origins import TrainingRun, descended, made_by, orphans, trainings, unexplained, versions_of
from pipelines.registry.store import must_exist
from pipelines.registry.versions import Version
from pipelines.settings import TrackingConfig
from pipelines.tracing.holdings import CLIPS, COLUMNS, LEARNED_FROM, Holding, changed, rows_of, search, silent


@dataclass(frozen=True)
class Origin:
    """What a bundle was made of."""

    bundle: str
    trainings: list[TrainingRun]
    """Its own first, then those that it began from."""
    clips: pa.Table
    """clip_id, content_hash, uri, split: what the weights were learned or chosen by, each clip once."""
    unknown: tuple[str, ...]
    """Why clips are missing there: tables that are gone, or hold others by now."""

    def by_split(self) -> dict[str, int]:
        """How many clips, by split."""
        return dict(Counter(self.clips["split"].to_pylist()))


def origin_of(cfg: TrackingConfig, sha: str, fingerprint: str = "") -> Origin:
    """Walks from a bundle to its trainings, their tables, and the clips in them."""
    known = trainings(cfg)
    found = made_by(sha, fingerprint, known)
    unknown: list[str] = [] if found else ["no training that is on record here made it"]
    unknown += orphans(found, known)
    if found and not any(training.made for training in found):
        unknown.append(
            "no training says that it made this bundle: these read its data, what it began from is not known"
        )
    rows: dict[tuple[str, ...], None] = {}
    for training in {(each.features, each.fingerprint): each for each in found}.values():
        if reason := changed(training):
            unknown.append(reason)
            continue
        table = rows_of(training.features)
        for row in zip(*(table[name].to_pylist() for name in COLUMNS), strict=True):
            if row[-1] in LEARNED_FROM:
                rows[row] = None
    clips = pa.Table.from_pylist([dict(zip(COLUMNS, row, strict=True)) for row in rows], schema=CLIPS)
    return Origin(sha, found, clips, tuple(unknown))


def origin_of_picture(cfg: TrackingConfig, made: Mapping[str, Any]) -> tuple[Origin, list[Version]]:
    """What the model of a picture was made of, and the versions it is registered as. made: the picture's own words."""
    must_exist(cfg)
    sha = str(made["bundle"])
    found = versions_of(cfg, [sha])
    fingerprint = found[0].tags.get("data_fingerprint", "") if found else ""
    return origin_of(cfg, sha, fingerprint), found


@dataclass(frozen=True)
class Spread:
    """Where clips have got to."""

    holdings: list[Holding]
    trainings: list[TrainingRun]
    """Runs whose weights have seen them, also through what they began from."""
    versions: list[Version]
    unknown: tuple[str, ...]
    """What nobody can tell of: trainings whose tables are gone or hold other clips by now, versions without one."""

    def told(self) -> dict[str, Any]:
        """As JSON."""
        tables = [{"kind": each.kind, "uri": each.uri, "clips": each.by_split()} for each in self.holdings]
        runs = [
            {
                "run": each.run_id,
                "stage": each.stage,
                "status": each.status,
                "bundle": each.made,
                "features": each.features,
            }
            for each in self.trainings
        ]
        versions = [{"model": v.model, "version": v.version, "aliases": list(v.aliases)} for v in self.versions]
        return {"tables": tables, "runs": runs, "versions": versions, "unknown": list(self.unknown)}


def spread_of(cfg: TrackingConfig, wanted: frozenset[str], tables: Sequence[str] = ()) -> Spread:
    """Walks from clips (ids, content hashes, URIs) to the tables, trainings and versions that have them.

    tables: FeatureTables and folders of `aai curate` beside those that trainings name.
    """
    known = trainings(cfg)
    features = [*(each.features for each in known), *tables]
    holdings = search(features, [each.aligned for each in known], wanted)
    learned = {each.uri for each in holdings if each.kind == "features" and set(each.by_split()) & set(LEARNED_FROM)}
    unknown, direct = [], []
    for training in known:
        if reason := changed(training):
            unknown.append(f"{training.stage} {training.run_id}: {reason}")
        elif training.features.rstrip("/") in learned:
            direct.append(training)
    reached = descended(direct, known)
    shas = {each.made for each in reached if each.made}
    data = {each.fingerprint for each in direct} | {each.fingerprint for each in reached if not each.made}
    found = versions_of(cfg, shas, data)
    unknown += [*silent(features), *orphans(known, known), *unexplained(cfg, known, found)]
    return Spread(holdings, reached, found, tuple(unknown))
