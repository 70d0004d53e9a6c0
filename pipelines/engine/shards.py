"""Work in shards: one engine for every stage that reads rows and writes tables.

A shard is a small dict of names and numbers. A worker does all the work of one shard and writes its outputs
itself, under names that the shard determines, so a finished shard is never made again and a re-run after a kill
goes on. Ray Data spreads the shards over a pool of actors.
"""

import json
import logging
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from tqdm import tqdm

from aai.errors import UserError
from pipelines.engine.cluster import connect, native_stderr_held
from pipelines.settings import ClusterConfig

log = logging.getLogger(__name__)

Shard = dict[str, Any]
Result = dict[str, Any]


class Worker(Protocol):
    """What runs in an actor: made once per process, called once per shard.

    It handles bad rows itself; whatever it raises ends the job. The result needs `rows`, and may hold `rejected`.
    """

    def __call__(self, shard: Shard) -> Result:
        """Does one shard's work and writes its files; returns small JSON values."""


class _Actor:
    """Ray Data's side of a worker: shards, results and errors travel as JSON text, a type that cannot drift.

    Ray would hand an error on as text of its own; this way a UserError is still one in the driver. The worker is
    made on the first shard, so that an error in making it takes the same way.
    """

    def __init__(self, worker_cls: Callable[..., Worker], worker_args: Mapping[str, Any]) -> None:
        self.make = partial(worker_cls, **worker_args)
        self.worker: Worker | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        return {"result": [json.dumps(self.work(json.loads(text))) for text in batch["shard"]]}

    def work(self, shard: Shard) -> Result:
        """The worker's result with its `call`, or `user_error` or `error`."""
        try:
            self.worker = self.worker or self.make()
            started_s = time.monotonic()
            result = self.worker(shard)
            return {**result, "call": (os.getpid(), int(result["rows"]), started_s, time.monotonic())}
        except UserError as error:
            return {"user_error": [str(arg) for arg in error.args]}
        except Exception:
            return {"error": traceback.format_exc(), "shard": str(shard.get("name") or shard.get("output"))}


@dataclass
class Stage:
    """One `run_shards` as it was measured, in seconds of this machine's monotonic clock."""

    name: str
    called_s: float
    calls: list[tuple[int, int, float, float]] = field(default_factory=list)
    """(process id, rows, started, ended) of each call of a worker; making the worker is not part of it."""
    returned_s: float = 0.0


_RECORD: ContextVar[tuple[list[Stage], bool] | None] = ContextVar("record", default=None)


@contextmanager
def recorded(bare: bool = False) -> Iterator[list[Stage]]:
    """While the body runs, each `run_shards` that has work adds its Stage to the list.

    bare: the same workers do the same shards in a plain pool of processes, without Ray, for comparison.
    """
    stages: list[Stage] = []
    token = _RECORD.set((stages, bare))
    try:
        yield stages
    finally:
        _RECORD.reset(token)


def _once(batch: dict[str, Any], worker_cls: Callable[..., Worker], worker_args: Mapping[str, Any]) -> Any:
    return _Actor(worker_cls, worker_args)(batch)


def _check(name: str, result: Result) -> Result:
    """Raises what a worker raised."""
    if "user_error" in result:
        raise UserError(*result["user_error"])
    if "error" in result:
        log.error("%s", result["error"].rstrip())
        last = result["error"].rstrip().split("\n")[-1]
        raise RuntimeError(f"{name}: {result['shard']} failed: {last}")
    return result


def _quiet_ray_data() -> None:
    """One line of progress is ours; Ray Data's bars and logs are not for the user."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.print_on_execution_start = False
    context.max_errored_blocks = 0
    for name in ("ray.data", "ray.data.dataset"):
        logging.getLogger(name).setLevel(logging.ERROR)


def run_shards(
    name: str,
    shards: Sequence[Shard],
    worker_cls: Callable[..., Worker],
    worker_args: Mapping[str, Any],
    cluster: ClusterConfig,
    done: Callable[[Shard], bool],
    log_dir: str | None = None,
    stateful: bool = True,
    unit: str = "clip",
    on_result: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Runs every shard that is not `done`, and returns the results of those that ran, in any order.

    name and unit: of the progress line; shards: JSON values, with `rows`, how many units each has; worker_cls and its
    keyword arguments must be importable on every node. stateful: keep one worker per process; False makes a worker
    for each shard and saves the start of the processes. on_result: sees every result as it comes, and may raise to stop
    the job. A worker's UserError is raised as it is, any other error of
    a worker as a RuntimeError with its last line.
    """
    todo = [shard for shard in shards if not done(shard)]
    rows, skipped = sum(int(s["rows"]) for s in todo), len(shards) - len(todo)
    if skipped:
        log.info("%s: %d of %d shards are there already", name, skipped, len(shards))
    if not todo:
        return []
    stages, bare = _RECORD.get() or ([], False)
    stages.append(stage := Stage(name, time.monotonic()))
    if not bare:
        connect(cluster, log_dir)
    stream = _pool_results if bare else _ray_results
    results: list[Result] = []
    rejected = 0
    with (
        native_stderr_held() as terminal,
        tqdm(total=rows, desc=name, unit=unit, mininterval=1.0, file=terminal) as bar,
    ):
        for result in stream(todo, worker_cls, worker_args, cluster, stateful):
            stage.calls.append(_check(name, result).pop("call"))
            results.append(result)
            if "rejected" in result:
                rejected += int(result["rejected"])
                bar.set_postfix(rejected=rejected, refresh=False)
            bar.update(int(result["rows"]))
            on_result(result)
    if len(results) != len(todo):
        raise RuntimeError(f"{name}: {len(results)} results for {len(todo)} shards")
    stage.returned_s = time.monotonic()
    return results


_pooled: _Actor
"""The worker of a process of the bare pool."""


def _start_pooled(worker_cls: Callable[..., Worker], worker_args: Mapping[str, Any]) -> None:
    global _pooled
    _pooled = _Actor(worker_cls, worker_args)


def _work_pooled(shard: Shard) -> Result:
    return _pooled.work(shard)


def _pool_results(
    todo: Sequence[Shard],
    worker_cls: Callable[..., Worker],
    worker_args: Mapping[str, Any],
    cluster: ClusterConfig,
    stateful: bool,
) -> Iterator[Result]:
    """The results by a plain pool of fresh processes, one worker in each."""
    workers, context = min(cluster.num_workers, len(todo)), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_pooled, (worker_cls, dict(worker_args))) as pool:
        for future in as_completed([pool.submit(_work_pooled, shard) for shard in todo]):
            yield future.result()


def _ray_results(
    todo: Sequence[Shard],
    worker_cls: Callable[..., Worker],
    worker_args: Mapping[str, Any],
    cluster: ClusterConfig,
    stateful: bool,
) -> Iterator[Result]:
    """The results by Ray Data: one block, one task and one batch per shard."""
    import ray

    _quiet_ray_data()
    resources = {"batch_size": 1, "num_cpus": cluster.cpus_per_worker, "num_gpus": cluster.gpus_per_worker}
    arguments: dict[str, Any] = {"worker_cls": worker_cls, "worker_args": dict(worker_args)}
    workers = min(cluster.num_workers, len(todo))
    dataset = ray.data.from_items([{"shard": json.dumps(shard)} for shard in todo], override_num_blocks=len(todo))
    if stateful:
        pool = ray.data.ActorPoolStrategy(size=workers)
        dataset = dataset.map_batches(_Actor, fn_constructor_kwargs=arguments, compute=pool, **resources)
    else:
        tasks = ray.data.TaskPoolStrategy(size=workers)
        dataset = dataset.map_batches(_once, fn_kwargs=arguments, compute=tasks, **resources)
    for row in dataset.iter_rows():
        yield json.loads(row["result"])
