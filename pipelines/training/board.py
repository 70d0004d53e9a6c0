"""Where rank 0 of a training posts its figures and the driver reads them; imports nothing, so it starts at once."""


class Board:
    """The state of a small Ray actor."""

    def __init__(self) -> None:
        self.entries: list[dict[str, float]] = []

    def post(self, entry: dict[str, float]) -> None:
        """Adds one entry."""
        self.entries.append(entry)

    def take(self) -> list[dict[str, float]]:
        """The entries since the last call."""
        taken, self.entries = self.entries, []
        return taken
