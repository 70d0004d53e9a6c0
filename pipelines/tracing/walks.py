"""The walk from a bundle back to its clips, and from clips on to what was made of them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipelines.registry.origins import TrainingRun, descended, made_by, trainings, versions_of
from pipelines.registry.versions import Version
from pipelines.settings import TrackingConfig
from pipelines.tracing.holdings import CLIPS, COLUMNS, LEARNED_FROM, Holding, changed, rows_of, search


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
    found = made_by(sha, fingerprint, trainings(cfg))
    unknown: list[str] = [] if found else ["no training in this store made it"]
    rows: dict[tuple[str, ...], None] = {}
    for uri, training in {each.features: each for each in reversed(found)}.items():
        if reason := changed(training):
            unknown.append(reason)
            continue
        table = rows_of(uri)
        for row in zip(*(table[name].to_pylist() for name in COLUMNS), strict=True):
            if row[-1] in LEARNED_FROM:
                rows[row] = None
    clips = pa.Table.from_pylist([dict(zip(COLUMNS, row, strict=True)) for row in rows], schema=CLIPS)
    return Origin(sha, found, clips, tuple(unknown))


def origin_of_picture(cfg: TrackingConfig, made: Mapping[str, Any]) -> tuple[Origin, list[Version]]:
    """What the model of a picture was made of, and the versions it is registered as. made: the picture's own words."""
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
    """Trainings that nobody can tell of: their tables are gone or hold other clips by now."""

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
        versions = [{"version": each.version, "aliases": list(each.aliases)} for each in self.versions]
        return {"tables": tables, "runs": runs, "versions": versions, "unknown": list(self.unknown)}


def spread_of(cfg: TrackingConfig, wanted: frozenset[str], tables: Sequence[str] = ()) -> Spread:
    """Walks from clips (ids, content hashes, URIs) to the tables, trainings and versions that have them.

    tables: FeatureTables and folders of `aai curate` beside those that trainings name.
    """
    known = trainings(cfg)
    holdings = search([*(each.features for each in known), *tables], [each.aligned for each in known], wanted)
    learned = {each.uri for each in holdings if each.kind == "features" and set(each.by_split()) & set(LEARNED_FROM)}
    unknown, direct = [], []
    for training in known:
        if reason := changed(training):
            unknown.append(f"{training.stage} {training.run_id}: {reason}")
        elif training.features.rstrip("/") in learned:
            direct.append(training)
    reached = descended(direct, known)
    shas = [each.made for each in reached if each.made]
    silent = [each.fingerprint for each in reached if not each.made and each.status == "FINISHED"]
    return Spread(holdings, reached, versions_of(cfg, shas, silent), tuple(unknown))
