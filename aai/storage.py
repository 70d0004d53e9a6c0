"""Files by URI: a local path, `file://` or `s3://`, through fsspec.

S3 endpoint and keys come from the environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY).
Only these schemes are allowed: nothing is ever fetched from an arbitrary URL.
"""

import contextlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterator
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


@contextlib.contextmanager
def writing(uri: str) -> Iterator[Path]:
    """A local file for content of any size; it takes its place at `uri` in one step when the body ends well."""
    fs, path = filesystem(uri)
    if uri.startswith("s3://"):
        with tempfile.TemporaryDirectory(prefix="aai-") as folder:
            local = Path(folder) / "content"
            yield local
            fs.put_file(str(local), path)  # an upload in parts shows when it is complete
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
