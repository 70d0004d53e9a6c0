"""A hand-made FeatureTable, small enough to check every row: each feature of a row is its number."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from aai import schema, storage
from aai.features import METADATA_KEY, FeatureManifest
from aai.media.waveform import encode_flac

SAMPLES = 400


def row(number: int, split: str) -> dict[str, Any]:
    """Every feature of a row is its number, so that a row is known by its features."""
    audio = np.full(SAMPLES // 2 if number % 2 else SAMPLES, number / 1024, np.float32)
    return {
        "clip_id": f"c{number}",
        "content_hash": f"h{number}",
        "uri": f"{number}.mp4",
        "caption": f"word {number % 3}",
        "labels": ["dog"],
        "split": split,
        "duration_s": 1.0,
        "audio": encode_flac(audio, 16_000),
        "image_features": [float(number)] * 6,
        "text_features": [float(number)] * 3,
        "latents": [float(number)] * 8,
    }


def write(folder: Path, shards: int = 3, rows: int = 10, digest: str = "d", bare_every: int = 0) -> str:
    """Splits alternate train, train, val; two row groups a file. bare_every: clips of which one has no picture."""
    number = itertools.count()
    out = schema.feature_table(2, 3, 1, 3, 8, bare_every > 0).with_metadata({METADATA_KEY: digest.encode()})
    for shard in range(shards):
        data = [row(n := next(number), "val" if n % 3 == 2 else "train") for _ in range(rows)]
        for clip in data if bare_every else []:
            bare = int(clip["clip_id"][1:]) % bare_every == 0
            clip[schema.PICTURE] = schema.NO_PICTURE if bare else schema.VIDEO_PICTURES
        storage.write_table(f"{folder}/shard-{shard:05d}.parquet", pa.Table.from_pylist(data, schema=out), 5)
    manifest = {
        "settings_digest": digest,
        "foundation": {},
        "processor": "P",
        "dtype": "float32",
        "sample_rate_hz": 16_000,
        "prompts": ["{caption}"],
        "num_frames": 2,
        "image_dim": 3,
        "num_texts": 1,
        "text_dim": 3,
        "latent_shape": [2, 2, 2],
        "latent_frame": 1,
        "rows": {},
        "input_fingerprint": "i",
        "fingerprint": "f",
        "seconds": 1.0,
    }
    storage.write_json(f"{folder}/manifest.json", FeatureManifest.parse(manifest).model_dump(mode="json"))
    return str(folder)


def numbers(batch: dict[str, Any]) -> list[int]:
    return batch["image_features"][:, 0, 0].int().tolist()
