"""What both trainings take on nodes of a kind, from the work of a step: the calculated side of `aai plan`."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from pipelines.__main__ import load_config
from pipelines.settings import TrainClusterConfig
from pipelines.training.recipe import CPU_TFLOPS, StageConfig


@dataclass(frozen=True)
class Nodes:
    """All nodes of one kind together."""

    name: str
    cpus: int
    gpus: int
    gpu_tflops: float
    """What a step reaches on one of the GPUs."""


@dataclass(frozen=True)
class Training:
    """One stage on nodes of one kind."""

    stage: str
    shape: str
    workers: int
    """GPUs of the nodes, or CPUs where there are none; as many as can share a step's clips evenly."""
    steps: int
    epochs: float
    gb_per_worker: float | None = None
    step_s: float | None = None
    hours: float | None = None
    read_mb_per_s: float | None = None
    """Of all nodes together, from the features."""
    note: str = ""
    """Why the rest is not told."""

    def line(self) -> str:
        """A row of the printed table."""
        head = f"  {self.stage:<6} {self.shape:<14} {self.workers:>7} {self.steps:>8} {self.epochs:>8.3g}"
        if self.step_s is None:
            return f"{head}  {self.note}"
        told = f"{head} {self.gb_per_worker:>12.3g} {self.step_s:>9.2g} {self.hours:>9.3g} {self.read_mb_per_s:>10.3g}"
        return f"{told}  {self.note}".rstrip()

    def rounded(self) -> dict[str, Any]:
        """For plan.json."""
        return {key: float(f"{v:.4g}") if isinstance(v, float) else v for key, v in asdict(self).items()}


HEADER = (
    f"  {'stage':<6} {'shape':<14} {'workers':>7} {'steps':>8} {'epochs':>8} "
    f"{'GB a worker':>12} {'s a step':>9} {'hours':>9} {'read MB/s':>10}"
)


def plan_training(stage: str, file: str, features: str, clips: float, clip_bytes: float, nodes: Nodes) -> Training:
    """file: config of the stage. features: of a sample. clips: accepted ones, of clip_bytes each."""
    config, _ = load_config(stage, ["--config", file, "--set", f"features={features}"])
    assert isinstance(config, StageConfig)
    fit, most = config.fit, nodes.gpus or nodes.cpus
    workers = max(count for count in range(1, min(most, fit.batch_size) + 1) if fit.batch_size % count == 0)
    each = {"cpus_per_worker": nodes.cpus / workers, "gpus_per_worker": 1 if nodes.gpus else 0}
    config = config.model_copy(update={"cluster": TrainClusterConfig.parse({"num_workers": workers, **each})})
    known = Training(stage, nodes.name, workers, fit.steps, fit.steps * fit.batch_size / max(1.0, clips))
    cost = config.step_cost()
    if isinstance(cost, str):
        return replace(known, note=cost)
    step_s = cost.flop / 1e12 / (nodes.gpu_tflops if nodes.gpus else CPU_TFLOPS * nodes.cpus / workers)
    spare = f"{most - workers} of {most} GPUs have no part in {fit.batch_size} clips" if workers < most else ""
    return replace(
        known,
        gb_per_worker=cost.num_bytes / 1e9,
        step_s=step_s,
        hours=step_s * fit.steps / 3600,
        read_mb_per_s=fit.batch_size * clip_bytes / step_s / 1e6,
        note=spare if nodes.gpus else "",
    )
