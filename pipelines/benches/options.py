"""Settings of the benches."""

from collections.abc import Sequence
from typing import Literal

import pydantic

from aai import storage
from aai.config import Config
from pipelines.settings import ClusterConfig, Plan, VerbConfig


def as_flags(settings: Sequence[str]) -> list[str]:
    """Settings `a.b=c` as the arguments of a command: --set a.b=c ..."""
    words: list[str] = []
    for setting in settings:
        words += ["--set", setting]
    return words


class ModelConfig(Config):
    """The models of vitl14, align and adapt: random weights cost what trained ones cost."""

    size: Literal["vitl14", "tiny"] = "vitl14"
    """vitl14: of align and adapt also AST-base and Stable Diffusion 1.5. tiny: only to see that the bench works."""
    images: int = pydantic.Field(8192, ge=1)
    """Pictures of each measurement; without a GPU a few only."""
    batch_size: int = pydantic.Field(256, ge=1)
    """Pictures per forward pass."""
    picture_px: int = pydantic.Field(224, ge=16)
    """Edge of the pictures as curate keeps them."""
    threads: int = pydantic.Field(8, ge=1)
    """Threads that prepare pictures."""


class TrainBenchConfig(Config):
    """What `aai bench align` and `aai bench adapt` compare."""

    steps: int = pydantic.Field(2, ge=1)
    """Steps of a turn of Ray Train, and of a turn without Ray; each turn makes one entry of the history."""
    pairs: int = pydantic.Field(40, ge=1)
    """Turns of each that count, after one to warm up."""
    clips: int = pydantic.Field(16, ge=2)
    """Clips of a step with and without towers; without a GPU two."""
    frames: int = pydantic.Field(4, ge=1)
    """Pictures of a clip that towers see in each step."""


class ServeBenchConfig(Config):
    """What `aai bench serve` asks of a painter and of two services. `repeats` is the number of rounds."""

    bundle: str | None = None
    """As for `aai serve`; empty = what configs/demo/serve.yaml serves."""
    clients: tuple[pydantic.PositiveInt, ...] = (1, 4, 8, 16)
    """Of closed loops: each asks again when it is answered."""
    open_shares: tuple[pydantic.PositiveFloat, ...] = (0.5, 0.8)
    """Open loops: arrivals as a share of what the same service painted in the best of its closed loops."""
    overload: float = pydantic.Field(10, ge=1)
    """The last open loop, times that capacity."""
    cell_s: float = pydantic.Field(4, gt=0)
    """Seconds of each load, in each round."""
    steps: int = pydantic.Field(20, ge=2, le=100)
    """Denoising steps of a picture."""


class BenchConfig(VerbConfig):
    """Settings of `aai bench`."""

    name: Literal["decode", "curate", "featurize", "align", "adapt", "vitl14", "inject", "serve"]
    """What to measure."""
    out: str = "runs/bench"
    """Folder of NAME.json, and of the toy world and tables that are measured on."""
    clips: int = pydantic.Field(2400, ge=1)
    """Clips of the toy world; nine in ten are accepted."""
    windows: int = pydantic.Field(1, ge=1, le=25)
    """List each clip so many times, each time with another start: many rows of few files. Without duplicates."""
    seed: int = pydantic.Field(1, ge=0)
    """Of the toy world."""
    repeats: int = pydantic.Field(3, ge=1)
    """Turns of the compared runs; of align and adapt, steps with the towers in the loop."""
    compare: bool = True
    """False runs the command alone, for its peak memory."""
    overrides: tuple[str, ...] = ()
    """Settings of the measured command, as for its --set."""
    media: tuple[str, ...] = ()
    """Files of `aai bench decode`; empty = up to eight H.264 clips of 10 s at 720p, made once in OUT/clips."""
    model: ModelConfig = ModelConfig()
    train: TrainBenchConfig = TrainBenchConfig()
    serve: ServeBenchConfig = ServeBenchConfig()
    cluster: ClusterConfig = ClusterConfig()
    """The processes that are compared, on this machine."""

    def plan(self) -> Plan:
        """See VerbConfig."""
        where = storage.join(self.out, f"{self.name}.json")
        return Plan(inputs={"clips": str(self.clips)}, outputs={"figures": where}, resources=self.cluster.describe())

    @pydantic.model_validator(mode="after")
    def _one_machine(self) -> "BenchConfig":
        if self.cluster.address:
            raise ValueError("cluster.address must be empty: a bench compares processes of one machine")
        return self
