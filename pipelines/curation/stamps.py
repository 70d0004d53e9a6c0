"""What tells a file's present content from an earlier one, without reading it: size and time of change, or ETag."""

import os
from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from aai import storage

MISSING = "missing"
"""Stamp of a file that is not there."""


class Stamps:
    """Stamps of files and of members of tars, whose stamp is their tar's. A folder of S3 is listed once, and kept."""

    def __init__(self) -> None:
        self._listed: dict[str, pa.Table] = {}

    def of(self, uris: Sequence[str]) -> list[str]:
        """The stamp of each."""
        found: dict[str, str] = {}
        folders: dict[str, list[str]] = {}
        for file in {storage.file_of(uri) for uri in uris}:
            if file.startswith("s3://"):
                folders.setdefault(os.path.dirname(file), []).append(file)
            else:
                found[file] = _local(file)
        for folder, files in folders.items():
            found |= self._in_folder(folder, files)
        return [found[storage.file_of(uri)] for uri in uris]

    def _in_folder(self, folder: str, files: list[str]) -> dict[str, str]:
        if folder not in self._listed:
            batches = [pa.table(page) for page in _pages(folder)]
            self._listed[folder] = pa.concat_tables(batches) if batches else pa.table({"name": [""], "stamp": [""]})
        listed = self._listed[folder]
        names = pa.array([file.rsplit("/", 1)[1] for file in files])
        places = pc.index_in(names, listed["name"].combine_chunks())
        return dict(zip(files, listed["stamp"].take(places).fill_null(MISSING).to_pylist(), strict=True))


def stamps_of(uris: Iterable[str]) -> dict[str, str]:
    """The stamp of each."""
    uris = list(uris)
    return dict(zip(uris, Stamps().of(uris), strict=True))


def _pages(folder: str) -> Iterator[dict[str, list[str]]]:
    """Name and stamp of the files of a folder of S3, a page of the listing at a time."""
    fs, path = storage.filesystem(folder)
    bucket, _, prefix = path.partition("/")
    asked = {"Bucket": bucket, "Prefix": f"{prefix}/" if prefix else "", "Delimiter": "/"}
    while True:
        try:
            page = fs.call_s3("list_objects_v2", **asked)
        except FileNotFoundError:  # no such bucket
            return
        entries = page.get("Contents", ())
        if entries:
            names = [entry["Key"][len(asked["Prefix"]) :] for entry in entries]
            yield {"name": names, "stamp": [f"{entry['ETag']}:{entry['Size']}" for entry in entries]}
        if not page.get("IsTruncated"):
            return
        asked["ContinuationToken"] = page["NextContinuationToken"]


def _local(file: str) -> str:
    try:
        stat = os.stat(file.removeprefix("file://"))
    except OSError:
        return MISSING
    return f"{stat.st_size}:{stat.st_mtime_ns}"
