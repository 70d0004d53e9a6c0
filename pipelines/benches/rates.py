"""What a sample of clips costs on this machine: the measured side of `aai plan`."""

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from aai import storage
from aai.errors import UserError
from pipelines import curate, featurize
from pipelines.__main__ import load_config
from pipelines.align import AlignConfig
from pipelines.benches.options import as_flags
from pipelines.engine.shards import recorded
from pipelines.featurize import FeaturizeWorker
from pipelines.manifests.row import ManifestRow
from pipelines.settings import Choice, ClusterConfig

SHARDS = 4
"""Of the sample."""
_MANIFEST_COLUMNS = ("uri", "start_s", "end_s", "caption", "labels", "image_uri")  # splits cost the same


@dataclass(frozen=True)
class Rates:
    """Costs of a clip, measured with one process of one thread. A clip is a row of the manifest, accepted or not."""

    sample: int
    accepted_share: float
    frames: int
    """Pictures of a clip that CLIP sees; the VAE sees one."""
    curate_cpu_s: float
    """Seconds of a CPU per clip: reading, decoding, measuring, judging, writing."""
    prepare_cpu_s: float
    """Seconds of a CPU per accepted clip that featurize takes around the models."""
    images_per_s: float
    latents_per_s: float
    """Of the models on `device`."""
    device: str
    read_bytes: float
    """Of a clip's file, or of its whole file when it is a part of one."""
    curated_bytes: float
    working_bytes: float
    """What curate keeps beside the two tables for a later run."""
    feature_bytes: float
    """Per accepted clip."""
    chosen: dict[str, str]
    """What settings that are `auto` stand for with these clips and this foundation, and why."""

    def as_dict(self) -> dict[str, Any]:
        """For plan.json, rounded."""
        return {key: float(f"{v:.4g}") if isinstance(v, float) else v for key, v in asdict(self).items()}


def measure_rates(
    rows: Sequence[ManifestRow], out: str, curate_sets: Sequence[str], featurize_sets: Sequence[str], measure_s: float
) -> Rates:
    """Curates and featurizes the rows under `out` and times the steps. Raises UserError when none is accepted."""
    storage.remove(out)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cluster = ClusterConfig(num_workers=1, gpus_per_worker=int(device == "cuda"))
    settings = _loaded("featurize", [f"input={out}/curated/accepted", f"out={out}/features", *featurize_sets], cluster)
    # The sample is curated for the foundation that it is then featurized with.
    known = [f"foundation.{name}={value}" for name, value in settings.foundation if value is not None]
    curate_s, chosen = _curate(rows, out, [*known, *curate_sets])
    curated, accepted = f"{out}/curated", f"{out}/curated/accepted"
    clips = storage.read_table(accepted, ["clip_id", "frames"])
    if not clips.num_rows:
        raise UserError(
            "manifest", out, "no clip of the sample was accepted", f"read the reasons in {curated}/rejected"
        )
    with recorded(bare=True):
        featurize.run(settings)
    _, chosen["encoder.clip_s"] = AlignConfig(features=settings.out, out=f"{out}/align").fitted()
    worker = FeaturizeWorker(settings.model_dump(mode="json"), "")
    encoded: list[bytes] = []
    for frames in clips["frames"].to_pylist():
        encoded += frames
    if not encoded:
        rule = "no clip of the sample has a picture, whose cost would be most of the work"
        raise UserError("manifest", out, rule, "give one that names videos or stills, too")
    pixels = worker.clip.framed(encoded[: worker.clip.batches.size])
    picture = [Image.open(io.BytesIO(encoded[0])).convert("RGB")] * min(32, clips.num_rows)
    prepare_s = _prepare_s(worker, accepted, encoded, f"{out}/features", measure_s) / clips.num_rows
    tables = [*storage.list_files(accepted), *storage.list_files(f"{curated}/rejected")]
    return Rates(
        sample=len(rows),
        accepted_share=clips.num_rows / len(rows),
        frames=-(-len(encoded) // clips.num_rows),  # those that have none take no time here
        curate_cpu_s=curate_s,
        prepare_cpu_s=prepare_s,
        images_per_s=len(pixels) / _per_call_s(lambda: worker.clip.embed(pixels).cpu(), measure_s),
        latents_per_s=len(picture) / _per_call_s(lambda: worker.latents(picture), measure_s),
        device=device,
        read_bytes=float(np.mean([_size(row.uri) for row in rows])),
        curated_bytes=sum(map(_size, tables)) / len(rows),
        working_bytes=(sum(map(_size, storage.list_files(curated))) - sum(map(_size, tables))) / len(rows),
        feature_bytes=sum(map(_size, storage.list_files(f"{out}/features", ".parquet"))) / clips.num_rows,
        chosen={name: str(choice) for name, choice in chosen.items()},
    )


def _loaded(verb: str, sets: Sequence[str], cluster: ClusterConfig) -> Any:
    """A verb's demo settings with others."""
    config, _ = load_config(verb, as_flags(sets))
    return config.model_copy(update={"cluster": cluster})


def _curate(rows: Sequence[ManifestRow], out: str, sets: Sequence[str]) -> tuple[float, dict[str, Choice]]:
    """Curates the sample in one process; returns seconds per clip, and what was chosen for the foundation.

    The seconds are without each stage's first shard if it has more.
    """
    manifest = f"{out}/sample.parquet"
    columns = {}
    for name in _MANIFEST_COLUMNS:
        columns[name] = [getattr(row, name) for row in rows]
    storage.write_table(manifest, pa.table(columns))
    parts = f"rows_per_shard={-(-len(rows) // SHARDS)}"
    fixed = [f"manifest={manifest}", "media_root=null", f"out={out}/curated", "max_reject_ratio=1", parts]
    with recorded(bare=True) as stages:
        result = curate.run(_loaded("curate", [*sets, *fixed], ClusterConfig(num_workers=1)))
    seconds = 0.0
    for stage in stages:
        calls = sorted(stage.calls, key=lambda call: call[2])
        calls = calls[1:] or calls  # the first one warms up
        seconds += sum(end - start for _, _, start, end in calls) / sum(count for _, count, _, _ in calls)
    return seconds, {name: Choice.parse(choice) for name, choice in result["chosen"].items()}


def _prepare_s(worker: FeaturizeWorker, accepted: str, encoded: list[bytes], features: str, measure_s: float) -> float:
    """Seconds of reading the clips, decoding and framing their pictures, and writing the features."""
    made = storage.read_table(features)

    def around_the_models() -> None:
        storage.read_table(accepted)
        for start in range(0, len(encoded), worker.clip.batches.size):
            worker.clip.framed(encoded[start : start + worker.clip.batches.size])
        storage.write_table(f"{features}.again", made)

    seconds = _per_call_s(around_the_models, measure_s)
    storage.remove(f"{features}.again")
    return seconds


def _per_call_s(work: Callable[[], Any], measure_s: float) -> float:
    """Mean seconds of a call, over at least `measure_s`, after one to warm up."""
    work()
    start, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - start < measure_s:
        work()
        calls += 1
    return (time.perf_counter() - start) / calls


def _size(uri: str) -> int:
    fs, path = storage.filesystem(uri)
    try:
        return int(fs.size(path))
    except (FileNotFoundError, ValueError):  # a member of an archive, or a file that is gone: curate tells
        return 0
