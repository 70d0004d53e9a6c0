"""Exports a ClipTable as WebDataset tars: per clip its sound, its pictures and a JSON of all that is known."""

import hashlib
import io
import json
import logging
import math
import re
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from aai import storage
from aai.errors import UserError
from aai.schema import CLIP_TABLE, PICTURE, SIGNALS, SIMILARITIES, STILL_PICTURE, further_columns
from pipelines.engine.resume import finished

log = logging.getLogger(__name__)

BATCH_ROWS = 32
_BLOCK = 512
_RECORD = 10_240  # a tar is padded to a multiple of this
_PLAIN = ("content_hash", "uri", "start_s", "end_s", "caption", "labels", "split", "frame_pts_s", "flags")


@dataclass(frozen=True)
class Tar:
    """A finished tar, as export.json names it."""

    name: str
    clips: int
    bytes: int


def export(given: str, out: str, shard_bytes: int) -> dict[str, Any]:
    """Writes OUT/SPLIT-000000.tar and so on, none larger than `shard_bytes` (unless one clip is); returns the counts.

    Of each clip, in table order: CLIP_ID.flac (mono), CLIP_ID.0.jpg and so on for its K pictures (CLIP_ID.jpg for a
    still, nothing where there is none), CLIP_ID.json with caption, labels, split, picture times in seconds and signals.
    The same table gives the same bytes; tars appear whole or not at all; export.json names them and is written last.
    Raises UserError for a table that is none, or an `out` that holds something else.
    """
    files = storage.list_files(given, ".parquet")
    if not files:
        raise UserError("input", given, "holds no Parquet files", "give a ClipTable, such as curated/accepted")
    total = sum(_checked(file) for file in files)
    settings = {"input": _fingerprint(files), "format": "webdataset", "shard_bytes": shard_bytes}
    if (done := finished(out, "export", settings)) is not None:
        log.info("export: up to date: %d clips in %d tars -> %s", done["clips"], len(done["shards"]), out)
        return done
    tars: list[Tar] = []
    with ExitStack() as stack, tqdm(total=total, desc="export", unit="clip", mininterval=1.0) as bar:
        writers: dict[str, _Tars] = {}
        names = _Names()
        for row in _rows(files):
            split = re.sub(r"[^\w-]", "_", row["split"]) or "none"
            if split not in writers:
                writers[split] = stack.enter_context(_Tars(out, split, shard_bytes, tars))
            writers[split].add(names.key(row["clip_id"]), row)
            bar.update()
        for writer in writers.values():
            writer.finish()
    tars.sort(key=lambda tar: tar.name)
    result: dict[str, Any] = {
        **settings,
        "clips": sum(tar.clips for tar in tars),
        "bytes": sum(tar.bytes for tar in tars),
    }
    result["shards"] = [asdict(tar) for tar in tars]
    storage.write_json(storage.join(out, "export.json"), result)
    log.info("export: %d clips, %.1f MB in %d tars -> %s", result["clips"], result["bytes"] / 1e6, len(tars), out)
    return result


def _checked(file: str) -> int:
    """The number of rows of a file of a ClipTable. Raises UserError when it is not one."""
    fs, path = storage.filesystem(file)
    try:
        with pq.ParquetFile(path, filesystem=fs) as table:
            missing = set(CLIP_TABLE.names) - set(table.schema_arrow.names)
            rows = int(table.metadata.num_rows)
    except pa.ArrowInvalid as error:
        raise UserError("input", file, f"is not a whole Parquet file ({error})", "write it anew") from error
    if missing:
        rule = f"is no ClipTable of this version (it lacks {', '.join(sorted(missing)[:3])})"
        raise UserError("input", file, rule, "give curate's accepted/")
    return rows


def _fingerprint(files: list[str]) -> str:
    parts = []
    for file in files:
        fs, path = storage.filesystem(file)
        parts.append([file.rsplit("/", 1)[1], fs.size(path)])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _rows(files: list[str]) -> Iterator[dict[str, Any]]:
    for file in files:
        fs, path = storage.filesystem(file)
        with pq.ParquetFile(path, filesystem=fs, pre_buffer=False) as table:
            for batch in table.iter_batches(BATCH_ROWS):
                yield from batch.to_pylist()


class _Names:
    """Keys: a clip_id that comes again gets a number, or readers would take both clips for one sample."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def key(self, clip_id: str) -> str:
        """The clip_id, without what separates a key from its suffix."""
        name = key = re.sub(r"[^\w-]", "_", clip_id, flags=re.ASCII)[:80]
        number = 1
        while key in self.seen:
            number += 1
            key = f"{name}_{number}"
        self.seen.add(key)
        return key


class _Tars:
    """The tars of one split, one open at a time."""

    def __init__(self, out: str, split: str, shard_bytes: int, tars: list[Tar]) -> None:
        self.out, self.split, self.shard_bytes, self.tars = out, split, shard_bytes, tars
        self.number = self.clips = self.bytes = 0
        self.stack = ExitStack()
        self.tar: tarfile.TarFile | None = None

    def __enter__(self) -> "_Tars":
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.__exit__(*error)  # with an error, what is half written vanishes

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Appends one clip's files."""
        members = [(f"{key}.flac", row["audio"])]
        still = row.get(PICTURE) == STILL_PICTURE  # of that name `aai curate` takes it for the clip's own picture again
        members += [(f"{key}.jpg" if still else f"{key}.{i}.jpg", frame) for i, frame in enumerate(row["frames"])]
        members.append((f"{key}.json", json.dumps(_facts(row), ensure_ascii=False).encode()))
        size = sum(_BLOCK + -(-len(data) // _BLOCK) * _BLOCK for _, data in members)
        if self.tar is not None and self.bytes + size + 2 * _BLOCK + _RECORD > self.shard_bytes:
            self.finish()
        if self.tar is None:
            self.name = f"{self.split}-{self.number:06d}.tar"
            local = self.stack.enter_context(storage.writing(storage.join(self.out, self.name)))
            self.tar = self.stack.enter_context(tarfile.TarFile(local, "w", format=tarfile.USTAR_FORMAT))
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            self.tar.addfile(entry, io.BytesIO(data))
        self.bytes, self.clips = self.bytes + size, self.clips + 1

    def finish(self) -> None:
        """Closes the open tar and puts it in its place."""
        if self.tar is None:
            return
        self.stack.close()
        whole = -(-(self.bytes + 2 * _BLOCK) // _RECORD) * _RECORD
        self.tars.append(Tar(self.name, self.clips, whole))
        self.tar, self.number, self.clips, self.bytes = None, self.number + 1, 0, 0


def _facts(row: dict[str, Any]) -> dict[str, Any]:
    """All that is known of a clip but its sound and pictures, as JSON values; hashes as hex digits."""
    signals = {field.name: _plain(row[field.name]) for field in (*SIGNALS, *SIMILARITIES)}
    further = {name: _plain(row[name]) for name in further_columns(row)}
    return {"clip_id": row["clip_id"], **{name: row[name] for name in _PLAIN}, "signals": signals, **further}


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    return None if isinstance(value, float) and not math.isfinite(value) else value
