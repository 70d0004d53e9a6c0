"""Curated tables and their features, and the command that works on them."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from aai import schema, storage
from pipelines.data import DataConfig, run
from pipelines.featurize import FeaturizeConfig, FeaturizeWorker, list_shards
from pipelines.featurize import _manifest as feature_manifest
from tests.tiny import write_clip, write_clip_table, write_diffusion

ROWS, FILES = 8, 3


def write_curated(out: Path) -> Path:
    """Curated tables: 24 accepted clips of 2 pictures; rejects: a double of the first clip, and an unreadable file."""
    write_clip_table(out / "accepted", FILES, ROWS)
    first = storage.read_table(f"{out}/accepted").slice(0, 1).to_pylist()[0]
    double = {**first, "uri": "clips/double.mp4", "stage": "duplicate", "code": "EXACT_DUPLICATE", "transient": False}
    double |= {"message": f"same clip as {first['uri']} ({first['clip_id']}) of split train", "rms_db": -20.0}
    double["thumbnail"] = first["frames"][0]
    lost = {"uri": "clips/lost$x^2\n.mp4", "caption": "", "labels": [], "split": "train", "stage": "read"}
    lost |= {"code": "MISSING_FILE", "message": "no such file", "transient": False}
    rejects = pa.Table.from_pylist([double, lost], schema.REJECT_TABLE)
    storage.write_table(f"{out}/rejected/shard-00000.parquet", rejects)
    return out


@pytest.fixture(scope="session")
def curated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See write_curated; tests leave it as it is."""
    return write_curated(tmp_path_factory.mktemp("data") / "curated")


@pytest.fixture(scope="session")
def features(curated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The FeatureTable of the accepted clips, by random models, without Ray."""
    root = tmp_path_factory.mktemp("features")
    clip = write_clip(root / "clip")
    foundation = {"clip": str(clip), "diffusion": str(write_diffusion(root / "diffusion", clip))}
    settings = {"input": str(curated / "accepted"), "out": str(root / "features"), "foundation": foundation}
    config = FeaturizeConfig.parse(settings)
    shards = list_shards(config)
    worker = FeaturizeWorker(config.model_dump(mode="json"), config.content_digest())
    for shard in shards:
        worker(shard)
    manifest = feature_manifest(config, shards, config.content_digest(), "input", 1.0)
    storage.write_json(f"{config.out}/manifest.json", manifest.model_dump(mode="json"))
    return Path(config.out)


def data(action: str, **settings: Any) -> dict[str, Any]:
    return run(DataConfig.parse({"action": action, **{k: v and str(v) for k, v in settings.items()}}))
