"""One stage's folder as a listing shows it, and its files; whatever is read may be gone since: the run goes on."""

import json
from collections.abc import Iterator
from typing import Any

from aai import storage
from aai.storage import FileFacts
from pipelines.engine.lock import LOCK, LockState, holding

TAIL_BYTES = 65_536
"""How much of the end of a history is read."""
MAX_HEADER_BYTES = 16 * 2**20


class StageFolder:
    """The files of a folder or s3:// prefix, listed once."""

    def __init__(self, uri: str, depth: int | None = None) -> None:
        """depth: levels that are listed; None = all."""
        self.uri, self.files = uri, storage.files_in(uri, depth)

    @property
    def holding(self) -> LockState | None:
        """Who holds its lock, or has left it there."""
        return holding(self.uri) if LOCK in self.files else None

    @property
    def last_write_s(self) -> float | None:
        """When the youngest file was written, in Unix time."""
        return max((facts.modified_s for name, facts in self.files.items() if name != LOCK), default=None)

    def below(self, folder: str) -> dict[str, FileFacts]:
        """The files of a folder in it, by their names there."""
        prefix = f"{folder}/"
        return {name.removeprefix(prefix): facts for name, facts in self.files.items() if name.startswith(prefix)}

    def shards(self, folder: str = "") -> set[str]:
        """Names of the tables that lie directly in a folder."""
        names = self.below(folder) if folder else self.files
        return {name.removesuffix(".parquet") for name in names if name.endswith(".parquet") and "/" not in name}

    def json(self, name: str) -> dict[str, Any] | None:
        """A JSON object; None where it is not there, or is something else."""
        if name not in self.files:
            return None
        try:
            found = storage.read_json(storage.join(self.uri, name))
        except (FileNotFoundError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def last_entries(self, name: str) -> Iterator[dict[str, Any]]:
        """The entries at the end of a .jsonl file, the last one first."""
        if name not in self.files:
            return
        size = self.files[name].size_bytes
        start = max(0, size - TAIL_BYTES)
        try:
            lines = storage.read_range(storage.join(self.uri, name), start, size).split(b"\n")
        except (FileNotFoundError, EOFError):  # it is written anew, and may be shorter for a moment
            return
        for line in reversed(lines[1 if start else 0 :]):
            if line.strip():
                yield json.loads(line)

    def safetensors_about(self, name: str) -> dict[str, str]:
        """What a safetensors file says of itself, by reading its header alone; {} where it is gone."""
        uri = storage.join(self.uri, name)
        try:
            size = int.from_bytes(storage.read_range(uri, 0, 8), "little")
            header = json.loads(storage.read_range(uri, 8, 8 + min(size, MAX_HEADER_BYTES)))
        except (FileNotFoundError, EOFError, ValueError):
            return {}
        return dict(header.get("__metadata__", {}))
