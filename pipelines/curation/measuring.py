"""Measuring: every clip is decoded once in a child process and becomes one row: good, or with a reason.

A file is read and hashed once for all of a shard's clips; of a large one only what its clips need is read, by range.

The table knows no captions and no splits, so that a changed manifest costs no decoding.
"""

import logging
import os
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

import pyarrow as pa

from aai import storage
from aai.errors import UserError
from aai.media.child import MediaChild
from aai.media.filters import RULES, FilterConfig, broken_rules
from aai.media.limits import ClipError, DecodeConfig
from aai.media.measure import MEASURED_ROW, MeasuredRow, clip_id
from aai.media.ranged import Content, hash_of
from pipelines.curation.curate_config import CurateConfig
from pipelines.curation.layout import KNOWN, MEASURED, shard_file
from pipelines.curation.ledger import Entry, Ledger
from pipelines.engine.ranges import open_file
from pipelines.engine.shards import Result, Shard, run_shards
from pipelines.manifests.row import ManifestRow

log = logging.getLogger(__name__)

READ_AHEAD = 3
"""Files read while one is decoded."""
TRANSIENT = "TRANSIENT"
"""Stands for every code in --retry that may pass next time."""
EARLY_ROWS = 500
"""Rows after which a job with too many rejects is stopped."""
MEASURED_TABLE = pa.schema([pa.field("key", pa.string(), nullable=False), *MEASURED_ROW])
SMALL = [name for name in MEASURED_TABLE.names if name not in ("audio", "frames", "frame_pts_s", "decoder")]
"""The columns that judging needs."""


class ReadFile(NamedTuple):
    """A file's content and the SHA-256 of it."""

    content: Content
    content_hash: str


@dataclass(frozen=True, kw_only=True)
class MeasureShard(Shard):
    """Clips to measure, those of one file together."""

    clips: list[Entry]
    hashes: dict[str, str] = field(default_factory=dict)
    """{uri: SHA-256 of the content} where it is known already."""


@dataclass(frozen=True, kw_only=True)
class MeasureResult(Result):
    """`rejected` counts what cannot be decoded or breaks a filter."""

    rejected: int
    reused: int
    """Clips whose content an earlier run had measured."""


class MeasureWorker:
    """Measures the clips of one shard -> _measured/SHARD.parquet."""

    def __init__(self, out: str, decode: dict[str, Any], filters: dict[str, Any]) -> None:
        self.out, self.decode, self.filters = out, DecodeConfig.parse(decode), FilterConfig.parse(filters)
        self.child = MediaChild(self.decode)

    def __call__(self, shard: MeasureShard) -> MeasureResult:
        """Measures the shard's clips."""
        rows, reused = [], 0
        by_file = [list(clips) for _, clips in groupby(shard.clips, lambda clip: clip.uri)]
        for clips, found in self._read_ahead(by_file, shard.hashes):
            for clip in clips:
                if isinstance(found, ClipError):
                    row = _unread(found)
                elif known := self._known(found.content_hash, clip):
                    row, reused = known, reused + 1
                else:
                    row = self.child.measure(found.content, clip.start_s, clip.end_s, found.content_hash)
                rows.append({**row, "key": clip.key})
        table = pa.Table.from_pylist(rows, schema=MEASURED_TABLE)
        storage.write_table(shard_file(self.out, MEASURED, shard.name), table, row_group_size=64)
        rejected = sum(bool(row.get("code") or broken_rules(row, self.filters)) for row in rows)
        return MeasureResult(rows=len(rows), rejected=rejected, reused=reused)

    def _read_ahead(
        self, groups: Sequence[list[Entry]], hashes: Mapping[str, str]
    ) -> Iterator[tuple[list[Entry], ReadFile | ClipError]]:
        """The clips of each file with its content, or why it cannot be read; the next few files are on their way."""
        waiting: deque[tuple[list[Entry], Future[ReadFile | ClipError]]] = deque()
        with ThreadPoolExecutor(READ_AHEAD) as pool:
            for clips in groups:
                waiting.append((clips, pool.submit(_read, clips[0].uri, self.decode.max_bytes, hashes)))
                if len(waiting) > READ_AHEAD:
                    clips, future = waiting.popleft()
                    yield clips, future.result()
            while waiting:
                clips, future = waiting.popleft()
                yield clips, future.result()

    @cached_property
    def _places(self) -> dict[str, tuple[str, int]]:
        """{clip_id: (shard, row)} of what earlier runs measured."""
        where = storage.join(self.out, KNOWN)
        if not storage.exists(where):
            return {}
        table = storage.read_table(where)
        places = zip(table["shard"].to_pylist(), table["row"].to_pylist(), strict=True)
        return dict(zip(table["clip_id"].to_pylist(), places, strict=True))

    def _known(self, content_hash: str, clip: Entry) -> MeasuredRow | None:
        """An earlier run's row of the same content and window: moved, copied and touched files are not decoded."""
        if not self._places:
            return None
        place = self._places.get(clip_id(content_hash, clip.start_s, clip.end_s))
        if place is None:
            return None
        row: MeasuredRow = storage.read_row(shard_file(self.out, MEASURED, place[0]), place[1])
        return row


def _read(uri: str, max_bytes: int, hashes: Mapping[str, str]) -> ReadFile | ClipError:
    """A file, or why it cannot be read."""
    content = open_file(uri, max_bytes)
    try:
        return content if isinstance(content, ClipError) else ReadFile(content, hashes.get(uri) or hash_of(content))
    except ClipError as error:
        return error


def _unread(error: ClipError) -> MeasuredRow:
    return {"stage": "read", "code": error.code, "message": error.message, "transient": error.transient}


# ---------------------------------------------------------------- the driver's side


class _RejectWatch:
    """Stops a job that is going wrong: the shards that are done stay done."""

    def __init__(self, config: CurateConfig, total: int) -> None:
        self.config, self.after = config, max(EARLY_ROWS, total // 50)
        self.rows = self.rejected = 0

    def __call__(self, result: MeasureResult) -> None:
        self.rows, self.rejected = self.rows + result.rows, self.rejected + result.rejected
        if self.rows >= self.after:
            check_ratio(self.config, self.rejected, self.rows, "so far")


def check_ratio(config: CurateConfig, rejected: int, rows: int, when: str) -> None:
    """Raises UserError when more than `max_reject_ratio` of the rows were rejected."""
    if rejected > config.max_reject_ratio * rows:
        raise UserError(
            "max_reject_ratio",
            config.max_reject_ratio,
            f"{rejected / rows:.0%} of {rows} rows were rejected {when}",
            f"read the reasons under {config.out}, mend the input, or raise it; what is done is kept",
        )


def _retried(config: CurateConfig, ledger: Ledger, keys: Sequence[str]) -> list[Entry]:
    """The clips that --retry names. Raises UserError for a code that no undecodable row has."""
    wanted, found, entries = set(config.retry), Counter[str](), []
    for name, valid in ledger.valid(set(keys)).items():
        file = shard_file(ledger.out, MEASURED, name)
        if not storage.exists(file):
            continue
        here = {entry.key: entry for entry in valid}
        table = storage.read_table(file, ["key", "code", "transient"])
        failed = table.filter(table["code"].is_valid())
        columns = [failed[column].to_pylist() for column in ("key", "code", "transient")]
        for key, code, transient in zip(*columns, strict=True):
            if key not in here:
                continue
            found[code] += 1
            if code in wanted or (TRANSIENT in wanted and transient):
                entries.append(here[key])
    if unknown := wanted - set(found) - {TRANSIENT}:
        known = ", ".join(f"{code} ({count})" for code, count in found.most_common()) or "none"
        verdict = unknown & {rule[0] for rule in RULES}
        remedy = "a filter's verdict changes with --rejudge" if verdict else f"undecodable rows here: {known}"
        raise UserError("retry", ",".join(sorted(unknown)), "is no code of a row that could not be decoded", remedy)
    return entries


def _measured(ledger: Ledger) -> set[str]:
    """The shards whose table is there, and of the clips that the plan has under this name."""

    def is_of_the_plan(name: str) -> bool:
        keys = storage.read_table(shard_file(ledger.out, MEASURED, name), ["key"])["key"].to_pylist()
        return keys == [entry.key for entry in ledger.shards[name]]

    names = sorted(storage.shard_names(storage.join(ledger.out, MEASURED)) & set(ledger.shards))
    with ThreadPoolExecutor(16) as pool:
        return {name for name, is_so in zip(names, pool.map(is_of_the_plan, names), strict=True) if is_so}


def _write_known(out: str, ledger: Ledger, done: set[str]) -> None:
    """Where the good clips of the finished shards lie, so that the same content is not decoded again."""
    places: dict[str, tuple[str, int]] = {}
    for name in sorted(done):
        table = storage.read_table(shard_file(out, MEASURED, name), ["clip_id", "code"])
        ids, codes = table["clip_id"].to_pylist(), table["code"].to_pylist()
        for row, (clip, code) in enumerate(zip(ids, codes, strict=True)):
            if clip and not code:
                places[clip] = (name, row)
    columns = {
        "clip_id": pa.array(list(places), pa.string()),
        "shard": pa.array([shard for shard, _ in places.values()], pa.string()),
        "row": pa.array([row for _, row in places.values()], pa.int64()),
    }
    storage.write_table(storage.join(out, KNOWN), pa.table(columns), row_group_size=65_536)


def measure_rows(
    config: CurateConfig, out: str, rows: Sequence[ManifestRow], keys: Sequence[str]
) -> tuple[Ledger, Counter[str]]:
    """Plans what is new, or to be tried again, and measures every shard that is missing."""
    ledger = Ledger(out)
    done = _measured(ledger)
    again = _retried(config, ledger, keys) if config.retry else []
    new = [_entry(keys[i], rows[i]) for i in ledger.missing(keys)]
    if done and new:
        _write_known(out, ledger, done)
    added = ledger.add([*again, *new], config.rows_per_shard)
    if ledger.batches > 1 and added:
        log.info("curate: %d new or changed rows, %d to try again", len(new), len(again))
    hashes = {row.uri: row.content_hash for row in rows if row.content_hash}
    shards = [_shard(name, entries, hashes) for name, entries in ledger.shards.items()]
    args = {"out": out, "decode": config.decode.model_dump(), "filters": config.filters.model_dump()}
    counts = Counter({"earlier": len(done)})
    watch = _RejectWatch(config, len(rows))

    def on_result(result: MeasureResult) -> None:
        counts.update({"measured": result.rows, "reused": result.reused})
        watch(result)

    logs = os.path.dirname(out)

    def is_done(shard: MeasureShard) -> bool:
        return shard.name in done

    run_shards("curate", shards, MeasureWorker, args, config.cluster, is_done, logs, on_result=on_result)
    return ledger, counts


def _shard(name: str, clips: list[Entry], hashes: Mapping[str, str]) -> MeasureShard:
    known = {clip.uri: hashes[clip.uri] for clip in clips if clip.uri in hashes}
    return MeasureShard(name=name, rows=len(clips), clips=clips, hashes=known)


def _entry(key: str, row: ManifestRow) -> Entry:
    return Entry(key, row.uri, row.start_s, row.end_s)
