"""Judging: which measured clips are taken. Thresholds, correspondence and duplicates, from small columns only."""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from aai import storage
from aai.digest import stored_digest
from aai.media.duplicates import EXCLUDED, EXCLUDED_SPLIT, HashedClip, find_duplicates, split_rank
from aai.media.filters import FilterConfig, broken_rules
from aai.media.measure import MeasuredRow
from aai.schema import CLIP_TABLE, REJECT_TABLE, SIMILARITIES
from pipelines.curation.curate_config import CurateConfig
from pipelines.curation.layout import ACCEPTED, MEASURED, REJECTED, shard_file
from pipelines.curation.measuring import MEASURED_TABLE, SMALL
from pipelines.curation.near import spread_near_pairs
from pipelines.curation.own_signals import SignalConfig, signal_reasons
from pipelines.curation.similarity import Null, read_scores
from pipelines.engine.shards import Result, Shard
from pipelines.manifests.extras import NUMBER
from pipelines.manifests.row import ManifestRow

log = logging.getLogger(__name__)

DIGEST = b"aai.judged"
"""Where the tables carry the digest of what they were made of."""
EXCLUDE = "exclude"
"""Stage of the reasons against clips that must not be kept, not even flagged or as a thumbnail."""
HASHED = ("clip_id", "video_hash", "audio_hash", "duration_s", "picture_print", "sound_print")
"""What duplicates are told by."""
Reason = tuple[str, str, str]
"""stage, code, message."""
Measured = Mapping[str, pa.Table]
"""By shard: the small columns of its wanted clips and their scores, one row a clip."""


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
    out: str, shards: Mapping[str, Sequence[str]], scored: bool, names: Sequence[str] = ()
) -> dict[str, pa.Table]:
    """The small columns of the shards' wanted clips (shard -> keys), with their scores: null where there are none.

    names: signals that models told beside SIMILARITIES.
    """
    found = {}
    for name, keys in shards.items():
        table = storage.read_table(shard_file(out, MEASURED, name), SMALL, MEASURED_TABLE)
        table = table.filter(pc.is_in(table["key"], pa.array(keys, pa.string())))
        scores = read_scores(out, name, names) if scored else None
        # An undecodable clip has no scores: it is not found there, and its place is null.
        places = pc.index_in(table["key"], scores["key"].combine_chunks()) if scores is not None else None
        for score in (*SIMILARITIES, *(pa.field(name, pa.float64()) for name in names)):
            values = pa.nulls(len(table), score.type) if scores is None else scores[score.name].take(places)
            table = table.append_column(score, values)
        found[name] = table
    return found


# ---------------------------------------------------------------- what speaks against clips


def judge(
    measured: Measured, rows: Mapping[str, ManifestRow], config: CurateConfig, out: str
) -> tuple[Verdicts, Null | None]:
    """Reasons against the clips; and what the similarity of sound and pictures is by chance, where it was measured.

    rows: by key. Only clips that pass all else are looked at for duplicates. out: where workers may share what that
    needs.
    """
    verdicts, null = Verdicts(), None
    _exclude(verdicts, measured, rows, config, out)
    _judge_signals(verdicts, measured, config.filters)
    _judge_own_signals(verdicts, measured, config.signals)
    if config.scores.bundle:
        good = set(_undisputed(measured, verdicts))
        null = Null.measure(out, list(measured), rows, good, config.scores.false_accept_rate)
    if null:
        _judge_correspondence(verdicts, measured, null)
    if config.split_by == "source":
        _judge_sources(verdicts, measured, rows, config)
    _judge_duplicates(verdicts, measured, rows, config, out)
    return verdicts, null


def _exclude(
    verdicts: Verdicts, measured: Measured, rows: Mapping[str, ManifestRow], config: CurateConfig, out: str
) -> None:
    """Speaks against the clips that are named by id, content or URI, and against all that look and sound like them."""
    listed = config.excluded()
    if not listed:
        return
    named: set[str] = set()
    matched: set[str] = set()
    for table in measured.values():
        columns = [table[name].to_pylist() for name in ("key", "clip_id", "content_hash")]
        for key, clip_id, content_hash in zip(*columns, strict=True):
            if hits := listed.intersection((clip_id, content_hash, rows[key].uri)):
                matched |= hits
                named.add(key)
                verdicts.add(key, EXCLUDE, EXCLUDED, "is named in the list of clips to leave out")
    log.info("curate: %d clips are left out by %s, of whose %d entries %d name none here",
             len(named), config.exclude, len(listed), len(listed) - len(matched))  # fmt: skip
    decoded = [key for table in measured.values() for key in table["key"].filter(table["code"].is_null()).to_pylist()]
    keys, clips = _hashed(measured, rows, set(decoded), named)
    alike = config.duplicates.model_copy(update={"enabled": True})
    search = partial(spread_near_pairs, out=out, cluster=config.cluster)
    for index, (code, message) in find_duplicates(clips, alike, search).items():
        if code == EXCLUDED and keys[index] not in named:
            verdicts.add(keys[index], EXCLUDE, code, message)


def _hashed(
    measured: Measured, rows: Mapping[str, ManifestRow], wanted: set[str], excluded: Collection[str] = ()
) -> tuple[list[str], list[HashedClip]]:
    """The wanted clips, by key, as duplicates are looked for; excluded ones are of a split that wins."""
    keys, clips = [], []
    for table in measured.values():
        columns = table.select(("key", *HASHED)).to_pydict()
        for key, *values in zip(*columns.values(), strict=True):
            if key in wanted:
                keys.append(key)
                uri, split = rows[key].uri, EXCLUDED_SPLIT if key in excluded else rows[key].split
                clips.append(HashedClip(uri=uri, split=split, **dict(zip(HASHED, values, strict=True))))
    if unprinted := sum(clip.sound_print is None for clip in clips):
        log.warning("curate: %d of %d clips were measured by a version that made no prints: edited copies of them are"
                    " not looked for; curate into another out to measure them anew", unprinted, len(clips))  # fmt: skip
    return keys, clips


def _judge_signals(verdicts: Verdicts, measured: Measured, filters: FilterConfig) -> None:
    for table in measured.values():
        for row in table.filter(table["code"].is_null()).to_pylist():
            for code, message in broken_rules(row, filters):
                verdicts.add(row["key"], "filter", code, message)


def _judge_own_signals(verdicts: Verdicts, measured: Measured, signals: Mapping[str, SignalConfig]) -> None:
    for table in measured.values():
        good = table.filter(table["code"].is_null())
        for row, code, message in signal_reasons(good, signals):
            verdicts.add(good["key"][row].as_py(), "filter", code, message)


def _judge_correspondence(verdicts: Verdicts, measured: Measured, null: Null) -> None:
    for table in measured.values():
        for key, value in zip(table["key"].to_pylist(), table["av_similarity"].to_pylist(), strict=True):
            if unlike := null.against(value):
                verdicts.add(key, "correspondence", "WRONG_AUDIO", unlike)


def _judge_sources(
    verdicts: Verdicts, measured: Measured, rows: Mapping[str, ManifestRow], config: CurateConfig
) -> None:
    """Speaks against the clips whose video stands in a split that is held out before theirs."""
    good = list(_undisputed(measured, verdicts))
    first: dict[str, ManifestRow] = {}
    for key in good:
        row, source = rows[key], config.source_of(rows[key])
        first[source] = min(first.get(source, row), row, key=lambda row: split_rank(row.split))
    for key in good:
        source = config.source_of(rows[key])
        if (other := first[source]).split != rows[key].split:
            where = f"its video, {source}, is in split {other.split}, too ({other.uri})"
            verdicts.add(key, "source", "CROSS_SPLIT_SOURCE", where)


def _judge_duplicates(
    verdicts: Verdicts, measured: Measured, rows: Mapping[str, ManifestRow], config: CurateConfig, out: str
) -> None:
    keys, clips = _hashed(measured, rows, set(_undisputed(measured, verdicts)))
    search = partial(spread_near_pairs, out=out, cluster=config.cluster)
    for index, (code, message) in find_duplicates(clips, config.duplicates, search).items():
        verdicts.add(keys[index], "duplicate", code, message)


def _undisputed(measured: Measured, verdicts: Verdicts) -> Iterator[str]:
    """Keys of the clips that could be decoded and that nothing speaks against so far."""
    for table in measured.values():
        for key in table["key"].filter(table["code"].is_null()).to_pylist():
            if key not in verdicts:
                yield key


# ---------------------------------------------------------------- writing the tables


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgedClip:
    """A measured clip as its manifest row now describes it, with its scores and what speaks against it."""

    key: str
    row: ManifestRow
    caption_similarity: float | None
    av_similarity: float | None
    reasons: list[Reason]
    signals: dict[str, float | None] = field(default_factory=dict)
    """Signals that are not measured here."""

    def content(self) -> dict[str, object]:
        """All of it as JSON values; the order is part of the digest that tables carry."""
        return {
            "key": self.key,
            **self.row.content(),
            "caption_similarity": self.caption_similarity,
            "av_similarity": self.av_similarity,
            "reasons": self.reasons,
            **({"signals": self.signals} if self.signals else {}),
        }

    def columns(self) -> dict[str, str | float | None]:
        """What the tables have of it beyond their own columns."""
        return {**self.row.extra, **self.signals}


@dataclass(frozen=True, kw_only=True)
class JudgeShard(Shard):
    """The clips of a measured shard that the manifest still names."""

    clips: list[JudgedClip]
    digest: str
    """Of the clips and of what is done with flagged ones."""
    columns: dict[str, str] = field(default_factory=dict)
    """{name: number or text} of the columns that tables have beyond their own: the same for all shards."""


class JudgeWorker:
    """Splits one measured shard into accepted/SHARD.parquet and rejected/SHARD.parquet."""

    def __init__(self, out: str, flag_only: bool) -> None:
        self.out, self.flag_only = out, flag_only

    def __call__(self, shard: JudgeShard) -> Result:
        """Writes the shard's two tables."""
        clips = {clip.key: clip for clip in shard.clips}
        measured = storage.read_table(shard_file(self.out, MEASURED, shard.name))
        accepted: list[MeasuredRow] = []
        rejected: list[MeasuredRow] = []
        for row in measured.to_pylist():
            if row["key"] not in clips:
                continue
            judged = self._judged(row, clips[row["key"]])
            (rejected if judged["code"] else accepted).append(judged)
        # One after the other: a shard is done when both carry its digest.
        for folder, rows, schema in ((REJECTED, rejected, REJECT_TABLE), (ACCEPTED, accepted, CLIP_TABLE)):
            schema = _widened(schema, shard.columns).with_metadata({DIGEST: shard.digest.encode()})
            table = pa.Table.from_pylist(rows, schema=schema)
            storage.write_table(shard_file(self.out, folder, shard.name), table)
        return Result(rows=shard.rows, rejected=len(rejected))

    def _judged(self, measured: MeasuredRow, clip: JudgedClip) -> MeasuredRow:
        """The row of either table: `code` tells which."""
        row = measured | clip.content() | clip.columns()
        is_excluded = any(stage == EXCLUDE for stage, _, _ in clip.reasons)
        if row["code"] is None and clip.reasons and (is_excluded or not self.flag_only):
            stage, code, message = clip.reasons[0]
            row |= {"stage": stage, "code": code, "message": message, "transient": False}
        if row["code"]:
            return row | {"thumbnail": None if is_excluded else (row["frames"] or [None])[0]}
        return row | {"flags": [code for _, code, _ in clip.reasons]}


def _widened(schema: pa.Schema, columns: Mapping[str, str]) -> pa.Schema:
    """The schema with further columns at its end."""
    kinds = [pa.field(name, pa.float64() if kind == NUMBER else pa.string()) for name, kind in columns.items()]
    return pa.schema([*schema, *kinds])


def judge_shards(
    measured: Measured,
    shards: Mapping[str, Sequence[str]],
    rows: Mapping[str, ManifestRow],
    verdicts: Verdicts,
    flag_only: bool,
    further: Mapping[str, str] | None = None,
    signals: Sequence[str] = (),
) -> list[JudgeShard]:
    """What each JudgeWorker needs: its clips with provenance, scores and reasons, under a digest of all that.

    further: the manifest's further columns, {name: number or text}; signals: columns of `measured` that go along.
    """
    out = []
    columns = {**(further or {}), **dict.fromkeys(signals, NUMBER)}
    for name, keys in shards.items():
        told = measured[name].select(["key", "caption_similarity", "av_similarity", *signals]).to_pylist()
        scores = {row.pop("key"): row for row in told}
        clips = []
        for key in keys:
            of_caption, of_sound = scores[key].pop("caption_similarity"), scores[key].pop("av_similarity")
            reasons = verdicts.reasons.get(key, [])
            clips.append(
                JudgedClip(
                    key=key, row=rows[key], caption_similarity=of_caption, av_similarity=of_sound, reasons=reasons,
                    signals=scores[key],
                )
            )  # fmt: skip
        content = [[clip.content() for clip in clips], flag_only, *([columns] if columns else [])]
        out.append(JudgeShard(name=name, rows=len(clips), clips=clips, digest=stored_digest(content), columns=columns))
    return out
