"""Work in shards: one engine for every stage that reads rows and writes tables.

A shard is a small dict of names and numbers. A worker does all the work of one shard and writes its outputs
itself, under names that the shard determines, so a finished shard is never made again and a re-run after a kill
goes on. Ray Data spreads the shards over a pool of actors.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from tqdm import tqdm

from pipelines.cluster import connect, native_stderr_held
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
    """Ray Data's side of a worker: shards and results travel as JSON text, a type that cannot drift."""

    def __init__(self, worker_cls: Callable[..., Worker], worker_args: Mapping[str, Any]) -> None:
        self.worker = worker_cls(**worker_args)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        return {"result": [json.dumps(self.worker(json.loads(text))) for text in batch["shard"]]}


def _once(batch: dict[str, Any], worker_cls: Callable[..., Worker], worker_args: Mapping[str, Any]) -> Any:
    return _Actor(worker_cls, worker_args)(batch)


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
) -> list[Result]:
    """Runs every shard that is not `done`, and returns the results of those that ran, in any order.

    name: of the progress line; shards: JSON values, with `rows` (how many) for the progress line; worker_cls and
    its keyword arguments must be importable on every node. stateful: keep one worker per process; False makes a
    worker for each shard and saves the start of the processes. Raises the worker's own error when a shard fails.
    """
    todo = [shard for shard in shards if not done(shard)]
    rows, skipped = sum(int(s["rows"]) for s in todo), len(shards) - len(todo)
    if skipped:
        log.info("%s: %d of %d shards are there already", name, skipped, len(shards))
    if not todo:
        return []
    connect(cluster, log_dir)
    import ray

    _quiet_ray_data()
    workers = min(cluster.num_workers, len(todo))
    resources = {"batch_size": 1, "num_cpus": cluster.cpus_per_worker, "num_gpus": cluster.gpus_per_worker}
    results: list[Result] = []
    dataset = ray.data.from_items([{"shard": json.dumps(shard)} for shard in todo], override_num_blocks=len(todo))
    arguments: dict[str, Any] = {"worker_cls": worker_cls, "worker_args": dict(worker_args)}
    if stateful:
        pool = ray.data.ActorPoolStrategy(size=workers)
        dataset = dataset.map_batches(_Actor, fn_constructor_kwargs=arguments, compute=pool, **resources)
    else:
        pool = ray.data.TaskPoolStrategy(size=workers)
        dataset = dataset.map_batches(_once, fn_kwargs=arguments, compute=pool, **resources)
    try:
        with (
            native_stderr_held() as terminal,
            tqdm(total=rows, desc=name, unit="clip", mininterval=1.0, file=terminal) as bar,
        ):
            for row in dataset.iter_rows():
                result = json.loads(row["result"])
                results.append(result)
                bar.set_postfix(rejected=sum(r.get("rejected", 0) for r in results), refresh=False)
                bar.update(int(result["rows"]))
    except ray.exceptions.RayTaskError as error:
        raise _root_cause(error) from error
    if len(results) != len(todo):
        raise RuntimeError(f"{name}: {len(results)} results for {len(todo)} shards")
    return results


def _root_cause(error: BaseException) -> BaseException:
    """The worker's own exception, without Ray's wrapping."""
    while (cause := getattr(error, "cause", None) or error.__cause__) is not None:
        error = cause
    return error
