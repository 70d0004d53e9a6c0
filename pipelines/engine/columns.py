"""Footers and small columns of many Parquet files at once, with as few requests as there can be.

A listing tells how large the files are, so that none is asked for its size. A footer is then one request, and columns
are one more for each stretch of the file in which they lie together; what comes with the footer is not asked for again.
Files are read ahead of what the caller takes, a few at a time.
"""

import io
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from aai import storage

THREADS = {"s3": 32, "file": 4}
"""Files that are read at once: on S3 nearly all the time is waiting, and files on disk may be large."""
T = TypeVar("T")


class _Ranges(io.RawIOBase):
    """A file of known size, read by ranges; the last one that was read is kept."""

    def __init__(self, fs: AbstractFileSystem, path: str, size_bytes: int) -> None:
        self.fs, self.path = fs, path
        self.size_bytes, self.at = size_bytes, 0
        self.kept_from, self.kept = 0, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size_bytes}[whence]
        return self.at

    def read(self, size: int = -1) -> bytes:
        begin, end = self.at, self.size_bytes if size < 0 else min(self.at + size, self.size_bytes)
        if begin >= end:
            return b""
        if not self.kept_from <= begin <= end <= self.kept_from + len(self.kept):
            self.kept_from, self.kept = begin, bytes(self.fs.cat_file(self.path, start=begin, end=end))
        self.at = end
        return self.kept[begin - self.kept_from : end - self.kept_from]


def open_parquet(uri: str, size_bytes: int | None = None) -> pq.ParquetFile:
    """A Parquet file whose neighbouring columns are read together. size_bytes: where it is known."""
    fs, path = storage.filesystem(uri)
    if not uri.startswith("s3://"):
        return pq.ParquetFile(path)
    return pq.ParquetFile(_Ranges(fs, path, int(fs.size(path)) if size_bytes is None else size_bytes), pre_buffer=True)


def read_each(read: Callable[[str, int], T], files: Mapping[str, int]) -> Iterator[T]:
    """What `read(uri, bytes)` gives of each file, in the order of the files."""
    waiting: deque[Future[T]] = deque()
    threads = THREADS["s3" if any(uri.startswith("s3://") for uri in files) else "file"]
    with ThreadPoolExecutor(threads) as pool:
        for uri, size_bytes in files.items():
            waiting.append(pool.submit(read, uri, size_bytes))
            if len(waiting) == threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def read_footers(files: Mapping[str, int]) -> Iterator[pq.FileMetaData]:
    """Of each file, in the order of the files ({uri: bytes}, as `storage.file_sizes` gives them)."""

    def read(uri: str, size_bytes: int) -> pq.FileMetaData:
        with open_parquet(uri, size_bytes) as file:
            return file.metadata

    return read_each(read, files)


def read_columns(files: Mapping[str, int], columns: Sequence[str]) -> Iterator[pa.Table]:
    """These columns of each file, as far as it has them, with its metadata, in the order of the files."""

    def read(uri: str, size_bytes: int) -> pa.Table:
        with open_parquet(uri, size_bytes) as file:
            found = [name for name in columns if name in file.schema_arrow.names]
            return file.read(found, use_threads=False).select(found)

    return read_each(read, files)
