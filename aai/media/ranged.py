"""The content of a media file: bytes in memory, or pieces that are asked for, so that its length costs no memory."""

import hashlib
import io
from collections.abc import Callable
from typing import Any, BinaryIO, Protocol, cast

PIECE_BYTES = 2**18
"""What is asked for at once: a seek makes the rest of a piece useless."""


class Ranges(Protocol):
    """A file that is read by range."""

    def __len__(self) -> int:
        """Its size in bytes."""

    def read(self, start: int, end: int) -> bytes:
        """The bytes [start, end), all of them."""


Content = bytes | Ranges


class AskedRanges:
    """Ranges of `size` bytes that somebody else reads: `ask(start, end)`."""

    def __init__(self, size: int, ask: Callable[[int, int], bytes]) -> None:
        self.size, self.read = size, ask

    def __len__(self) -> int:
        return self.size


class HashedRanges:
    """Ranges that are hashed as they pass by in order: who reads a file through has its hash, too."""

    def __init__(self, ranges: Ranges) -> None:
        self.ranges, self._sha, self._hashed = ranges, hashlib.sha256(), 0

    def __len__(self) -> int:
        return len(self.ranges)

    def read(self, start: int, end: int) -> bytes:
        """The bytes [start, end)."""
        data = self.ranges.read(start, end)
        if start <= self._hashed < end:
            self._sha.update(memoryview(data)[self._hashed - start :])
            self._hashed = end
        return data

    def content_hash(self) -> str:
        """SHA-256 of the whole file; what did not pass by in order is read now."""
        while self._hashed < len(self):
            self.read(self._hashed, min(self._hashed + PIECE_BYTES, len(self)))
        return self._sha.hexdigest()


def hash_of(content: Content) -> str:
    """SHA-256 of a file's content, which is read for it."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    return HashedRanges(content).content_hash()


class _RangedFile(io.RawIOBase):
    def __init__(self, ranges: Ranges) -> None:
        self.ranges, self.size, self.position = ranges, len(ranges), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = max(0, offset + (0, self.position, self.size)[whence])
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        end = min(self.position + len(buffer), self.size)
        data = self.ranges.read(self.position, end) if end > self.position else b""
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def opened(content: Content) -> BinaryIO:
    """The content as a file of its own, at its start."""
    if isinstance(content, bytes):
        return io.BytesIO(content)
    return cast(BinaryIO, io.BufferedReader(_RangedFile(content), PIECE_BYTES))
