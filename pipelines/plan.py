"""Capacity: what N clips take on M nodes, and how many CPUs a GPU needs so that neither waits for the other.

    aai plan                                             # on the toy world
    aai plan --manifest FILE --clips 200000 --nodes 4 --set gpu_images_per_s=2500
    aai plan --manifest FOLDER --scale                   # also OUT/scale.md: up to 100 million clips

Curates and featurizes a small sample of the manifest in one process, without Ray, and calculates the rest; of the two
trainings, from the work of a step of the configs that are meant. Says what was measured, what was given and what is
assumed; writes OUT/plan.json. (What a single command would read, write and occupy, each tells with --dry-run.)
"""

import argparse
import logging
import shlex
from collections.abc import Sequence
from typing import Any

import pydantic

from aai import storage
from aai.config import Config
from aai.errors import UserError
from pipelines import world
from pipelines.benches.rates import Rates, measure_rates
from pipelines.benches.scaling import SIZES, page
from pipelines.benches.trainings import HEADER, Nodes, Training, foundation_note, plan_training
from pipelines.engine.machine import machine
from pipelines.manifests.row import ManifestRow
from pipelines.manifests.table import read_manifest
from pipelines.settings import Plan, VerbConfig
from pipelines.training.recipe import CPU_TFLOPS, GPU_TFLOPS
from pipelines.world import WorldConfig

log = logging.getLogger(__name__)

TOY_CLIPS = 64


class NodeShape(Config):
    """One kind of node."""

    cpus: int = pydantic.Field(ge=1)
    gpus: int = pydantic.Field(0, ge=0)


class CapacityConfig(VerbConfig):
    """Settings of `aai plan`."""

    manifest: str | None = None
    """Manifest to sample, as for `aai curate`; empty makes a small toy world."""
    out: str = "runs/plan"
    """Local folder of plan.json and of the sample's tables."""
    sample: int = pydantic.Field(64, ge=1)
    """Clips that are measured, evenly spaced in the manifest."""
    clips: int | None = pydantic.Field(None, ge=1)
    """Clips to plan for; empty = the manifest's."""
    nodes: int = pydantic.Field(1, ge=1)
    """Nodes to plan for."""
    shapes: dict[str, NodeShape] = pydantic.Field(
        {"cpu_rich": NodeShape(cpus=64, gpus=1), "cpu_poor": NodeShape(cpus=8, gpus=1)}, min_length=1
    )
    """Kinds of nodes to compare."""
    gpu_images_per_s: float | None = pydantic.Field(None, gt=0)
    """Pictures a GPU takes through CLIP (`aai bench vitl14`), where this machine has none or another."""
    gpu_latents_per_s: float | None = pydantic.Field(None, gt=0)
    """Pictures a GPU takes through the VAE."""
    efficiency: float = pydantic.Field(0.85, gt=0, le=1)
    """Share of the single process's rate that each of many keeps."""
    media_root: str | None = None
    """As for `aai curate`."""
    curate: tuple[str, ...] = ()
    """Settings of `aai curate`, as for its --set."""
    featurize: tuple[str, ...] = ()
    """Settings of `aai featurize`, as for its --set: [foundation.clip=..., batch_size=16]."""
    align: str = "configs/demo/align.yaml"
    """Config file of the align that is planned for."""
    adapt: str = "configs/demo/adapt.yaml"
    """Config file of the adapt that is planned for."""
    gpu_tflops: float = pydantic.Field(GPU_TFLOPS, gt=0)
    """TFLOP/s that a training step reaches on a GPU."""
    scale: bool = False
    """Also write OUT/scale.md: what 200 thousand, 2 million and 100 million clips take, and what gives way first."""
    measure_s: float = pydantic.Field(2.0, ge=0)
    """How long each model step is measured at least."""

    def plan(self) -> Plan:
        """See VerbConfig."""
        inputs = {"manifest": self.manifest or "a toy world", "sample": f"{self.sample} clips"}
        return Plan(
            inputs=inputs,
            outputs={"plan": storage.join(self.out, "plan.json")},
            resources={"this machine": "1 process"},
        )


CONFIG = CapacityConfig


def add_flags(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Short flags and the settings they stand for."""
    parser.add_argument("--manifest", metavar="FILE", help="CSV or Parquet manifest, or a folder of media files")
    parser.add_argument("--out", metavar="DIR", help="folder of plan.json")
    parser.add_argument("--clips", type=int, metavar="N", help="clips to plan for")
    parser.add_argument("--scale", action="store_true", help="also write OUT/scale.md, for far more clips")
    parser.add_argument("--nodes", type=int, metavar="M", help="nodes to plan for")
    return {"manifest": "manifest", "out": "out", "clips": "clips", "nodes": "nodes", "scale": "scale"}


def run(config: CapacityConfig) -> dict[str, Any]:
    """Measures the sample, calculates, prints the tables, writes plan.json; returns what it holds."""
    if config.out.startswith("s3://"):
        raise UserError("out", config.out, "is not a local folder", "measure on this machine")
    config = config.model_copy(update={"out": storage.absolute(config.out)})
    manifest = config.manifest or _toy_manifest(config)
    rows = read_manifest(manifest, config.media_root)
    rates = measure_rates(
        _spread(rows, config.sample), f"{config.out}/sample", config.curate, config.featurize, config.measure_s
    )
    clips = config.clips or len(rows)
    result = calculate(rates, config, clips)
    result = {"name": "plan", "machine": machine(), "inputs": {"manifest": manifest, "rows": len(rows)}, **result}
    planned = trainings(rates, config, clips)
    result["trainings"] = [training.rounded() for training in planned]
    storage.write_json(f"{config.out}/plan.json", result)
    if config.scale:
        write_scale(rates, config)
    for line in [*report(result), *trainings_report(planned, config)]:
        print(line)
    log.info("plan: -> %s/plan.json", config.out)
    return result


def write_scale(rates: Rates, config: CapacityConfig) -> None:
    """OUT/scale.md."""
    results = [{"machine": machine(), **calculate(rates, config, clips)} for clips in SIZES.values()]
    words = ["aai", "plan", "--scale", "--nodes", str(config.nodes)]
    words += ["--manifest", "FOLDER"] if config.manifest else []
    for name in ("gpu_images_per_s", "gpu_latents_per_s"):
        if getattr(config, name):
            words += ["--set", f"{name}={getattr(config, name):g}"]
    if config.curate:
        words += ["--set", f"curate=[{','.join(config.curate)}]"]
    storage.write_bytes(f"{config.out}/scale.md", page(results, shlex.join(words)).encode())
    log.info("plan: -> %s/scale.md", config.out)


def _toy_manifest(config: CapacityConfig) -> str:
    folder = f"{config.out}/world"
    world.run(WorldConfig(out=folder, clips=TOY_CLIPS))
    return f"{folder}/manifest.csv"


def _spread(rows: list[ManifestRow], count: int) -> list[ManifestRow]:
    """At most `count` rows, evenly spaced."""
    count = min(count, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


# ---------------------------------------------------------------- calculation


def gpu_rates(rates: Rates, config: CapacityConfig) -> tuple[float | None, float | None, list[str]]:
    """(pictures/s through CLIP, pictures/s through the VAE, where they are from) of one GPU; None = unknown."""
    measured = rates.device == "cuda"
    images = config.gpu_images_per_s or (rates.images_per_s if measured else None)
    latents = config.gpu_latents_per_s or (rates.latents_per_s if measured else None)
    notes = []
    if images is None:
        notes.append("no GPU here and no gpu_images_per_s given: the models are planned on the CPUs")
        return None, None, notes
    notes.append(f"GPU: {images:.4g} pictures/s through CLIP ({'given' if config.gpu_images_per_s else 'measured'})")
    if latents is None:
        latents = rates.latents_per_s * images / rates.images_per_s
        notes.append(f"GPU: {latents:.4g} pictures/s through the VAE (scaled from the CPU as CLIP's rate; a guess)")
    else:
        notes.append(
            f"GPU: {latents:.4g} pictures/s through the VAE ({'given' if config.gpu_latents_per_s else 'measured'})"
        )
    return images, latents, notes


def calculate(rates: Rates, config: CapacityConfig, clips: int) -> dict[str, Any]:
    """measured, assumed, needs, shapes, storage: everything of plan.json that follows from the rates."""
    images, latents, notes = gpu_rates(rates, config)
    share = rates.accepted_share
    gpu_s = rates.frames / images + 1 / latents if images and latents else None
    needs = {}
    if gpu_s:
        needs = {
            "cpus_per_gpu_featurize": rates.prepare_cpu_s / gpu_s,
            "cpus_per_gpu_with_curate": (rates.curate_cpu_s / share + rates.prepare_cpu_s) / gpu_s,
        }
    shapes = {name: _shape(rates, config, clips, shape, gpu_s) for name, shape in config.shapes.items()}
    stored = {
        "input": rates.read_bytes * clips,
        "accepted and rejected": rates.curated_bytes * clips,
        "kept for later runs": rates.working_bytes * clips,
        "features": rates.feature_bytes * clips * share,
    }
    assumed = [
        *notes,
        f"each of many processes keeps {config.efficiency:.0%} of the single one's rate",
        f"a CPU of the nodes is as fast as one here; {share:.1%} of the clips are accepted, as in the sample",
        "storage and network are fast enough for the MB/s named",
    ]
    return {
        "clips": clips,
        "nodes": config.nodes,
        "measured": rates.as_dict(),
        "assumed": assumed,
        "needs": {key: round(value, 2) for key, value in needs.items()},
        "shapes": shapes,
        "storage_gb": {name: float(f"{value / 1e9:.4g}") for name, value in stored.items()},
    }


def _shape(rates: Rates, config: CapacityConfig, clips: int, shape: NodeShape, gpu_s: float | None) -> dict[str, Any]:
    """Hours on nodes of one shape: curate, then featurize; and both side by side, featurize fed as clips come."""
    cpus, gpus = config.nodes * shape.cpus * config.efficiency, config.nodes * shape.gpus * config.efficiency
    accepted = clips * rates.accepted_share
    curate_s = clips * rates.curate_cpu_s / cpus
    prepare_s = accepted * rates.prepare_cpu_s / cpus
    if gpus and gpu_s:
        models_s, on_gpu = accepted * gpu_s / gpus, True
        features_s, both_s = max(prepare_s, models_s), max(curate_s + prepare_s, models_s)
    elif rates.device == "cpu":
        models_s, on_gpu = accepted * (rates.frames / rates.images_per_s + 1 / rates.latents_per_s) / cpus, False
        features_s, both_s = prepare_s + models_s, curate_s + prepare_s + models_s
    else:
        raise UserError("shapes", shape, "has no GPU, and the models were measured on one", "give it gpus")
    return {
        **shape.model_dump(),
        "curate_h": curate_s / 3600,
        "featurize_h": features_s / 3600,
        "featurize_waits_for": "GPU" if on_gpu and models_s >= prepare_s else "CPU",
        "one_after_the_other_h": (curate_s + features_s) / 3600,
        "side_by_side_h": both_s / 3600,
        "gpu_busy_featurize": models_s / features_s if on_gpu else 0.0,
        "gpu_busy_side_by_side": models_s / both_s if on_gpu else 0.0,
        "read_mb_per_s_per_node": clips * rates.read_bytes / curate_s / config.nodes / 1e6,
    }


def trainings(rates: Rates, config: CapacityConfig, clips: int) -> list[Training]:
    """Both trainings on each shape."""
    found, features = [], f"{config.out}/sample/features"
    note = foundation_note(config.align, features)
    for stage, file in (("align", config.align), ("adapt", config.adapt)):
        for name, shape in config.shapes.items():
            nodes = Nodes(name, config.nodes * shape.cpus, config.nodes * shape.gpus, config.gpu_tflops)
            found.append(plan_training(stage, file, features, clips * rates.accepted_share, nodes, note))
    return found


# ---------------------------------------------------------------- the page


def report(result: dict[str, Any]) -> list[str]:
    """The printed plan."""
    known, rates = result["machine"], result["measured"]
    lines = [
        f"measured here ({known['cores']} x {known['cpu']}, {known['gpu'] or 'no GPU'}) on {rates['sample']} clips:",
        f"  curate              {1 / rates['curate_cpu_s']:8.4g} clips/s per CPU",
        f"  prepare pictures    {1 / rates['prepare_cpu_s']:8.4g} clips/s per CPU ({rates['frames']} pictures each)",
        f"  CLIP                {rates['images_per_s']:8.4g} pictures/s on one {rates['device']}",
        f"  VAE                 {rates['latents_per_s']:8.4g} pictures/s on one {rates['device']}",
        "chosen for these clips and this foundation:",
        *(f"  {name:<24}{choice}" for name, choice in rates["chosen"].items()),
        "assumed:",
        *(f"  {note}" for note in result["assumed"]),
    ]
    if needs := result["needs"]:
        lines += [
            "CPUs a GPU needs so that neither waits:",
            f"  featurize alone     {needs['cpus_per_gpu_featurize']:8.4g}",
            f"  curate beside it    {needs['cpus_per_gpu_with_curate']:8.4g}",
        ]
    lines += [
        f"{result['clips']} clips on {result['nodes']} node(s), hours:",
        f"  {'shape':<14} {'CPUs':>5} {'GPUs':>5} {'curate':>9} {'featurize':>10} {'waits for':>10} "
        f"{'in turn':>9} {'together':>9} {'GPU busy':>9} {'read MB/s':>10}",
    ]
    lines += [
        f"  {name:<14} {s['cpus']:>5} {s['gpus']:>5} {s['curate_h']:>9.3g} {s['featurize_h']:>10.3g} "
        f"{s['featurize_waits_for']:>10} {s['one_after_the_other_h']:>9.3g} {s['side_by_side_h']:>9.3g} "
        f"{s['gpu_busy_side_by_side']:>9.0%} {s['read_mb_per_s_per_node']:>10.4g}"
        for name, s in result["shapes"].items()
    ]
    lines += ["storage, GB:", *(f"  {name:<20}{size:>9.4g}" for name, size in result["storage_gb"].items())]
    return lines


def trainings_report(planned: Sequence[Training], config: CapacityConfig) -> list[str]:
    """The printed table of the trainings."""
    at = f"a step's matrix products at {config.gpu_tflops:g} TFLOP/s on a GPU, at {CPU_TFLOPS:g} on a CPU"
    rows = [training.line() for training in planned]
    return [f"trainings, by {config.align} and {config.adapt}, {at}:", HEADER, *rows]
