"""A stage as a process of its own: its resources end with it, and what kills it does not kill the run."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

log = logging.getLogger(__name__)

USER_ERROR, INTERRUPTED = 2, 130
"""Exit codes of a command that would end the same way again, and of one that was told to stop."""
PAUSE_S = 10.0
"""Before a stage that broke off goes on: a node that is gone has been noticed by then."""


def launch(
    verb: str, words: Sequence[str], attempts: int, pause_s: float = PAUSE_S, ready: Callable[[], None] = lambda: None
) -> tuple[int, int]:
    """Runs `aai VERB WORDS`, again as long as it breaks off; (exit code, attempts that it took).

    A mistake of the user's is not tried again, and neither is what was interrupted: the code is INTERRUPTED when we
    were told to stop, however the stage ended then. ready: returns when the stage can be begun again, after the pause.
    """
    command = [sys.executable, "-P", "-m", "pipelines", verb, *words]  # a folder of that name in this one is not ours
    for attempt in range(1, attempts + 1):
        code = _run(command)
        if code in (0, USER_ERROR, INTERRUPTED):
            break
        if attempt < attempts:
            log.warning(
                "run: %s broke off (%s), attempt %d of %d; it goes on in %g s where it stopped",
                verb, told(code), attempt, attempts, pause_s,
            )  # fmt: skip
            time.sleep(pause_s)
            ready()
    return code, attempt


def told(code: int) -> str:
    """An exit code in words: a negative one is a signal's."""
    return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


def _run(command: Sequence[str]) -> int:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(command, env=environment) as process, _passed_on(process) as told_to_stop:
        while True:
            try:
                code = process.wait()
                return INTERRUPTED if told_to_stop else code
            except KeyboardInterrupt:
                told_to_stop.append(signal.SIGINT)
                if not _is_in_front():  # else the terminal has told the stage, too: it ends in good order
                    process.send_signal(signal.SIGINT)


def _is_in_front() -> bool:
    """Whether Ctrl-C at the terminal reaches this process, and with it those that it started."""
    try:
        descriptor = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(descriptor) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(descriptor)


@contextmanager
def _passed_on(process: "subprocess.Popen[bytes]") -> Iterator[list[int]]:
    """While the body runs, SIGTERM and SIGHUP go on to the process, as SIGINT: the stage gives its locks back.

    A process that a script started with `&` does not hear SIGINT, and neither does what it starts: there the signal is
    SIGTERM. Under `nohup` SIGHUP stays ignored. Yields the signals that came.
    """
    came: list[int] = []
    goes_on = signal.SIGTERM if signal.getsignal(signal.SIGINT) == signal.SIG_IGN else signal.SIGINT

    def stop(number: int, _: object) -> None:
        came.append(number)
        process.send_signal(goes_on)

    heard = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in heard}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
