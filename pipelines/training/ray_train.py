"""Ray Train around `aai.fit`: workers, checkpoints, restarts, and what the driver sees of a running training.

A run is named by its output folder and a digest of its settings; calling `train` again with both goes on from the last
checkpoint, whether the workers, the driver or the whole cluster died.
"""

import json
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.train.v2.api.config import LoggingConfig
from torch import nn
from tqdm import tqdm

from aai import fit as loop
from aai import storage
from aai.config import Config
from aai.errors import UserError
from aai.fit import FitConfig, State
from aai.memory import memory_explained
from pipelines.engine.cluster import connect, native_stderr_held
from pipelines.settings import TrainClusterConfig
from pipelines.training.board import Board
from pipelines.training.recipe import Trained

log = logging.getLogger(__name__)

STATE = "state.safetensors"
"""In every checkpoint: what the next step depends on."""
TRAINED = "trained.safetensors"
"""In the last checkpoint also: what the driver gets."""
HISTORY = "history.jsonl"
SKIPPED = "skipped.jsonl"
"""Steps that were not taken, with the clips that are suspected."""
SHOWN_CLIPS = 5
POLL_S = 0.5


@dataclass(frozen=True)
class Work:
    """What one worker trains: made there, once all workers are up."""

    task: nn.Module
    """`task(batch) -> (loss, report)`."""
    batches: Callable[[int], Iterator[dict[str, Any]]]
    """Given the first step's number, yields this rank's batch of every step from there on."""
    export: Callable[[], tuple[nn.Module, Config]]
    """The module whose whole state the driver gets, and the settings that build it again."""
    evaluate: Callable[[], dict[str, float]] | None = None
    """Figures on held-out clips; rank 0 alone evaluates."""


MakeWork = Callable[[int, int, Any], Work]
"""(rank, world size, settings) -> Work."""


@dataclass(frozen=True)
class Session:
    """A worker's place in the run, and what it does there between steps."""

    rank: int
    steps: int
    work: Work
    board: Any

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Rank 0 posts an entry of the history."""
        if self.rank == 0:
            ray.get(self.board.post.remote({"step": step, **figures}))

    def skip(self, step: int, clips: list[str]) -> None:
        """Any rank posts the clips of a step that was not taken."""
        ray.get(self.board.post.remote({"step": step, "clips": clips, "rank": self.rank}))

    def checkpoint(self, state: State) -> None:
        """Rank 0 writes, with the last step also what the driver gets; all report, since reporting is a barrier."""
        if self.rank != 0:
            ray.train.report({"step": state.step})
            return
        with tempfile.TemporaryDirectory() as folder:
            state.save(Path(folder) / STATE)
            if state.step == self.steps:
                module, settings = self.work.export()
                final = Trained(module.state_dict(), settings.model_dump(mode="json"), state.step, state.precision)
                final.save(Path(folder) / TRAINED)
            ray.train.report({"step": state.step}, checkpoint=ray.train.Checkpoint.from_directory(folder))


def train(
    name: str,
    make_work: MakeWork,
    settings: Any,
    cluster: TrainClusterConfig,
    out: str,
    digest: str,
    fit: FitConfig,
    on_log: Callable[[int, dict[str, float]], None] = lambda step, figures: None,
) -> Trained:
    """Trains `make_work(rank, world_size, settings)` on all workers and returns what rank 0 exports at the end.

    name: of the progress line. make_work: importable on every node. out: local folder (shared by all nodes) or s3://
    prefix; history.jsonl there gets every entry, also of earlier, interrupted calls. on_log is called on the driver,
    in another thread. Raises the workers' own UserError or FloatingPointError, else RuntimeError.
    """
    connect(cluster, out)
    if cluster.address is None:  # nobody preempts this machine: one process less to start
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    board: Any = ray.remote(num_cpus=0)(Board).remote()
    trainer = ray.train.torch.TorchTrainer(
        _work,
        train_loop_config={
            "make_work": make_work,
            "settings": settings,
            "fit": fit,
            "board": board,
            "cpus": cluster.cpus_per_worker,
        },
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if cluster.gpus_per_worker else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.num_workers,
            elastic_resize_monitor_interval_s=cluster.resize_every_s,
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker={"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker},
        ),
        run_config=ray.train.RunConfig(
            name=digest,
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            logging_config=LoggingConfig(log_level="ERROR"),
            **_storage(checkpoints(out)),
        ),
    )
    logging.getLogger("ray.train").setLevel(logging.CRITICAL)
    with _follow(name, board, out, fit.steps, on_log):
        try:
            result = trainer.fit()
        except ray.train.v2.api.exceptions.TrainingFailedError as error:
            raise _cause(name, error) from error
    if result.return_value:
        raise FloatingPointError(f"{name}: {result.return_value}")
    if result.checkpoint is None:
        raise RuntimeError(f"{name}: training ended without a checkpoint")
    with result.checkpoint.as_directory() as folder:
        return Trained.load(Path(folder) / TRAINED)


def checkpoints(out: str) -> str:
    """Where the checkpoints of a run with output `out` lie; remove it once the result is written."""
    return storage.join(out, "_checkpoints")


def history(out: str) -> list[dict[str, Any]]:
    """The entries of history.jsonl by step; empty before the first."""
    return [json.loads(line) for line in _lines(out, HISTORY)]


def _lines(out: str, name: str) -> list[str]:
    where = storage.join(out, name)
    return storage.read_bytes(where).decode().splitlines() if storage.exists(where) else []


def _work(config: dict[str, Any]) -> str | None:
    """What runs on a worker. Returns what went wrong when trying again cannot help, else None."""
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    if device.type == "cpu":  # two workers with all cores each would only wait for one another
        torch.set_num_threads(max(1, int(config["cpus"])))
    rank, fit = context.get_world_rank(), config["fit"]
    work = config["make_work"](rank, context.get_world_size(), config["settings"])
    task = ray.train.torch.prepare_model(work.task, parallel_strategy_kwargs={"broadcast_buffers": False})
    session = Session(rank, fit.steps, work, config["board"])
    evaluate = work.evaluate if rank == 0 else None
    try:
        with memory_explained(fit.chunk_size):
            loop.fit(task, work.batches, fit, session.log, session.checkpoint, evaluate, _resume(), session.skip)
    except FloatingPointError as error:
        # The gradient is the same on all ranks, so all end here, and would again after a restart.
        return str(error)
    return None


def _resume() -> State | None:
    """The last checkpoint of this run, if there is one."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        return State.load(Path(folder) / STATE)


def _storage(uri: str) -> dict[str, Any]:
    if not uri.startswith("s3://"):
        return {"storage_path": storage.absolute(uri)}
    fs, path = storage.filesystem(uri)
    return {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(fs))}


def _cause(name: str, error: Exception) -> Exception:
    """The workers' UserError, or one line on what happened."""
    failures = getattr(error, "worker_failures", {})
    for failure in failures.values():
        inner: Any = failure
        while inner is not None:
            if isinstance(inner, UserError):
                return inner
            inner = getattr(inner, "cause", None) or inner.__cause__
    first = next(iter(failures.values()), error)
    return RuntimeError(f"{name}: training failed: {str(first).strip().splitlines()[-1]}")


@contextmanager
def _follow(
    name: str, board: Any, out: str, steps: int, on_log: Callable[[int, dict[str, float]], None]
) -> Iterator[None]:
    """While the body runs: one progress line, history.jsonl, and `on_log` for every entry."""
    entries = {_key(entry): entry for entry in history(out)}
    before = [json.loads(line) for line in _lines(out, SKIPPED)]
    skipped = {(entry["step"], entry["rank"]): entry for entry in before}
    stop = threading.Event()
    with (
        native_stderr_held() as terminal,
        tqdm(total=steps, desc=name, unit="step", mininterval=1.0, file=terminal) as bar,
    ):

        def poll() -> None:
            """Takes what rank 0 has posted: shows it, and rewrites the history with it."""
            taken = ray.get(board.take.remote())
            for entry in [entry for entry in taken if "clips" in entry]:
                some = ", ".join(entry["clips"][:SHOWN_CLIPS]) or "(not named)"
                more = f" and {len(entry['clips']) - SHOWN_CLIPS} more" if len(entry["clips"]) > SHOWN_CLIPS else ""
                log.warning("%s: step %d was left out, not finite: clips %s%s", name, entry["step"], some, more)
                skipped[entry["step"], entry["rank"]] = entry
            for entry in [entry for entry in taken if "clips" not in entry]:
                # After a restart steps come again: the newer entry counts.
                entries[_key(entry)] = entry
                bar.n = int(entry["step"])
                if "loss" in entry:
                    bar.set_postfix(loss=f"{entry['loss']:.3f}", refresh=False)
                on_log(int(entry["step"]), {k: v for k, v in entry.items() if k != "step"})
            if any("clips" in entry for entry in taken):
                lines = [json.dumps(skipped[key]) for key in sorted(skipped)]
                storage.write_bytes(storage.join(out, SKIPPED), ("\n".join(lines) + "\n").encode())
            if taken and entries:
                lines = [json.dumps(entries[key]) for key in sorted(entries)]
                storage.write_bytes(storage.join(out, HISTORY), ("\n".join(lines) + "\n").encode())
                bar.refresh()

        def watch() -> None:
            while not stop.wait(POLL_S):
                poll()

        thread = threading.Thread(target=watch, name="training-progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            poll()


def _key(entry: dict[str, Any]) -> tuple[int, bool]:
    """A step may have two entries: training, then validation."""
    return int(entry["step"]), "learning_rate" not in entry
