"""Folders of frozen models: whole, cut off, changed, absent."""

import json
import os
import shutil
from pathlib import Path

import pytest

from aai import storage
from aai.foundation.identity import FoundationSpec, identity
from pipelines.checkup.finding import Finding
from pipelines.checkup.weights import broken_files, check_weights


@pytest.fixture
def mine(spec: FoundationSpec, tmp_path: Path) -> FoundationSpec:
    """A copy of the small models that a test may spoil."""
    shutil.copytree(spec.clip, tmp_path / "clip")
    shutil.copytree(spec.diffusion, tmp_path / "diffusion")
    return FoundationSpec(clip=str(tmp_path / "clip"), diffusion=str(tmp_path / "diffusion"))


def wrong(rows: list[Finding]) -> list[str]:
    """What is not ok, by name."""
    return [row.check for row in rows if row.state != "ok"]


def featurized(spec: FoundationSpec, run_dir: Path) -> str:
    """A run whose features record these models."""
    storage.write_json(str(run_dir / "features" / "manifest.json"), {"foundation": identity(spec)})
    return str(run_dir)


def test_whole_models_are_fine(mine: FoundationSpec, tmp_path: Path) -> None:
    assert wrong(check_weights(FoundationSpec(), ())) == []
    run = featurized(mine, tmp_path / "run")
    rows = check_weights(mine, (run, str(tmp_path / "no-features-yet")))
    assert wrong(rows) == []
    assert [row.check for row in rows] == ["weights.hash"] * 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"foundation": 3}'])
def test_a_manifest_that_is_none_is_told(mine: FoundationSpec, tmp_path: Path, content: str) -> None:
    run = Path(featurized(mine, tmp_path / "run"))
    (run / "features" / "manifest.json").write_text(content)
    assert wrong(check_weights(mine, (str(run),))) == ["features.manifest"]


def test_a_model_that_is_cut_off_or_changed_is_seen(mine: FoundationSpec, tmp_path: Path) -> None:
    run = featurized(mine, tmp_path / "run")
    weights = next(Path(mine.clip).glob("*.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # one bit
    (row,) = [row for row in check_weights(mine, (run,)) if row.state != "ok"]
    assert row.check == "weights.hash"
    assert "restore the folder" in row.remedy
    weights.write_bytes(whole[: len(whole) // 2])
    assert wrong(check_weights(mine, (run,))) == ["weights.file"]
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")  # never fetched
    assert "header" in broken_files(Path(mine.clip))[weights.name]
    weights.write_bytes(whole)
    config = Path(mine.clip) / "config.json"
    config.write_text(config.read_text()[:-5])
    assert list(broken_files(Path(mine.clip))) == ["config.json"]


def test_absent_models_are_seen(mine: FoundationSpec, tmp_path: Path) -> None:
    absent = mine.model_copy(update={"clip": str(tmp_path / "nowhere")})
    (row,) = [row for row in check_weights(absent, ()) if row.state != "ok"]
    assert row.check == "weights.folder"
    assert "foundation.clip" in row.remedy
    (tmp_path / "empty").mkdir()
    assert wrong(check_weights(mine.model_copy(update={"clip": str(tmp_path / "empty")}), ())) == ["weights.file"]
    unpinned = mine.model_copy(update={"clip": "openai/clip-vit-large-patch14"})
    assert wrong(check_weights(unpinned, ())) == ["weights.folder"]


def test_hub_ids_that_are_not_there_are_seen_without_a_network(mine: FoundationSpec) -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    pinned = mine.model_copy(update={"clip": "openai/clip-nowhere", "clip_revision": "0" * 40})
    (row,) = [row for row in check_weights(pinned, ()) if row.state != "ok"]
    assert row.check == "weights.hub"
    assert "put the folder on every node" in row.remedy


def test_a_header_without_tensors_is_told_by_its_size(tmp_path: Path) -> None:
    header = json.dumps({"__metadata__": {"a": "b"}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert broken_files(tmp_path) == {}
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"x")
    assert "its header says" in broken_files(tmp_path)["a.safetensors"]
