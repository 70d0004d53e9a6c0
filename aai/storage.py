"""Files by URI: a local path, `file://` or `s3://`, through fsspec.

S3 endpoint and keys come from the environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY).
Only these schemes are allowed: nothing is ever fetched from an arbitrary URL.
"""

import json
import os
import tempfile
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from aai.errors import UserError

SCHEMES = ("file", "s3")


def filesystem(uri: str) -> tuple[AbstractFileSystem, str]:
    """The fsspec file system of a URI and the path inside it. Raises UserError for another scheme."""
    scheme = uri.split("://", 1)[0] if "://" in uri else "file"
    if scheme not in SCHEMES:
        raise UserError("uri", uri, f"scheme {scheme!r} is not allowed", "use a local path, file:// or s3://")
    if scheme == "s3":
        # Servers other than AWS reject the newer trailing checksums.
        os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        os.environ.setdefault("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
        return fsspec.filesystem("s3", use_listings_cache=False), uri.split("://", 1)[1]
    # Only this prefix is cut: a name may itself hold "://" or start with "-".
    return fsspec.filesystem("file"), os.path.abspath(uri.removeprefix("file://"))


def absolute(uri: str) -> str:
    """A URI that means the same on every node: local paths made absolute."""
    return uri if uri.startswith("s3://") else os.path.abspath(uri.removeprefix("file://"))


def join(base: str, *parts: str) -> str:
    """Joins path parts with "/"."""
    return "/".join([base.rstrip("/"), *parts])


def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    fs, path = filesystem(uri)
    return bool(fs.exists(path))


def list_files(uri: str, suffix: str = "") -> list[str]:
    """All files under a folder whose names end in `suffix`, as sorted URIs; empty if there is no such folder."""
    fs, path = filesystem(uri)
    if not fs.exists(path):
        return []
    prefix = "s3://" if uri.startswith("s3://") else ""
    return sorted(prefix + found for found in fs.find(path) if found.endswith(suffix))


def shard_names(folder: str) -> set[str]:
    """Names of a folder's Parquet files, without their ending."""
    return {file.rsplit("/", 1)[1].removesuffix(".parquet") for file in list_files(folder, ".parquet")}


def stamps(uris: Iterable[str]) -> dict[str, str]:
    """What tells a file's present content from an earlier one, without reading it: size and time of change, or ETag.

    One listing for each folder. A file that is not there has the stamp "missing".
    """
    folders: dict[str, list[str]] = {}
    for uri in uris:
        folders.setdefault(os.path.dirname(uri), []).append(uri)
    found: dict[str, str] = {}
    for folder, members in folders.items():
        if folder.startswith("s3://"):
            fs, path = filesystem(folder)
            listed = {entry["name"]: entry for entry in fs.ls(path, detail=True)} if fs.exists(path) else {}
            for uri in members:
                entry = listed.get(uri.removeprefix("s3://"))
                found[uri] = f"{entry.get('ETag')}:{entry['size']}" if entry else "missing"
        else:
            found |= {uri: _local_stamp(uri) for uri in members}
    return found


def _local_stamp(uri: str) -> str:
    try:
        stat = os.stat(filesystem(uri)[1])
    except OSError:
        return "missing"
    return f"{stat.st_size}:{stat.st_mtime_ns}"


def read_bytes(uri: str, max_bytes: int | None = None) -> bytes:
    """A file's content. Raises ValueError when it is larger than `max_bytes` (before reading it)."""
    fs, path = filesystem(uri)
    if max_bytes is not None and (size := fs.size(path)) > max_bytes:
        raise ValueError(f"file of {size} bytes is over the limit of {max_bytes} bytes")
    with fs.open(path, "rb") as file:
        return bytes(file.read())


def write_bytes(uri: str, data: bytes) -> None:
    """Writes a file in one step: a reader, or a kill, never sees half of it."""
    fs, path = filesystem(uri)
    if uri.startswith("s3://"):  # a PUT is atomic
        fs.pipe_file(path, data)
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.write_bytes(data)
    temporary.replace(target)


def read_json(uri: str) -> Any:
    """Parses a JSON file."""
    return json.loads(read_bytes(uri))


def write_json(uri: str, value: Any) -> None:
    """Writes readable JSON in one step."""
    write_bytes(uri, (json.dumps(value, indent=1, sort_keys=False, default=str) + "\n").encode())


def write_table(uri: str, table: pa.Table, row_group_size: int = 256) -> None:
    """Writes a Parquet file in one step (zstd)."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=row_group_size)
    write_bytes(uri, sink.getvalue().to_pybytes())


def read_table(uri: str, columns: list[str] | None = None) -> pa.Table:
    """Reads one Parquet file, or all Parquet files of a folder in name order."""
    files = [uri] if uri.endswith(".parquet") else list_files(uri, ".parquet")
    if not files:
        raise UserError("table", uri, "holds no Parquet files", "run the stage that writes it first")
    tables = []
    for file in files:
        fs, path = filesystem(file)
        tables.append(pq.read_table(path, columns=columns, filesystem=fs, partitioning=None))
    return pa.concat_tables(tables)


def read_row(uri: str, row: int) -> dict[str, Any]:
    """One row of a Parquet file, by its place; reads no more than its row group."""
    fs, path = filesystem(uri)
    with fs.open(path, "rb") as handle:
        file = pq.ParquetFile(handle)
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if row < size:
                found: dict[str, Any] = file.read_row_group(group).slice(row, 1).to_pylist()[0]
                return found
            row -= size
    raise IndexError(f"{uri} has no such row")


def remove(uri: str) -> None:
    """Removes a file or a folder with everything in it; it may be absent."""
    fs, path = filesystem(uri)
    if fs.exists(path):
        fs.rm(path, recursive=True)


def upload_folder(local: str | Path, uri: str) -> None:
    """Copies a local folder's files to a URI, replacing what has the same name."""
    local = Path(local)
    for file in sorted(local.rglob("*")):
        if file.is_file():
            write_bytes(join(uri, file.relative_to(local).as_posix()), file.read_bytes())


def local_folder(uri: str) -> str:
    """A local folder with the files of `uri`: itself when it is local, else a fresh copy."""
    if not uri.startswith("s3://"):
        return absolute(uri)
    target = Path(tempfile.mkdtemp(prefix="aai-"))
    base = filesystem(uri)[1].rstrip("/")
    for file in list_files(uri):
        out = target / filesystem(file)[1].removeprefix(base).lstrip("/")
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(read_bytes(file))
    return str(target)
