"""Many small tables of one form as slices of a few large ones: ten thousand of their own would take several times as
much memory."""

from collections.abc import Iterator, Mapping

import pyarrow as pa

GROUP_ROWS = 16_384


class TableSlices(Mapping[str, pa.Table]):
    """Tables by name, in the order in which they were added."""

    def __init__(self) -> None:
        self._groups: list[pa.Table | None] = []
        self._places: dict[str, tuple[int, int, int]] = {}
        self._loose: list[pa.Table] = []
        self._loose_rows = 0
        self._gone = 0

    def add(self, name: str, table: pa.Table) -> None:
        """Adds a table; all have the same columns."""
        self._places[name] = (len(self._groups), self._loose_rows, len(table))
        self._loose.append(table.replace_schema_metadata(None))
        self._loose_rows += len(table)
        if self._loose_rows >= GROUP_ROWS:
            self._join()

    def _join(self) -> None:
        self._groups.append(pa.concat_tables(self._loose).combine_chunks())
        self._loose, self._loose_rows = [], 0

    def __getitem__(self, name: str) -> pa.Table:
        group, start, size = self._places[name]
        if group == len(self._groups):
            self._join()
        if (found := self._groups[group]) is None:
            raise KeyError(f"{name} was let go")
        return found.slice(start, size)

    def drop_before(self, name: str) -> None:
        """Lets go of the tables before this one: they are not asked for any more."""
        while self._gone < self._places[name][0]:
            self._groups[self._gone] = None
            self._gone += 1

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
