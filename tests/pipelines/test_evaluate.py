"""Evaluate's output folder: nobody else's files are ever touched."""

from pathlib import Path

import pytest
import torch

from aai import storage
from aai.bundle import BundleConfig, write_bundle
from aai.errors import UserError
from aai.foundation.identity import FoundationSpec
from pipelines import evaluate


@pytest.fixture
def config(tmp_path: Path) -> evaluate.EvaluateConfig:
    """Settings that are refused only once clips are read: there is a bundle, and a FeatureTable without rows."""
    config = BundleConfig(foundation=FoundationSpec(), encoder={})
    write_bundle(tmp_path / "bundle", config, {"weight": torch.zeros(2)}, None, {})
    storage.write_json(str(tmp_path / "features" / "manifest.json"), {"fingerprint": "0"})
    places = {"features": tmp_path / "features", "bundle": tmp_path / "bundle", "out": tmp_path / "out"}
    return evaluate.EvaluateConfig.parse({name: str(place) for name, place in places.items()})


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("foreign", ["thesis.tex", "pictures/holiday.png", "inputs/a.csv", "evaluate.json"])
def test_a_foreign_folder_survives_byte_for_byte(config: evaluate.EvaluateConfig, foreign: str) -> None:
    out = Path(config.out)
    (out / foreign).parent.mkdir(parents=True)
    (out / foreign).write_text("{}")
    before = content(out)
    with pytest.raises(UserError, match="nor written by evaluate"):
        evaluate.run(config)
    assert content(out) == before


def test_settings_are_checked_before_an_earlier_result_goes(config: evaluate.EvaluateConfig) -> None:
    out = Path(config.out)
    storage.write_json(str(out / "_started.json"), {"bundle": "another"})
    (out / "pictures").mkdir()
    (out / "pictures" / "sound-00000.parquet").write_bytes(b"earlier")
    before = content(out)
    with pytest.raises(UserError, match="holds no Parquet files"):
        evaluate.run(config)
    assert content(out) == before
