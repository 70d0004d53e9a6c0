"""Work in shards: one engine for every stage that reads rows and writes tables.

A shard is a small record of names and numbers. A worker does all the work of one shard and writes its outputs
itself, under names that the shard determines, so a finished shard is never made again and a re-run after a kill
goes on. Ray Data spreads the shards over a pool of actors.

    @dataclass(frozen=True, kw_only=True)
    class CountShard(Shard):
        file: str

    class CountWorker:
        def __call__(self, shard: CountShard) -> Result:
            ...  # reads shard.file, writes its output
            return Result(rows=shard.rows)

    run_shards("count", shards, CountWorker, {}, cluster, done=lambda shard: exists(output_of(shard)))
"""

import json
import logging
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Protocol, TypeVar, cast, get_type_hints

import pydantic
from tqdm import tqdm

from aai import fencing
from aai.errors import UserError
from pipelines.engine.cluster import connect, is_connected, native_stderr_held
from pipelines.engine.stage_metrics import telling
from pipelines.engine.waiting import WaitingTexts, text_at
from pipelines.settings import ClusterConfig

log = logging.getLogger(__name__)

MOST_BLOCKS, BLOCKS_OF_WORKER = 2000, 50
"""From so many shards on, in all and for each worker, Ray handles several at once: its own work for a task takes
milliseconds of the driver, and kilobytes that it keeps."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One unit of work. A stage adds what its worker needs: values that JSON knows, and dataclasses of such."""

    name: str
    """Of the shard's outputs."""
    rows: int
    """How many units of work it holds, for the progress line."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of a shard; a stage may add small figures of its own."""

    rows: int
    rejected: int | None = None
    """Shown beside the progress, where a stage rejects rows."""
    codes: dict[str, int] = field(default_factory=dict)
    """Of the rejected rows, by code: for the metrics."""


S = TypeVar("S", bound=Shard)
R = TypeVar("R", bound=Result)
S_in = TypeVar("S_in", bound=Shard, contravariant=True)
R_out = TypeVar("R_out", bound=Result, covariant=True)


class Worker(Protocol[S_in, R_out]):
    """What runs in an actor: made once per process, called once per shard.

    It handles bad rows itself; whatever it raises ends the job. The annotations of `__call__` say which records it
    takes and returns.
    """

    def __call__(self, shard: S_in) -> R_out:
        """Does one shard's work and writes its files."""


@cache
def _adapter(kind: type[Any]) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(kind)


def _pack(record: Shard | Result) -> Any:
    """A record as JSON values."""
    kind: Any = type(record)
    return _adapter(kind).dump_python(record, mode="json")


def _unpack(kind: Any, values: Any) -> Any:
    """A record of a kind from JSON values."""
    return _adapter(kind).validate_python(values)


def _records(worker_cls: Callable[..., Worker[S, R]]) -> tuple[type[S], type[R]]:
    """The types of shard and result of a worker class, read off its `__call__`."""
    hints = get_type_hints(cast(Any, worker_cls).__call__)
    return hints["shard"], hints["return"]


class _Actor:
    """Ray Data's side of a worker: shards, results and errors travel as JSON text, a type that cannot drift.

    Ray would hand an error on as text of its own; this way a UserError is still one in the driver. The worker is
    made on the first shard, so that an error in making it takes the same way. guards: the driver's, which also ask of
    what a worker writes whether that driver may write here still.
    """

    def __init__(
        self,
        worker_cls: Callable[..., Worker[Any, Any]],
        worker_args: Mapping[str, Any],
        guards: tuple[fencing.Guard, ...],
    ) -> None:
        self.make, self.guards = partial(worker_cls, **worker_args), guards
        self.shard_type, _ = _records(worker_cls)
        self.worker: Worker[Any, Any] | None = None
        self.ended_s: float | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        return {"answer": [self.work(str(text)) for text in batch["shard"]]}

    def work(self, text: str) -> str:
        """A shard's answer: `result`, `call` (see Stage) and `wait_s` (since the shard before), or an error.

        An error is `user_error`, or `error` with the shard's name.
        """
        name = text
        try:
            values = json.loads(text_at(text))  # not there any more where another driver has taken over
            name = values["name"]
            self.worker = self.worker or self.make()
            started_s = time.monotonic()
            with fencing.guarded(*self.guards):
                result = self.worker(_unpack(self.shard_type, values))
            wait_s = 0.0 if self.ended_s is None else started_s - self.ended_s
            self.ended_s = time.monotonic()
            call = (os.getpid(), result.rows, started_s, self.ended_s)
            return json.dumps({"result": _pack(result), "call": call, "wait_s": wait_s})
        except UserError as error:
            return json.dumps({"user_error": [str(arg) for arg in error.args]})
        except Exception:
            return json.dumps({"error": traceback.format_exc(), "shard": name})


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


def _once(batch: dict[str, Any], **arguments: Any) -> Any:
    return _Actor(**arguments)(batch)


def _raise_for(name: str, answer: Mapping[str, Any]) -> None:
    """Raises what a worker raised."""
    if "user_error" in answer:
        raise UserError(*answer["user_error"])
    if "error" in answer:
        log.error("%s", answer["error"].rstrip())
        last = answer["error"].rstrip().split("\n")[-1]
        raise RuntimeError(f"{name}: {answer['shard']} failed: {last}")


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
    shards: Iterable[S],
    worker_cls: Callable[..., Worker[S, R]],
    worker_args: Mapping[str, Any],
    cluster: ClusterConfig,
    done: Callable[[S], bool] = lambda shard: False,
    log_dir: str | None = None,
    stateful: bool = True,
    unit: str = "clip",
    on_result: Callable[[R], None] = lambda result: None,
    waiting: str | None = None,
    alone_up_to: int = 0,
) -> list[R]:
    """Runs every shard that is not `done`, and returns the results of those that ran, in any order.

    name and unit: of the progress line; worker_cls and its keyword arguments must be importable on every node.
    stateful: keep one worker per process; False makes a worker for each shard and saves the start of the processes.
    on_result: sees every result as it comes, and may raise to stop the job. A worker's UserError is raised as it is,
    any other error of a worker as a RuntimeError with its last line. waiting: folder or s3:// prefix in which the
    records of many or large shards wait for their workers, where the driver should not hold them all.
    alone_up_to: a job of no more units than these is done in this process, unless Ray is started anyway.
    """
    texts, total, there = WaitingTexts(waiting), 0, 0
    for shard in shards:
        if done(shard):
            there += 1
        else:
            texts.add(json.dumps(_pack(shard)))
            total += shard.rows
    if there:
        log.info("%s: %d of %d shards are there already", name, there, there + len(texts))
    if not len(texts):
        return []
    try:
        actor = {"worker_cls": worker_cls, "worker_args": dict(worker_args), "guards": fencing.guards()}
        job = _Job(texts.places(), actor, cluster, stateful)
        return _run(name, job, total, log_dir, unit, on_result, alone=total <= alone_up_to)
    finally:
        texts.remove()


def _run(
    name: str,
    job: "_Job",
    total: int,
    log_dir: str | None,
    unit: str,
    on_result: Callable[[R], None],
    alone: bool,
) -> list[R]:
    """The results of a job's shards; total: their units of work."""
    stages, bare = _RECORD.get() or ([], False)
    stages.append(stage := Stage(name, time.monotonic()))
    stream = _pool_answers if bare else _ray_answers
    if alone and job.cluster.address is None and not is_connected():
        stream = _own_answers
    elif not bare:
        connect(job.cluster, log_dir)
    _, result_type = _records(job.actor["worker_cls"])
    results: list[R] = []
    rejected = 0
    with (
        native_stderr_held() as terminal,
        tqdm(total=total, desc=name, unit=unit, mininterval=1.0, file=terminal) as bar,
        telling(name) as metrics,
    ):
        metrics.shards(0, len(job.shards))
        for text in stream(job):
            answer = json.loads(text)
            _raise_for(name, answer)
            stage.calls.append(tuple(answer["call"]))
            results.append(result := _unpack(result_type, answer["result"]))
            work_s = stage.calls[-1][3] - stage.calls[-1][2]
            metrics.result(result.rows, unit, result.codes, work_s, answer["wait_s"])
            metrics.shards(len(results), len(job.shards) - len(results))
            if result.rejected is not None:
                rejected += result.rejected
                bar.set_postfix(rejected=rejected, refresh=False)
            bar.update(result.rows)
            on_result(result)
    if len(results) != len(job.shards):
        raise RuntimeError(f"{name}: {len(results)} results for {len(job.shards)} shards")
    stage.returned_s = time.monotonic()
    return results


@dataclass(frozen=True)
class _Job:
    """The shards that are to be done, as JSON text or where that waits, and who does them."""

    shards: list[str]
    actor: dict[str, Any]
    """The arguments of an _Actor."""
    cluster: ClusterConfig
    stateful: bool

    @property
    def workers(self) -> int:
        return min(self.cluster.most_workers, len(self.shards))


_pooled: _Actor
"""The worker of a process of the bare pool."""


def _start_pooled(arguments: Mapping[str, Any]) -> None:
    global _pooled
    _pooled = _Actor(**arguments)


def _work_pooled(text: str) -> str:
    return _pooled.work(text)


def _own_answers(job: _Job) -> Iterator[str]:
    """The answers of a worker in this very process, where the driver's guards are in force already."""
    actor = _Actor(**{**job.actor, "guards": ()})
    for text in job.shards:
        yield actor.work(text)


def _pool_answers(job: _Job) -> Iterator[str]:
    """The answers of a plain pool of fresh processes, one worker in each."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(job.workers, context, _start_pooled, (job.actor,)) as pool:
        for future in as_completed([pool.submit(_work_pooled, text) for text in job.shards]):
            yield future.result()


def _ray_answers(job: _Job) -> Iterator[str]:
    """The answers by way of Ray Data: one block, one task and one batch per shard, or for several of very many."""
    import ray

    _quiet_ray_data()
    resources = {"batch_size": None, "num_cpus": job.cluster.cpus_per_worker, "num_gpus": job.cluster.gpus_per_worker}
    blocks = min(len(job.shards), max(MOST_BLOCKS, BLOCKS_OF_WORKER * job.workers))
    dataset = ray.data.from_items([{"shard": text} for text in job.shards], override_num_blocks=blocks)
    if job.stateful:
        pool = ray.data.ActorPoolStrategy(size=job.workers)
        dataset = dataset.map_batches(_Actor, fn_constructor_kwargs=job.actor, compute=pool, **resources)
    else:
        tasks = ray.data.TaskPoolStrategy(size=job.workers)
        dataset = dataset.map_batches(_once, fn_kwargs=job.actor, compute=tasks, **resources)
    for row in dataset.iter_rows():
        yield str(row["answer"])
