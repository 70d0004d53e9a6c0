"""Tables that are needed once more but too large for the driver's memory: in a temporary file of its machine."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from functools import cached_property

import pyarrow as pa


class SpilledTables(Mapping[str, pa.Table]):
    """Tables by name. The file has no name on disk and is gone with the process, however it ends."""

    def __init__(self) -> None:
        self._places: dict[str, tuple[int, int]] = {}
        self._end = 0

    @cached_property
    def _file(self) -> int:
        self._keeper = tempfile.TemporaryFile(prefix="aai-")  # noqa: SIM115 (open as long as this object)
        return self._keeper.fileno()

    def add(self, name: str, table: pa.Table) -> None:
        """Adds a table, or puts another in its place."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        data, start = memoryview(sink.getvalue()), self._end
        while data:
            written = os.pwrite(self._file, data, self._end)
            data, self._end = data[written:], self._end + written
        self._places[name] = (start, self._end - start)

    def __getitem__(self, name: str) -> pa.Table:
        start, size = self._places[name]
        return pa.ipc.open_stream(os.pread(self._file, size, start)).read_all()

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
