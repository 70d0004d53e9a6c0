"""Texts of shards that wait for a worker: outside the driver, where there may be many."""

import json

import pyarrow as pa

from aai import storage

PART_CHARS = 4_000_000
"""About how much text a file holds, and the driver at once."""
_KEY = "waiting"


class WaitingTexts:
    """Texts that are kept in FOLDER/part-*.parquet, one in each row group; without a folder, in memory."""

    def __init__(self, folder: str | None) -> None:
        self._folder, self._parts, self._held, self._held_chars = folder, 0, list[str](), 0
        self._places: list[str] = []
        self.remove()  # what a run left that was killed

    def add(self, text: str) -> None:
        """Adds one."""
        if self._folder is None:
            self._places.append(text)
            return
        self._held.append(text)
        self._held_chars += len(text)
        if self._held_chars >= PART_CHARS:
            self._write(self._folder)

    def _write(self, folder: str) -> None:
        file = storage.join(folder, f"part-{self._parts:05d}.parquet")
        storage.write_table(file, pa.table({"text": pa.array(self._held, pa.large_string())}), row_group_size=1)
        self._places += [json.dumps({_KEY: [file, row]}) for row in range(len(self._held))]
        self._parts, self._held, self._held_chars = self._parts + 1, [], 0

    def __len__(self) -> int:
        return len(self._places) + len(self._held)

    def places(self) -> list[str]:
        """For each text what `text_at` finds it by."""
        if self._held and self._folder is not None:
            self._write(self._folder)
        return self._places

    def remove(self) -> None:
        """Deletes the files."""
        if self._folder is not None:
            storage.remove(self._folder)


def text_at(place: str) -> str:
    """The text that waits at a place."""
    found = json.loads(place).get(_KEY) if place.startswith(f'{{"{_KEY}"') else None
    return str(storage.read_rows(found[0], [found[1]])["text"][0].as_py()) if found else place
