"""Keys of many clips in little memory, and what is known by them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Generic, TypeVar, overload

import numpy as np
import pyarrow as pa

_DECODED = 4096
T = TypeVar("T")


class ClipKeys(Sequence[str]):
    """Short ASCII texts: bytes [N] of one length, texts only as they are asked for."""

    def __init__(self, keys: "np.ndarray | Iterable[str]") -> None:
        given = keys if isinstance(keys, np.ndarray) else np.array([key.encode() for key in keys], np.bytes_)
        self.packed = given

    @classmethod
    def of_column(cls, column: pa.ChunkedArray) -> "ClipKeys":
        """The keys of a column of texts."""
        starts = range(0, len(column), _DECODED)
        return cls.joined(cls(column.slice(start, _DECODED).to_pylist()) for start in starts)

    @classmethod
    def joined(cls, parts: Iterable["ClipKeys"]) -> "ClipKeys":
        """The keys of all parts."""
        return cls(np.concatenate([np.empty(0, np.bytes_), *(part.packed for part in parts)]))

    def __len__(self) -> int:
        return len(self.packed)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> "ClipKeys": ...
    def __getitem__(self, place: int | slice) -> "str | ClipKeys":
        found = self.packed[place]
        return ClipKeys(found) if isinstance(place, slice) else bytes(found).decode()

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _DECODED):
            for key in self.packed[start : start + _DECODED].tolist():
                yield key.decode()

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.place(key) is not None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ClipKeys) and np.array_equal(self.packed, other.packed)

    __hash__ = None  # type: ignore[assignment]

    @cached_property
    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        """Places in the order of their keys, and the keys in that order."""
        order = np.argsort(self.packed, kind="stable").astype(np.int32)
        return order, self.packed[order]

    def place(self, key: str) -> int | None:
        """Where a key stands first, if it does."""
        found = int(self.places(ClipKeys(np.array([key.encode()])))[0])
        return None if found < 0 else found

    def places(self, keys: "ClipKeys") -> np.ndarray:
        """int64: where each of `keys` stands here first; -1 for those that do not."""
        order, ascending = self._sorted
        if not len(order):
            return np.full(len(keys), -1)
        near = np.minimum(np.searchsorted(ascending, keys.packed), len(order) - 1)
        return np.where(ascending[near] == keys.packed, order[near], -1).astype(np.int64)

    def are_last(self) -> np.ndarray:
        """bool [N]: whether a key does not come again."""
        order, ascending = self._sorted
        last = np.ones(len(order), bool)
        last[order[:-1]] = ascending[:-1] != ascending[1:]
        return last


class Keyed(Mapping[str, T], Generic[T]):
    """What stands in `values`, by the key in its place; keys are unique."""

    def __init__(self, keys: ClipKeys, values: Sequence[T]) -> None:
        self._keys, self.in_order = keys, values
        self._next = 0  # most who ask go through all in order

    def __getitem__(self, key: str) -> T:
        place: int | None = self._next
        if self._next >= len(self._keys) or self._keys[self._next] != key:
            place = self._keys.place(key)
        if place is None:
            raise KeyError(key)
        self._next = place + 1
        return self.in_order[place]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)
