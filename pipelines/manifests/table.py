"""Manifests: which clips there are. A table, a VGGSound or AudioSet CSV, WebDataset tars, or a folder of media."""

import csv
import hashlib
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from aai import storage
from aai.errors import UserError
from aai.schema import MANIFEST_OPTIONAL, MANIFEST_REQUIRED, MEDIA_SUFFIXES, SPLITS
from pipelines.manifests.tar import REST, refuse_compressed, tars_rows
from pipelines.manifests.youtube import youtube_rows

TEXTS = (".csv", ".tsv", ".txt")
Row = dict[str, Any]
"""One clip: uri, start_s, end_s, caption, labels (list), split."""


def read_manifest(
    manifest: str, media_root: str | None = None, default_split: str = "train", label_names: str | None = None
) -> list[Row]:
    """The clips of a manifest, in its order, with absolute URIs.

    manifest: a CSV or Parquet file with `uri` and maybe `start_s, end_s, caption, labels, split`; a WebDataset .tar; a
    folder or prefix of media files and tars; or, with `media_root` (the folder of the videos), a VGGSound or AudioSet
    CSV. Relative URIs count from the manifest's folder. label_names: AudioSet's class_labels_indices.csv.
    Raises UserError for a missing or empty manifest, a missing column or a wrong value.
    """
    if not storage.exists(manifest):
        raise UserError("manifest", manifest, "does not exist", "give a CSV, a Parquet file, a tar or a folder")
    refuse_compressed(manifest)
    if manifest.endswith(".parquet"):
        rows = _from_parquet(manifest)
    elif manifest.endswith(TEXTS) and media_root:
        rows = youtube_rows(manifest, _text(manifest).getvalue(), media_root, default_split, label_names)
    elif manifest.endswith(TEXTS):
        rows = _from_csv(manifest)
    else:
        rows = _from_files(manifest)
    rows = [_clean(row, manifest, number, default_split) for number, row in enumerate(rows, start=1)]
    if not rows:
        raise UserError("manifest", manifest, "names no clips", "give a manifest with at least one row")
    return rows


_USUAL_NAMES = {
    "train": ("training",),
    "val": ("valid", "validation", "dev", "development"),
    "test": ("testing", "eval", "evaluation"),
}
"""What splits are called elsewhere; only ever suggested, since "eval" is validation to some."""


def named_splits(manifest: str, rows: Sequence[Row], split_names: Mapping[str, str]) -> list[Row]:
    """The rows with their splits renamed by `split_names`.

    Raises UserError for a split that is then not one of SPLITS: no stage would use its clips.
    """
    renamed = [row | {"split": split_names.get(row["split"], row["split"])} for row in rows]
    unknown = [number for number, row in enumerate(renamed) if row["split"] not in SPLITS]
    if not unknown:
        return renamed
    row = renamed[unknown[0]]
    setting = {}
    for name in dict.fromkeys(renamed[number]["split"] for number in unknown):
        setting[name] = next((split for split, usual in _USUAL_NAMES.items() if name.lower() in (split, *usual)), "?")
    pairs = ", ".join(f"{json.dumps(name, ensure_ascii=False)}: {split}" for name, split in setting.items())
    rule = f"row {unknown[0] + 1} ({row['uri']}): split is {row['split']!r}, not one of {', '.join(SPLITS)}"
    remedy = f"rename it, or pass --set 'split_names={{{pairs}}}'"
    if "?" in setting.values():
        remedy += f" with one of {', '.join(SPLITS)} for each ?"
    raise UserError("manifest", manifest, rule, remedy)


def with_val_share(rows: Iterable[Row], share: float) -> list[Row]:
    """The rows, with about this share of train's files moved to the split val.

    A file, or a tar's member, is chosen by the hash of where it lies and of nothing else: all clips of a file stay
    together, and the choice is the same however often, and with whatever other clips, it is made.
    """
    out = []
    for row in rows:
        part = storage.member(row["uri"])
        name = f"{part.file}/{part.name}" if part else row["uri"]
        chance = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 16**8
        out.append({**row, "split": "val"} if row["split"] == "train" and chance < share else row)
    return out


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


def _from_files(place: str) -> list[Row]:
    """A tar, or the media files and tars of a folder."""
    uris = [place] if place.lower().endswith(".tar") else storage.list_files(place)
    for uri in uris:
        refuse_compressed(uri)
    tars = [uri for uri in uris if uri.lower().endswith(".tar")]
    inside = tars_rows(tars)
    media = [uri for uri in uris if uri.lower().endswith(MEDIA_SUFFIXES)]
    rows = [{"uri": uri, "caption": "", "labels": [uri.rsplit("/", 2)[-2]]} for uri in media]
    if not rows and all(row["uri"].endswith(REST) for row in inside):
        raise UserError("manifest", place, "holds no media files", f"give {', '.join((*MEDIA_SUFFIXES, '.tar'))}")
    return sorted(rows + inside, key=lambda row: storage.file_of(row["uri"]))


def _clean(row: Row, manifest: str, number: int, default_split: str) -> Row:
    uri = str(row.get("uri") or "").strip()
    if not uri:
        raise UserError("manifest", manifest, f"row {number} has an empty uri", "give every row a uri")
    file = storage.file_of(uri)
    if "://" not in file and not file.startswith("/"):
        is_table = manifest.endswith((*TEXTS, ".parquet"))
        uri = storage.join(os.path.dirname(manifest) if is_table else manifest, uri)
    if "://" in file and (scheme := file.split("://", 1)[0]) not in storage.SCHEMES:
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
        "split": _split(row.get("split")) or default_split,
    }


def _split(value: object) -> str:
    is_empty = value is None or (isinstance(value, float) and math.isnan(value))  # pandas writes NaN for an empty cell
    return "" if is_empty else str(value).strip()


def _seconds(value: object, column: str, manifest: str, number: int) -> float | None:
    if value is None or value == "":
        return None
    try:
        seconds = float(str(value))
    except ValueError as error:
        rule = f"row {number}: {column} is {value!r}"
        raise UserError("manifest", manifest, rule, "give seconds") from error
    return None if math.isnan(seconds) else seconds  # pandas writes NaN for an empty cell
