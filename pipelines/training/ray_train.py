"""Ray Train around `aai.fit`: workers, checkpoints, restarts, and what the driver sees of a running training.

A run is named by its output folder and a digest of its settings; calling `train` again with both goes on from the last
checkpoint, whether the workers, the driver or the whole cluster died.
"""

import contextlib
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.train.v2.api.config import LoggingConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import nn

from aai import fit as loop
from aai import storage
from aai.config import Config
from aai.errors import UserError, room_explained
from aai.fit import FitConfig, State
from aai.memory import memory_explained, peak_memory_gb
from pipelines.engine.cluster import connect
from pipelines.engine.machine import load
from pipelines.engine.stage_metrics import telling
from pipelines.settings import TrainClusterConfig
from pipelines.training.board import Board
from pipelines.training.following import OnLog, OnPicture, following, history
from pipelines.training.gloo import GlooConfig
from pipelines.training.recipe import Trained

log = logging.getLogger(__name__)

STATE = "state.safetensors"
"""In every checkpoint: what the next step depends on."""
TRAINED = "trained.safetensors"
"""In the last checkpoint also: what the driver gets."""
LOCAL = "aai-checkpoint-"
"""How the folder of a checkpoint that is being made begins; then comes the process."""
LEFT_S = 3600.0
"""A folder of a process that is gone is left over when it is older."""
ROOM_S = 5.0
"""How long what others have just given back may take until it counts as free."""
UPLOAD_S, UPLOAD_WAIT_S = 600.0, 15.0
"""How long sending a checkpoint is tried before it is given up, and the wait between two tries."""


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
    sample: Callable[[], bytes | None] = lambda: None
    """A PNG file of what the task does now, asked for with every evaluation."""


MakeWork = Callable[[int, int, Any], Work]
"""(rank, world size, settings) -> Work."""


@dataclass
class Session:
    """A worker's place in the run, and what it does there between steps."""

    rank: int
    work: Work
    board: Any
    out: str
    preemptible: bool
    _noticed: set[str] = field(default_factory=set)
    _sending: threading.Event = field(default_factory=threading.Event)

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Rank 0 posts an entry of the history; those of training tell of workers and of its machine."""
        if self.rank == 0:
            more: dict[str, float] = {}
            if "loss" in figures:
                workers = ray.train.get_context().get_world_size()
                more = {"workers": workers, "peak_memory_gb": peak_memory_gb(), **load()}
            ray.get(self.board.post.remote({"step": step, **figures, **more}))

    def evaluate(self, step: int) -> dict[str, float]:
        """The work's figures; a picture, where it makes one, is posted."""
        assert self.work.evaluate is not None
        figures = self.work.evaluate()
        if (picture := self.work.sample()) is not None:
            ray.get(self.board.post.remote({"step": step, "picture": picture}))
        return figures

    def skip(self, step: int, clips: list[str]) -> None:
        """Any rank posts the clips of a step that was not taken."""
        ray.get(self.board.post.remote({"step": step, "clips": clips, "rank": self.rank}))

    def leaving(self) -> bool:
        """Whether a node of the run was announced to be taken away since the last call; all ranks ask together."""
        info = ray.train.get_preemption_info() if self.preemptible else None
        fresh = set(info.preempted_node_ids) - self._noticed if info else set()
        self._noticed |= fresh
        return bool(fresh)

    def checkpoint(self, state: State) -> None:
        """Rank 0 writes, with the last step also what the driver gets; all report, since reporting is a barrier.

        To s3:// it is sent on a thread while steps go on, but for the last one; one that comes while another is still
        on its way, because the storage is away, is left out.
        """
        if self.rank != 0 or (self._sending.is_set() and not state.ended):
            ray.train.report({"step": state.step})
            return
        folder = tempfile.mkdtemp(prefix=f"{LOCAL}{os.getpid()}-")
        try:
            with room_explained(folder):
                self._save(state, Path(folder))
            how: dict[str, Any] = {}
            if self.out.startswith("s3://"):
                modes = ray.train.CheckpointUploadMode
                mode = modes.SYNC if state.ended else modes.ASYNC
                how = {"checkpoint_upload_mode": mode, "checkpoint_upload_fn": self._upload}
                self._sending.set()
            here = ray.train.Checkpoint.from_directory(folder)
            with room_explained(checkpoints(self.out)):
                ray.train.report({"step": state.step}, here, delete_local_checkpoint_after_upload=True, **how)
            if not how:
                ray.get(self.board.post.remote({"checkpoint": state.step}))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _save(self, state: State, folder: Path) -> None:
        state.save(folder / STATE)
        if state.ended:
            module, settings = self.work.export()
            about = settings.model_dump(mode="json"), state.step, state.precision, state.kept_step
            Trained(module.state_dict(), *about).save(folder / TRAINED)

    def _upload(self, checkpoint: Any, name: str) -> Any:
        """Sends a checkpoint's files to the run's storage; errors are bridged for ten minutes, then raised."""
        place = ray.train.get_context().get_storage()
        target, gives_up_s = f"{place.experiment_fs_path}/{name}", time.monotonic() + UPLOAD_S
        while True:
            try:
                storage.upload_folder(checkpoint.path, f"s3://{target}")
                self._sending.clear()
                self.board.post.remote({"checkpoint": name})
                return ray.train.Checkpoint(target, place.storage_filesystem)
            except Exception as error:
                if time.monotonic() > gives_up_s:
                    raise
                log.warning("checkpoint %s cannot be sent for now (%s)", name, error)
                time.sleep(UPLOAD_WAIT_S)


def remove_leftovers() -> None:
    """Removes what killed workers of this machine have left of checkpoints in its temporary folder.

    Only what is old: a process of another container that shares the folder is not seen from here.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"{LOCAL}*"):
        with contextlib.suppress(ValueError, OSError):
            process = int(folder.name.removeprefix(LOCAL).split("-")[0])
            old = folder.stat().st_mtime < time.time() - LEFT_S
            if old and not Path(f"/proc/{process}").exists():
                shutil.rmtree(folder)


def tell_of_room(name: str, cluster: TrainClusterConfig, patience_s: float = ROOM_S) -> None:
    """Says what a training waits for where the cluster has no room for its fewest workers: Ray waits without a word."""
    each = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    wanted = {kind: cluster.fewest_workers * count for kind, count in each.items()}
    gives_up_s = time.monotonic() + patience_s
    while True:
        free = ray.available_resources()
        short = [kind for kind, count in wanted.items() if count > free.get(kind, 0)]
        if not short:
            return
        if time.monotonic() > gives_up_s:
            lacking = " and ".join(f"{wanted[kind]:g} {kind}s ({free.get(kind, 0):g} free)" for kind in short)
            remedy = "add nodes, end what runs there (a job's own command counts, too), or lower cluster.num_workers"
            log.warning("%s: waits for room: its workers want %s; %s", name, lacking, remedy)
            return
        time.sleep(0.5)


def _enter(name: str, cluster: TrainClusterConfig, out: str) -> None:
    """Connects to Ray."""
    connect(cluster, out)
    if cluster.address is None:  # nobody preempts this machine: one process less to start
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    else:
        tell_of_room(name, cluster)


def train(
    name: str,
    make_work: MakeWork,
    settings: Any,
    cluster: TrainClusterConfig,
    out: str,
    digest: str,
    fit: FitConfig,
    on_log: OnLog = lambda step, figures: None,
    on_picture: OnPicture = lambda step, png: None,
) -> Trained:
    """Trains `make_work(rank, world_size, settings)` on all workers and returns what rank 0 exports at the end.

    name: of the progress line. make_work: importable on every node. out: local folder (shared by all nodes) or s3://
    prefix; history.jsonl there gets every entry, also of earlier, interrupted calls. on_log and on_picture are
    called on the driver, in another thread. Raises the workers' own UserError or FloatingPointError, else RuntimeError.
    """
    _enter(name, cluster, out)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board: Any = ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote()  # not on a node that may be taken
    trainer = ray.train.torch.TorchTrainer(
        _work,
        train_loop_config={
            "make_work": make_work,
            "settings": settings,
            "fit": fit,
            "board": board,
            "out": out,
            "preemptible": cluster.address is not None,
            "cpus": cluster.cpus_per_worker,
        },
        torch_config=_processes(cluster),
        scaling_config=_scaling(cluster),
        run_config=ray.train.RunConfig(
            name=digest,
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            logging_config=LoggingConfig(log_level="ERROR"),
            **storage_of(checkpoints(out)),
        ),
    )
    logging.getLogger("ray.train").setLevel(logging.CRITICAL)
    with _followed(name, board, out, fit, on_log, on_picture):
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


@contextlib.contextmanager
def _followed(name: str, board: Any, out: str, fit: FitConfig, on_log: OnLog, on_picture: OnPicture) -> Iterator[None]:
    """While the body runs, the training is followed, and its metrics are told."""
    with telling(name) as metrics:
        metrics.begin_training(fit.steps, goes_on=bool(history(out)))

        def heard(step: int, figures: dict[str, float]) -> None:
            metrics.entry(step, figures, fit.batch_size)
            on_log(step, figures)

        with following(name, board, out, fit.steps, heard, on_picture, metrics.checkpoint):
            yield


def checkpoints(out: str) -> str:
    """Where the checkpoints of a run with output `out` lie; remove it once the result is written."""
    return storage.join(out, "_checkpoints")


def has_checkpoint(out: str, digest: str) -> bool:
    """Whether a run has come to its first checkpoint."""
    return any("/checkpoint_" in file for file in storage.list_files(storage.join(checkpoints(out), digest)))


def _work(config: dict[str, Any]) -> str | None:
    """What runs on a worker. Returns what went wrong when trying again cannot help, else None."""
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    if device.type == "cpu":  # two workers with all cores each would only wait for one another
        torch.set_num_threads(max(1, int(config["cpus"])))
    storage.be_patient()
    remove_leftovers()
    load()  # counts from here
    rank, fit = context.get_world_rank(), config["fit"]
    work = config["make_work"](rank, context.get_world_size(), config["settings"])
    task = ray.train.torch.prepare_model(work.task, parallel_strategy_kwargs={"broadcast_buffers": False})
    session = Session(rank, work, config["board"], config["out"], config["preemptible"])
    evaluate, resume = session.evaluate if rank == 0 and work.evaluate else None, _resume()
    hooks = session.log, session.checkpoint, evaluate, resume, session.skip, session.leaving
    try:
        with memory_explained(fit.chunk_size):
            loop.fit(task, work.batches, fit, *hooks)
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


def _processes(cluster: TrainClusterConfig) -> Any:
    if cluster.gpus_per_worker:
        return ray.train.torch.TorchConfig(backend="nccl")
    return ray.train.torch.TorchConfig(backend="gloo") if cluster.address is None else GlooConfig(backend="gloo")


def _scaling(cluster: TrainClusterConfig) -> Any:
    return ray.train.ScalingConfig(
        num_workers=cluster.num_workers,
        elastic_resize_monitor_interval_s=cluster.resize_every_s,
        use_gpu=cluster.gpus_per_worker > 0,
        resources_per_worker={"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker},
    )


def storage_of(uri: str) -> dict[str, Any]:
    """What a RunConfig of Ray says of a local folder or s3:// prefix."""
    if not uri.startswith("s3://"):
        return {"storage_path": storage.absolute(uri)}
    fs, path = storage.filesystem(uri, patient=True)
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
