"""This machine: what it is, how busy it is, and how much of its memory a run takes."""

import contextlib
import os
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil


def machine() -> dict[str, Any]:
    """What a measured figure depends on: cores, cpu, memory_gb, python, torch, ray, gpu (None without one)."""
    import torch

    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu": _cpu_name(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "python": platform.python_version(),
        "torch": version("torch"),
        "ray": version("ray"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def load() -> dict[str, float]:
    """Shares of this machine that are taken: of its CPUs since the last call, of its memory, of its GPU of late.

    MLflow's UI shows what begins with `system/` apart.
    """
    import torch

    found = {
        "system/cpu_share": psutil.cpu_percent() / 100,
        "system/memory_share": psutil.virtual_memory().percent / 100,
    }
    if torch.cuda.is_available():
        with contextlib.suppress(Exception):  # not every driver, container or part of a GPU can tell
            found["system/gpu_share"] = torch.cuda.utilization() / 100
    return found


def _cpu_name() -> str:
    known = Path("/proc/cpuinfo")
    lines = known.read_text(encoding="utf-8").splitlines() if known.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@contextmanager
def peak_memory(interval_s: float = 1.0) -> Iterator[list[float]]:
    """While the body runs, the largest resident memory in bytes of this process and all below it, in a list of one.

    A page that several processes share is divided among them (PSS), so that it counts once.
    """
    peak, stop, own = [0.0], threading.Event(), psutil.Process()

    def resident(process: psutil.Process) -> int:
        try:
            full = process.memory_full_info()
            return int(getattr(full, "pss", full.rss))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return 0

    def watch() -> None:
        while not stop.wait(interval_s):
            peak[0] = max(peak[0], sum(resident(p) for p in [own, *own.children(recursive=True)]))

    thread = threading.Thread(target=watch, name="peak-memory", daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()
