"""Metrics of the stages, on Ray's Prometheus endpoint of the driver's node: there their names begin with `ray_aai_`.

The driver alone tells them, from what its workers answer anyway, so that a step of a training costs nothing and nothing
is lost with a worker. Where this process is in no Ray cluster (shards done here, ray:// drivers) nothing is told.
Labels hold what is bounded: names of stages, units, codes.
"""

import math
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

COUNTERS = {
    "aai_pipeline_rows_total": ("Rows that a stage has done; of a training, clips of its steps", ("stage", "unit")),
    "aai_pipeline_rejects_total": ("Rows that a stage rejected", ("stage", "code")),
    "aai_pipeline_work_seconds_total": ("Seconds that workers were in a shard, all together", ("stage",)),
    "aai_pipeline_wait_seconds_total": ("Seconds that workers were between two shards, all together", ("stage",)),
    "aai_train_checkpoints_total": ("Checkpoints that are in the run's storage", ("stage",)),
}
GAUGES = {
    "aai_pipeline_running": "1 while a stage runs",
    "aai_pipeline_shards_todo": "Shards of this call that wait or are worked on",
    "aai_pipeline_shards_done": "Shards of this call that are done",
    "aai_train_step": "Steps done",
    "aai_train_steps_planned": "Steps of the training",
    "aai_train_loss": "Mean loss since the last entry of the history",
    "aai_train_steps_per_second": "Steps a second since the last entry of the history",
    "aai_train_data_wait_ratio": "Share of the time that steps waited for data, 0 to 1",
    "aai_train_skipped_steps": "Steps since the last entry of the history that were left out, being not finite",
    "aai_train_workers": "Workers that train",
    "aai_train_checkpoint_timestamp_seconds": "Unix time of the last checkpoint, or of the start",
}
"""By name: what it is, and for counters the labels; gauges have the stage."""
OF_ENTRY = {
    "loss": "aai_train_loss",
    "steps_per_s": "aai_train_steps_per_second",
    "data_wait_share": "aai_train_data_wait_ratio",
    "skipped_steps": "aai_train_skipped_steps",
    "workers": "aai_train_workers",
}
"""The gauge for a figure of the history."""
RETELL_S = 5.0
"""How often gauges are told again: Ray forgets those of which it hears nothing."""


class StageMetrics:
    """What one running stage tells; made by `telling`."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self._counters: dict[str, Any] = {}
        self._gauges: dict[str, Any] = {}
        self._values: dict[str, float] = {}
        self._step: int | None = None
        if _is_exported():
            from ray.util import metrics

            self._counters = {name: metrics.Counter(name, text, keys) for name, (text, keys) in COUNTERS.items()}
            self._gauges = {name: metrics.Gauge(name, text, ("stage",)) for name, text in GAUGES.items()}

    def add(self, name: str, amount: float, **labels: str) -> None:
        """Adds to a counter."""
        if self._counters and amount > 0:
            self._counters[name].inc(amount, {"stage": self.stage, **labels})

    def set(self, name: str, value: float) -> None:
        """Sets a gauge; what is not finite is left out, as Ray does."""
        if self._gauges and math.isfinite(value):
            self._values[name] = value
            self._gauges[name].set(value, {"stage": self.stage})

    def retell(self) -> None:
        """Tells all gauges again."""
        for name, value in dict(self._values).items():
            self._gauges[name].set(value, {"stage": self.stage})

    def shards(self, done: int, todo: int) -> None:
        """How many shards of this call are done, and are not."""
        self.set("aai_pipeline_shards_done", done)
        self.set("aai_pipeline_shards_todo", todo)

    def result(self, rows: int, unit: str, rejects: Mapping[str, int], work_s: float, wait_s: float) -> None:
        """A shard is done. rejects: by code; work_s, wait_s: its worker's seconds in it, and before it."""
        self.add("aai_pipeline_rows_total", rows, unit=unit)
        for code, count in rejects.items():
            self.add("aai_pipeline_rejects_total", count, code=code)
        self.add("aai_pipeline_work_seconds_total", work_s)
        self.add("aai_pipeline_wait_seconds_total", wait_s)

    def begin_training(self, steps: int, goes_on: bool = False) -> None:
        """A training begins, or goes on from a step that nobody knows before its first entry."""
        self._step = None if goes_on else 0
        self.set("aai_train_steps_planned", steps)
        self.set("aai_train_checkpoint_timestamp_seconds", time.time())

    def entry(self, step: int, figures: Mapping[str, float], clips_per_step: int) -> None:
        """An entry of a training's history."""
        if self._step is not None:
            self.add("aai_pipeline_rows_total", (step - self._step) * clips_per_step, unit="clip")
        self._step = step
        self.set("aai_train_step", step)
        for name, gauge in OF_ENTRY.items():
            if name in figures:
                self.set(gauge, figures[name])

    def checkpoint(self) -> None:
        """A checkpoint is in the run's storage."""
        self.add("aai_train_checkpoints_total", 1)
        self.set("aai_train_checkpoint_timestamp_seconds", time.time())


@contextmanager
def telling(stage: str) -> Iterator[StageMetrics]:
    """While the body runs, the stage is told to be running, and its gauges are told again and again."""
    told, ended = StageMetrics(stage), threading.Event()

    def keep() -> None:
        while not ended.wait(RETELL_S):
            told.retell()

    told.set("aai_pipeline_running", 1)
    thread = threading.Thread(target=keep, name="stage-metrics", daemon=True)
    thread.start()
    try:
        yield told
    finally:
        ended.set()
        thread.join()
        told.set("aai_pipeline_running", 0)


def _is_exported() -> bool:
    """Whether this process is one of a Ray cluster's own; asking does not even import Ray."""
    if "ray" not in sys.modules:
        return False
    import ray

    return bool(ray.is_initialized()) and not ray.util.client.ray.is_connected()
