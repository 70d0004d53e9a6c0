"""Decodes every clip of a manifest once, measures it, filters it, drops duplicates.

out/accepted holds the ClipTable, out/rejected the RejectTable with the reason of every row that was not taken:
rows in = accepted + rejected. out/curate.json holds the counts.
"""

import argparse
import hashlib
import io
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pydantic
from PIL import Image

from aai import storage
from aai.errors import UserError
from aai.media.audio import encode_flac
from aai.media.decode import ClipError, DecodeConfig, decode_clip
from aai.media.duplicates import DuplicateConfig, find_duplicates
from aai.media.filters import FilterConfig, verdict
from aai.media.signals import measure
from aai.schema import CLIP_TABLE, REJECT_TABLE, SIGNALS, VERSION
from pipelines.manifest import Row, fingerprint, read_manifest
from pipelines.settings import Plan, VerbConfig
from pipelines.shards import Result, Shard, run_shards

log = logging.getLogger(__name__)

JPEG_QUALITY = 92
_ERROR_FIELDS = [REJECT_TABLE.field(name) for name in ("stage", "code", "message", "transient")]
MEASURED_TABLE = pa.schema([f.with_nullable(True) for f in [*CLIP_TABLE, *_ERROR_FIELDS]])
"""Between measuring and judging: a ClipTable row, or provenance and an error."""


class CurateConfig(VerbConfig):
    """Settings of `aai curate`."""

    manifest: str
    """CSV or Parquet (uri, start_s, end_s, caption, labels, split), or a folder of media files."""
    media_root: str | None = None
    """Folder of the videos when the manifest is a VGGSound CSV (id, start, label, split)."""
    out: str
    """Folder or s3:// prefix of the tables."""
    default_split: str = "train"
    """Split of rows that name none."""
    rows_per_shard: int = pydantic.Field(128, ge=1)
    """Rows of one unit of work, and of one Parquet file."""
    decode: DecodeConfig = DecodeConfig()
    filters: FilterConfig = FilterConfig()
    duplicates: DuplicateConfig = DuplicateConfig()
    max_reject_ratio: float = pydantic.Field(0.5, ge=0, le=1)
    """Share of rejected rows above which the stage fails: something is wrong with the data or the settings."""

    def plan(self) -> Plan:
        """Counts the manifest's rows; decodes nothing."""
        rows = len(read_manifest(self.manifest, self.media_root, self.default_split))
        shards = -(-rows // self.rows_per_shard)
        return Plan(
            inputs={"manifest": f"{self.manifest} ({rows} rows, {shards} shards)"},
            outputs={"accepted": storage.join(self.out, "accepted"), "rejected": storage.join(self.out, "rejected")},
            resources=self.resources(),
        )

    def content_digest(self) -> str:
        """The digest of the settings that decide what stands in the tables."""
        parts = {"decode", "filters", "duplicates", "rows_per_shard"}
        text = f"{VERSION} {self.model_dump_json(include=parts)}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]


CONFIG = CurateConfig


def add_flags(parser: argparse.ArgumentParser) -> dict[str, str]:
    """--manifest and --out."""
    parser.add_argument("--manifest", metavar="FILE", help="CSV or Parquet manifest, or a folder of media files")
    parser.add_argument("--out", metavar="DIR", help="folder or s3:// prefix of the tables")
    return {"manifest": "manifest", "out": "out"}


def clip_id(content_hash: str, start_s: float | None, end_s: float | None) -> str:
    """Names a clip by its content: 24 hex digits of the hash of (file hash, start, end)."""
    return hashlib.sha256(f"{content_hash}:{start_s}:{end_s}".encode()).hexdigest()[:24]


# ---------------------------------------------------------------- workers


def _read(uri: str, max_bytes: int) -> bytes:
    try:
        return storage.read_bytes(uri, max_bytes)
    except FileNotFoundError as error:
        raise ClipError("MISSING_FILE", "no such file") from error
    except ValueError as error:
        raise ClipError("TOO_LARGE", str(error)) from error
    except Exception as error:  # storage clients raise many types; all mean "ask again later"
        raise ClipError("IO_ERROR", f"{type(error).__name__}: {error}"[:300], transient=True) from error


def _jpeg(pixels: Any) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return sink.getvalue()


def measure_clip(row: Row, cfg: DecodeConfig) -> dict[str, Any]:
    """One row of MEASURED_TABLE. A bad clip becomes a row with an error; nothing is raised."""
    record: dict[str, Any] = dict(row)
    stage = "read"
    try:
        data = _read(row["uri"], cfg.max_bytes)
        stage = "decode"
        record["content_hash"] = hashlib.sha256(data).hexdigest()
        record["clip_id"] = clip_id(record["content_hash"], row["start_s"], row["end_s"])
        clip = decode_clip(data, row["start_s"], row["end_s"], cfg)
        signals = measure(clip, cfg.sample_rate_hz)
        return (
            record
            | signals
            | {
                "audio": encode_flac(clip.audio, cfg.sample_rate_hz),
                "frames": [_jpeg(frame) for frame in clip.frames],
                "frame_pts_s": clip.frame_pts_s,
            }
        )
    except ClipError as error:
        failure = error
    except Exception as error:  # one clip must not end the job; max_reject_ratio stops a systematic fault
        log.exception("unexpected error in %s", row["uri"])
        failure = ClipError("UNEXPECTED", f"{type(error).__name__}: {error}"[:300])
    return record | {"stage": stage, "code": failure.code, "message": failure.message, "transient": failure.transient}


class MeasureWorker:
    """Decodes and measures the clips of one shard -> _measured/SHARD.parquet."""

    def __init__(self, out: str, decode: dict[str, Any]) -> None:
        self.out, self.cfg = out, DecodeConfig.parse(decode)

    def __call__(self, shard: Shard) -> Result:
        """Shard: name, rows, clips (manifest rows)."""
        records = [measure_clip(row, self.cfg) for row in shard["clips"]]
        table = pa.Table.from_pylist(records, schema=MEASURED_TABLE)
        storage.write_table(_file(self.out, "_measured", shard), table, row_group_size=64)
        return {"rows": len(records), "rejected": sum("code" in record for record in records)}


class JudgeWorker:
    """Splits one measured shard into accepted/SHARD.parquet and rejected/SHARD.parquet."""

    def __init__(self, out: str) -> None:
        self.out = out

    def __call__(self, shard: Shard) -> Result:
        """Shard: name, rows, drop: {row number within the shard as text: [stage, code, message]}."""
        records = storage.read_table(_file(self.out, "_measured", shard)).to_pylist()
        accepted, rejected = [], []
        for number, record in enumerate(records):
            if reason := shard["drop"].get(str(number)):
                record |= dict(zip(("stage", "code", "message"), reason, strict=True)) | {"transient": False}
            if record["code"]:
                rejected.append(record | {"thumbnail": (record["frames"] or [None])[0]})
            else:
                accepted.append(record | {"flags": []})
        for folder, rows, schema in (("rejected", rejected, REJECT_TABLE), ("accepted", accepted, CLIP_TABLE)):
            storage.write_table(_file(self.out, folder, shard), pa.Table.from_pylist(rows, schema=schema))
        return {"rows": len(records), "rejected": len(rejected)}


# ---------------------------------------------------------------- the stage


def _file(out: str, folder: str, shard: Shard) -> str:
    return storage.join(out, folder, f"{shard['name']}.parquet")


def _done(out: str, folder: str) -> Callable[[Shard], bool]:
    return lambda shard: storage.exists(_file(out, folder, shard))


def _shards(rows: Sequence[Row], rows_per_shard: int) -> list[Shard]:
    parts = [list(rows[i : i + rows_per_shard]) for i in range(0, len(rows), rows_per_shard)]
    return [{"name": f"shard-{n:05d}", "rows": len(part), "clips": part} for n, part in enumerate(parts)]


def _judge(out: str, shards: Sequence[Shard], config: CurateConfig) -> dict[int, tuple[str, str, str]]:
    """{row number: (stage, code, message)} of measured clips that filters or duplicates drop."""
    columns = ["clip_id", "uri", "split", "code", *(field.name for field in SIGNALS)]
    files = [_file(out, "_measured", shard) for shard in shards]  # their small columns only
    rows = [row for file in files for row in storage.read_table(file, columns).to_pylist()]
    drop: dict[int, tuple[str, str, str]] = {}
    good = []
    for number, row in enumerate(rows):
        if row["code"]:
            continue
        if broken := verdict(row, config.filters):
            drop[number] = ("filter", *broken)
        else:
            good.append(number)
    duplicates = find_duplicates([rows[number] for number in good], config.duplicates)
    return drop | {good[index]: ("duplicate", *reason) for index, reason in duplicates.items()}


def _split_drops(shards: Sequence[Shard], drop: dict[int, tuple[str, str, str]]) -> list[Shard]:
    out, first = [], 0
    for shard in shards:
        mine = {str(n - first): drop[n] for n in range(first, first + shard["rows"]) if n in drop}
        out.append({"name": shard["name"], "rows": shard["rows"], "drop": mine})
        first += shard["rows"]
    return out


def _finished(out: str, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The result of an earlier run with the same settings and input; None to start or to go on."""
    started, result = storage.join(out, "_started.json"), storage.join(out, "curate.json")
    if storage.exists(started):
        before = storage.read_json(started)
        for name, what in (("digest", "settings"), ("input", "input")):
            if before.get(name) != settings[name]:
                raise UserError("out", out, f"holds tables of other {what}", "choose another, or delete it")
    elif storage.list_files(out):
        raise UserError("out", out, "is not empty, nor written by curate", "choose another, or delete it")
    else:
        storage.write_json(started, settings)
    return storage.read_json(result) if storage.exists(result) else None


def _totals(out: str, rows_in: int) -> dict[str, Any]:
    """Counts from the tables themselves."""
    hours = storage.read_table(storage.join(out, "accepted"), ["duration_s"])["duration_s"].to_pylist()
    reasons = storage.read_table(storage.join(out, "rejected"), ["code", "transient"])
    codes, transient = reasons["code"].to_pylist(), reasons["transient"].to_pylist()
    if rows_in != len(hours) + len(codes):
        raise RuntimeError(f"curate: {rows_in} rows in, but {len(hours)} accepted and {len(codes)} rejected")
    return {
        "rows_in": rows_in,
        "accepted": len(hours),
        "rejected": len(codes),
        "by_code": dict(sorted(Counter(codes).items(), key=lambda item: (-item[1], item[0]))),
        "transient": sum(transient),
        "hours": round(sum(hours) / 3600, 4),
    }


def _summary(result: dict[str, Any], out: str) -> str:
    codes = ", ".join(f"{code} {count}" for code, count in result["by_code"].items())
    return (
        f"{result['rows_in']} rows in = {result['accepted']} accepted + {result['rejected']} rejected"
        f"{f' ({codes})' if codes else ''} in {result['seconds']:.0f} s -> {out}"
    )


def run(config: CurateConfig) -> dict[str, Any]:
    """Curates a manifest; returns what curate.json holds. A second run with nothing changed does nothing."""
    started = time.monotonic()
    rows = read_manifest(config.manifest, config.media_root, config.default_split)
    out = storage.absolute(config.out)
    settings = {"version": VERSION, "digest": config.content_digest(), "input": fingerprint(rows)}
    if earlier := _finished(out, settings):
        log.info("curate: up to date: %s", _summary(earlier, config.out))
        storage.remove(storage.join(out, "_measured"))
        return earlier
    shards = _shards(rows, config.rows_per_shard)
    cluster, logs = config.cluster, os.path.dirname(out)
    measure_args = {"out": out, "decode": config.decode.model_dump()}
    run_shards("curate", shards, MeasureWorker, measure_args, cluster, _done(out, "_measured"), logs)
    judged = _split_drops(shards, _judge(out, shards, config))
    # accepted/ is written after rejected/: when it is there, both are.
    done = _done(out, "accepted")
    run_shards("curate: split", judged, JudgeWorker, {"out": out}, cluster, done, logs, stateful=False)
    result: dict[str, Any] = settings | _totals(out, len(rows)) | {"seconds": round(time.monotonic() - started, 1)}
    ratio = result["rejected"] / len(rows)
    if ratio > config.max_reject_ratio:
        raise UserError(
            "max_reject_ratio",
            config.max_reject_ratio,
            f"{ratio:.0%} of the rows were rejected ({result['by_code']})",
            f"read the reasons in {config.out}/rejected, mend the input, or raise it",
        )
    storage.write_json(storage.join(out, "curate.json"), result)
    storage.remove(storage.join(out, "_measured"))
    log.info("curate: %s", _summary(result, config.out))
    return result
