"""Measures a part of the system beside its alternatives and its floor, on the same files in one run.

    aai bench curate               # `aai curate` on Ray, the same work in a plain pool of processes, decoding alone
    aai bench featurize            # `aai featurize` likewise; the floor is the models alone
    aai bench decode               # the ways of decoding, beside other decoders
    aai bench align                # a step of `aai align` on Ray Train, without Ray, from towers in place of features
    aai bench adapt                # `aai adapt` likewise
    aai bench inject               # what the sound adds to a generation with Stable Diffusion 1.5 of random weights
    aai bench vitl14               # CLIP ViT-L/14 of random weights, beside the device's matrix product
    aai bench serve                # the service, with batches and without, beside the painter alone

Prints a table and writes OUT/NAME.json: name, machine, inputs, figures, ratios. Compared runs take turns, so that
what else the machine does hits all of them; a figure is the median of its runs and a ratio the median over the turns.
"""

import argparse
import importlib
import logging
from collections.abc import Mapping
from typing import Any

from aai import storage
from aai.errors import UserError
from pipelines.benches.options import BenchConfig
from pipelines.engine.machine import machine

log = logging.getLogger(__name__)

MODULES = {
    "decode": "decoding",
    "curate": "curation",
    "featurize": "featurization",
    "align": "training",
    "adapt": "training",
    "vitl14": "vitl14",
    "inject": "injection",
    "serve": "serving",
}
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
    for line in [*found.get("lines", ()), *table(result)]:
        print(line)
    log.info("bench: %s -> %s", config.name, storage.join(config.out, f"{config.name}.json"))
    return result


def _measure(config: BenchConfig) -> dict[str, Any]:
    """inputs, figures and ratios of the chosen bench; maybe lines of a table of its own."""
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
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:<{widths[2]}}  {d}".rstrip() for a, b, c, d in rows]
