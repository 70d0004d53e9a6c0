"""Media files of any size: small ones as bytes, larger ones as ranges of which the last blocks are kept."""

from functools import lru_cache

from aai import storage
from aai.media.limits import ClipError
from aai.media.ranged import Content
from pipelines.engine.reading import read_file, tried

IN_MEMORY_BYTES = 128 * 2**20
"""Larger files are never in memory as a whole."""
BLOCK_BYTES, BLOCKS = 8 * 2**20, 8
"""What is read at once, and how many of these are kept: a film's index, which every clip needs, and where it is."""


class FileRanges:
    """A file on disk or S3, or a member of a tar; a block that is kept is not read again."""

    def __init__(self, uri: str, size: int) -> None:
        self.uri, self.size = uri, size
        self._block = lru_cache(BLOCKS)(self._read_block)

    def __len__(self) -> int:
        return self.size

    def _read_block(self, number: int) -> bytes:
        start = number * BLOCK_BYTES
        return storage.read_range(self.uri, start, min(start + BLOCK_BYTES, self.size))

    def read(self, start: int, end: int) -> bytes:
        """The bytes [start, end), as far as there are any. Raises ClipError as `read_file` gives it."""
        end = min(end, self.size)  # a decoder that was taken over may ask for anything
        first, last = start // BLOCK_BYTES, (end - 1) // BLOCK_BYTES
        found = tried(self.uri, lambda: b"".join(self._block(number) for number in range(first, last + 1)))
        if isinstance(found, ClipError):
            raise found
        return found[start - first * BLOCK_BYTES : end - first * BLOCK_BYTES]


def open_file(uri: str, max_bytes: int) -> Content | ClipError:
    """A file's content, or why it cannot be had, as `read_file` says; what is over IN_MEMORY_BYTES as FileRanges."""
    found = read_file(uri, min(max_bytes, IN_MEMORY_BYTES))
    if max_bytes <= IN_MEMORY_BYTES or not isinstance(found, ClipError) or found.code != "TOO_LARGE":
        return found
    size = tried(uri, lambda: storage.file_size(uri, max_bytes))
    return size if isinstance(size, ClipError) else FileRanges(uri, size)
