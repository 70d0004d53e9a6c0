"""Plain processes that train one model together."""

import multiprocessing
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from aai import storage
from aai.config import Config
from aai.fit import FitConfig, fit
from pipelines.benches.bare import BareRun, started
from pipelines.settings import ClusterConfig
from pipelines.training.ray_train import Work

pytestmark = pytest.mark.slow
FIT = FitConfig(steps=4, learning_rate=0.1, warmup_steps=0, log_every=1, precision="float32")


class Line(torch.nn.Module):
    """y = 3 x - 1, learned."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(1, 1)

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The squared error."""
        return (self.linear(batch["x"]) - 3 * batch["x"] + 1).square().mean(), {}


def make_line(rank: int, world_size: int, settings: str) -> Work:
    """Each rank takes its part of the same rows."""

    def batches(first_step: int) -> Iterator[dict[str, Any]]:
        if rank == 1 and settings == "fails":
            raise ValueError("no such rows")
        for step in range(first_step, FIT.steps):
            x = torch.randn(8, 1, generator=torch.Generator().manual_seed(step))
            yield {"x": x.chunk(world_size)[rank], "clip_id": []}

    task = Line()
    return Work(task, batches, lambda: (task, Config()))


def noted(file: str, why: str) -> None:
    if not storage.exists(file):  # the other rank's error follows from it
        storage.write_json(file, why)


def run_of(folder: Path, settings: str) -> BareRun:
    on_error = partial(noted, str(folder / "error.json"))
    return BareRun(make_line, settings, FIT, ClusterConfig(num_workers=2), str(folder / "history.json"), on_error)


def train(run: BareRun) -> None:
    with started(run) as processes:
        while not processes.join():
            pass


def test_processes_take_the_steps_of_one_with_the_whole_batch(tmp_path: Path) -> None:
    train(run_of(tmp_path, ""))
    entries = storage.read_json(str(tmp_path / "history.json"))["entries"]
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4]
    alone = make_line(0, 1, "")
    norms: list[float] = []
    fit(alone.task, alone.batches, FIT, lambda step, figures: norms.append(figures["grad_norm"]))
    assert [entry["grad_norm"] for entry in entries] == pytest.approx(norms, 1e-5)  # after DDP's mean


def test_an_error_is_raised_here_and_told_to_others(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="no such rows"):
        train(run_of(tmp_path, "fails"))
    assert "no such rows" in storage.read_json(str(tmp_path / "error.json"))
    assert multiprocessing.active_children() == []
