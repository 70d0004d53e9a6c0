"""Where painters tell what they serve, and are told to look; it knows no model, so it costs nobody one."""

import asyncio
import time
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import Any

import ray
from ray import serve

STALE_S = 180.0
"""After which a painter that told nothing is gone."""
HOLD_S = 30.0
"""How long the board keeps who waits for a move, and has none to tell."""
PAUSE_S = 2.0
"""How often a painter asks at most: where no board is there, or moves come in bursts."""


class Noticeboard:
    """What each painter serves: they tell it, the gateway reads it. It tells when the alias moved, and they hear it.

    An actor, since Serve asks only one of many.
    """

    def __init__(self) -> None:
        self._rows: dict[str, tuple[float, dict[str, Any]]] = {}
        self._moves = time.time_ns()
        """Another number after each move, and on each board: who meets a new one may have missed a move."""
        self._news = asyncio.Event()

    def tell(self, painter: str, row: dict[str, Any]) -> None:
        """A painter's state: model, refused, trouble."""
        self._rows[painter] = time.monotonic(), row

    def read(self) -> list[dict[str, Any]]:
        """The states of all painters that are there."""
        fresh = time.monotonic() - STALE_S
        self._rows = {painter: row for painter, row in self._rows.items() if row[0] > fresh}
        return [row for _, row in self._rows.values()]

    def move(self) -> None:
        """The alias moved: all who wait are told."""
        self._moves += 1
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def moved(self, painter: str, seen: int) -> int:
        """The number of the last move, as soon as it is not `seen`, or after HOLD_S. Who asks is there."""
        if painter in self._rows:
            self.tell(painter, self._rows[painter][1])
        if self._moves == seen:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), HOLD_S)
        return self._moves


class BoardClient:
    """A painter's side of a board, which may be gone for a moment, with the gateway: then nobody waits for it."""

    def __init__(self, name: str) -> None:
        self._name, self._painter = name, ray.get_runtime_context().get_actor_id()
        self._answer: Future[int] | None = None
        self._seen, self._asked_s = 0, time.monotonic() - PAUSE_S

    def tell(self, row: dict[str, Any]) -> None:
        """See Noticeboard."""
        with suppress(Exception):
            ray.get_actor(self._name).tell.remote(self._painter, row)

    def moved(self, wait_s: float) -> bool:
        """Whether the alias moved, or may have: at once when it does, else after `wait_s`. For one thread alone."""
        answer = self._answer = self._answer or self._asked()
        if answer is None:
            time.sleep(wait_s)
            return False
        if not wait([answer], wait_s).done:
            if time.monotonic() > self._asked_s + 2 * HOLD_S:  # its node may be cut off
                self._answer = None
            return False
        self._answer = None
        try:
            seen, self._seen = self._seen, answer.result()
        except Exception:  # whatever ends with a board
            return False
        return seen != self._seen

    def _asked(self) -> Future[int] | None:
        """The board's answer to come; None where there is no board, or it was asked a moment ago."""
        if time.monotonic() < self._asked_s + PAUSE_S:
            return None
        self._asked_s = time.monotonic()
        try:
            return ray.get_actor(self._name).moved.remote(self._painter, self._seen).future()
        except Exception:
            return None


def board_name(name: str) -> str:
    """The board of this application: others on the cluster have their own. For replicas alone."""
    return f"{name}-{serve.get_replica_context().app_name}"
