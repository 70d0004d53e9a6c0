"""The row of a manifest: one clip, as every form of manifest gives it."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from aai import storage
from aai.errors import UserError
from pipelines.manifests.extras import Extra

TABLE_SUFFIXES = (".csv", ".tsv", ".txt", ".parquet")


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestRow:
    """One clip: the part [start_s, end_s) of a file, and what is said of it."""

    uri: str
    """Absolute: a path or s3://, maybe a member of a tar."""
    start_s: float | None = None
    """None: from the file's start."""
    end_s: float | None = None
    """None: to the file's end."""
    caption: str = ""
    labels: tuple[str, ...] = ()
    split: str
    image_uri: str | None = None
    """A still picture, which is shown beside the sound; absolute as `uri`."""
    content_hash: str | None = None
    """SHA-256 of a large file, where it was read already."""
    extra: Extra = field(default_factory=dict)
    """Further columns of the manifest."""

    def content(self) -> dict[str, object]:
        """The row as JSON values; `extra` and `image_uri` only where there are any, as in digests of before."""
        extra: dict[str, object] = {"extra": dict(self.extra)} if self.extra else {}
        if self.image_uri is not None:
            extra["image_uri"] = self.image_uri
        return {
            "uri": self.uri,
            "start_s": self.start_s,
            "end_s": self.end_s,
            "caption": self.caption,
            "labels": self.labels,
            "split": self.split,
            **extra,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class RawRow:
    """A row as it was read: nothing is checked, None stands for what a manifest does not say."""

    uri: object
    start_s: object = None
    end_s: object = None
    caption: object = None
    labels: object = None
    """A list, or text with ";" between labels."""
    split: object = None
    image_uri: object = None
    extra: Mapping[str, object] = field(default_factory=dict)
    """Whatever else the manifest says of it."""


def checked_row(raw: RawRow, manifest: str, number: int, default_split: str) -> ManifestRow:
    """The row with absolute URIs and values of the right types; number: its place in the manifest, from 1.

    Relative URIs count from the manifest's folder. Raises UserError for an empty URI, a scheme that is not allowed, or
    a time that is no number.
    """
    image_uri = _text(raw.image_uri).strip()
    return ManifestRow(
        uri=_checked_uri(_text(raw.uri).strip(), manifest, number),
        start_s=_seconds(raw.start_s, "start_s", manifest, number),
        end_s=_seconds(raw.end_s, "end_s", manifest, number),
        caption=_text(raw.caption),
        labels=_labels(raw.labels),
        split=_text(raw.split).strip() or default_split,
        image_uri=_checked_uri(image_uri, manifest, number) if image_uri else None,
    )


def absolute_uri(uri: str, manifest: str) -> str:
    """A URI as tables have it: relative ones count from the manifest's folder."""
    file = storage.file_of(uri)
    if "://" not in file and not file.startswith("/"):
        is_table = manifest.endswith(TABLE_SUFFIXES)
        uri = storage.join(os.path.dirname(manifest) if is_table else manifest, uri)
    return storage.absolute(uri)


def _checked_uri(uri: str, manifest: str, number: int) -> str:
    if not uri:
        raise UserError("manifest", manifest, f"row {number} has an empty uri", "give every row a uri")
    file = storage.file_of(uri)
    if "://" in file and (scheme := file.split("://", 1)[0]) not in storage.SCHEMES:
        rule = f"row {number}: scheme {scheme!r} is not allowed"
        raise UserError("manifest", manifest, rule, "use a path, file:// or s3://")
    return absolute_uri(uri, manifest)


def _labels(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        parts = [part.strip() for part in value.split(";")]
        return tuple(part for part in parts if part)
    if isinstance(value, list | tuple):
        return tuple(str(label) for label in value)
    return () if _is_empty(value) else (str(value),)


def _text(value: object) -> str:
    return "" if _is_empty(value) else str(value)


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))  # pandas writes NaN for an empty cell


def _seconds(value: object, column: str, manifest: str, number: int) -> float | None:
    if value is None or value == "":
        return None
    try:
        seconds = float(str(value))
    except ValueError as error:
        rule = f"row {number}: {column} is {value!r}"
        raise UserError("manifest", manifest, rule, "give seconds") from error
    return None if math.isnan(seconds) else seconds  # pandas writes NaN for an empty cell
