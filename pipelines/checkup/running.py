"""Checks side by side, each in a process of its own: what hangs is ended, what dies takes nothing with it."""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

from pipelines.checkup.finding import Finding, failure, warning

_WATCHED_S, _WORKS_S = 0.5, 0.05
"""How long a late check is watched, and how much CPU time it takes in that if it does not wait."""


@dataclass(frozen=True)
class Check:
    """`call(*args)` returns findings; `subject` says what is looked at, should it never come to an end."""

    subject: str
    call: Callable[..., list[Finding]]
    args: tuple[Any, ...] = ()
    late: Finding | None = None
    """What is told of it then; by default that it hangs, which is a failure."""


def run_checks(checks: Sequence[Check], timeout_s: float) -> list[Finding]:
    """The findings of all checks, in their order, no later than `timeout_s` after the call."""
    end_s = time.monotonic() + timeout_s
    context = multiprocessing.get_context("spawn")  # a fork would inherit threads' locks
    with tempfile.TemporaryDirectory(prefix="aai-doctor-") as folder:
        started: list[tuple[Check, BaseProcess, Connection, Path]] = []
        for number, check in enumerate(checks):
            ours, theirs = context.Pipe(duplex=False)
            log = Path(folder) / str(number)
            process = context.Process(target=_child, args=(theirs, str(log), check), daemon=True)
            process.start()
            theirs.close()  # so that its end is seen here
            started.append((check, process, ours, log))
        left = [connection for _, _, connection, _ in started]
        while left and (remaining_s := end_s - time.monotonic()) > 0:
            left = [connection for connection in left if connection not in wait(left, remaining_s)]
        busy = _at_work([process for _, process, connection, _ in started if connection in left])
        rows: list[Finding] = []
        for check, child, connection, log in started:
            rows += _result(check, child, connection, log, timeout_s, child in busy)
    return rows


def _at_work(processes: Sequence[BaseProcess]) -> list[BaseProcess]:
    """Those that compute and do not wait for somebody else: on a busy machine they only need more time."""
    before = {process: _cpu_s(process) for process in processes}
    if processes:
        time.sleep(_WATCHED_S)
    return [process for process, cpu_s in before.items() if _cpu_s(process) > cpu_s + _WORKS_S]


def _cpu_s(process: BaseProcess) -> float:
    try:
        times = psutil.Process(process.pid).cpu_times()
    except psutil.Error:  # it has just ended
        return 0.0
    return float(times.user + times.system)


def _child(connection: Connection, log: str, check: Check) -> None:
    """What libraries write to the terminal goes into a file: the table has the words that count."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    try:
        found = check.call(*check.args)
    except Exception as error:
        found = [_broke(check, f"{type(error).__name__}: {error}")]
    connection.send(found)
    os._exit(0)  # at an ordinary end some libraries wait for what does not answer


def _result(
    check: Check, process: BaseProcess, connection: Connection, log: Path, timeout_s: float, is_busy: bool
) -> list[Finding]:
    try:
        if not connection.poll():
            if check.late is not None:
                return [check.late]
            rule = f"did not end within {timeout_s:g} s"
            if is_busy:
                return [
                    warning("doctor.busy", check.subject, f"{rule}: this machine is busy", "give it --timeout-s 60")
                ]
            remedy = "something on the way swallows what is sent; --timeout-s 60 tells what is slow from what is dead"
            return [failure("doctor.timeout", check.subject, rule, remedy)]
        found: list[Finding] = connection.recv()
        return found
    except EOFError:
        said = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
        return [_broke(check, f"ended without a word; last was: {said[-1] if said else '(nothing)'}")]
    finally:
        process.kill()
        process.join(1)
        connection.close()


def _broke(check: Check, what: str) -> Finding:
    return failure("doctor.broken", check.subject, what, "look at it with the tool's own client; then tell us")
