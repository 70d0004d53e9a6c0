"""Where painters tell what they serve and the gateway reads it; it knows no model, so it costs neither of them one."""

import time
from typing import Any

from ray import serve

STALE_S = 180.0
"""After which a painter that told nothing is gone."""


class Noticeboard:
    """What each painter serves: they tell it, the gateway reads it. An actor, since Serve asks only one of many."""

    def __init__(self) -> None:
        self._rows: dict[str, tuple[float, dict[str, Any]]] = {}

    def tell(self, painter: str, row: dict[str, Any]) -> None:
        """A painter's state: model, refused, trouble."""
        self._rows[painter] = time.monotonic(), row

    def read(self) -> list[dict[str, Any]]:
        """The states of all painters that are there."""
        fresh = time.monotonic() - STALE_S
        self._rows = {painter: row for painter, row in self._rows.items() if row[0] > fresh}
        return [row for _, row in self._rows.values()]


def board_name(name: str) -> str:
    """The board of this application: others on the cluster have their own. For replicas alone."""
    return f"{name}-{serve.get_replica_context().app_name}"
