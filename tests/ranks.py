"""Runs a function on several gloo processes of this machine."""

import os
import socket
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(count: int, work: Callable[[int, str], None], folder: str) -> None:
    """Calls `work(rank, folder)` in fresh processes that share a process group; their errors are raised here."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_enter, args=(work, folder, port, count), nprocs=count)


def _enter(rank: int, work: Callable[[int, str], None], folder: str, port: int, count: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=count, timeout=timedelta(seconds=90)
    )
    work(rank, folder)
    dist.barrier()  # a rank that leaves early must not pull the other down
    dist.destroy_process_group()
