"""Figures and pictures of a running training, sent to MLflow as they come; a server that is away stops nothing.

What is to be sent waits in order, and is sent again when no answer came. history.jsonl and OUT/samples hold the same,
so that nothing is lost with the process.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from pipelines.registry.tracking import OpenRun

log = logging.getLogger(__name__)

RETRY_S = 5.0
"""Between two tries to reach a server that is away."""
PATIENCE_S = 600.0
"""How long a training that has ended waits for a server that is away."""

SAMPLES = "samples"
"""Name of the pictures in MLflow."""


@contextmanager
def sender(run: OpenRun) -> Iterator["Sender"]:
    """Yields what sends, at once. At the end it waits until all is sent, or for PATIENCE_S."""
    found = Sender(run)
    found.thread.start()
    try:
        yield found
    except BaseException:
        found.finish(patience_s=0)  # an error must not wait for a server
        raise
    found.finish(PATIENCE_S)


class Sender:
    """A thread and what it has yet to send; its methods return at once."""

    def __init__(self, run: OpenRun) -> None:
        self.run = run
        self.waiting: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self.thread = threading.Thread(target=self._work, name="live-metrics", daemon=True)
        self.gives_up_s = float("inf")
        self.unsent = 0

    def figures(self, step: int, figures: Mapping[str, Any]) -> None:
        """Sends the figures of a step."""
        self.waiting.put(partial(self.run.log_metrics, figures, step=step))

    def picture(self, step: int, png: bytes) -> None:
        """Sends what was painted after a step."""
        self.waiting.put(partial(self.run.log_image, SAMPLES, png, step))

    def finish(self, patience_s: float) -> None:
        """Ends the thread when all is sent, or when the patience has ended."""
        self.gives_up_s = time.monotonic() + patience_s
        self.waiting.put(None)
        self.thread.join()
        if self.unsent:
            said = "MLflow got %d entries or pictures less than were written here: it was away to the end"
            log.warning(said, self.unsent)

    def _work(self) -> None:
        while (send := self.waiting.get()) is not None:
            self.unsent += not self._sent(send)

    def _sent(self, send: Callable[[], None]) -> bool:
        told = False
        while True:
            try:
                send()
                return True
            except Exception as error:  # MLflow's, or those of the storage of its pictures
                if time.monotonic() >= self.gives_up_s:
                    return False
                if not told:
                    log.warning("MLflow is away, the training goes on and all is sent later (%s)", error)
                    told = True
                time.sleep(RETRY_S)
