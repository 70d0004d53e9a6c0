"""`aai bench featurize`: the command on Ray, its workers in a plain pool of processes, and the models alone."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from aai import storage
from pipelines import curate, featurize
from pipelines.__main__ import load_config
from pipelines.benches.curation import curate_config
from pipelines.benches.engines import Timing, summarise, take_turns, timed, toy_manifest
from pipelines.benches.options import BenchConfig, as_flags
from pipelines.engine.shards import Result, Shard, recorded, run_shards
from pipelines.featurize import FeaturizeConfig, FeaturizeWorker


class ModelWorker:
    """The floor: the frozen models on pictures that are ready in memory; nothing is read or written."""

    def __init__(self, config: dict[str, Any], num_frames: int) -> None:
        self.worker, self.num_frames = FeaturizeWorker(config, ""), num_frames
        edge_px, size = self.worker.clip.processor.crop_size["height"], self.worker.config.batch_size
        self.pixels = np.random.default_rng(0).integers(0, 256, (size, edge_px, edge_px, 3), np.uint8)
        self.picture = Image.new("RGB", (self.worker.edge_px, self.worker.edge_px))

    def __call__(self, shard: Shard) -> Result:
        """Computes the features of as many clips as the shard has rows."""
        count = shard.rows * self.num_frames
        for start in range(0, count, len(self.pixels)):
            self.worker.clip.embed(self.pixels[: count - start]).cpu()
        self.worker.latents([self.picture] * shard.rows)
        return Result(rows=shard.rows)


def accepted_clips(config: BenchConfig) -> str:
    """The ClipTable of the bench's toy world, made once for each setting of curate."""
    settings = curate_config(config.model_copy(update={"overrides": ()}), toy_manifest(config), config.out)
    out = f"{config.out}/clips-{settings.digest()}"
    with recorded(bare=True):
        curate.run(settings.model_copy(update={"out": out}))
    return f"{out}/accepted"


def measure(config: BenchConfig) -> dict[str, Any]:
    """inputs, figures, ratios. Raises RuntimeError when the engines' tables differ."""
    clips = accepted_clips(config)
    frames = storage.read_table(storage.list_files(clips, ".parquet")[0], ["frame_pts_s"])["frame_pts_s"]
    rows = storage.read_table(clips, ["clip_id"]).num_rows
    settings = {name: _config(config, clips, f"{config.out}/featurize/{name}") for name in ("ray", "bare")}

    def once(name: str) -> Timing:
        storage.remove(settings[name].out)
        return timed(lambda: featurize.run(settings[name]), rows, config.cluster, bare=name == "bare")

    runs: dict[str, Callable[[], Timing]] = {"ray": partial(once, "ray")}
    if config.compare:
        runs["bare"] = partial(once, "bare")
        models = partial(_models_alone, settings["bare"], len(frames[0]))
        runs["models"] = lambda: timed(models, rows, config.cluster, bare=True)
    figures, ratios = summarise(take_turns(runs, config.repeats))
    made = {name: storage.read_table(settings[name].out, ["clip_id", "latents"]) for name in runs.keys() & settings}
    if not all(table.equals(made["ray"]) for table in made.values()):
        raise RuntimeError("bench: the tables of both engines differ")
    inputs = {
        "clips_table": clips,
        "clips": rows,
        "frames": len(frames[0]),
        "foundation": settings["ray"].foundation.model_dump(),
        "device": "gpu" if config.cluster.gpus_per_worker else "cpu",
        "processes": config.cluster.num_workers,
        "repeats": config.repeats,
        "overrides": list(config.overrides),
    }
    return {"inputs": inputs, "figures": figures, "ratios": ratios}


def _config(config: BenchConfig, clips: str, out: str) -> FeaturizeConfig:
    settings = [f"run_dir={config.out}", f"input={clips}", f"out={out}", *config.overrides]
    loaded = load_config("featurize", as_flags(settings))[0].model_copy(update={"cluster": config.cluster})
    return FeaturizeConfig.model_validate(loaded.model_dump())


def _models_alone(config: FeaturizeConfig, num_frames: int) -> None:
    shards = [Shard(name=shard.name, rows=shard.rows) for shard in featurize.list_shards(config)]
    args = {"config": config.model_dump(mode="json"), "num_frames": num_frames}
    run_shards("models alone", shards, ModelWorker, args, config.cluster)
