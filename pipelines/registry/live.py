"""Figures of a running training, sent to MLflow as they come; a server that is away stops nothing.

What is to be sent waits in order. history.jsonl holds the same entries, so that nothing is lost with the process.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from aai.errors import UserError
from pipelines.registry.tracking import OpenRun

log = logging.getLogger(__name__)

RETRY_S = 5.0
"""Between two tries to reach a server that is away."""
PATIENCE_S = 600.0
"""How long a training that has ended waits for a server that is away."""

Send = Callable[[int, Mapping[str, Any]], None]


@contextmanager
def live_metrics(run: OpenRun) -> Iterator[Send]:
    """Yields `send(step, figures)`, which returns at once. At the end it waits until all is sent, or for PATIENCE_S."""
    sender = _Sender(run)
    sender.thread.start()
    try:
        yield sender.put
    except BaseException:
        sender.finish(patience_s=0)  # an error must not wait for a server
        raise
    sender.finish(PATIENCE_S)


class _Sender:
    def __init__(self, run: OpenRun) -> None:
        self.run = run
        self.waiting: queue.Queue[tuple[int, Mapping[str, Any]] | None] = queue.Queue()
        self.thread = threading.Thread(target=self._work, name="live-metrics", daemon=True)
        self.gives_up_s = float("inf")
        self.unsent = 0

    def put(self, step: int, figures: Mapping[str, Any]) -> None:
        self.waiting.put((step, figures))

    def finish(self, patience_s: float) -> None:
        self.gives_up_s = time.monotonic() + patience_s
        self.waiting.put(None)
        self.thread.join()
        if self.unsent:
            log.warning("MLflow got %d entries less than history.jsonl has: it was away to the end", self.unsent)

    def _work(self) -> None:
        while (entry := self.waiting.get()) is not None:
            self.unsent += not self._sent(*entry)

    def _sent(self, step: int, figures: Mapping[str, Any]) -> bool:
        told = False
        while True:
            try:
                self.run.log_metrics(figures, step=step)
                return True
            except UserError as error:
                if time.monotonic() >= self.gives_up_s:
                    return False
                if not told:
                    log.warning("MLflow is away, the training goes on and its figures are sent later (%s)", error)
                    told = True
                time.sleep(RETRY_S)
