"""A curation of any size whose clips are measured already, and the driver that judges it, with what that costs.

    python -m tests.scale OUT            # prints a line of JSON: seconds and peak memory of each step

Nothing is decoded: the tables of `write_measured` hold drawn signals, and sound and pictures of a few bytes.
"""

import hashlib
import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from aai import storage
from aai.media.edited import PICTURE_PRINT_BYTES
from aai.media.measure import DECODER
from aai.schema import SIGNALS
from pipelines import curate
from pipelines.curation.curate_config import CurateConfig
from pipelines.curation.layout import MEASURED, PLAN, shard_file
from pipelines.curation.ledger import BATCH_TABLE
from pipelines.curation.measured import MEASURED_TABLE
from pipelines.engine.shards import recorded

HASH_BYTES = 32
WORDS = 145
"""Of the print of a sound of 10 s."""


def settings(out: str, **values: Any) -> CurateConfig:
    """Those of the measured command; its manifest lies in the output folder's neighbour."""
    base = {"manifest": f"{out}-manifest.parquet", "out": out, "max_reject_ratio": 1}
    return CurateConfig.parse({**base, "decode": {"frame_size_px": 64}, **values})


def write_measured(out: str, rows: int, rows_per_shard: int, row_group_size: int = 256) -> None:
    """A manifest of `rows` clips, and OUT as `aai curate` leaves it when all are measured and none is judged.

    Of a hundred clips about two could not be decoded, fourteen break a filter, and two are doubles of others.
    """
    rng = np.random.default_rng(rows)
    uris = [f"/data/clips/of-a-long-name/{number:08d}.mp4" for number in range(rows)]
    keys = [_key(uri) for uri in uris]
    labels = rng.integers(0, 300, rows)
    manifest = pa.table(
        {
            "uri": uris,
            "caption": [f"the sound of label {label} in the rain" for label in labels],
            "labels": pa.array([[f"label {label}"] for label in labels], pa.list_(pa.string())),
            "split": rng.choice(["train", "val", "test"], rows, p=[0.9, 0.05, 0.05]),
        }
    )
    storage.write_table(f"{out}-manifest.parquet", manifest, row_group_size=65_536)
    names = [f"shard-{number // rows_per_shard:05d}" for number in range(rows)]
    nothing = [None] * rows
    columns = {"key": keys, "uri": uris, "start_s": nothing, "end_s": nothing, "shard": names}
    storage.write_table(storage.join(out, PLAN, "batch-00000.parquet"), pa.table(columns, schema=BATCH_TABLE))
    doubles = rng.choice(rows, max(2, rows // 50) // 2 * 2, replace=False).reshape(2, -1)
    hashes = {name: rng.integers(0, 256, (rows, HASH_BYTES), np.uint8) for name in ("video_hash", "audio_hash")}
    for bits in hashes.values():
        bits[doubles[0]] = bits[doubles[1]]
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 80, 40)).save(picture, "JPEG")
    for start in range(0, rows, rows_per_shard):
        part = slice(start, min(start + rows_per_shard, rows))
        table = _measured(rng, keys[part], {name: bits[part] for name, bits in hashes.items()}, picture.getvalue())
        storage.write_table(shard_file(out, MEASURED, names[start]), table, row_group_size)
    storage.write_json(storage.join(out, "_started.json"), settings(out).fitted()[0].digests())


def _key(uri: str) -> str:
    """Of a clip without start and end whose file is not there."""
    return hashlib.sha256(json.dumps([uri, None, None, "missing"]).encode()).hexdigest()[:24]


def _measured(rng: np.random.Generator, keys: list[str], hashes: dict[str, np.ndarray], picture: bytes) -> pa.Table:
    """One shard's rows of MEASURED_TABLE."""
    size = len(keys)
    bad = rng.random(size) < 0.02
    columns: dict[str, Any] = {
        "key": keys,
        "clip_id": [hashlib.sha256(key.encode()).hexdigest()[:24] for key in keys],
        "content_hash": [hashlib.sha256(key.encode()).hexdigest() for key in keys],
        "audio": [b"flac"] * size,
        "frames": [[picture]] * size,
        "frame_pts_s": [[0.5]] * size,
        "stage": np.where(bad, "decode", None).tolist(),
        "code": np.where(bad, "UNREADABLE", None).tolist(),
        "message": np.where(bad, "the file breaks off", None).tolist(),
        "transient": [False if is_bad else None for is_bad in bad],
        "decoder": [DECODER] * size,
        "picture_print": [None if is_bad else rng.bytes(PICTURE_PRINT_BYTES) for is_bad in bad],
        "sound_print": [None if is_bad else rng.bytes(4 * WORDS) for is_bad in bad],
    }
    usual = {"duration_s": 10.0, "width": 64, "height": 64, "fps": 25.0, "source_sample_rate_hz": 44100, "channels": 2}
    usual |= {"av_gap_s": 0.01, "rms_db": -20.0, "silent_fraction": 0.1, "clipped_fraction": 0.0, "luma_mean": 100.0}
    usual |= {"luma_std": 40.0, "motion": 5.0}
    for name, value in usual.items():
        kind = next(field.type for field in SIGNALS if field.name == name)
        drawn = value * rng.lognormal(0, 0.05, size) if pa.types.is_floating(kind) else np.full(size, int(value))
        columns[name] = pa.array(drawn, kind, mask=bad)
    for name, odd in (("rms_db", -80.0), ("motion", 0.01)):
        values = columns[name].to_numpy(zero_copy_only=False).copy()
        values[rng.random(size) < 0.07] = odd
        columns[name] = pa.array(values, pa.float64(), mask=bad)
    for name, bits in hashes.items():
        columns[name] = pa.array([None if is_bad else row.tobytes() for row, is_bad in zip(bits, bad, strict=True)])
    return pa.table(columns, schema=MEASURED_TABLE)


def peak_mb() -> float:
    """The most memory that this process had resident so far; `getrusage` counts its parent's before it began, too."""
    (most,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(most.split()[1]) / 1024


def run_timed(out: str, bare: bool, **values: Any) -> dict[str, Any]:
    """`aai curate` on the tables, twice; seconds of planning, judging, the card, and of a run with nothing to do.

    bare: workers are a plain pool of processes, not Ray's. `workers` of the seconds is time in which they work.
    """
    steps: dict[str, float] = {}
    config = settings(out, **values)
    imported_mb = peak_mb()

    def timed(name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            begin_s, begin_cpu_s = time.monotonic(), time.process_time()
            try:
                return step(*args)
            finally:
                steps[f"{name}_s"] = round(time.monotonic() - begin_s, 1)
                steps[f"{name}_cpu_s"] = round(time.process_time() - begin_cpu_s, 1)
                steps[f"{name}_mb"] = round(peak_mb())

        return run

    names = {"measure_rows": "ledger", "_judge": "judge", "_write_card": "card"}
    kept = {name: getattr(curate, name) for name in names}
    for name, step in names.items():
        setattr(curate, name, timed(step, kept[name]))
    begin = time.monotonic()
    with recorded(bare) as stages:
        first = timed("first", curate.run)(config)
    second = timed("second", curate.run)(config)
    for name, step in kept.items():
        setattr(curate, name, step)
    assert second == first
    workers_s = sum(stage.returned_s - stage.called_s for stage in stages)
    return {
        "rows": first["rows_in"],
        "accepted": first["accepted"],
        "imported_mb": round(imported_mb),
        **steps,
        "workers_s": round(workers_s, 1),
        "all_s": round(time.monotonic() - begin, 1),
        "peak_mb": round(peak_mb()),
    }


if __name__ == "__main__":
    folder, *rest = sys.argv[1:]
    print(json.dumps(run_timed(str(Path(folder).resolve()), bare="bare" in rest)))
