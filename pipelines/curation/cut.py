"""Cuts long videos into clips, before anything is decoded: fixed windows, or shots.

Workers look through each file once and keep what they found in OUT/_cut/shard-NAME.json, by file and its stamp: a later
run looks through new and changed files only.
"""

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Self

import pydantic

from aai import storage
from aai.config import Config
from aai.media.child import MediaChild
from aai.media.limits import ClipError, DecodeConfig
from aai.media.shots import Probe, failed_probe, require_shots
from pipelines.curation.measuring import read_file
from pipelines.engine.shards import Result, Shard, run_shards
from pipelines.manifests.table import Row
from pipelines.settings import ClusterConfig

log = logging.getLogger(__name__)

FOLDER = "_cut"
_FILES_PER_SHARD = {"windows": 64, "shots": 8}

Span = tuple[float, float | None]
"""(start_s, end_s) of a clip; None = to the end of the file."""


class CutConfig(Config):
    """How long videos become clips. Rows that have a start_s or end_s are clips already and stay as they are."""

    mode: Literal["none", "windows", "shots"] = "none"
    """none: a file is a clip; windows: clips of a fixed length; shots: a clip for each shot (needs `aai[shots]`)."""
    window_s: float = pydantic.Field(10.0, gt=0)
    """Length of a window."""
    stride_s: float | None = pydantic.Field(None, ge=0.1)
    """From one window's start to the next; empty = window_s, so that windows neither overlap nor leave gaps."""
    min_s: float = pydantic.Field(2.0, ge=0)
    """Shorter shots, and shorter rests at the end of a file, are left out."""
    max_s: float = pydantic.Field(30.0, gt=0)
    """Longer shots are divided into equal parts of at most this length."""
    shot_threshold: float = pydantic.Field(3.0, gt=1)
    """How many times stronger than its neighbours' a change of picture must be to end a shot."""
    max_file_s: float = pydantic.Field(6 * 3600, gt=0)
    """Longest file that is cut; a longer one stays a clip of its own (which decoding then refuses)."""
    timeout_s: float = pydantic.Field(900, gt=0)
    """Wall-clock limit for looking through one file."""

    @pydantic.model_validator(mode="after")
    def _lengths(self) -> Self:
        if self.min_s > min(self.window_s, self.max_s):
            raise ValueError("min_s is longer than window_s or max_s: no clip would be left")
        return self


def windows(duration_s: float, cfg: CutConfig) -> list[Span]:
    """Windows from 0 on; the last one ends with the file."""
    stride_s = cfg.stride_s or cfg.window_s
    # Where windows overlap, the first one that reaches the end is the last.
    count = max(1, math.ceil((duration_s - cfg.window_s) / stride_s - 1e-9) + 1)
    starts_s = [round(number * stride_s, 6) for number in range(count)]
    return [
        (start_s, min(round(start_s + cfg.window_s, 6), duration_s)) for start_s in starts_s if start_s < duration_s
    ]


def parts(start_s: float, end_s: float, cfg: CutConfig) -> list[Span]:
    """One shot, or its equal parts of at most max_s."""
    count = max(1, math.ceil((end_s - start_s) / cfg.max_s - 1e-9))
    edges_s = [round(start_s + (end_s - start_s) * number / count, 3) for number in range(count + 1)]
    return list(pairwise(edges_s))


def spans(probe: Probe, cfg: CutConfig) -> list[Span]:
    """The clips of a file; empty where it stays whole: it is no longer than one clip, or cannot be cut.

    A file that breaks off before its promised end gets one span more, from there on, so that its decoding tells.
    """
    if "code" in probe:
        return []
    duration_s = math.floor(probe["duration_s"] * 1000) / 1000
    if cfg.mode == "shots":
        found = [part for start_s, end_s in probe["shots"] for part in parts(start_s, end_s, cfg)]
    else:
        found = windows(duration_s, cfg)
    if probe["is_whole"] and len(found) == 1:
        return []
    kept = [(start_s, end_s) for start_s, end_s in found if end_s is None or end_s - start_s >= cfg.min_s]
    return kept if probe["is_whole"] or not kept else [*kept, (duration_s, None)]


@dataclass(frozen=True, kw_only=True)
class CutShard(Shard):
    """Files to look through."""

    files: dict[str, str]
    """{key: uri}."""


class CutWorker:
    """Looks through the files of one shard -> _cut/SHARD.json."""

    def __init__(self, out: str, cut: dict[str, Any], decode: dict[str, Any]) -> None:
        self.out, self.cut, self.decode = out, CutConfig.parse(cut), DecodeConfig.parse(decode)
        if self.cut.mode == "shots":
            require_shots()  # on every node
        self.child = MediaChild(self.decode)

    def __call__(self, shard: CutShard) -> Result:
        """Looks through the shard's files."""
        found = {key: self.probe(uri) for key, uri in shard.files.items()}
        storage.write_json(storage.join(self.out, FOLDER, f"{shard.name}.json"), found)
        return Result(rows=len(found))

    def probe(self, uri: str) -> Probe:
        """What is found in one file; a file that cannot be read is told of, nothing is raised."""
        data = read_file(uri, self.decode.max_bytes)
        if isinstance(data, ClipError):  # decoding will tell it again, as a rejected row
            return failed_probe(data)
        threshold = self.cut.shot_threshold if self.cut.mode == "shots" else None
        return self.child.probe(data, threshold, self.cut.max_file_s, self.cut.timeout_s)


def _keys(uris: Sequence[str], cfg: CutConfig) -> dict[str, str]:
    """{uri: key}: what was found under a key holds for as long as the file and what is looked for stay the same."""
    wanted = [cfg.mode, cfg.max_file_s, *([cfg.shot_threshold] if cfg.mode == "shots" else [])]
    stamps = storage.stamps(uris)
    return {uri: _short_hash([uri, stamps[uri], *wanted]) for uri in uris}


def _short_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:24]


def _known(out: str) -> dict[str, Probe]:
    """What was found so far, by key; a passing failure gives way to what a later run found."""
    found: dict[str, Probe] = {}
    for file in storage.list_files(storage.join(out, FOLDER), ".json"):
        probes: dict[str, Probe] = storage.read_json(file)
        found |= {key: probe for key, probe in probes.items() if key not in found or not probe.get("transient")}
    return found


def _shards(keys: Mapping[str, str], known: Mapping[str, Probe], size: int) -> list[CutShard]:
    """New files, and those whose failure may have been a passing one."""
    todo = {key: uri for uri, key in keys.items() if known.get(key, {"transient": True}).get("transient")}
    names = list(todo)
    parts = [names[i : i + size] for i in range(0, len(names), size)]
    return [
        CutShard(name=f"shard-{_short_hash(part)}", rows=len(part), files={key: todo[key] for key in part})
        for part in parts
    ]


def cut_rows(
    rows: Sequence[Row],
    cfg: CutConfig,
    decode_cfg: DecodeConfig,
    out: str,
    cluster: ClusterConfig,
    log_dir: str | None = None,
) -> list[Row]:
    """The manifest's rows in their order, those of whole files replaced by their clips.

    out: folder or s3:// prefix; what was found stays in out/_cut. A file that cannot be looked through, or is no longer
    than one clip, stays one row. Raises UserError where shots are asked for and PySceneDetect is missing.
    """
    uris = list(dict.fromkeys(row["uri"] for row in rows if _is_whole_file(row)))
    if cfg.mode == "none" or not uris:
        return list(rows)
    keys = _keys(uris, cfg)
    shards = _shards(keys, _known(out), _FILES_PER_SHARD[cfg.mode])
    arguments = {"out": out, "cut": cfg.model_dump(), "decode": decode_cfg.model_dump()}
    run_shards("cut", shards, CutWorker, arguments, cluster, log_dir=log_dir, unit="file")
    found = _known(out)
    cut: list[Row] = []
    for row in rows:
        clips = spans(found[keys[row["uri"]]], cfg) if _is_whole_file(row) else []
        cut += [row | {"start_s": start_s, "end_s": end_s} for start_s, end_s in clips] or [row]
    failed = sum("code" in found[key] for key in keys.values())
    log.info("cut: %d rows -> %d clips; %d of %d files cannot be cut", len(rows), len(cut), failed, len(uris))
    return cut


def _is_whole_file(row: Row) -> bool:
    return row["start_s"] is None and row["end_s"] is None
