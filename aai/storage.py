"""Files by URI: a local path, `file://` or `s3://`, through fsspec.

S3 endpoint and keys come from the environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY).
Only these schemes are allowed: nothing is ever fetched from an arbitrary URL. A member of a tar is
`PATH.tar#OFFSET,SIZE,NAME`: it is read as a range of the tar, and never written; NAME only tells people which it is.
"""

import atexit
import contextlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from aai.errors import UserError, room_explained
from aai.fencing import ask_guards
from aai.version import METADATA_KEY, UNKNOWN, code_version

SCHEMES = ("file", "s3")
PATIENCE = {"retries": {"mode": "standard", "total_max_attempts": 16}}
"""botocore's: waits that double up to 20 s between tries."""
CONNECTIONS = {"max_pool_connections": 32}
"""botocore's, too: requests that one process has under way at once."""
_MEMBER = re.compile(r"(?P<file>.+?\.tar)#(?P<offset>[0-9]+),(?P<size>[0-9]+),(?P<name>.*)", re.I | re.S)


@dataclass(frozen=True)
class Member:
    """A file inside a tar: `size` bytes from `offset` on."""

    file: str
    offset: int
    size: int
    name: str

    @property
    def uri(self) -> str:
        """The URI that `member` parses."""
        return f"{self.file}#{self.offset},{self.size},{self.name}"


def member(uri: str) -> Member | None:
    """The member that a URI names, or None for a file of its own."""
    match = _MEMBER.fullmatch(uri) if "#" in uri else None
    return Member(match["file"], int(match["offset"]), int(match["size"]), match["name"]) if match else None


def file_of(uri: str) -> str:
    """The file that holds the content of a URI: the tar of a member, else itself."""
    part = member(uri)
    return part.file if part else uri


_patient = False


def be_patient() -> None:
    """From now on this process bridges S3 outages of a minute or two, not of seconds: for what runs for days."""
    global _patient
    _patient = True


def filesystem(uri: str, patient: bool = False) -> tuple[AbstractFileSystem, str]:
    """The fsspec file system of a URI and the path of its file there. Raises UserError for another scheme.

    patient: see `be_patient`, for this file system alone.
    """
    uri = file_of(uri)
    scheme = uri.split("://", 1)[0] if "://" in uri else "file"
    if scheme not in SCHEMES:
        raise UserError("uri", uri, f"scheme {scheme!r} is not allowed", "use a local path, file:// or s3://")
    if scheme == "s3":
        # Servers other than AWS reject the newer trailing checksums.
        os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        os.environ.setdefault("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
        client = CONNECTIONS | (PATIENCE if patient or _patient else {})
        return fsspec.filesystem("s3", use_listings_cache=False, config_kwargs=client), uri.split("://", 1)[1]
    # Only this prefix is cut: a name may itself hold "://" or start with "-".
    return fsspec.filesystem("file"), os.path.abspath(uri.removeprefix("file://"))


def absolute(uri: str) -> str:
    """A URI that means the same on every node: local paths made absolute."""
    if part := member(uri):
        return replace(part, file=absolute(part.file)).uri
    return uri if uri.startswith("s3://") else os.path.abspath(uri.removeprefix("file://"))


def join(base: str, *parts: str) -> str:
    """Joins path parts with "/"."""
    return "/".join([base.rstrip("/"), *parts])


def exists(uri: str) -> bool:
    """Whether a file or folder is there; of a member, whether its tar is."""
    fs, path = filesystem(uri)
    return bool(fs.exists(path))


def list_files(uri: str, suffix: str = "") -> list[str]:
    """All files under a folder whose names end in `suffix`, as sorted URIs; empty if there is no such folder."""
    fs, path = filesystem(uri)
    if not fs.exists(path):
        return []
    prefix = "s3://" if uri.startswith("s3://") else ""
    return sorted(prefix + found for found in fs.find(path) if found.endswith(suffix))


def file_sizes(uri: str, suffix: str = "") -> dict[str, int]:
    """{file: bytes} of `list_files`, out of the same listing."""
    fs, path = filesystem(uri)
    prefix = "s3://" if uri.startswith("s3://") else ""
    found = {prefix + name: int(about["size"]) for name, about in fs.find(path, detail=True).items()}
    return {name: found[name] for name in sorted(found) if name.endswith(suffix)}


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What a listing tells of a file."""

    size_bytes: int
    modified_s: float
    """Unix time."""


def files_in(uri: str, depth: int | None = None) -> dict[str, FileFacts]:
    """{name within the folder: facts} of its files, down to `depth` levels, by one listing; {} where it is absent."""
    fs, path = filesystem(uri)
    base, found = path.rstrip("/") + "/", {}
    for name, about in fs.find(path, maxdepth=depth, detail=True).items():
        modified = about["LastModified"].timestamp() if uri.startswith("s3://") else about["mtime"]
        found[name.removeprefix(base)] = FileFacts(int(about["size"]), float(modified))
    return found


def names_in(uri: str) -> list[str]:
    """Names of what lies directly in a folder, in order; [] where it is absent."""
    fs, path = filesystem(uri)
    try:
        return sorted(name.rstrip("/").rsplit("/", 1)[1] for name in fs.ls(path, detail=False))
    except FileNotFoundError:
        return []


def shard_names(folder: str) -> set[str]:
    """Names of a folder's Parquet files, without their ending."""
    return {file.rsplit("/", 1)[1].removesuffix(".parquet") for file in list_files(folder, ".parquet")}


def read_bytes(uri: str, max_bytes: int | None = None) -> bytes:
    """A file's content, or a member's: that range alone.

    Raises ValueError when it is larger than `max_bytes` (before reading it), EOFError when a tar ends within a member.
    """
    if max_bytes is not None:
        file_size(uri, max_bytes)
    if part := member(uri):
        return read_range(uri, 0, part.size)
    fs, path = filesystem(uri)
    with fs.open(path, "rb") as file:
        return bytes(file.read())


def file_size(uri: str, max_bytes: int) -> int:
    """Bytes of a file or member. Raises ValueError when they are more than `max_bytes`."""
    part = member(uri)
    fs, path = filesystem(uri)
    if (size := part.size if part else int(fs.size(path))) > max_bytes:
        raise ValueError(f"file of {size} bytes is over the limit of {max_bytes} bytes")
    return size


def read_range(uri: str, start: int, end: int) -> bytes:
    """The bytes [start, end) of a file or member. Raises EOFError when it ends before."""
    part = member(uri)
    fs, path = filesystem(uri)
    begin = part.offset if part else 0
    # An empty range cannot be asked for over HTTP.
    data = bytes(fs.cat_file(path, start=begin + start, end=begin + end)) if end > start else b""
    if len(data) != end - start:
        raise EOFError(f"the tar ends within {part.name}" if part else f"the file ends before byte {end}")
    return data


def _refuse_member(uri: str) -> None:
    if member(uri):
        raise ValueError(f"{uri} is a member of a tar: it can only be read")


def tag_of(uri: str) -> str | None:
    """What `write_bytes` takes as `over`: the ETag under s3://, None where there is no file, or none of that kind."""
    fs, path = filesystem(uri)
    try:
        return fs.info(path).get("ETag")
    except FileNotFoundError:
        return None


def _is_refused(error: OSError) -> bool:
    """Whether a server refused a write because of its condition; servers differ in how they say so."""
    answer = getattr(error.__cause__, "response", {}).get("Error", {})
    return answer.get("Code") in ("PreconditionFailed", "ConditionalRequestConflict", "412")


def write_bytes(uri: str, data: bytes | memoryview, new: bool = False, over: str | None = None) -> None:
    """Writes a file in one step: a reader, or a kill, never sees half of it.

    new: raise FileExistsError where one is there; over: raise it where the file's tag (see `tag_of`) is another by now.
    On S3 only servers that honour `If-None-Match` and `If-Match` do, on disk `over` is not looked at.
    """
    _refuse_member(uri)
    fs, path = filesystem(uri)
    if uri.startswith("s3://"):  # a PUT is atomic
        ask_guards(absolute(uri))
        condition = {"IfNoneMatch": "*"} if new else {"IfMatch": over} if over else {}
        try:
            fs.pipe_file(path, data, **condition)
        except OSError as error:
            if _is_refused(error):
                raise FileExistsError(uri) from error
            raise
        return
    target = Path(path)
    with _beside(target) as temporary:
        temporary.write_bytes(data)
        ask_guards(absolute(uri))
        if new:
            target.hardlink_to(temporary)  # unlike a rename, it fails where the name is taken
        else:
            temporary.replace(target)


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A name beside a file's for what shall take its place; nothing of it stays. A full disk is a UserError."""
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    with room_explained(str(target.parent)):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


def read_json(uri: str) -> Any:
    """Parses a JSON file."""
    return json.loads(read_bytes(uri))


def write_json(uri: str, value: Any) -> None:
    """Writes readable JSON in one step."""
    write_bytes(uri, (json.dumps(value, indent=1, sort_keys=False, default=str) + "\n").encode())


def parquet_options(compressed: bool) -> dict[str, Any]:
    """How Parquet files are written: zstd, or plain for numbers and sound, which hardly shrink and are read often."""
    return {"compression": "zstd"} if compressed else {"compression": "none", "use_dictionary": False}


def write_table(
    uri: str, table: pa.Table, row_group_size: int = 256, new: bool = False, compressed: bool = True
) -> None:
    """Writes a Parquet file in one step; its metadata says which code wrote it.

    new: as for `write_bytes`. compressed: see `parquet_options`.
    """
    written_by = {METADATA_KEY: code_version().encode()}
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), **written_by})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=row_group_size, **parquet_options(compressed))
    data = sink.getvalue()
    write_bytes(uri, data.to_pybytes() if uri.startswith("s3://") else memoryview(data), new)


def written_by(uri: str) -> str:
    """Which code wrote a Parquet file; "unknown" for one that does not say."""
    fs, path = filesystem(uri)
    return (pq.read_schema(path, filesystem=fs).metadata or {}).get(METADATA_KEY, UNKNOWN.encode()).decode()


def read_table(uri: str, columns: list[str] | None = None, schema: pa.Schema | None = None) -> pa.Table:
    """Reads one Parquet file, or all Parquet files of a folder in name order.

    schema: what the table ought to have; a column of it that a file of an earlier version lacks is null.
    """
    files = [uri] if uri.endswith(".parquet") else list_files(uri, ".parquet")
    if not files:
        raise UserError("table", uri, "holds no Parquet files", "run the stage that writes it first")
    tables = []
    for file in files:
        fs, path = filesystem(file)
        tables.append(pq.read_table(path, columns=columns, filesystem=fs, partitioning=None, schema=schema))
    return pa.concat_tables(tables)


def read_rows(uri: str, rows: Sequence[int], columns: list[str] | None = None) -> pa.Table:
    """Rows of one Parquet file by their places, in the order given; reads the row groups that hold them, one by one."""
    fs, path = filesystem(uri)
    wanted = np.asarray(rows, np.int64)
    parts, places, first = [], [], 0
    with fs.open(path, "rb") as handle:
        file = pq.ParquetFile(handle)
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            here = np.flatnonzero((wanted >= first) & (wanted < first + size))
            if len(here):
                parts.append(file.read_row_group(group, columns=columns).take(pa.array(wanted[here] - first)))
                places.append(here)
            first += size
    if sum(len(here) for here in places) != len(wanted):
        raise IndexError(f"{uri} has {first} rows, not all of {sorted(set(rows))[:5]}...")
    if not parts:
        return pq.read_schema(path, filesystem=fs).empty_table().select(columns or slice(None))
    return pa.concat_tables(parts).take(pa.array(np.argsort(np.concatenate(places))))


def remove(uri: str) -> None:
    """Removes a file or a folder with everything in it; it may be absent."""
    _refuse_member(uri)
    fs, path = filesystem(uri)
    if fs.exists(path):
        ask_guards(absolute(uri))
        fs.rm(path, recursive=True)


def upload_folder(local: str | Path, uri: str) -> None:
    """Copies a local folder's files to a URI, replacing what has the same name."""
    local = Path(local)
    for file in sorted(local.rglob("*")):
        if file.is_file():
            write_bytes(join(uri, file.relative_to(local).as_posix()), file.read_bytes())


def temporary_folder() -> Path:
    """A fresh local folder that is removed when this process ends."""
    folder = tempfile.mkdtemp(prefix="aai-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def local_folder(uri: str) -> str:
    """A local folder with the files of `uri`: itself when it is local, else a fresh copy."""
    if not uri.startswith("s3://"):
        return absolute(uri)
    target = temporary_folder()
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
            ask_guards(absolute(uri))
            fs.put_file(str(local), path)  # an upload in parts shows when it is complete
        return
    target = Path(path)
    with _beside(target) as temporary:
        yield temporary
        ask_guards(absolute(uri))
        temporary.replace(target)
