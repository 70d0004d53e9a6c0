"""What the processes around a measured work take of the CPU while it runs."""

import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil

LOOK_EVERY_S = 1.0


@dataclass
class Background:
    """CPU seconds of this process and all below it, looked at again and again."""

    looks: list[tuple[float, dict[int, float]]] = field(default_factory=list)
    """(monotonic clock, CPU seconds by process)."""

    def cpus(self, from_s: float, to_s: float, without: Collection[int]) -> float:
        """CPUs that the processes, some left out, kept busy on average within a span of the clock; 0 if it is short."""
        inside = [look for look in self.looks if from_s <= look[0] <= to_s]
        if len(inside) < 2:
            return 0.0
        (begin_s, before), (end_s, after) = inside[0], inside[-1]
        used = [spent - before.get(pid, 0.0) for pid, spent in after.items() if pid not in without]
        return sum(used) / (end_s - begin_s)


@contextmanager
def background(every_s: float = LOOK_EVERY_S) -> Iterator[Background]:
    """Looks while the body runs; the looking itself is not counted."""
    found, stop, own = Background(), threading.Event(), psutil.Process()

    def watch() -> None:
        while not stop.wait(every_s):
            spent = {own.pid: _cpu_s(own) - time.thread_time()}
            for process in own.children(recursive=True):
                spent[process.pid] = _cpu_s(process)
            found.looks.append((time.monotonic(), spent))

    thread = threading.Thread(target=watch, name="background", daemon=True)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


def _cpu_s(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0.0
    return float(times.user + times.system)
