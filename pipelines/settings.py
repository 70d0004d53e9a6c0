"""Config sections that all commands share."""

import re
from typing import Any, Literal

import pydantic

from aai import storage
from aai.config import Config


class ClusterConfig(Config):
    """Where a command runs and how much of the cluster it takes."""

    address: str | None = None
    """Ray cluster to use: `auto`, HOST:PORT or ray://HOST:PORT; empty starts Ray on this machine."""
    num_workers: int = pydantic.Field(2, ge=1)
    """Worker processes of the stage."""
    cpus_per_worker: float = pydantic.Field(1, gt=0)
    gpus_per_worker: float = pydantic.Field(0, ge=0)

    @property
    def most_workers(self) -> int:
        """Workers when all are there."""
        return self.num_workers

    def describe(self) -> dict[str, str]:
        """The cluster and its share, in words."""
        each = f"{self.cpus_per_worker:g} CPU, {self.gpus_per_worker:g} GPU"
        return {"cluster": self.address or "this machine", "workers": f"{self.most_workers} x ({each})"}


class TrainClusterConfig(ClusterConfig):
    """As ClusterConfig, for workers that train together."""

    num_workers: pydantic.PositiveInt | tuple[pydantic.PositiveInt, pydantic.PositiveInt] = 2  # type: ignore[assignment]
    """Worker processes; [2, 8] = as many as there is room for, from 2 to 8, changing while it runs. The clips of a step
    stay the same: they are shared out among fewer."""
    gb_per_worker: float = pydantic.Field(0, ge=0)
    """Memory of a worker's device in GB; a training whose step is forecast to need more than nine tenths of it is
    refused before anything starts. 0 = not checked."""
    resize_every_s: float = pydantic.Field(60, gt=0)
    """How often an elastic training looks whether there is room for more workers; it then goes on from a checkpoint."""
    max_failures: int = pydantic.Field(2, ge=0)
    """How often a failed group of workers is started again from its last checkpoint; what a cloud takes back with a
    notice does not count."""

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> "TrainClusterConfig":
        if self.fewest_workers > self.most_workers:
            raise ValueError(f"num_workers: {self.fewest_workers} is more than {self.most_workers}")
        return self

    @property
    def fewest_workers(self) -> int:
        """Workers without which training waits."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most_workers(self) -> int:
        """See ClusterConfig."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    def at_most(self, workers: int) -> "TrainClusterConfig":
        """The same with no more workers than these."""
        if self.most_workers <= workers:
            return self
        fewest = min(self.fewest_workers, workers)
        bounds = workers if isinstance(self.num_workers, int) else (fewest, workers)
        return self.model_copy(update={"num_workers": bounds})

    def describe(self) -> dict[str, str]:
        """See ClusterConfig."""
        told = super().describe()
        elastic = f"{self.fewest_workers} to " if self.fewest_workers < self.most_workers else ""
        return {**told, "workers": elastic + told["workers"]}


class Autoscaling(Config):
    """Painters of the service by how much is asked of them: more while requests wait, fewer when none do."""

    min_painters: int = pydantic.Field(1, ge=1)
    max_painters: int = pydantic.Field(ge=2)
    target_ongoing_requests: float = pydantic.Field(8, gt=0)
    """Requests, painted and waiting, that there should be for each painter: about as many as it paints together."""
    upscale_delay_s: float = pydantic.Field(10, ge=0)
    """How long there must be more before a painter is added; a new node takes minutes on top."""
    downscale_delay_s: float = pydantic.Field(600, ge=0)
    """How long there must be fewer before one is taken away."""

    @pydantic.model_validator(mode="after")
    def _can_act(self) -> "Autoscaling":
        if self.min_painters >= self.max_painters:
            rule = f"min_painters {self.min_painters} is not below max_painters {self.max_painters}"
            raise ValueError(f"{rule}; for a fixed number set cluster.num_workers alone")
        return self

    def describe(self) -> dict[str, Any]:
        """The same in the words of Ray Serve's autoscaling_config."""
        return {
            "min_replicas": self.min_painters,
            "max_replicas": self.max_painters,
            "target_ongoing_requests": self.target_ongoing_requests,
            "upscale_delay_s": self.upscale_delay_s,
            "downscale_delay_s": self.downscale_delay_s,
        }


class StoreConfig(Config):
    """MLflow: where registered models are looked up."""

    uri: str = "sqlite:///mlflow.db"
    """Tracking and registry URI: sqlite:///FILE, http(s)://SERVER, or databricks[://PROFILE]."""
    wait_s: float = pydantic.Field(30, ge=0)
    """How long a server that does not answer is waited for before any work begins: it may be starting."""

    def anywhere(self) -> "StoreConfig":
        """The same as it holds in any folder of this machine."""
        if not self.uri.startswith("sqlite:///"):
            return self
        return self.model_copy(update={"uri": f"sqlite:///{storage.absolute(self.uri.removeprefix('sqlite:///'))}"})


class RunsConfig(StoreConfig):
    """As StoreConfig, for commands that log a run."""

    artifacts: str | None = None
    """Artifact folder or s3:// prefix of a new experiment; empty = the server's default, or a folder beside sqlite."""
    experiment: str = "aai"


class TrackingConfig(RunsConfig):
    """As RunsConfig, for the command that registers models."""

    model_name: str = "aai"
    """Name of the registered model."""


class Choice(Config):
    """The number that a setting has, and where it is from."""

    value: float
    why: str

    def __str__(self) -> str:
        return f"{self.value:g} ({self.why})"


class SoundLimits(Config):
    """What a sound that somebody hands in may cost."""

    max_bytes: int = pydantic.Field(32 * 2**20, gt=0)
    """Largest file; of the service: largest request body, counted while it streams in."""
    max_audio_s: float = pydantic.Field(60, gt=0)
    """Longest sound."""


class InputLimits(SoundLimits):
    """What a sound or a picture that somebody hands in may cost: for the painting commands, the service and MLflow."""

    max_pixels: int = pydantic.Field(4096 * 4096, gt=0)
    """Largest width x height of a picture; checked before it is decoded."""


class Plan(Config):
    """What a command would read, write and occupy: printed by --dry-run."""

    inputs: dict[str, str]
    outputs: dict[str, str]
    resources: dict[str, str]
    chosen: dict[str, str] = pydantic.Field(default_factory=dict)
    """What settings that are `auto` stand for, and why."""
    training: dict[str, str] = pydantic.Field(default_factory=dict)
    """Steps, batches and memory of a training."""
    stages: dict[str, str] = pydantic.Field(default_factory=dict)
    """Of a chain of commands: which would run, and why."""


_NAMED = re.compile(r"\$\{(\w+)\}")


def _text_of(cls: type[Config], given: dict[str, object], name: str) -> str:
    """What a default puts in the place of ${name}: a folder without the slash at its end."""
    return str(given.get(name, cls.model_fields[name].default)).rstrip("/")


class VerbConfig(Config):
    """Base of every command's config."""

    run_dir: str = "runs/demo"
    """Folder or s3:// prefix of the run; other settings may refer to it as ${run_dir}."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _defaults_name_others(cls, given: object) -> object:
        """Puts other settings into the defaults that name them; in a file's values OmegaConf has done so."""
        if not isinstance(given, dict):
            return given
        filled = dict(given)
        for name, field in cls.model_fields.items():
            if name not in given and isinstance(field.default, str) and "${" in field.default:
                filled[name] = _NAMED.sub(lambda found: _text_of(cls, filled, found[1]), field.default)
        return filled

    def plan(self) -> Plan:
        """What the command would do with these settings, without doing it."""
        raise TypeError(f"{type(self).__name__} has no plan")


class RayVerbConfig(VerbConfig):
    """Base of the config of a command that works on Ray; only these are offered `--address`."""

    cluster: ClusterConfig = ClusterConfig()

    def resources(self) -> dict[str, str]:
        """The cluster's share as printed by --dry-run."""
        return self.cluster.describe()


DType = Literal["auto", "float32", "bfloat16", "float16"]
"""Arithmetic type of frozen models; auto: bfloat16 where the device has it natively, float32 elsewhere."""
