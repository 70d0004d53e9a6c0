"""A bundle of random weights, and the tables of a dozen clips written by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from aai import storage
from aai.foundation.identity import FoundationSpec
from aai.media.waveform import encode_flac
from aai.png import encode_png
from aai.toy.draw import draw_scene
from aai.toy.grammar import Scene
from tests import tiny

OBJECTS = ("dog", "bell", "car")
SCENES = [Scene(OBJECTS[i % 3], ("rain", "night")[i % 2], "photo", i / 12, i) for i in range(12)]


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory, spec: FoundationSpec) -> str:
    """Folder of a bundle around the small foundation models."""
    return str(tiny.write_bundle_of(tmp_path_factory.mktemp("bundle") / "bundle", spec))


def sound(number: int) -> np.ndarray:
    """float32 [S]: noise of a loudness of its own, half a second."""
    noise = np.random.default_rng(number).standard_normal(8_000)
    return (0.01 * (1 + number) * noise).astype(np.float32)


def frame(number: int, time_s: float) -> bytes:
    """A picture of the clip's scene."""
    return encode_png(draw_scene(SCENES[number], 64, time_s=time_s))


def clip(number: int) -> dict[str, Any]:
    """What both tables know of a clip; its features are unit vectors turned by its number."""
    angle = np.linspace(0, 1, 32) * (1 + number)
    return {
        "clip_id": f"c{number:02d}",
        "content_hash": f"h{number:02d}",
        "caption": f"a photo of a {SCENES[number].obj} number {number}",
        "labels": SCENES[number].labels,
        "split": "train" if number % 4 == 3 else "test",
        "audio": encode_flac(sound(number), 16_000),
        "image_features": [*np.cos(angle), *np.sin(angle)],
        "text_features": list(np.sin(2 * angle)),
        "frames": [frame(number, 0.0), frame(number, 0.5), frame(number, 1.0)],
    }


def write_tables(folder: Path, numbers: list[list[int]]) -> tuple[str, str]:
    """(features, clips): in each a file for each list of clips; the pictures lie in reverse order."""
    clips = {number: clip(number) for part in numbers for number in part}
    for at, part in enumerate(numbers):
        rows = [{k: v for k, v in clips[number].items() if k != "frames"} for number in part]
        storage.write_table(f"{folder}/features/shard-{at:05d}.parquet", pa.Table.from_pylist(rows))
    order = sorted(clips, reverse=True)
    for at, part in enumerate((order[: len(order) // 2], order[len(order) // 2 :])):
        rows = [{k: clips[number][k] for k in ("clip_id", "frames")} for number in part]
        storage.write_table(f"{folder}/clips/shard-{at:05d}.parquet", pa.Table.from_pylist(rows))
    return f"{folder}/features", f"{folder}/clips"
