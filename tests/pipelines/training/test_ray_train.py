"""Real Ray Train on two gloo workers. Worker functions travel by value: Ray's processes cannot import test files."""

import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from aai.config import Config
from aai.fit import FitConfig, fit
from pipelines.engine.cluster import connect, shutdown
from pipelines.settings import TrainClusterConfig
from pipelines.training import following, ray_train
from pipelines.training.board import Board

CLUSTER = TrainClusterConfig(num_workers=2, max_failures=1)
CONFIG = FitConfig(steps=12, learning_rate=0.1, warmup_steps=2, checkpoint_every=4, log_every=2, precision="float32")


@pytest.fixture(scope="module", autouse=True)
def ray_cluster() -> Iterator[None]:
    connect(CLUSTER)
    yield
    shutdown()


def make_parts() -> tuple[type, Callable[..., Any], Callable[..., Any]]:
    """A task, its data and a worker function that dies, or meets a NaN, as its settings say."""

    class Line(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear = torch.nn.Linear(1, 1)

        def forward(self, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
            return (self.linear(batch["x"]) - batch["y"]).square().mean(), {}

    def batches(first: int, part: slice, hook: Callable[[int], float]) -> Iterator[dict[str, Any]]:
        for step in itertools.count(first):
            factor = hook(step)
            x = torch.randn(8, 1, generator=torch.Generator().manual_seed(step))[part]
            yield {"x": x * factor, "y": 3 * x - 1, "clip_id": [f"c{row}" for row in range(len(x))]}

    class Size(Config):
        inputs: int = 1

    def make_work(rank: int, world_size: int, settings: dict[str, Any]) -> ray_train.Work:
        import os
        import pathlib

        folder = pathlib.Path(settings["folder"])

        def hook(step: int) -> float:
            if rank == 1 and step == settings.get("die_at") and not (folder / "died").exists():
                (folder / "died").write_text("")
                os._exit(1)
            return float("nan") if step == settings.get("nan_at") else 1.0

        def data(first: int) -> Iterator[dict[str, Any]]:
            if rank == 0:
                with (folder / "starts").open("a") as file:
                    file.write(f"{first}\n")
            return batches(first, slice(rank * 4, rank * 4 + 4), hook)

        task = Line()
        return ray_train.Work(task, data, lambda: (task, Size()), lambda: {"val": 1.0})

    return Line, batches, make_work


def nan_at(step: int, bad: int) -> float:
    """What a step's data are multiplied by."""
    return float("nan") if step == bad else 1.0


def starts(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "starts").read_text().split()]


def test_a_killed_training_goes_on_and_ends_where_it_would_have(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A step that is not finite is left out on the way, and its clips are named."""
    line, batches, make_work = make_parts()
    settings, out = {"folder": str(tmp_path), "nan_at": 2, "die_at": 9}, str(tmp_path / "out")
    seen: list[int] = []

    def call() -> Any:
        return ray_train.train("test", make_work, settings, CLUSTER, out, "run1", CONFIG, lambda s, f: seen.append(s))

    final = call()
    assert (final.step, final.precision, final.settings) == (12, "float32", {"inputs": 1})
    # The new workers begin at a checkpoint; the last one may have died with the old before it was registered.
    assert starts(tmp_path)[0] == 0
    assert starts(tmp_path)[1] in (4, 8)
    assert max(seen) == 12
    whole = fit(line(), lambda first: batches(first, slice(None), lambda step: nan_at(step, 2)), CONFIG)
    for name, value in whole.weights.items():
        torch.testing.assert_close(final.weights[name], value, atol=1e-5, rtol=1e-5)
    check_entries(out)
    assert "test: step 3 was left out, not finite: clips c0, c1, c2, c3" in caplog.text
    again = call()  # the same call finds the finished run in storage
    assert again.step == 12
    assert all(torch.equal(again.weights[name], value) for name, value in final.weights.items())
    assert len(starts(tmp_path)) == 2  # and reads no data


def check_entries(out: str) -> None:
    """One entry for every second step, one of the last validation; the step that was left out is in its lists."""
    history = following.history(out)
    assert [(e["step"], "val" in e) for e in history] == [(s, False) for s in (2, 4, 6, 8, 10, 12)] + [(12, True)]
    entries = [entry for entry in history if "learning_rate" in entry]
    assert {entry["step"]: entry["skipped_steps"] for entry in entries} == {2: 0, 4: 1, 6: 0, 8: 0, 10: 0, 12: 0}
    lines = [json.loads(line) for line in Path(out, following.SKIPPED).read_text().splitlines()]
    assert {(line["step"], line["rank"]) for line in lines} == {(3, 0), (3, 1)}
    assert lines[0]["clips"] == ["c0", "c1", "c2", "c3"]


def test_a_nan_ends_the_run_where_none_is_allowed(tmp_path: Path) -> None:
    _, _, make_work = make_parts()
    settings, strict = {"folder": str(tmp_path), "nan_at": 2}, CONFIG.model_copy(update={"max_skipped_in_a_row": 0})
    with pytest.raises(FloatingPointError, match="step 3"):
        ray_train.train("test", make_work, settings, CLUSTER, str(tmp_path / "out"), "run1", strict)
    assert starts(tmp_path) == [0]


def test_a_skipped_step_is_listed_once_however_often_it_comes(tmp_path: Path) -> None:
    """After a restart steps come again; and the file is written when there is something new, not at each poll."""
    board: Any = ray.remote(num_cpus=0)(Board).remote()
    listed = tmp_path / following.SKIPPED
    for _ in range(2):  # two calls of the same run
        with following.following("test", board, str(tmp_path), 12, lambda step, figures: None):
            for rank in (1, 0, 1):
                ray.get(board.post.remote({"step": 3, "rank": rank, "clips": ["c1"]}))
            while not listed.exists():
                time.sleep(0.05)
            time.sleep(3 * following.POLL_S)
            written_ns = listed.stat().st_mtime_ns
            time.sleep(3 * following.POLL_S)
            assert listed.stat().st_mtime_ns == written_ns
        lines = [json.loads(line) for line in listed.read_text().splitlines()]
        assert [(line["step"], line["rank"]) for line in lines] == [(3, 0), (3, 1)]


def test_a_training_without_room_says_what_it_waits_for(caplog: pytest.LogCaptureFixture) -> None:
    ray_train.tell_of_room("align", CLUSTER, patience_s=30)
    assert caplog.text == ""
    ray_train.tell_of_room(
        "align", CLUSTER.model_copy(update={"num_workers": 1000, "gpus_per_worker": 1}), patience_s=0
    )
    assert "align: waits for room: its workers want 1000 CPUs (" in caplog.text
    assert " free) and 1000 GPUs (0 free); add nodes" in caplog.text
