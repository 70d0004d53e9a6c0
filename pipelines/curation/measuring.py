"""Measuring: every clip is decoded once in a child process and becomes one row: good, or with a reason.

A file is read and hashed once for all of a shard's clips; of a large one only what its clips need is read, by range.

The table knows no captions and no splits, so that a changed manifest costs no decoding.
"""

import logging
import os
from collections import Counter, deque
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple, cast

import pyarrow as pa

from aai import storage
from aai.errors import UserError
from aai.media.child import MediaChild
from aai.media.filters import RULES, FilterConfig, broken_rules
from aai.media.limits import ClipError, DecodeConfig
from aai.media.measure import VIDEO, MeasuredRow, Shown, clip_id, kind_of
from aai.media.ranged import Content, hash_of
from aai.schema import VIDEO_PICTURES
from pipelines.curation.clip_keys import ClipKeys
from pipelines.curation.curate_config import CurateConfig
from pipelines.curation.known_clips import KnownClips, write_known
from pipelines.curation.layout import MEASURED, WAITING, shard_file, shard_of
from pipelines.curation.ledger import Entry, Ledger
from pipelines.curation.measured import MEASURED_TABLE, MeasuredTables
from pipelines.engine.columns import read_columns
from pipelines.engine.kept_blocks import KeptBlocks, remove_kept
from pipelines.engine.ranges import open_file
from pipelines.engine.reading import read_file
from pipelines.engine.shards import Result, Shard, run_shards
from pipelines.manifests.row import ManifestRow
from pipelines.manifests.sources import names_sound

log = logging.getLogger(__name__)

MAX_STILL_BYTES = 64 * 2**20
"""Largest picture file that is read."""
READ_AHEAD = 3
"""Files read while one is decoded."""
TRANSIENT = "TRANSIENT"
"""Stands for every code in --retry that may pass next time."""
BATCH_ROWS = 65_536
"""About how many clips are planned in one file."""
EARLY_ROWS = 500
"""Rows after which a job with too many rejects is stopped."""


class ReadFile(NamedTuple):
    """A file's content, the SHA-256 of it, and by URI its clips' still pictures, or why they are not there."""

    content: Content
    content_hash: str
    stills: dict[str, bytes | ClipError]


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
    kept: bool = False
    """Whether blocks of files may lie on the node's disk now."""


class MeasureWorker:
    """Measures the clips of one shard -> _measured/SHARD.parquet."""

    def __init__(self, out: str, decode: dict[str, Any], filters: dict[str, Any], kept_bytes: int = 0) -> None:
        self.out, self.decode, self.filters = out, DecodeConfig.parse(decode), FilterConfig.parse(filters)
        self.child = MediaChild(self.decode)
        self.known, self.kept = KnownClips(out), KeptBlocks(out, kept_bytes)

    def __call__(self, shard: MeasureShard) -> MeasureResult:
        """Measures the shard's clips."""
        rows, reused = [], 0
        by_file = [list(clips) for _, clips in groupby(shard.clips, lambda clip: clip.uri)]
        for clips, found in self._read_ahead(by_file, shard.hashes):
            for clip in clips:
                shown = found if isinstance(found, ClipError) else _shown(clip, found)
                if isinstance(found, ClipError) or isinstance(shown, ClipError):
                    row = _unread(cast(ClipError, shown))
                elif known := self._known(clip, found, shown):
                    row, reused = known, reused + 1
                else:
                    row = self.child.measure(found.content, clip.start_s, clip.end_s, found.content_hash, shown)
                rows.append({**row, "key": clip.key})
        table = pa.Table.from_pylist(rows, schema=MEASURED_TABLE)
        storage.write_table(shard_file(self.out, MEASURED, shard.name), table)
        broken = [row.get("code") or next((code for code, _ in broken_rules(row, self.filters)), None) for row in rows]
        codes = Counter(code for code in broken if code)
        return MeasureResult(rows=len(rows), rejected=codes.total(), codes=codes, reused=reused, kept=self.kept.in_use)

    def _read_ahead(
        self, groups: Sequence[list[Entry]], hashes: Mapping[str, str]
    ) -> Iterator[tuple[list[Entry], ReadFile | ClipError]]:
        """The clips of each file with its content, or why it cannot be read; the next few files are on their way."""
        waiting: deque[tuple[list[Entry], Future[ReadFile | ClipError]]] = deque()
        with ThreadPoolExecutor(READ_AHEAD) as pool:
            for clips in groups:
                waiting.append((clips, pool.submit(_read, clips, self.decode.max_bytes, hashes, self.kept)))
                if len(waiting) > READ_AHEAD:
                    clips, future = waiting.popleft()
                    yield clips, future.result()
            while waiting:
                clips, future = waiting.popleft()
                yield clips, future.result()

    def _known(self, clip: Entry, found: ReadFile, shown: Shown) -> MeasuredRow | None:
        """What an earlier run measured of the same content."""
        row = self.known.find(clip_id(found.content_hash, clip.start_s, clip.end_s, shown.still_hash))
        is_other = row is not None and shown == VIDEO and kind_of(row) != VIDEO_PICTURES
        return None if is_other else row


def _read(clips: Sequence[Entry], max_bytes: int, hashes: Mapping[str, str], kept: KeptBlocks) -> ReadFile | ClipError:
    """The file of some clips, or why it cannot be read."""
    uri = clips[0].uri
    content = open_file(uri, max_bytes, kept)
    if isinstance(content, ClipError):
        return content
    stills = {clip.image_uri for clip in clips if clip.image_uri is not None}
    try:
        content_hash = hashes.get(uri) or hash_of(content)
    except ClipError as error:
        return error
    return ReadFile(content, content_hash, {still: read_file(still, MAX_STILL_BYTES) for still in stills})


def _shown(clip: Entry, found: ReadFile) -> Shown | ClipError:
    """What a clip of a file shows, or why its still picture cannot be read."""
    if clip.image_uri is None:
        return Shown(must_be_video=not names_sound(clip.uri))
    still = found.stills[clip.image_uri]
    if isinstance(still, ClipError):
        return ClipError(still.code, f"its picture, {clip.image_uri}: {still.message}", still.transient)
    return Shown(still=still)


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


def _retried(config: CurateConfig, ledger: Ledger, keys: ClipKeys) -> list[Entry]:
    """The clips that --retry names. Raises UserError for a code that no undecodable row has."""
    wanted, found, entries = set(config.retry), Counter[str](), []
    valid, files = ledger.valid(keys), storage.file_sizes(storage.join(ledger.out, MEASURED), ".parquet")
    files = {file: size for file, size in files.items() if shard_of(file) in valid}
    for file, table in zip(files, read_columns(files, ["key", "code", "transient"]), strict=True):
        failed = table.filter(table["code"].is_valid())
        if not len(failed):
            continue
        name, again = shard_of(file), set[str]()
        columns = [failed[column].to_pylist() for column in ("key", "code", "transient")]
        for key, code, transient in zip(*columns, strict=True):
            if key not in valid[name]:
                continue
            found[code] += 1
            if code in wanted or (TRANSIENT in wanted and transient):
                again.add(key)
        entries += [entry for entry in ledger.shards[name] if entry.key in again]
    if unknown := wanted - set(found) - {TRANSIENT}:
        known = ", ".join(f"{code} ({count})" for code, count in found.most_common()) or "none"
        verdict = unknown & {rule[0] for rule in RULES}
        remedy = "a filter's verdict changes with --rejudge" if verdict else f"undecodable rows here: {known}"
        raise UserError("retry", ",".join(sorted(unknown)), "is no code of a row that could not be decoded", remedy)
    return entries


def measure_rows(
    config: CurateConfig, out: str, rows: Sequence[ManifestRow], keys: ClipKeys, measured: MeasuredTables
) -> tuple[dict[str, ClipKeys], Counter[str]]:
    """Plans what is new, or to be tried again, and measures every shard that is missing.

    Returns the shards with the keys of their wanted clips, and how many were there, measured and reused.
    """
    ledger = Ledger(out)
    done = measured.of_the_plan(ledger)
    again = _retried(config, ledger, keys) if config.retry else []
    new = list(ledger.missing(keys))
    if done and new:
        write_known(out, done & ledger.shards.keys())
    added = ledger.add(again, config.rows_per_shard)
    at_once = max(1, BATCH_ROWS // config.rows_per_shard) * config.rows_per_shard
    for start in range(0, len(new), at_once):
        entries = [_entry(keys[i], rows[i]) for i in new[start : start + at_once]]
        added += ledger.add(entries, config.rows_per_shard)
    if added and added != list(ledger.shards):
        log.info("curate: %d new or changed rows, %d to try again", len(new), len(again))
    hashes = {row.uri: row.content_hash for row in rows if row.content_hash}
    args = {
        "out": out,
        "decode": config.decode.model_dump(),
        "filters": config.filters.model_dump(),
        "kept_bytes": config.kept_bytes,
    }
    counts = Counter({"earlier": len(done)})
    watch = _RejectWatch(config, len(rows))

    def on_result(result: MeasureResult) -> None:
        counts.update({"measured": result.rows, "reused": result.reused, "kept": int(result.kept)})
        watch(result)

    shards, logs, waiting = _shards(ledger, done, hashes), os.path.dirname(out), storage.join(out, WAITING)

    def is_done(shard: MeasureShard) -> bool:
        return shard.name in done

    run_shards(
        "curate", shards, MeasureWorker, args, config.cluster, is_done, logs, on_result=on_result, waiting=waiting
    )
    if counts["kept"]:
        remove_kept(out)
    return ledger.valid(keys), counts


def _shards(ledger: Ledger, done: Container[str], hashes: Mapping[str, str]) -> Iterator[MeasureShard]:
    """All shards of the plan; of those that are done nobody needs the clips."""
    for name in ledger.shards:
        clips = [] if name in done else ledger.shards[name]
        known = {clip.uri: hashes[clip.uri] for clip in clips if clip.uri in hashes}
        yield MeasureShard(name=name, rows=ledger.shards.rows(name), clips=clips, hashes=known)


def _entry(key: str, row: ManifestRow) -> Entry:
    return Entry(key, row.uri, row.start_s, row.end_s, row.image_uri)
