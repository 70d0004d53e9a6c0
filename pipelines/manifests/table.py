"""Manifests: which clips there are. A table, a VGGSound or AudioSet CSV, WebDataset tars, or a folder of media."""

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace

import pyarrow as pa
import pyarrow.parquet as pq

from aai import storage
from aai.errors import UserError
from aai.schema import MANIFEST_OPTIONAL, MANIFEST_REQUIRED, MEDIA_SUFFIXES, SPLITS
from pipelines.manifests.row import ManifestRow, RawRow, checked_row
from pipelines.manifests.tar import REST, refuse_compressed, tars_rows
from pipelines.manifests.youtube import is_youtube, youtube_rows

TEXTS = (".csv", ".tsv", ".txt")
_COLUMNS = tuple(field.name for field in fields(RawRow))


def read_manifest(
    manifest: str, media_root: str | None = None, default_split: str = "train", label_names: str | None = None
) -> list[ManifestRow]:
    """The clips of a manifest, in its order, with absolute URIs.

    manifest: a CSV or Parquet file with `uri` and maybe `start_s, end_s, caption, labels, split`; a WebDataset .tar; a
    folder or prefix of media files and tars; or, with `media_root` (the folder of the videos), a VGGSound or AudioSet
    CSV. Relative URIs count from the manifest's folder. label_names: AudioSet's class_labels_indices.csv.
    Raises UserError for a missing or empty manifest, a missing column or a wrong value.
    """
    return list(manifest_rows(manifest, media_root, default_split, label_names))


def manifest_rows(
    manifest: str, media_root: str | None = None, default_split: str = "train", label_names: str | None = None
) -> Iterator[ManifestRow]:
    """As `read_manifest`, one row after the other: those of a table are never all in memory as objects."""
    if not storage.exists(manifest):
        raise UserError("manifest", manifest, "does not exist", "give a CSV, a Parquet file, a tar or a folder")
    refuse_compressed(manifest)
    if manifest.endswith(".parquet"):
        raw = _from_parquet(manifest)
    elif manifest.endswith(TEXTS) and media_root:
        raw = iter(youtube_rows(manifest, _text(manifest), media_root, default_split, label_names))
    elif manifest.endswith(TEXTS):
        raw = _from_csv(manifest)
    else:
        raw = iter(_from_files(manifest))
    number = 0
    for number, row in enumerate(raw, start=1):
        yield checked_row(row, manifest, number, default_split)
    if not number:
        raise UserError("manifest", manifest, "names no clips", "give a manifest with at least one row")


_USUAL_NAMES = {
    "train": ("training",),
    "val": ("valid", "validation", "dev", "development"),
    "test": ("testing", "eval", "evaluation"),
}
"""What splits are called elsewhere; only ever suggested, since "eval" is validation to some."""


def named_splits(manifest: str, rows: Iterable[ManifestRow], split_names: Mapping[str, str]) -> Iterator[ManifestRow]:
    """The rows with their splits renamed by `split_names`.

    Raises UserError, after the last row, for a split that is then not one of SPLITS: no stage would use its clips.
    """
    setting: dict[str, str] = {}
    rule = ""
    for number, row in enumerate(rows, start=1):
        split = split_names.get(row.split, row.split)
        if split not in SPLITS:
            rule = rule or f"row {number} ({row.uri}): split is {split!r}, not one of {', '.join(SPLITS)}"
            setting[split] = _usual_split(split)
        yield row if split == row.split else replace(row, split=split)
    if not setting:
        return
    pairs = ", ".join(f"{json.dumps(name, ensure_ascii=False)}: {split}" for name, split in setting.items())
    remedy = f"rename it, or pass --set 'split_names={{{pairs}}}'"
    if "?" in setting.values():
        remedy += f" with one of {', '.join(SPLITS)} for each ?"
    raise UserError("manifest", manifest, rule, remedy)


def _usual_split(name: str) -> str:
    """The split that a name usually stands for; "?" where nothing is usual."""
    for split, usual in _USUAL_NAMES.items():
        if name.lower() in (split, *usual):
            return split
    return "?"


def with_val_share(rows: Iterable[ManifestRow], share: float) -> list[ManifestRow]:
    """The rows, with about this share of train's files moved to the split val.

    A file, or a tar's member, is chosen by the hash of where it lies and of nothing else: all clips of a file stay
    together, and the choice is the same however often, and with whatever other clips, it is made.
    """
    return [val_or_train(row, share) for row in rows]


def val_or_train(row: ManifestRow, share: float) -> ManifestRow:
    """One row; see `with_val_share`."""
    part = storage.member(row.uri)
    name = f"{part.file}/{part.name}" if part else row.uri
    chance = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 16**8  # uniform in [0, 1)
    return replace(row, split="val") if row.split == "train" and chance < share else row


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


def _from_parquet(manifest: str) -> Iterator[RawRow]:
    try:
        table = pq.read_table(io.BytesIO(storage.read_bytes(manifest)))
    except pa.ArrowInvalid as error:
        raise UserError("manifest", manifest, f"is not Parquet ({error})", "write it anew") from error
    _check_columns(manifest, table.column_names)
    known = [name for name in _COLUMNS if name in table.column_names]
    for batch in table.select(known).to_batches(max_chunksize=4096):
        for row in batch.to_pylist():
            yield RawRow(**row)


def _text(manifest: str) -> str:
    try:
        return storage.read_bytes(manifest).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError("manifest", manifest, "is not UTF-8 text", "save it as UTF-8") from error


def _from_csv(manifest: str) -> Iterator[RawRow]:
    data = storage.read_bytes(manifest)
    lines = io.TextIOWrapper(io.BytesIO(data), "utf-8-sig", newline="")  # all at once, text takes four times as much
    try:
        reader = csv.DictReader(lines, delimiter="\t" if manifest.endswith(".tsv") else ",")
        header = reader.fieldnames or []
        if "uri" not in header and is_youtube(_text(manifest)):
            rule = "is a VGGSound or AudioSet CSV, which names videos by their ids"
            raise UserError("manifest", manifest, rule, "give media_root, the folder of its videos")
        _check_columns(manifest, header)
        known = [name for name in _COLUMNS if name in header]
        for line in reader:
            yield RawRow(**{name: line[name] for name in known})
    except UnicodeDecodeError as error:
        raise UserError("manifest", manifest, "is not UTF-8 text", "save it as UTF-8") from error


def _from_files(place: str) -> list[RawRow]:
    """A tar, or the media files and tars of a folder."""
    uris = [place] if place.lower().endswith(".tar") else storage.list_files(place)
    for uri in uris:
        refuse_compressed(uri)
    inside = tars_rows([uri for uri in uris if uri.lower().endswith(".tar")])
    media = [uri for uri in uris if uri.lower().endswith(MEDIA_SUFFIXES)]
    if not media and all(str(row.uri).endswith(REST) for row in inside):
        raise UserError("manifest", place, "holds no media files", f"give {', '.join((*MEDIA_SUFFIXES, '.tar'))}")
    # The folder that a file lies in is its label.
    rows = [RawRow(uri=uri, labels=[uri.rsplit("/", 2)[-2]]) for uri in media]
    return sorted(rows + inside, key=lambda row: storage.file_of(str(row.uri)))
