"""Judging: which measured clips are taken. Thresholds, correspondence and duplicates, from small columns only."""

import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from aai import storage
from aai.digest import stored_digest
from aai.media.duplicates import EXCLUDED, split_rank
from aai.media.filters import FilterConfig, broken_rules, may_break
from aai.media.measure import MeasuredRow, kind_of
from aai.schema import CLIP_TABLE, PICTURE, REJECT_TABLE, SIMILARITIES
from pipelines.curation.clip_keys import ClipKeys
from pipelines.curation.curate_config import CurateConfig
from pipelines.curation.decoders import DecoderCounts
from pipelines.curation.doubles import find_doubles
from pipelines.curation.layout import ACCEPTED, MEASURED, REJECTED, shard_file
from pipelines.curation.measured import MeasuredTables
from pipelines.curation.near import spread_near_pairs
from pipelines.curation.own_signals import SignalConfig, signal_reasons
from pipelines.curation.similarity import Null, scored_files
from pipelines.curation.table_slices import TableSlices
from pipelines.engine.columns import read_columns
from pipelines.engine.shards import Result, Shard
from pipelines.manifests.extras import NUMBER
from pipelines.manifests.row import ManifestRow

log = logging.getLogger(__name__)

DIGEST = b"aai.judged"
"""Where the tables carry the digest of what they were made of."""
EXCLUDE = "exclude"
"""Stage of the reasons against clips that must not be kept, not even flagged or as a thumbnail."""
BARE = "decode"
"""Stage of the reason against clips that nothing could be learned from, flagged or not."""
Reason = tuple[str, str, str]
"""stage, code, message."""
WHY = ("stage", "code", "message", "transient")
"""What the RejectTable says of a clip."""
_SIMILAR = [field.name for field in SIMILARITIES]
Measured = TableSlices
"""By shard: the small columns of its wanted clips and their scores, one row a clip."""


class Verdicts:
    """What speaks against each clip, by key: no entry, nothing does."""

    def __init__(self) -> None:
        self.reasons: dict[str, list[Reason]] = {}

    def add(self, key: str, stage: str, code: str, message: str) -> None:
        """Notes one more reason."""
        self.reasons.setdefault(key, []).append((stage, code, message))

    def __contains__(self, key: object) -> bool:
        return key in self.reasons


def read_measured(
    measured: MeasuredTables, shards: Mapping[str, ClipKeys], scored: bool, names: Sequence[str] = ()
) -> tuple[TableSlices, DecoderCounts]:
    """The small columns of the shards' wanted clips (shard -> keys), with their scores: null where there are none.

    names: signals that models told beside SIMILARITIES. Besides, who decoded the clips.
    """
    similar = read_columns(scored_files(measured.out, shards), ["key", *_SIMILAR, *names]) if scored else repeat(None)
    found, decoders = TableSlices(), DecoderCounts()
    for (name, table), scores in zip(measured.wanted(shards), similar, strict=False):
        decoders.add(table)
        found.add(name, _with_scores(table.drop_columns("decoder"), scores, names))
    return found, decoders


def _with_scores(table: pa.Table, scores: pa.Table | None, names: Sequence[str]) -> pa.Table:
    # An undecodable clip has no scores: it is not found there, and its place is null.
    places = pc.index_in(table["key"], scores["key"].combine_chunks()) if scores is not None else None
    for score in (*SIMILARITIES, *(pa.field(name, pa.float64()) for name in names)):
        values = pa.nulls(len(table), score.type) if scores is None else scores[score.name].take(places)
        table = table.append_column(score, values)
    return table


# ---------------------------------------------------------------- what speaks against clips


def judge(
    measured: Measured, prints: Mapping[str, pa.Table], rows: Mapping[str, ManifestRow], config: CurateConfig, out: str
) -> tuple[Verdicts, Null | None]:
    """Reasons against the clips; and what the similarity of sound and pictures is by chance, where it was measured.

    prints: by shard, see `find_doubles`; rows: by key. Only clips that pass all else are looked at for duplicates.
    out: where workers may share what that needs.
    """
    verdicts, null = Verdicts(), None
    _exclude(verdicts, measured, prints, rows, config, out)
    _judge_bare(verdicts, measured, rows)
    _judge_signals(verdicts, measured, config.filters)
    _judge_own_signals(verdicts, measured, config.signals, config.scores.prompts)
    if config.scores.bundle:
        null = Null.measure(out, measured, rows, verdicts, config.scores.false_accept_rate)
    if null:
        _judge_correspondence(verdicts, measured, null)
    if config.split_by == "source":
        _judge_sources(verdicts, measured, rows, config)
    search = partial(spread_near_pairs, out=out, cluster=config.cluster)
    doubles = find_doubles(measured, prints, rows, verdicts, (), config.duplicates, search)
    for key, (code, message) in doubles.items():
        verdicts.add(key, "duplicate", code, message)
    return verdicts, null


def _exclude(
    verdicts: Verdicts,
    measured: Measured,
    prints: Mapping[str, pa.Table],
    rows: Mapping[str, ManifestRow],
    config: CurateConfig,
    out: str,
) -> None:
    """Speaks against the clips that are named by id, content or URI, and against all that look and sound like them."""
    listed = config.excluded()
    if not listed:
        return
    named: set[str] = set()
    matched: set[str] = set()
    for key, clip_id, content_hash in _contents(out, measured):
        if key in rows and (hits := listed.intersection((clip_id, content_hash, rows[key].uri, rows[key].image_uri))):
            matched |= hits
            named.add(key)
            verdicts.add(key, EXCLUDE, EXCLUDED, "is named in the list of clips to leave out")
    log.info("curate: %d clips are left out by %s, of whose %d entries %d name none here",
             len(named), config.exclude, len(listed), len(listed) - len(matched))  # fmt: skip
    alike = config.duplicates.model_copy(update={"enabled": True})
    search = partial(spread_near_pairs, out=out, cluster=config.cluster)
    for key, (code, message) in find_doubles(measured, prints, rows, (), named, alike, search).items():
        if code == EXCLUDED and key not in named:
            verdicts.add(key, EXCLUDE, code, message)


def _contents(out: str, shards: Collection[str]) -> Iterator[tuple[str, str, str]]:
    """key, clip_id and content_hash of all clips of these shards."""
    sizes = storage.file_sizes(storage.join(out, MEASURED), ".parquet")
    files = {file: sizes[file] for file in (shard_file(out, MEASURED, name) for name in shards)}
    for table in read_columns(files, ["key", "clip_id", "content_hash"]):
        yield from zip(*(column.to_pylist() for column in table.columns), strict=True)


def _judge_bare(verdicts: Verdicts, measured: Measured, rows: Mapping[str, ManifestRow]) -> None:
    """Speaks against sounds that have neither a picture nor a caption."""
    why = "no video stream, no image_uri and no caption: give the row of the manifest a caption, or a picture's URI"
    for table in measured.values():
        for key in table.filter(is_bare(table))["key"].to_pylist():
            if not rows[key].caption.strip():
                verdicts.add(key, BARE, "NO_VIDEO", why)


def is_bare(measured: pa.Table) -> pa.ChunkedArray:
    """bool [N]: which measured clips could be decoded and show nothing."""
    return pc.and_(measured["code"].is_null(), measured["width"].is_null())


def _judge_signals(verdicts: Verdicts, measured: Measured, filters: FilterConfig) -> None:
    for table in measured.values():
        good = table.filter(table["code"].is_null())
        for row in good.filter(may_break(good, filters)).to_pylist():
            for code, message in broken_rules(row, filters):
                verdicts.add(row["key"], "filter", code, message)


def _judge_own_signals(
    verdicts: Verdicts, measured: Measured, signals: Mapping[str, SignalConfig], seen: Collection[str]
) -> None:
    """seen: signals of pictures, which a clip that shows nothing need not have."""
    heard = {name: signal for name, signal in signals.items() if name not in seen}
    for table in measured.values():
        bare = is_bare(table)
        for good, judged in ((pc.and_(table["code"].is_null(), pc.invert(bare)), signals), (bare, heard)):
            clips = table.filter(good)
            for row, code, message in signal_reasons(clips, judged):
                verdicts.add(clips["key"][row].as_py(), "filter", code, message)


def _judge_correspondence(verdicts: Verdicts, measured: Measured, null: Null) -> None:
    for table in measured.values():
        for key, value in zip(table["key"].to_pylist(), table["av_similarity"].to_pylist(), strict=True):
            if unlike := null.against(value):
                verdicts.add(key, "correspondence", "WRONG_AUDIO", unlike)


def _judge_sources(
    verdicts: Verdicts, measured: Measured, rows: Mapping[str, ManifestRow], config: CurateConfig
) -> None:
    """Speaks against the clips whose video stands in a split that is held out before theirs."""
    first: dict[str, tuple[int, str, str]] = {}
    for key in _undisputed(measured, verdicts):
        row = rows[key]
        source, place = config.source_of(row), (split_rank(row.split), row.split, row.uri)
        if source not in first or place[0] < first[source][0]:
            first[source] = place
    for key in list(_undisputed(measured, verdicts)):
        source = config.source_of(rows[key])
        _, split, uri = first[source]
        if split != rows[key].split:
            verdicts.add(key, "source", "CROSS_SPLIT_SOURCE", f"its video, {source}, is in split {split}, too ({uri})")


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
    picture: str | None = None
    """Of which kind it is, where the tables tell; of one that cannot be decoded nobody knows."""

    def content(self) -> dict[str, object]:
        """All of it as JSON values; the order is part of the digest that tables carry."""
        return {
            "key": self.key,
            **self.row.content(),
            "caption_similarity": self.caption_similarity,
            "av_similarity": self.av_similarity,
            "reasons": self.reasons,
            **({"signals": self.signals} if self.signals else {}),
            **({PICTURE: self.picture} if self.picture else {}),
        }

    def columns(self) -> dict[str, str | float | None]:
        """What the tables have of it beyond their own columns."""
        return {**self.row.extra, **self.signals, "image_uri": self.row.image_uri, PICTURE: self.picture}


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
        return Result(rows=shard.rows, rejected=len(rejected), codes=Counter(str(row["code"]) for row in rejected))

    def _judged(self, measured: MeasuredRow, clip: JudgedClip) -> MeasuredRow:
        """The row of either table: `code` tells which."""
        row = measured | clip.content() | clip.columns()
        row |= final(measured, clip.reasons, self.flag_only)
        if row["code"]:
            is_excluded = any(stage == EXCLUDE for stage, _, _ in clip.reasons)
            return row | {"thumbnail": None if is_excluded else (row["frames"] or [None])[0]}
        return row


def final(measured: Mapping[str, Any], reasons: Sequence[Reason], flag_only: bool) -> MeasuredRow:
    """What becomes of a clip: WHY of one that is rejected, else code=None and its flags."""
    if measured["code"] is not None:
        return {name: measured[name] for name in WHY}
    if reasons and (not flag_only or any(stage in (EXCLUDE, BARE) for stage, _, _ in reasons)):
        return dict(zip(WHY, (*reasons[0], False), strict=True))
    return {"code": None, "flags": [code for _, code, _ in reasons]}


def kinds_of(measured: pa.Table) -> dict[str, str | None]:
    """{key: what the column `picture` says of the clip}."""
    small = measured.select(["key", "code", "motion", "width"]).to_pylist()
    return {row["key"]: kind_of(row) for row in small}


def are_mixed(measured: Measured) -> bool:
    """Whether any clip that could be decoded is not of a video."""
    return any(table.filter(table["code"].is_null())["motion"].null_count for table in measured.values())


def _widened(schema: pa.Schema, columns: Mapping[str, str]) -> pa.Schema:
    """The schema with further columns at its end."""
    kinds = [pa.field(name, pa.float64() if kind == NUMBER else pa.string()) for name, kind in columns.items()]
    return pa.schema([*schema, *kinds])


def judge_shards(
    measured: Measured,
    shards: Mapping[str, ClipKeys],
    rows: Mapping[str, ManifestRow],
    verdicts: Verdicts,
    flag_only: bool,
    further: Mapping[str, str] | None = None,
    signals: Sequence[str] = (),
) -> Iterator[JudgeShard]:
    """What each JudgeWorker needs: its clips with provenance, scores and reasons, under a digest of all that.

    further: columns, {name: number or text}, of the manifest, and `picture` where the tables tell of what kind clips
    are; signals: columns of `measured` that go along.
    """
    columns = {**(further or {}), **dict.fromkeys(signals, NUMBER)}
    for name, keys in shards.items():
        told = measured[name].select(["key", "caption_similarity", "av_similarity", *signals]).to_pylist()
        scores = {row.pop("key"): row for row in told}
        kinds = kinds_of(measured[name]) if PICTURE in columns else {}
        clips = []
        for key in keys:
            of_caption, of_sound = scores[key].pop("caption_similarity"), scores[key].pop("av_similarity")
            reasons = verdicts.reasons.get(key, [])
            clips.append(
                JudgedClip(
                    key=key, row=rows[key], caption_similarity=of_caption, av_similarity=of_sound, reasons=reasons,
                    signals=scores[key], picture=kinds.get(key),
                )
            )  # fmt: skip
        content = [[clip.content() for clip in clips], flag_only, *([columns] if columns else [])]
        yield JudgeShard(name=name, rows=len(clips), clips=clips, digest=stored_digest(content), columns=columns)
