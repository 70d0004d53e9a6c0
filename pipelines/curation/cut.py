"""Cuts long videos into clips, before anything is decoded: fixed windows, or shots.

Workers look through each file once and keep what they found in OUT/_cut/shard-NAME.json, by file and its stamp: a later
run looks through new and changed files only.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import Any

from aai import storage
from aai.digest import digest, stored_digest
from aai.media.child import MediaChild
from aai.media.limits import ClipError, DecodeConfig
from aai.media.ranged import HashedRanges
from aai.media.shots import Probe, probe_from_json, probe_to_json, require_shots
from pipelines.curation.curate_config import CutConfig
from pipelines.curation.layout import CUT
from pipelines.curation.stamps import stamps_of
from pipelines.engine.kept_blocks import KeptBlocks
from pipelines.engine.ranges import open_file
from pipelines.engine.shards import Result, Shard, run_shards
from pipelines.manifests.packed import PackedRows
from pipelines.manifests.row import ManifestRow
from pipelines.settings import ClusterConfig

log = logging.getLogger(__name__)

_FILES_PER_SHARD = {"windows": 64, "shots": 8}

Span = tuple[float, float | None]
"""(start_s, end_s) of a clip; None = to the end of the file."""


def windows(duration_s: float, cfg: CutConfig) -> list[Span]:
    """Windows from 0 on; the last one ends with the file."""
    stride_s = cfg.stride_s or cfg.window_s
    # Where windows overlap, the first one that reaches the end is the last.
    count = max(1, math.ceil((duration_s - cfg.window_s) / stride_s - 1e-9) + 1)
    found: list[Span] = []
    for number in range(count):
        start_s = round(number * stride_s, 6)
        if start_s < duration_s:
            found.append((start_s, min(round(start_s + cfg.window_s, 6), duration_s)))
    return found


def parts(start_s: float, end_s: float, cfg: CutConfig) -> list[Span]:
    """One shot, or its equal parts of at most max_s."""
    count = max(1, math.ceil((end_s - start_s) / cfg.max_s - 1e-9))
    edges_s = [round(start_s + (end_s - start_s) * number / count, 3) for number in range(count + 1)]
    return list(pairwise(edges_s))


def spans(probe: Probe | ClipError, cfg: CutConfig) -> list[Span]:
    """The clips of a file; empty where it stays whole: it is no longer than one clip, or cannot be cut.

    A file that breaks off before its promised end gets one span more, from there on, so that its decoding tells.
    """
    if isinstance(probe, ClipError):
        return []
    duration_s = math.floor(probe.duration_s * 1000) / 1000  # down, so that no clip ends after its file
    found: list[Span] = []
    if cfg.mode == "shots":
        for start_s, end_s in probe.shots or ():
            found += parts(start_s, end_s, cfg)
    else:
        found = windows(duration_s, cfg)
    if probe.is_whole and len(found) == 1:
        return []
    kept = [span for span in found if span[1] is None or span[1] - span[0] >= cfg.min_s]
    return kept if probe.is_whole or not kept else [*kept, (duration_s, None)]


@dataclass(frozen=True, kw_only=True)
class CutShard(Shard):
    """Files to look through."""

    files: dict[str, str]
    """{key: uri}."""


class CutWorker:
    """Looks through the files of one shard -> _cut/SHARD.json."""

    def __init__(self, out: str, cut: dict[str, Any], decode: dict[str, Any], kept_bytes: int = 0) -> None:
        self.out, self.cut, self.decode = out, CutConfig.parse(cut), DecodeConfig.parse(decode)
        self.kept = KeptBlocks(out, kept_bytes)
        if self.cut.mode == "shots":
            require_shots()  # on every node
        self.child = MediaChild(self.decode)

    def __call__(self, shard: CutShard) -> Result:
        """Looks through the shard's files."""
        found = {key: probe_to_json(self.probe(uri)) for key, uri in shard.files.items()}
        storage.write_json(storage.join(self.out, CUT, f"{shard.name}.json"), found)
        return Result(rows=len(found))

    def probe(self, uri: str) -> Probe | ClipError:
        """What is found in one file, or why it cannot be read; nothing is raised."""
        data = open_file(uri, self.decode.max_bytes, self.kept)
        if isinstance(data, ClipError):  # decoding will tell it again, as a rejected row
            return data
        threshold = self.cut.shot_threshold if self.cut.mode == "shots" else None
        content = data if isinstance(data, bytes) else HashedRanges(data)
        found = self.child.probe(content, threshold, self.cut.max_file_s, self.cut.timeout_s)
        if isinstance(found, ClipError) or isinstance(content, bytes):
            return found
        try:
            return replace(found, content_hash=content.content_hash())
        except ClipError as error:
            return error


def _keys(uris: Sequence[str], cfg: CutConfig) -> dict[str, str]:
    """{uri: key}: what was found under a key holds for as long as the file and what is looked for stay the same."""
    wanted = [cfg.mode, cfg.max_file_s, *([cfg.shot_threshold] if cfg.mode == "shots" else [])]
    stamps = stamps_of(uris)
    return {uri: stored_digest([uri, stamps[uri], *wanted], length=24) for uri in uris}


def _known(out: str) -> dict[str, Probe | ClipError]:
    """What was found so far, by key; a passing failure gives way to what a later run found."""
    found: dict[str, Probe | ClipError] = {}
    for file in storage.list_files(storage.join(out, CUT), ".json"):
        for key, values in storage.read_json(file).items():
            probe = probe_from_json(values)
            if key not in found or not _may_pass(probe):
                found[key] = probe
    return found


def _may_pass(probe: Probe | ClipError | None) -> bool:
    """Whether another look may find more: there was none yet, or it failed for a passing reason."""
    return probe is None or (isinstance(probe, ClipError) and probe.transient)


def _shards(keys: Mapping[str, str], known: Mapping[str, Probe | ClipError], size: int) -> list[CutShard]:
    """New files, and those whose failure may have been a passing one."""
    todo = [(key, uri) for uri, key in keys.items() if _may_pass(known.get(key))]
    shards = []
    for start in range(0, len(todo), size):
        files = dict(todo[start : start + size])
        shards.append(CutShard(name=f"shard-{digest(list(files), 24)}", rows=len(files), files=files))
    return shards


def cut_rows(
    rows: Sequence[ManifestRow],
    cfg: CutConfig,
    decode_cfg: DecodeConfig,
    out: str,
    cluster: ClusterConfig,
    log_dir: str | None = None,
    kept_bytes: int = 0,
) -> Sequence[ManifestRow]:
    """The manifest's rows in their order, those of whole files replaced by their clips.

    out: folder or s3:// prefix; what was found stays in out/_cut. A file that cannot be looked through, or is no longer
    than one clip, stays one row. kept_bytes: of large remote files, on each node's disk for who decodes them. Raises
    UserError where shots are asked for and PySceneDetect is missing.
    """
    if cfg.mode == "none":
        return rows
    uris = list(dict.fromkeys(row.uri for row in rows if _is_whole_file(row)))
    if not uris:
        return rows
    keys = _keys(uris, cfg)
    shards = _shards(keys, _known(out), _FILES_PER_SHARD[cfg.mode])
    arguments = {"out": out, "cut": cfg.model_dump(), "decode": decode_cfg.model_dump(), "kept_bytes": kept_bytes}
    run_shards("cut", shards, CutWorker, arguments, cluster, log_dir=log_dir, unit="file")
    found = _known(out)
    parts = (_clips(row, found[keys[row.uri]], cfg) if _is_whole_file(row) else [row] for row in rows)
    cut = PackedRows(chain.from_iterable(parts))
    failed = sum(isinstance(found[key], ClipError) for key in keys.values())
    log.info("cut: %d rows -> %d clips; %d of %d files cannot be cut", len(rows), len(cut), failed, len(uris))
    return cut


def _clips(row: ManifestRow, probe: Probe | ClipError, cfg: CutConfig) -> list[ManifestRow]:
    """A whole file's clips, or itself, with its hash if that is known."""
    if isinstance(probe, Probe):
        row = replace(row, content_hash=probe.content_hash)
    return [replace(row, start_s=start_s, end_s=end_s) for start_s, end_s in spans(probe, cfg)] or [row]


def _is_whole_file(row: ManifestRow) -> bool:
    return row.start_s is None and row.end_s is None
