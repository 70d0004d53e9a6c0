"""Judging: which measured clips are taken. Thresholds, correspondence and duplicates, from small columns only."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from aai import storage
from aai.media.duplicates import find_duplicates
from aai.media.filters import broken_rules
from aai.schema import CLIP_TABLE, REJECT_TABLE, SIMILARITIES
from pipelines.curation.measuring import FOLDER as MEASURED
from pipelines.curation.measuring import SMALL, shard_file
from pipelines.curation.near import spread_near_pairs
from pipelines.curation.similarity import Null, read_scores
from pipelines.engine.shards import Result, Shard
from pipelines.manifests.table import Row

if TYPE_CHECKING:
    from pipelines.curate import CurateConfig

DIGEST = b"aai.judged"
"""Where the tables carry the digest of what they were made of."""
PROVENANCE = ("uri", "start_s", "end_s", "caption", "labels", "split")
Reason = tuple[str, str, str]
"""stage, code, message."""


class Verdicts:
    """What speaks against each clip, by key: no entry, nothing does."""

    def __init__(self) -> None:
        self.reasons: dict[str, list[Reason]] = {}

    def add(self, key: str, stage: str, code: str, message: str) -> None:
        """Notes one more reason."""
        self.reasons.setdefault(key, []).append((stage, code, message))

    def __contains__(self, key: str) -> bool:
        return key in self.reasons


def read_measured(
    out: str, shards: Mapping[str, Sequence[str]], rows: Mapping[str, Row], scored: bool
) -> list[dict[str, Any]]:
    """The small columns of the shards' wanted clips (shard -> keys), each with its manifest row and its scores."""
    found = []
    nothing = dict.fromkeys(field.name for field in SIMILARITIES)
    for name, keys in shards.items():
        wanted = set(keys)
        scores = read_scores(out, name) if scored else {}
        for row in storage.read_table(shard_file(out, MEASURED, name), SMALL).to_pylist():
            if row["key"] in wanted:
                found.append({**row, **rows[row["key"]], **scores.get(row["key"], nothing)})
    return found


def judge(rows: Sequence[dict[str, Any]], config: "CurateConfig", null: Null | None, out: str) -> Verdicts:
    """Reasons against the clips. Only those that pass all else are looked at for duplicates; out: where workers may
    share what that needs.
    """
    verdicts = Verdicts()
    good = []
    for row in rows:
        if row["code"]:
            continue
        for code, message in broken_rules(row, config.filters):
            verdicts.add(row["key"], "filter", code, message)
        if null and (unlike := null.against(row)):
            verdicts.add(row["key"], "correspondence", "WRONG_AUDIO", unlike)
        if row["key"] not in verdicts:
            good.append(row)
    search = partial(spread_near_pairs, out=out, cluster=config.cluster)
    for index, (code, message) in find_duplicates(good, config.duplicates, search).items():
        verdicts.add(good[index]["key"], "duplicate", code, message)
    return verdicts


@dataclass(frozen=True, kw_only=True)
class JudgedClip:
    """A measured clip as its manifest row now describes it, with its scores and what speaks against it."""

    key: str
    uri: str
    start_s: float | None
    end_s: float | None
    caption: str
    labels: list[str]
    split: str
    caption_similarity: float | None
    av_similarity: float | None
    reasons: list[Reason]


@dataclass(frozen=True, kw_only=True)
class JudgeShard(Shard):
    """The clips of a measured shard that the manifest still names."""

    clips: list[JudgedClip]
    digest: str
    """Of the clips and of what is done with flagged ones."""


class JudgeWorker:
    """Splits one measured shard into accepted/SHARD.parquet and rejected/SHARD.parquet."""

    def __init__(self, out: str, flag_only: bool) -> None:
        self.out, self.flag_only = out, flag_only

    def __call__(self, shard: JudgeShard) -> Result:
        """Writes the shard's two tables."""
        clips = {clip.key: clip for clip in shard.clips}
        measured = storage.read_table(shard_file(self.out, MEASURED, shard.name))
        accepted, rejected = [], []
        for row in measured.to_pylist():
            if row["key"] not in clips:
                continue
            clip = clips[row["key"]]
            reasons = clip.reasons
            row |= {name: value for name, value in vars(clip).items() if name != "reasons"}
            if row["code"] is None and reasons and not self.flag_only:
                row |= dict(zip(("stage", "code", "message"), reasons[0], strict=True)) | {"transient": False}
            if row["code"]:
                rejected.append(row | {"thumbnail": (row["frames"] or [None])[0]})
            else:
                accepted.append(row | {"flags": [code for _, code, _ in reasons]})
        # accepted/ is written last: when it is there, both are.
        for folder, rows, schema in (("rejected", rejected, REJECT_TABLE), ("accepted", accepted, CLIP_TABLE)):
            table = pa.Table.from_pylist(rows, schema=schema.with_metadata({DIGEST: shard.digest.encode()}))
            storage.write_table(shard_file(self.out, folder, shard.name), table)
        return Result(rows=shard.rows, rejected=len(rejected))


def judge_shards(
    rows: Sequence[dict[str, Any]], shards: Mapping[str, Sequence[str]], verdicts: Verdicts, flag_only: bool
) -> list[JudgeShard]:
    """What each JudgeWorker needs: its clips with provenance, scores and reasons, under a digest of all that."""
    names = (*PROVENANCE, *(field.name for field in SIMILARITIES))
    small = {row["key"]: {"key": row["key"], **{name: row[name] for name in names}} for row in rows}
    out = []
    for shard, keys in shards.items():
        clips = [JudgedClip(**small[key], reasons=verdicts.reasons.get(key, [])) for key in keys]
        content = json.dumps([[vars(clip) for clip in clips], flag_only])
        digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        out.append(JudgeShard(name=shard, rows=len(clips), clips=clips, digest=digest))
    return out
