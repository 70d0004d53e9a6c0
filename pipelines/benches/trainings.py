"""What both trainings take on nodes of a kind, from the work of a step: the calculated side of `aai plan`."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow.parquet as pq

from aai import storage
from aai.features import MANIFEST, FeatureManifest
from pipelines.__main__ import load_config
from pipelines.adapt import AdaptConfig, AdaptRecipe
from pipelines.align import AlignRecipe
from pipelines.settings import TrainClusterConfig
from pipelines.training.recipe import CPU_TFLOPS, StageConfig

COLUMNS = {"align": AlignRecipe.columns, "adapt": AdaptRecipe.columns}


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


def foundation_note(align: str, features: str) -> str:
    """What is wrong where the sample was featurized for another foundation than the config file of align names."""
    wanted, manifest = load_config("align", ["--config", align])[0].foundation, _manifest(features)  # type: ignore[attr-defined]
    for name in ("clip", "diffusion"):
        meant = getattr(wanted, name)
        if manifest is not None and manifest.foundation[name] != meant:
            given = f"--set featurize=[foundation.{name}={meant}]"
            return f"the sample is featurized for {manifest.foundation[name]}: give {given}"
    return ""


def _manifest(features: str) -> FeatureManifest | None:
    return FeatureManifest.read(features) if storage.exists(storage.join(features, MANIFEST)) else None


def _train_share(features: str) -> float:
    manifest = _manifest(features)
    return manifest.rows.get("train", 0) / sum(manifest.rows.values()) if manifest else 1.0


def _clip_bytes(features: str, columns: tuple[str, ...]) -> float:
    """Bytes of a clip that a training reads of the features."""
    size = rows = 0
    for file in storage.list_files(features, ".parquet"):
        fs, path = storage.filesystem(file)
        about = pq.read_metadata(path, filesystem=fs)
        rows += about.num_rows
        for group in range(about.num_row_groups):
            chunks = [about.row_group(group).column(i) for i in range(about.num_columns)]
            size += sum(c.total_compressed_size for c in chunks if c.path_in_schema.split(".")[0] in columns)
    return size / max(1, rows)


def plan_training(stage: str, file: str, features: str, clips: float, nodes: Nodes, note: str = "") -> Training:
    """file: config of the stage. features: of a sample. clips: accepted ones. note: why nothing can be told."""
    config, _ = load_config(stage, ["--config", file, "--set", f"features={features}"])
    assert isinstance(config, StageConfig)
    fit, most = config.fit, nodes.gpus or nodes.cpus
    shared = math.gcd(fit.batch_size, config.loss.denoise_rows) if isinstance(config, AdaptConfig) else fit.batch_size
    workers = max(count for count in range(1, min(most, shared) + 1) if shared % count == 0)
    each = {"cpus_per_worker": nodes.cpus / workers, "gpus_per_worker": 1 if nodes.gpus else 0}
    config = config.model_copy(update={"cluster": TrainClusterConfig.parse({"num_workers": workers, **each})})
    train_clips = max(1.0, clips * _train_share(features))
    known = Training(stage, nodes.name, workers, fit.steps, fit.steps * fit.batch_size / train_clips)
    cost = note or config.step_cost()
    if isinstance(cost, str):
        return replace(known, note=cost)
    step_s = cost.flop / 1e12 / (nodes.gpu_tflops if nodes.gpus else CPU_TFLOPS * nodes.cpus / workers)
    spare = f"{most - workers} of {most} GPUs have no part in {shared} clips" if workers < most else ""
    return replace(
        known,
        gb_per_worker=cost.num_bytes / 1e9,
        step_s=step_s,
        hours=step_s * fit.steps / 3600,
        read_mb_per_s=fit.batch_size * _clip_bytes(features, COLUMNS[stage]) / step_s / 1e6,
        note=spare if nodes.gpus else "",
    )
