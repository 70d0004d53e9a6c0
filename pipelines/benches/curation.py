"""`aai bench curate`: the command on Ray, its workers in a plain pool of processes, and decoding alone."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from aai import storage
from aai.media.decode import ClipError, DecodeConfig, decode_clip
from pipelines import curate
from pipelines.__main__ import load_config
from pipelines.benches.engines import Timing, summarise, take_turns, timed, toy_manifest
from pipelines.benches.options import BenchConfig, as_flags
from pipelines.curate import CurateConfig
from pipelines.engine.shards import Result, Shard, run_shards
from pipelines.manifests.row import ManifestRow
from pipelines.manifests.table import read_manifest


@dataclass(frozen=True, kw_only=True)
class DecodeShard(Shard):
    """Rows of the manifest."""

    clips: list[ManifestRow]


class DecodeWorker:
    """The floor: reads and decodes the clips of a shard, and keeps nothing."""

    def __init__(self, decode: dict[str, Any]) -> None:
        self.cfg = DecodeConfig.parse(decode)

    def __call__(self, shard: DecodeShard) -> Result:
        """Decodes the shard's clips."""
        rejected = 0
        for row in shard.clips:
            try:
                decode_clip(storage.read_bytes(row.uri), row.start_s, row.end_s, self.cfg)
            except ClipError:
                rejected += 1
        return Result(rows=shard.rows, rejected=rejected)


def curate_config(config: BenchConfig, manifest: str, out: str) -> CurateConfig:
    """The settings of the measured command."""
    settings = [f"run_dir={config.out}", f"manifest={manifest}", f"out={out}", *config.overrides]
    if config.windows > 1:  # windows of one file resemble each other: all but one would be dropped
        settings += ["duplicates.enabled=false"]
    loaded = load_config("curate", as_flags(settings))[0].model_copy(update={"cluster": config.cluster})
    return CurateConfig.model_validate(loaded.model_dump())


def measure(config: BenchConfig) -> dict[str, Any]:
    """inputs, figures, ratios. Raises RuntimeError when the engines' tables differ."""
    manifest = toy_manifest(config)
    settings = {name: curate_config(config, manifest, f"{config.out}/curate/{name}") for name in ("ray", "bare")}
    rows = read_manifest(manifest, None, settings["ray"].default_split)

    def once(name: str) -> Timing:
        storage.remove(settings[name].out)
        return timed(lambda: curate.run(settings[name]), len(rows), config.cluster, bare=name == "bare")

    runs: dict[str, Callable[[], Timing]] = {"ray": partial(once, "ray")}
    if config.compare:
        runs["bare"] = partial(once, "bare")
        decode = partial(_decode_alone, rows, settings["bare"])
        runs["decode"] = lambda: timed(decode, len(rows), config.cluster, bare=True)
    figures, ratios = summarise(take_turns(runs, config.repeats))
    accepted = {
        name: storage.read_table(f"{settings[name].out}/accepted", ["clip_id"]) for name in runs.keys() & settings
    }
    if len({tuple(table["clip_id"].to_pylist()) for table in accepted.values()}) != 1:
        raise RuntimeError("bench: the tables of both engines differ")
    figures |= {"accepted": accepted["ray"].num_rows}
    inputs = {
        "manifest": manifest,
        "clips": len(rows),
        "processes": config.cluster.num_workers,
        "repeats": config.repeats,
        "rows_per_shard": settings["ray"].rows_per_shard,
        "overrides": list(config.overrides),
    }
    return {"inputs": inputs, "figures": figures, "ratios": ratios}


def _decode_alone(rows: list[ManifestRow], config: CurateConfig) -> None:
    size = config.rows_per_shard
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    shards = [DecodeShard(name=str(number), rows=len(part), clips=part) for number, part in enumerate(parts)]
    args = {"decode": config.fitted()[0].decode.model_dump()}
    run_shards("decode alone", shards, DecodeWorker, args, config.cluster)
