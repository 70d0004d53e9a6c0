"""Media files of any size: small ones as bytes, larger ones as ranges of which the last blocks are kept."""

from functools import lru_cache

from aai import storage
from aai.digest import digest
from aai.media.limits import ClipError
from aai.media.ranged import Content
from pipelines.engine.kept_blocks import KeptBlocks
from pipelines.engine.reading import read_file, tried

IN_MEMORY_BYTES = 128 * 2**20
"""Larger files are never in memory as a whole."""
BLOCK_BYTES, BLOCKS = 8 * 2**20, 8
"""What is read at once, and how many of these are kept: a film's index, which every clip needs, and where it is."""


class FileRanges:
    """A file on disk or S3, or a member of a tar; a block that is kept is not read again.

    kept: blocks of files under s3:// on this node's disk; what lies on a disk already, the system keeps in memory.
    """

    def __init__(self, uri: str, size: int, kept: KeptBlocks | None = None) -> None:
        self.uri, self.size, self.kept = uri, size, kept
        tag = storage.tag_of(storage.file_of(uri)) if kept and uri.startswith("s3://") else None
        self.key = tag and digest([uri, tag, size, BLOCK_BYTES], 24)
        self._block = lru_cache(BLOCKS)(self._read_block)

    def __len__(self) -> int:
        return self.size

    def _read_block(self, number: int) -> bytes:
        start = number * BLOCK_BYTES
        end = min(start + BLOCK_BYTES, self.size)
        name = f"{self.key}-{number}"
        if self.kept is None or self.key is None:
            return storage.read_range(self.uri, start, end)
        if (data := self.kept.get(name, end - start)) is None:
            data = storage.read_range(self.uri, start, end)
            self.kept.put(name, data)
        return data

    def read(self, start: int, end: int) -> bytes:
        """The bytes [start, end), as far as there are any. Raises ClipError as `read_file` gives it."""
        end = min(end, self.size)  # a decoder that was taken over may ask for anything
        first, last = start // BLOCK_BYTES, (end - 1) // BLOCK_BYTES
        found = tried(self.uri, lambda: b"".join(self._block(number) for number in range(first, last + 1)))
        if isinstance(found, ClipError):
            raise found
        return found[start - first * BLOCK_BYTES : end - first * BLOCK_BYTES]


def open_file(uri: str, max_bytes: int, kept: KeptBlocks | None = None) -> Content | ClipError:
    """A file's content, or why it cannot be had, as `read_file` says; what is over IN_MEMORY_BYTES as FileRanges."""
    found = read_file(uri, min(max_bytes, IN_MEMORY_BYTES))
    if max_bytes <= IN_MEMORY_BYTES or not isinstance(found, ClipError) or found.code != "TOO_LARGE":
        return found
    return tried(uri, lambda: FileRanges(uri, storage.file_size(uri, max_bytes), kept))
