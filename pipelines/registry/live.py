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

PICTURE_RETRY_S, PICTURE_PATIENCE_S = 20.0, 120.0
"""Between two tries of a picture, and until it is given up: it lies in OUT/samples too, and a try may leave a copy."""
SAMPLES = "samples"
"""Name of the pictures in MLflow."""


@contextmanager
def sender(run: OpenRun) -> Iterator["Sender"]:
    """Yields what sends, at once. At the end it waits until all is sent, or for PATIENCE_S."""
    found = Sender(run)
    try:
        yield found
    except BaseException:
        found.finish(patience_s=0)  # an error must not wait for a server
        raise
    found.finish(PATIENCE_S)


class Sender:
    """Sends figures, and beside them pictures, whose storage may be away alone; its methods return at once."""

    def __init__(self, run: OpenRun) -> None:
        self.run = run
        self._figures = Line("figures", RETRY_S)
        self._pictures = Line("pictures", PICTURE_RETRY_S, PICTURE_PATIENCE_S)

    def figures(self, step: int, figures: Mapping[str, Any]) -> None:
        """Sends the figures of a step."""
        self._figures.put(partial(self.run.log_metrics, figures, step=step))

    def picture(self, step: int, png: bytes) -> None:
        """Sends what was painted after a step."""
        self._pictures.put(partial(self.run.log_image, SAMPLES, png, step))

    def finish(self, patience_s: float) -> None:
        """Ends when all is sent, or when the patience has ended."""
        for line in (self._pictures, self._figures):
            line.finish(patience_s)


class Line:
    """A thread that does what it is given in order, each until it succeeds or was tried for so long."""

    def __init__(self, name: str, retry_s: float, patience_s: float = float("inf")) -> None:
        self.name, self.retry_s, self.patience_s = name, retry_s, patience_s
        self.waiting: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self.gives_up_s = float("inf")
        self.unsent = 0
        self.thread = threading.Thread(target=self._work, name=f"live-{name}", daemon=True)
        self.thread.start()

    def put(self, send: Callable[[], None]) -> None:
        """Adds one."""
        self.waiting.put(send)

    def finish(self, patience_s: float) -> None:
        """Ends the thread when all is sent, or when the patience has ended."""
        self.gives_up_s = time.monotonic() + patience_s
        self.waiting.put(None)
        self.thread.join()
        if self.unsent:
            log.warning("MLflow got %d %s less than were written here", self.unsent, self.name)

    def _work(self) -> None:
        while (send := self.waiting.get()) is not None:
            self.unsent += not self._sent(send)

    def _sent(self, send: Callable[[], None]) -> bool:
        ends_s, told = time.monotonic() + self.patience_s, False
        while True:
            try:
                send()
                return True
            except Exception as error:  # MLflow's, or those of the storage of its pictures
                if time.monotonic() >= min(ends_s, self.gives_up_s):
                    return False
                if not told:
                    said = "MLflow does not take %s for now, the training goes on and they are sent later (%s)"
                    log.warning(said, self.name, error)
                    told = True
                time.sleep(self.retry_s)
