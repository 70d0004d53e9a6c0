"""What a trained stage is: its settings, and a recipe that builds, validates and writes.

A stage is one file: a StageConfig, a TrainRecipe, and `run(config)` that calls `stage.run_stage(Recipe, config)`.
All else is the same for all stages and lives in `pipelines.training`: batches, workers, checkpoints, restarts, figures.
"""

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import pydantic
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from aai import storage
from aai.aligned import AlignedCache
from aai.config import Config
from aai.errors import UserError
from aai.features import MANIFEST, FeatureManifest
from aai.fit import FitConfig, local_batch_size
from aai.foundation.identity import FoundationSpec, identity, is_identity
from aai.memory import StepCost
from aai.precision import native_bfloat16
from pipelines.settings import Plan, RayVerbConfig, RunsConfig, TrainClusterConfig

log = logging.getLogger(__name__)

HOW_ALONE = ("chunk_size", "checkpoint_activations", "compile", "log_every", "checkpoint_every")
"""Settings of fit that change how a step is computed or told, not what is learned: a run goes on under others."""
GPU_TFLOPS, CPU_TFLOPS = 100.0, 0.03
"""Of one GPU (a third of an A100's peak in bfloat16) and of one core, for the time that a plan tells."""


class StageConfig(RayVerbConfig):
    """Settings of every training stage."""

    stage: ClassVar[str]
    """The verb's name, and of the JSON file with the result."""
    places: ClassVar[tuple[str, ...]] = ("features", "out")
    """The settings that are folders or s3:// prefixes: what lies there counts, not where it lies."""
    looked_at: ClassVar[tuple[str, ...]] = ("run_dir", "cluster", "tracking", "max_val_clips", "max_cut_share")
    """The settings of machines, and of what is only looked at."""

    features: str
    """Folder or s3:// prefix of the FeatureTable."""
    out: str
    """Folder or s3:// prefix for the bundle, the history and the figures."""
    fit: FitConfig = FitConfig()
    cluster: TrainClusterConfig = TrainClusterConfig()
    tracking: RunsConfig = RunsConfig()
    shuffle_clips: int = pydantic.Field(2048, ge=1)
    """Clips that a worker shuffles together, of several files. It holds twice as many in memory, at 16 kHz 32 kB for
    each second, besides some batches that are ready, 64 kB for each second."""
    max_val_clips: int = pydantic.Field(1000, ge=2)
    """Validation takes at most this many clips of the val split."""
    max_cut_share: float = pydantic.Field(0.5, ge=0, le=1)
    """Share of the clips' sound that may lie beyond what the encoder takes of a clip (its clip_s); more is an error."""

    @property
    def pictures_only(self) -> bool:
        """Whether clips of sound and text alone are left out."""
        return False

    def plan(self) -> Plan:
        """See VerbConfig."""
        inputs = {name: getattr(self, name) for name in self.places if name != "out"}
        outputs = {"bundle": bundle_dir(self.out), "figures": self.result}
        self.refuse_what_cannot_fit()
        return Plan(inputs=inputs, outputs=outputs, resources=self.resources(), training=self._arithmetic())

    def _arithmetic(self) -> dict[str, str]:
        """Steps, epochs, batches, memory and time, as far as they can be told before anything runs."""
        fit, workers = self.fit, self.cluster.most_workers
        steps, manifest = f"{fit.steps}", self.manifest()
        clips = manifest.clips("train", self.pictures_only) if manifest is not None else 0
        if clips:
            steps += f" = {fit.steps * fit.batch_size / clips:.1f} epochs of {clips:,} clips"
        each = local_batch_size(fit, workers)
        batch = f"{fit.batch_size:,} clips a step = {workers} workers x {each:,}"
        if self.clips_of_worker > each:
            batch += f", up to {self.clips_of_worker:,} when they are {self.cluster.fewest_workers}"
        if 0 < fit.chunk_size < each:
            batch += f", in chunks of {fit.chunk_size}"
        cost = self.step_cost()
        if isinstance(cost, str):
            return {"steps": steps, "batch": batch, "memory": cost}
        memory = f"{cost.num_bytes / 1e9:.1f} GB a worker, by PyTorch's fake tensors"
        return {"steps": steps, "batch": batch, "memory": memory, "time": self._time(cost, clips)}

    def _time(self, cost: StepCost, clips: int) -> str:
        """How long an epoch and all steps take at a stated speed."""
        on_gpu = self.cluster.gpus_per_worker > 0
        tflops = GPU_TFLOPS * self.cluster.gpus_per_worker if on_gpu else CPU_TFLOPS * self.cluster.cpus_per_worker
        step_tflop = cost.flop / 1e12 * local_batch_size(self.fit, self.cluster.most_workers) / self.clips_of_worker
        step_s = step_tflop / tflops
        told = f"{step_s:.2g} s a step, {_duration(step_s * self.fit.steps)} for all"
        if clips:
            told += f", {_duration(step_s * clips / self.fit.batch_size)} an epoch"
        return f"{told}: {step_tflop:.3g} TFLOP a worker at {tflops:g} TFLOP/s, where data does not wait"

    @property
    def clips_of_worker(self) -> int:
        """Clips that a worker takes in a step at most: more than its share where others are missing."""
        most, fewest = self.cluster.most_workers, self.cluster.fewest_workers
        return local_batch_size(self.fit, most) * -(-most // fewest)

    @property
    def half(self) -> bool:
        """Whether a step is computed in bfloat16, as far as this machine can tell of the workers' devices."""
        if self.fit.precision != "auto":
            return self.fit.precision == "bfloat16"
        return self.cluster.gpus_per_worker > 0 or native_bfloat16("cpu")

    def manifest(self) -> FeatureManifest | None:
        """The features', for a plan: none before they are there, or where their storage cannot be reached."""
        try:
            there = storage.exists(storage.join(self.features, MANIFEST))
        except Exception as error:  # no credentials, no network: a plan can be made anywhere
            log.warning("%s: features %s cannot be looked at (%s)", self.stage, self.features, error)
            return None
        return FeatureManifest.read(self.features) if there else None

    def step_cost(self) -> StepCost | str:
        """What a worker's step takes, or why that cannot be told."""
        return "not told for this stage"

    def refuse_what_cannot_fit(self) -> None:
        """Raises UserError when a step takes more clips than there are, or is forecast to need more than a worker's
        device has."""
        manifest = self.manifest()
        clips = manifest.clips("train", self.pictures_only) if manifest is not None else 0
        if 0 < clips < self.fit.batch_size:
            rule = f"is more than the {clips} rows of split 'train'{' with a picture' * self.pictures_only}"
            raise UserError("fit.batch_size", self.fit.batch_size, rule, "lower it, or featurize more clips")
        limit_gb = 0.9 * self.cluster.gb_per_worker
        cost = self.step_cost() if limit_gb else ""
        if isinstance(cost, StepCost) and cost.num_bytes > limit_gb * 1e9:
            limit = f"nine tenths of cluster.gb_per_worker={self.cluster.gb_per_worker:g}"
            needs = f"{cost.num_bytes / 1e9:.1f} GB"
            rule = f"a step of {self.clips_of_worker} clips is forecast to need {needs}, more than {limit}"
            remedy = "lower it (0 = all of a worker's clips at once): the gradient stays the same"
            raise UserError("fit.chunk_size", self.fit.chunk_size, rule, remedy)

    @property
    def result(self) -> str:
        """The file that is written last; a folder that has it is finished."""
        return storage.join(self.out, f"{self.stage}.json")

    def content(self) -> dict[str, Any]:
        """The settings that determine the weights: all but `places` and `looked_at`."""
        settings = self.model_dump(mode="json", exclude={*self.places, *self.looked_at})
        settings["fit"] = {name: value for name, value in settings["fit"].items() if name not in HOW_ALONE}
        return settings


C = TypeVar("C", bound=StageConfig)


@dataclass(frozen=True)
class Trained:
    """What a finished training hands to the driver, which builds no model to save one."""

    weights: dict[str, Tensor]
    """The whole state of the exported module: trained weights, frozen ones, buffers."""
    settings: dict[str, Any]
    """What builds the module again."""
    step: int
    """Steps done."""
    precision: str | None
    """Arithmetic of the forward pass."""
    kept_step: int | None = None
    """The step that the weights are of: an earlier one where the best are kept."""

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file."""
        weights = {name: x.detach().cpu().contiguous() for name, x in self.weights.items()}
        names = "settings", "step", "precision", "kept_step"
        about = {name: getattr(self, name) for name in names}
        save_file(weights, path, {"about": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> "Trained":
        """Reads what `save` wrote."""
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return cls(weights, **json.loads(file.metadata()["about"]))


class TrainRecipe(ABC, Generic[C]):
    """One training. Made on the driver and again on every worker, from the class and the settings as JSON.

    On the driver: `prepare` and `precompute`, then, when the workers are done, `write`. On the workers: `build`, and on
    rank 0 `validate`, `sample` and `export`.
    """

    config_class: ClassVar[type[StageConfig]]
    columns: ClassVar[tuple[str, ...]]
    """Columns of the FeatureTable that a batch holds (see `aai.reader.FeatureReader`)."""
    clip_samples: int = 0
    """Length that sounds are padded or cut to; for recipes with the column audio."""
    cache: AlignedCache | None = None
    """Where the sounds' embeddings are; for recipes with the column aligned."""
    parents: tuple[str, ...] = ()
    """Hashes of what the stage takes besides the features, such as an earlier bundle."""

    def __init__(self, config: C) -> None:
        self.config = config

    def prepare(self, manifest: FeatureManifest) -> C:
        """The settings with what only the data knows. Raises UserError for what does not fit together."""
        return self.config

    def precompute(self) -> None:
        """Makes what the workers read besides the features, where it is not there yet."""

    @abstractmethod
    def build(self) -> nn.Module:
        """The task, `task(batch) -> (loss, terms)`; only its parameters that require a gradient are trained."""

    @abstractmethod
    def validate(self, task: nn.Module, held_out: dict[str, Any]) -> dict[str, float]:
        """Figures on clips of the val split, as `aai.features.load_split` returns them; called without gradients."""

    def sample(self, task: nn.Module, held_out: dict[str, Any]) -> bytes | None:
        """A PNG file of what the task does with some clips of the val split; None for what cannot be looked at."""
        return None

    @abstractmethod
    def export(self, task: nn.Module) -> tuple[nn.Module, Config]:
        """The module whose whole state is kept, and the settings that build it again."""

    @abstractmethod
    def write(self, folder: str, trained: Trained, meta: dict[str, Any]) -> str:
        """Writes the result into a folder or s3:// prefix, and returns its hash; it loads no model.

        meta: data_fingerprint, metrics, parents.
        """


def _duration(seconds: float) -> str:
    for size, unit in ((86_400, "days"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds:.2g} s"


def bundle_dir(out: str) -> str:
    """Where a stage with output `out` puts its bundle."""
    return storage.join(out, "bundle")


def refuse_given(section: str, config: Config, names: Iterable[str]) -> None:
    """Raises UserError when somebody sets what the data or a model decides: it would be overwritten in silence."""
    for name in names:
        if name in config.model_fields_set:
            remedy = "leave it out"
            raise UserError(f"{section}.{name}", getattr(config, name), "is decided by data and models", remedy)


def prepare_network(network: nn.Module, fit: FitConfig) -> None:
    """What the settings ask of the large network. Raises UserError for one that cannot keep fewer activations."""
    if fit.checkpoint_activations:
        # diffusers and transformers name it differently
        enable = getattr(network, "enable_gradient_checkpointing", None)
        enable = enable or getattr(network, "gradient_checkpointing_enable", None)
        able = getattr(network, "supports_gradient_checkpointing", False)
        if enable is None or not (able or getattr(network, "_supports_gradient_checkpointing", False)):
            rule = f"{type(network).__name__} does not offer it"
            raise UserError("fit.checkpoint_activations", True, rule, "set it to false, and lower fit.chunk_size")
        enable()
    if fit.compile:
        network.compile()


def check_foundation(spec: FoundationSpec, manifest: FeatureManifest) -> None:
    """Raises UserError when the features were made with another foundation than the bundle would name."""
    for key in ("clip_revision", "diffusion_revision"):
        if not is_identity(spec, key, manifest.foundation[key]):
            raise UserError(
                f"foundation.{key.removesuffix('_revision')}",
                identity(spec)[key],
                f"the features were made with {manifest.foundation[key]}",
                "set the foundation that `aai featurize` used, or featurize again",
            )
