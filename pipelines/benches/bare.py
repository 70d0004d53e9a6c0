"""A training without Ray: plain processes, torch.distributed, DistributedDataParallel and `aai.fit`."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from aai import storage
from aai.fit import FitConfig, fit
from pipelines.settings import ClusterConfig
from pipelines.training.ray_train import MakeWork


@dataclass(frozen=True)
class BareRun:
    """What each process of such a training gets."""

    make_work: MakeWork
    settings: Any
    """Of make_work."""
    fit: FitConfig
    cluster: ClusterConfig
    """How many processes, and what each has."""
    history: str
    """File that the first process writes at the end: the entries of the history."""
    on_error: Callable[[str], None]
    """Called in a process that fails, with what went wrong."""


@contextmanager
def started(run: BareRun) -> Iterator[Any]:
    """The processes, while the body runs; `.join()` waits for one, raises their errors, and is true when all ended."""
    # As Ray sets it for its workers: libraries would else take all cores in each process.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, int(run.cluster.cpus_per_worker))))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    count = run.cluster.num_workers
    context: Any = mp.start_processes(_enter, (run, port), count, join=False, start_method="spawn")
    try:
        yield context
    finally:
        for process in context.processes:
            process.terminate()
            process.join()


def _enter(rank: int, run: BareRun, port: int) -> None:
    try:
        _train(rank, run, port)
    except BaseException as error:
        run.on_error(f"{type(error).__name__}: {error}")
        raise


def _train(rank: int, run: BareRun, port: int) -> None:
    on_gpu, world = run.cluster.gpus_per_worker > 0, run.cluster.num_workers
    if not on_gpu:
        torch.set_num_threads(max(1, int(run.cluster.cpus_per_worker)))
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else it asks for this machine's name, which may take long
    address, patience = f"tcp://127.0.0.1:{port}", timedelta(minutes=30)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", init_method=address, rank=rank, world_size=world, timeout=patience
    )
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    work = run.make_work(rank, world, run.settings)
    task = work.task.to(device)
    if world > 1:
        task = DistributedDataParallel(task, [device] if on_gpu else None, broadcast_buffers=False)
    entries: list[dict[str, float]] = []
    fit(task, work.batches, run.fit, lambda step, figures: entries.append({"step": step, **figures}))
    if rank == 0:
        storage.write_json(run.history, {"entries": entries})
    dist.barrier()  # a rank that leaves early must not pull the others down
    dist.destroy_process_group()
