"""Every shipped config loads and plans without starting anything."""

import re
from pathlib import Path

import pytest

from aai.foundation.identity import FoundationSpec
from pipelines.__main__ import CONFIGS, VERBS, main, module_of

REAL = sorted(path for path in CONFIGS.glob("*/*.yaml") if path.parent.name != "demo")
CLUSTER_VERBS = [
    "curate", "featurize", "align", "adapt", "tune", "evaluate", "promote", "generate", "edit", "stylize", "serve",
    "doctor", "run",
]  # fmt: skip
COMMIT = re.compile(r"[0-9a-f]{40}")


def label(path: Path) -> str:
    """COMMAND/FILE."""
    return f"{path.parent.name}/{path.name}"


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of the bucket, with one VGGSound row: `aai curate --dry-run` counts the manifest."""
    videos = tmp_path / "data" / "vggsound"
    videos.mkdir(parents=True)
    (videos.parent / "vggsound.csv").write_text("abcdefghijk,30,dog barking,train\n")
    (videos / "abcdefghijk_000030.mp4").touch()
    monkeypatch.setenv("AAI_BUCKET", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files_in(folder: Path) -> set[str]:
    """Names of everything in a folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_every_stage_has_a_config_for_real_weights() -> None:
    assert sorted({path.parent.name for path in REAL}) == sorted(CLUSTER_VERBS)


def test_files_are_named_by_data_model_and_hardware() -> None:
    assert [label(path) for path in REAL if not re.fullmatch(r"\w+_\w+_(cpu|gpu)\d+", path.stem)] == []
    assert [label(path) for path in REAL if path.parent.name not in VERBS] == []


@pytest.mark.parametrize("path", REAL, ids=label)
def test_config_loads_and_plans_and_starts_nothing(
    path: Path, bucket: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_in(bucket)
    code = main([path.parent.name, "--config", str(path), "--dry-run"])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert err == ""
    assert [part for part in ("inputs:", "outputs:", "resources:") if part not in out] == []
    assert files_in(bucket) == before


@pytest.mark.parametrize("path", REAL, ids=label)
def test_paths_follow_the_bucket(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AAI_BUCKET", "s3://elsewhere/x")
    config = module_of(path.parent.name).CONFIG.load(path)
    assert config.run_dir == "s3://elsewhere/x/runs/vggsound_vitl14"
    monkeypatch.delenv("AAI_BUCKET")
    assert module_of(path.parent.name).CONFIG.load(path).run_dir.startswith("s3://my-bucket/aai/")


@pytest.mark.parametrize("path", REAL, ids=label)
def test_hub_ids_are_pinned_to_commits(path: Path) -> None:
    config = module_of(path.parent.name).CONFIG.load(path)
    foundation = getattr(config, "foundation", None)
    if isinstance(foundation, FoundationSpec):
        assert COMMIT.fullmatch(foundation.clip_revision or "")
        assert COMMIT.fullmatch(foundation.diffusion_revision or "")
    encoder = getattr(config, "encoder", None)
    if encoder is not None and encoder.pretrained:
        assert COMMIT.fullmatch(encoder.revision or "")


def test_stages_hand_on_the_same_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one stage writes, the next one reads; featurize and align stand on the same foundation."""
    monkeypatch.setenv("AAI_BUCKET", "s3://b")
    configs = {path.parent.name: module_of(path.parent.name).CONFIG.load(path) for path in REAL}
    curate, featurize, align = configs["curate"], configs["featurize"], configs["align"]
    adapt, evaluate = configs["adapt"], configs["evaluate"]
    assert featurize.input == evaluate.clips == f"{curate.out}/accepted"
    assert align.features == adapt.features == evaluate.features == featurize.out
    assert adapt.bundle == f"{align.out}/bundle"
    assert evaluate.bundle == f"{adapt.out}/bundle"
    assert align.foundation == featurize.foundation
    assert len({config.run_dir for config in configs.values()}) == 1
    champion = f"models:/{configs['promote'].tracking.model_name}@champion"
    assert {configs[verb].bundle for verb in ("generate", "edit", "stylize", "serve")} == {champion}
    assert len({config.tracking.uri for config in configs.values() if getattr(config, "tracking", None)}) == 1
