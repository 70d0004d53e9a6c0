"""Measures a part of the system beside its alternatives and its floor, on the same files in one run.

    aai bench curate               # `aai curate` on Ray, the same work in a plain pool of processes, decoding alone
    aai bench featurize            # `aai featurize` likewise; the floor is the models alone
    aai bench decode               # the ways of decoding, beside other decoders
    aai bench vitl14               # CLIP ViT-L/14 of random weights, beside the device's matrix product

Prints a table and writes OUT/NAME.json: name, machine, inputs, figures, ratios. Compared runs take turns, so that
what else the machine does hits all of them; a figure is the median of its runs and a ratio the median over the turns.
"""

import argparse
import importlib
import logging
from collections.abc import Mapping
from typing import Any, Literal

import pydantic

from aai import storage
from aai.config import Config
from aai.errors import UserError
from pipelines.engine.machine import machine
from pipelines.settings import ClusterConfig, Plan, VerbConfig

log = logging.getLogger(__name__)

MODULES = {"decode": "decoding", "curate": "curation", "featurize": "featurization", "vitl14": "vitl14"}
"""Every bench and its module in pipelines.benches."""
NAMES = tuple(MODULES)
_UNITS = {
    "_clips_per_s": "clips/s",
    "_images_per_s": "images/s",
    "_per_s": "1/s",
    "_tflops": "TFLOP/s",
    "_ms": "ms",
    "_s": "s",
    "_gb": "GB",
    "_mb": "MB",
}


class ModelConfig(Config):
    """The CLIP of `aai bench vitl14`: random weights cost what trained ones cost."""

    size: Literal["vitl14", "tiny"] = "vitl14"
    """tiny: only to see that the bench works."""
    images: int = pydantic.Field(8192, ge=1)
    """Pictures of each measurement; without a GPU a few only."""
    batch_size: int = pydantic.Field(256, ge=1)
    """Pictures per forward pass."""
    picture_px: int = pydantic.Field(224, ge=16)
    """Edge of the pictures as curate keeps them."""
    threads: int = pydantic.Field(8, ge=1)
    """Threads that prepare pictures."""


class BenchConfig(VerbConfig):
    """Settings of `aai bench`."""

    name: Literal["decode", "curate", "featurize", "vitl14"]
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
    """Turns of the compared runs."""
    compare: bool = True
    """False runs the command alone, for its peak memory."""
    overrides: tuple[str, ...] = ()
    """Settings of the measured command, as for its --set."""
    media: tuple[str, ...] = ()
    """Files of `aai bench decode`; empty = up to eight H.264 clips of 10 s at 720p, made once in OUT/clips."""
    model: ModelConfig = ModelConfig()
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


CONFIG = BenchConfig


def add_flags(parser: argparse.ArgumentParser) -> dict[str, str]:
    """The positional NAME, and --clips."""
    parser.add_argument("name", nargs="?", metavar="NAME", choices=NAMES, help=f"{' | '.join(NAMES)} [curate]")
    parser.add_argument("--clips", type=int, metavar="N", help="clips of the toy world")
    return {"name": "name", "clips": "clips"}


def run(config: BenchConfig) -> dict[str, Any]:
    """Measures, prints the table, writes OUT/NAME.json; returns what it holds."""
    if config.out.startswith("s3://"):
        raise UserError("out", config.out, "is not a local folder", "measure on files of this machine")
    config = config.model_copy(update={"out": storage.absolute(config.out)})
    found = _measure(config)
    result = write_bench(config.out, config.name, found["inputs"], found["figures"], found["ratios"])
    for line in table(result):
        print(line)
    log.info("bench: %s -> %s", config.name, storage.join(config.out, f"{config.name}.json"))
    return result


def _measure(config: BenchConfig) -> dict[str, Any]:
    """inputs, figures and ratios of the chosen bench."""
    if config.name == "decode":
        decode = importlib.import_module("pipelines.benches.decoding")
        media = list(config.media) or decode.made_clips(storage.join(config.out, "clips"), config.clips, config.seed)
        inputs = {"media": media, "processes": config.cluster.num_workers, "repeats": config.repeats}
        return {"inputs": inputs, **decode.run_decode(media, config.cluster.num_workers, config.repeats)}
    module = importlib.import_module(f"pipelines.benches.{MODULES[config.name]}")
    return dict(module.measure(config))


def write_bench(
    out: str, name: str, inputs: Mapping[str, Any], figures: Mapping[str, Any], ratios: Mapping[str, float]
) -> dict[str, Any]:
    """Writes OUT/NAME.json, the form of every bench of the project, and returns it.

    figures: by name with the unit at its end (ray_clips_per_s); ratios: by "THIS/THAT" (ray/bare).
    """
    result = {"name": name, "machine": machine(), "inputs": dict(inputs)}
    result |= {"figures": dict(figures), "ratios": dict(ratios)}
    storage.write_json(storage.join(out, f"{name}.json"), result)
    return result


def table(result: Mapping[str, Any]) -> list[str]:
    """The lines of a bench's table: name, figure, unit, and how many times the alternative a rate is."""
    ratios = dict(result["ratios"])
    rows = []
    for key, value in result["figures"].items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        suffix = next((end for end in _UNITS if key.endswith(end)), "")
        name, beside = key.removesuffix(suffix), []
        if suffix.endswith("_per_s"):
            beside = [pair for pair in ratios if pair.split("/")[0] == name]
        text = ", ".join(f"{ratios.pop(pair):.3g} x {pair.split('/', 1)[1]}" for pair in beside)
        rows.append((name, f"{value:.4g}", _UNITS.get(suffix, ""), text))
    rows += [(pair, "", "", f"{value:.3g}") for pair, value in ratios.items()]
    rows = [("name", "figure", "unit", "ratio"), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:<{widths[2]}}  {d}".rstrip() for a, b, c, d in rows]
