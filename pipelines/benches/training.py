"""`aai bench align` and `aai bench adapt`: a training on Ray Train and without it, from features and from towers.

On the toy world's features, with the demo's settings: the same recipe, batches and `aai.fit` on Ray's workers and in
plain processes under DistributedDataParallel, in turns. The losses of both must be equal.
"""

import math
import os
import statistics
import time
from typing import Any

import torch

from aai import storage
from aai.bundle import BundleConfig, write_bundle
from aai.encoders.audio import AudioEncoder
from aai.features import FeatureManifest
from aai.fit import FitConfig
from pipelines import featurize
from pipelines.__main__ import load_config
from pipelines.adapt import AdaptRecipe
from pipelines.align import AlignRecipe
from pipelines.benches import bare
from pipelines.benches.background import background
from pipelines.benches.bare import BareRun
from pipelines.benches.featurization import accepted_clips
from pipelines.benches.options import BenchConfig, as_flags
from pipelines.benches.towers import measure_towers
from pipelines.benches.turns import GROUPS, Record, Turns, make_work
from pipelines.engine import cluster
from pipelines.engine.shards import recorded
from pipelines.settings import TrainClusterConfig
from pipelines.training import following, ray_train, stage
from pipelines.training.recipe import StageConfig, TrainRecipe

RECIPES: dict[str, type[TrainRecipe[Any]]] = {"align": AlignRecipe, "adapt": AdaptRecipe}
LOSSES_DIFFER = 1e-3
"""Relative; the same steps on one machine differ by less."""


def measure(config: BenchConfig) -> dict[str, Any]:
    """inputs, figures, ratios. Raises RuntimeError when the losses on Ray and without it differ."""
    features = made_features(config)
    settings = stage_config(config, features)
    records, spent = _both(config, settings)
    figures, ratios = summarise(records, settings.fit.batch_size, config.train.steps)
    figures |= {name: _short(value) for name, value in spent.items()}
    # In turns, Ray's other processes run during the turns of both: what they may cost where no core is free.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ratios["ray_other_processes/all_cores"] = _short(spent["ray_other_processes_cpus"] / cores)
    towers = measure_towers(config)
    inputs = {
        "features": features,
        "clips": FeatureManifest.read(features).rows["train"],
        "clips_per_step": settings.fit.batch_size,
        "steps_per_turn": config.train.steps,
        "turns": config.train.pairs,
        "processes": config.cluster.num_workers,
        "overrides": list(config.overrides),
    }
    return {
        "inputs": inputs | towers["inputs"],
        "figures": figures | towers["figures"],
        "ratios": ratios | towers["ratios"],
    }


def made_features(config: BenchConfig) -> str:
    """The FeatureTable of the bench's toy world, made once for each setting of curate and featurize."""
    clips = accepted_clips(config)
    settings: Any = load_config("featurize", as_flags([f"run_dir={config.out}", f"input={clips}"]))[0]
    out = f"{clips.removesuffix('/accepted')}-features-{settings.content_digest()}"
    with recorded(bare=True):
        featurize.run(settings.model_copy(update={"out": out, "cluster": config.cluster}))
    return out


def stage_config(config: BenchConfig, features: str) -> StageConfig:
    """The settings of the measured training: the demo's and `overrides`, for as many steps as the turns need."""
    places = [f"run_dir={config.out}", f"features={features}", f"out={config.out}/{config.name}"]
    if config.name == "adapt":
        places.append(f"bundle={_random_bundle(config, features)}")
    loaded: Any = load_config(config.name, as_flags([*places, *config.overrides]))[0]
    steps = _turns(config).all_steps
    fit = loaded.fit.model_copy(
        update={
            "steps": steps,
            "log_every": config.train.steps,
            "checkpoint_every": steps,
            "eval_every": 0,
            "best_metric": "",
            "patience": 0,
        }
    )
    machines = TrainClusterConfig(**config.cluster.model_dump(), max_failures=0)
    settings: StageConfig = loaded.model_copy(update={"fit": FitConfig.parse(fit.model_dump()), "cluster": machines})
    return settings


def _random_bundle(config: BenchConfig, features: str) -> str:
    """A bundle as the demo's align would write it, with random weights: they cost what trained ones cost."""
    loaded: Any = load_config("align", as_flags([f"run_dir={config.out}", f"features={features}"]))[0]
    encoder = AlignRecipe(loaded).prepare(FeatureManifest.read(features)).encoder
    torch.manual_seed(0)
    weights = AudioEncoder(encoder).state_dict()
    settings = BundleConfig(foundation=loaded.foundation, encoder=encoder.model_dump(mode="json"))
    return str(write_bundle(f"{features}-bundle", settings, weights, None, {}).folder)


def _turns(config: BenchConfig) -> Turns:
    return Turns(f"{config.out}/{config.name}/turns", config.train.steps, config.train.pairs)


def _both(config: BenchConfig, settings: StageConfig) -> tuple[dict[str, list[Record]], dict[str, float]]:
    """Trains in turns; returns each rank's record by group, and seconds and CPUs that were spent around the steps."""
    recipe_class, out, turns = RECIPES[config.name], f"{config.out}/{config.name}", _turns(config)
    storage.remove(out)
    recipe = recipe_class(settings)
    prepared = recipe.prepare(FeatureManifest.read(settings.features)).model_dump(mode="json")
    with recorded(bare=True):
        recipe.precompute()
    turns.begin()
    ranks = range(config.cluster.num_workers)
    work = {group: (stage.make_work, (recipe_class, prepared, len(ranks)), turns, group) for group in GROUPS}
    history = f"{out}/bare.json"
    began_s = {"bare": time.monotonic()}
    run = BareRun(make_work, work["bare"], settings.fit, config.cluster, history, turns.give_up)
    with background() as around, bare.started(run) as processes:
        while not all(turns.ready("bare", rank) for rank in ranks):  # so that each starts alone
            processes.join(0.05)
        began_s["ray"] = time.monotonic()
        try:
            where = settings.cluster, f"{out}/ray", config.name
            ray_train.train(config.name, make_work, work["ray"], *where, settings.fit)
        except BaseException as error:
            turns.give_up(f"{type(error).__name__}: {error}")
            raise
        finally:
            cluster.shutdown()
        while not processes.join():
            pass
    _check_losses(following.history(f"{out}/ray"), storage.read_json(history)["entries"])
    records = {group: [turns.record(group, rank) for rank in ranks] for group in GROUPS}
    spent = {f"{group}_start_s": max(r.ready_s for r in records[group]) - began_s[group] for group in GROUPS}
    all_records = [*records["ray"], *records["bare"]]
    span_s = max(r.ready_s for r in all_records), min(r.end_s for r in all_records)
    spent["ray_other_processes_cpus"] = around.cpus(*span_s, {r.pid for r in all_records})
    return records, spent


def _check_losses(ray: list[dict[str, Any]], plain: list[dict[str, Any]]) -> None:
    """Raises RuntimeError when the two histories are not of the same training."""
    losses = [[entry["loss"] for entry in entries if "loss" in entry] for entries in (ray, plain)]
    pairs = list(zip(*losses, strict=False))
    if len(losses[0]) != len(losses[1]) or not all(math.isclose(*pair, rel_tol=LOSSES_DIFFER) for pair in pairs):
        raise RuntimeError(f"bench: the losses on Ray and without it differ: {losses}")


def summarise(records: dict[str, list[Record]], clips: int, steps: int) -> tuple[dict[str, Any], dict[str, float]]:
    """(figures, ratios) of groups that took turns of so many steps of so many clips.

    A turn lasts as long as for its ranks on average. Figures are medians over the turns, a ratio the median over the
    pairs of turns: of times a step, and of the CPU time of all ranks.
    """
    figures: dict[str, Any] = {}
    step_s: dict[str, list[float]] = {}
    cpu_s: dict[str, list[float]] = {}
    for group, ranks in records.items():
        turns = list(zip(*(rank.turns for rank in ranks), strict=True))
        step_s[group] = [statistics.mean(part.seconds for part in turn) / steps for turn in turns]
        cpu_s[group] = [sum(part.cpu_s for part in turn) / steps for turn in turns]
        waited_s = sum(part.waited_s for turn in turns for part in turn)
        figures[f"{group}_clips_per_s"] = _short(clips / statistics.median(step_s[group]))
        figures[f"{group}_step_ms"] = _short(1e3 * statistics.median(step_s[group]))
        figures[f"{group}_step_cpu_ms"] = _short(1e3 * statistics.median(cpu_s[group]))
        figures[f"{group}_data_wait_share"] = _short(waited_s / (len(ranks) * steps * sum(step_s[group])))
        figures[f"{group}_each_step_ms"] = [round(1e3 * seconds, 1) for seconds in step_s[group]]
        peaks_gb = [rank.peak_gb for rank in ranks if rank.peak_gb is not None]
        if peaks_gb:
            figures[f"{group}_gpu_peak_gb"] = _short(max(peaks_gb))
    ratios = {}
    for name, times in (("step", step_s), ("step_cpu", cpu_s)):
        pairs = [a / b for a, b in zip(times["ray"], times["bare"], strict=True)]
        ratios[f"ray_{name}/bare_{name}"] = round(statistics.median(pairs), 4)
        figures[f"each_ray_{name}/bare_{name}"] = [round(pair, 3) for pair in pairs]
    return figures, ratios


def _short(value: float) -> float:
    return float(f"{value:.4g}")
