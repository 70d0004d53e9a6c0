"""Manifests: which clips there are. A table, a VGGSound or AudioSet CSV, WebDataset tars, or a folder of media."""

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from aai import storage
from aai.errors import UserError
from aai.schema import MANIFEST_OPTIONAL, MANIFEST_REQUIRED, MEDIA_SUFFIXES, SPLITS
from pipelines.manifests.extras import carried, kinds_of
from pipelines.manifests.row import ManifestRow, RawRow, checked_row
from pipelines.manifests.sources import place_of
from pipelines.manifests.tar import REST, refuse_compressed, tars_rows
from pipelines.manifests.youtube import is_youtube, youtube_rows

TEXTS = (".csv", ".tsv", ".txt")
_COLUMNS = (*MANIFEST_REQUIRED, *MANIFEST_OPTIONAL)


def read_manifest(
    manifest: str,
    media_root: str | None = None,
    default_split: str = "train",
    label_names: str | None = None,
    further: Sequence[str] | None = (),
) -> list[ManifestRow]:
    """The clips of a manifest, in its order, with absolute URIs.

    manifest: a CSV or Parquet file with `uri` and maybe `start_s, end_s, caption, labels, split, image_uri`; a
    WebDataset .tar; a folder or prefix of media files and tars; or, with `media_root` (the folder of the videos), a
    VGGSound or AudioSet CSV. Relative URIs count from the manifest's folder. label_names: AudioSet's
    class_labels_indices.csv.
    further: other columns, or keys of a tar's .json, that travel with the clips; None = all of numbers and text.
    Raises UserError for a missing or empty manifest, a missing column or a wrong value.
    """
    return list(manifest_rows(manifest, media_root, default_split, label_names, further))


def manifest_rows(
    manifest: str,
    media_root: str | None = None,
    default_split: str = "train",
    label_names: str | None = None,
    further: Sequence[str] | None = (),
) -> Iterator[ManifestRow]:
    """As `read_manifest`, one row after the other: those of a table are never all in memory as objects."""
    if not storage.exists(manifest):
        raise UserError("manifest", manifest, "does not exist", "give a CSV, a Parquet file, a tar or a folder")
    refuse_compressed(manifest)
    raw = _reader(manifest, media_root, default_split, label_names, further != ())
    first = next(iter(raw()), None)
    if first is None:
        raise UserError("manifest", manifest, "names no clips", "give a manifest with at least one row")
    alike = manifest.endswith((".parquet", *TEXTS))  # all rows of a table have the columns of the first
    none = further == () or (further is None and alike and not first.extra)
    kinds = {} if none else kinds_of(manifest, (row.extra for row in raw()), further)
    for number, row in enumerate(raw(), start=1):
        checked = checked_row(row, manifest, number, default_split)
        extra = carried(manifest, number, row.extra, kinds)
        yield replace(checked, extra=extra) if extra else checked


def _reader(
    manifest: str, media_root: str | None, default_split: str, label_names: str | None, with_further: bool
) -> Callable[[], Iterable[RawRow]]:
    """What reads a manifest's rows, from the first on each time; the file itself is read once."""
    rows: list[RawRow]
    if manifest.endswith(".parquet"):
        table = _parquet(manifest, with_further)
        return lambda: _from_parquet(table)
    if manifest.endswith(TEXTS) and not media_root:
        data = storage.read_bytes(manifest)
        return lambda: _from_csv(manifest, data)
    if manifest.endswith(TEXTS) and media_root:
        rows = youtube_rows(manifest, _text(manifest), media_root, default_split, label_names)
    else:
        rows = _from_files(manifest)
    return lambda: rows


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


def with_val_share(
    rows: Iterable[ManifestRow], share: float, name_of: Callable[[ManifestRow], str] = place_of
) -> list[ManifestRow]:
    """The rows, with about this share of train's files moved to the split val.

    A file, or a tar's member, is chosen by the hash of where it lies (or of `name_of`) and of nothing else: all clips
    of a file stay together, and the choice is the same however often, and with whatever other clips, it is made.
    """
    return [val_or_train(row, share, name_of) for row in rows]


def val_or_train(row: ManifestRow, share: float, name_of: Callable[[ManifestRow], str] = place_of) -> ManifestRow:
    """One row; see `with_val_share`."""
    chance = int(hashlib.sha256(name_of(row).encode()).hexdigest()[:8], 16) / 16**8  # uniform in [0, 1)
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


def _parquet(manifest: str, with_further: bool) -> pa.Table:
    try:
        table = pq.read_table(io.BytesIO(storage.read_bytes(manifest)))
    except pa.ArrowInvalid as error:
        raise UserError("manifest", manifest, f"is not Parquet ({error})", "write it anew") from error
    _check_columns(manifest, table.column_names)
    read = [f.name for f in table.schema if f.name in _COLUMNS or (with_further and not _is_bulky(f.type))]
    return table.select(read)


def _is_bulky(kind: pa.DataType) -> bool:
    """Whether a column is none of numbers or text, such as pictures and embeddings: it is not even read."""
    binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
    return binary or pa.types.is_nested(kind)


def _from_parquet(table: pa.Table) -> Iterator[RawRow]:
    for batch in table.to_batches(max_chunksize=4096):
        for row in batch.to_pylist():
            yield _raw(row)


def _raw(row: Mapping[str, Any]) -> RawRow:
    known = {name: value for name, value in row.items() if name in _COLUMNS}
    return RawRow(**known, extra={name: value for name, value in row.items() if name and name not in _COLUMNS})


def _text(manifest: str) -> str:
    try:
        return storage.read_bytes(manifest).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError("manifest", manifest, "is not UTF-8 text", "save it as UTF-8") from error


def _from_csv(manifest: str, data: bytes) -> Iterator[RawRow]:
    lines = io.TextIOWrapper(io.BytesIO(data), "utf-8-sig", newline="")  # all at once, text takes four times as much
    try:
        reader = csv.DictReader(lines, delimiter="\t" if manifest.endswith(".tsv") else ",")
        header = reader.fieldnames or []
        if "uri" not in header and is_youtube(_text(manifest)):
            rule = "is a VGGSound or AudioSet CSV, which names videos by their ids"
            raise UserError("manifest", manifest, rule, "give media_root, the folder of its videos")
        _check_columns(manifest, header)
        for line in reader:
            yield _raw(line)
    except UnicodeDecodeError as error:
        raise UserError("manifest", manifest, "is not UTF-8 text", "save it as UTF-8") from error
    except csv.Error as error:
        rule = f"cannot be read as CSV ({error}, in or before line {reader.line_num + 1})"
        raise UserError("manifest", manifest, rule, "look for a quote that is not closed") from error


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
