"""Manifests: which clips there are. A CSV or Parquet table, a VGGSound CSV, or a folder of media."""

import csv
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from aai import storage
from aai.errors import UserError
from aai.schema import MANIFEST_OPTIONAL, MANIFEST_REQUIRED

MEDIA_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mpg", ".mpeg", ".flv", ".3gp", ".wmv",
    ".wav", ".mp3", ".flac", ".ogg", ".opus", ".m4a", ".aac",
)  # fmt: skip
_VGGSOUND_NAME = re.compile(r"^(?P<id>.{11})_(?P<start>\d+)(?P<end>_\d+)?\.\w+$")

Row = dict[str, Any]
"""One clip: uri, start_s, end_s, caption, labels (list), split."""


def read_manifest(manifest: str, media_root: str | None = None, default_split: str = "train") -> list[Row]:
    """The clips of a manifest, in its order, with absolute URIs.

    manifest: a CSV or Parquet file with `uri` and maybe `start_s, end_s, caption, labels, split`; a folder or
    prefix of media files; or, with `media_root` (the folder of the videos), a VGGSound CSV: youtube id, start
    second, label, split, without a header. Relative URIs count from the manifest's folder.
    Raises UserError for a missing or empty manifest, a missing column or a wrong value.
    """
    if not storage.exists(manifest):
        raise UserError("manifest", manifest, "does not exist", "give a CSV, a Parquet file or a folder")
    if manifest.endswith(".parquet"):
        rows = _from_parquet(manifest)
    elif manifest.endswith((".csv", ".tsv", ".txt")):
        rows = _from_vggsound(manifest, media_root) if media_root else _from_csv(manifest)
    else:
        rows = _from_folder(manifest)
    rows = [_clean(row, manifest, number, default_split) for number, row in enumerate(rows, start=1)]
    if not rows:
        raise UserError("manifest", manifest, "names no clips", "give a manifest with at least one row")
    return rows


def fingerprint(rows: Iterable[Row]) -> str:
    """A short hash of the input: the rows and, for local files, their sizes and times of change."""
    digest = hashlib.sha256()
    for row in rows:
        stat: list[int] = []
        if not row["uri"].startswith("s3://") and os.path.exists(row["uri"]):
            found = os.stat(row["uri"])
            stat = [found.st_size, found.st_mtime_ns]
        digest.update(json.dumps([row, stat], sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _check_columns(manifest: str, found: Iterable[str]) -> None:
    found = list(found)
    for column in MANIFEST_REQUIRED:
        if column not in found:
            raise UserError(
                "manifest",
                manifest,
                f"has no column {column!r} (found: {', '.join(found) or 'none'})",
                f"columns are {', '.join((*MANIFEST_REQUIRED, *MANIFEST_OPTIONAL))}; only uri is required",
            )


def _from_parquet(manifest: str) -> list[Row]:
    try:
        table = pq.read_table(io.BytesIO(storage.read_bytes(manifest)))
    except pa.ArrowInvalid as error:
        raise UserError("manifest", manifest, f"is not Parquet ({error})", "write it anew") from error
    _check_columns(manifest, table.column_names)
    return list(table.to_pylist())


def _text(manifest: str) -> io.StringIO:
    try:
        return io.StringIO(storage.read_bytes(manifest).decode("utf-8-sig"), newline="")
    except UnicodeDecodeError as error:
        raise UserError("manifest", manifest, "is not UTF-8 text", "save it as UTF-8") from error


def _from_csv(manifest: str) -> list[Row]:
    reader = csv.DictReader(_text(manifest), delimiter="\t" if manifest.endswith(".tsv") else ",")
    _check_columns(manifest, reader.fieldnames or [])
    return list(reader)


def _from_vggsound(manifest: str, media_root: str) -> list[Row]:
    """VGGSound (Chen et al., ICASSP 2020): `id,start seconds,label,split` and 10 s videos named ID_START*."""
    videos: dict[tuple[str, int], str] = {}
    for uri in storage.list_files(media_root):
        match = _VGGSOUND_NAME.match(uri.rsplit("/", 1)[1].removeprefix("vggsound_"))
        if match:
            # ID_000517.mp4 counts seconds, ID_517000_527000.mp4 milliseconds.
            videos[match["id"], int(match["start"]) // (1000 if match["end"] else 1)] = uri
    if not videos:
        raise UserError("media_root", media_root, "holds no files named ID_START.mp4", "give the videos' folder")
    rows = []
    for line in csv.reader(_text(manifest)):
        if len(line) != 4 or not line[1].strip().isdigit():
            raise UserError("manifest", manifest, f"is no VGGSound CSV (line {line})", "give id,start,label,split")
        video_id, start_s, label, split = (cell.strip() for cell in line)
        known = videos.get((video_id, int(start_s)))
        uri = known or storage.join(media_root, f"{video_id}_{int(start_s):06d}.mp4")
        rows.append({"uri": storage.absolute(uri), "caption": label, "labels": [label], "split": split})
    return rows


def _from_folder(folder: str) -> list[Row]:
    uris = [uri for uri in storage.list_files(folder) if uri.lower().endswith(MEDIA_SUFFIXES)]
    if not uris:
        raise UserError("manifest", folder, "holds no media files", f"give {', '.join(MEDIA_SUFFIXES)}")
    return [{"uri": uri, "caption": "", "labels": [uri.rsplit("/", 2)[-2]]} for uri in uris]


def _clean(row: Row, manifest: str, number: int, default_split: str) -> Row:
    uri = str(row.get("uri") or "").strip()
    if not uri:
        raise UserError("manifest", manifest, f"row {number} has an empty uri", "give every row a uri")
    if "://" not in uri and not uri.startswith("/"):
        is_table = manifest.endswith((".csv", ".tsv", ".txt", ".parquet"))
        uri = storage.join(os.path.dirname(manifest) if is_table else manifest, uri)
    if "://" in uri and (scheme := uri.split("://", 1)[0]) not in storage.SCHEMES:
        rule = f"row {number}: scheme {scheme!r} is not allowed"
        raise UserError("manifest", manifest, rule, "use a path, file:// or s3://")
    labels = row.get("labels") or []
    if isinstance(labels, str):
        labels = [label.strip() for label in labels.split(";") if label.strip()]
    return {
        "uri": storage.absolute(uri),
        "start_s": _seconds(row.get("start_s"), "start_s", manifest, number),
        "end_s": _seconds(row.get("end_s"), "end_s", manifest, number),
        "caption": str(row.get("caption") or ""),
        "labels": [str(label) for label in labels],
        "split": str(row.get("split") or default_split),
    }


def _seconds(value: object, column: str, manifest: str, number: int) -> float | None:
    if value is None or value == "":
        return None
    try:
        seconds = float(str(value))
    except ValueError as error:
        rule = f"row {number}: {column} is {value!r}"
        raise UserError("manifest", manifest, rule, "give seconds") from error
    return None if math.isnan(seconds) else seconds  # pandas writes NaN for an empty cell
