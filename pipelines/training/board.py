"""Where ranks of a training post figures and skipped steps, and the driver reads them; it starts at once."""

from typing import Any


class Board:
    """The state of a small Ray actor."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []

    def post(self, entry: dict[str, Any]) -> None:
        """Adds one entry."""
        self.entries.append(entry)

    def take(self) -> list[dict[str, Any]]:
        """The entries since the last call."""
        taken, self.entries = self.entries, []
        return taken
