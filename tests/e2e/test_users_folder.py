"""A folder of one's own videos, a foundation of CLIP ViT-L/14's and Stable Diffusion's sizes, all else by default."""

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from aai import storage
from aai.bundle import read_bundle
from aai.features import FeatureManifest
from aai.foundation.identity import FoundationSpec
from pipelines.__main__ import load_config, main, module_of
from tests.clips import make_moving
from tests.pipelines.conftest import run_here
from tests.tiny import write_vitl14_sizes


@pytest.fixture(scope="module")
def foundation(tmp_path_factory: pytest.TempPathFactory) -> FoundationSpec:
    return write_vitl14_sizes(tmp_path_factory.mktemp("foundation"))


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine clips of 320x240 px and 1.5 s, and one of 160x120 px."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(10):
        size = (160, 120) if number == 9 else (320, 240)
        data = make_moving(num_frames=15, fps=10, size=size, seed=number)
        storage.write_bytes(str(folder / ("a dog", "a bell")[number % 2] / f"{number}.mp4"), data)
    return folder


def words(foundation: FoundationSpec | None, *more: str) -> list[str]:
    """Settings as arguments, the foundation's folders among them."""
    named: tuple[str, ...] = ()
    if foundation is not None:
        named = (f"foundation.clip={foundation.clip}", f"foundation.diffusion={foundation.diffusion}")
    return [word for setting in (*named, *more) for word in ("--set", setting)]


def run_verb(verb: str, *argv: str) -> dict[str, Any]:
    """The command in this process, its shards too."""
    with pytest.MonkeyPatch.context() as patch:
        run_here(patch)
        result: dict[str, Any] = module_of(verb).run(load_config(verb, list(argv))[0])
    return result


def curated(foundation: FoundationSpec, videos: Path, out: Path, *more: str) -> dict[str, Any]:
    no_store = ("tracking=null", *more)
    return run_verb("curate", "--manifest", str(videos), "--out", str(out), *words(foundation, *no_store))


def test_pictures_and_sounds_are_kept_as_the_foundation_takes_them(
    foundation: FoundationSpec, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--manifest", str(videos), "--out", str(tmp_path / "curated"), *words(foundation)]
    assert main(["curate", *argv, "--dry-run"]) == 0
    why = "foundation.clip takes 224 px, foundation.diffusion 512 px"
    assert f"decode.frame_size_px 512 (auto: {why})" in (plan := capsys.readouterr().out)
    assert "filters.min_size_px 224 (auto: foundation.clip takes 224 px)" in plan

    result = curated(foundation, videos, tmp_path / "curated")
    assert result["by_code"] == {"TOO_SMALL": 1}
    assert result["small_sources"] == result["accepted"] == 9  # none has 512 px
    clips = str(tmp_path / "curated/accepted")
    for row in storage.read_table(clips).to_pylist():
        assert [Image.open(io.BytesIO(frame)).size for frame in row["frames"]] == [(320, 240)] * 4

    features = str(tmp_path / "features")
    run_verb("featurize", "--input", clips, "--out", features, *words(foundation))
    manifest = FeatureManifest.read(features)
    assert (manifest.image_dim, manifest.latent_shape) == (768, (4, 64, 64))
    assert manifest.enlarged == {"clip": 0, "latents": 9}
    argv = ["--features", features, "--out", "unused", *words(foundation, "fit.batch_size=4")]
    align = load_config("align", argv)[0]
    assert align.plan().chosen["encoder.clip_s"].startswith("1.5 (auto: 95% of 9 clips last 1.5")


def test_a_table_of_other_sizes_is_refused(foundation: FoundationSpec, videos: Path, tmp_path: Path) -> None:
    toy = FoundationSpec()
    assert curated(toy, videos, tmp_path / "toy")["chosen"]["decode.frame_size_px"]["value"] == 64
    argv = ["--input", str(tmp_path / "toy/accepted"), "--out", str(tmp_path / "features")]
    assert main(["featurize", *argv, *words(foundation)]) == 2
    assert not (tmp_path / "features").exists()


@pytest.mark.accept
@pytest.mark.timeout(900)
def test_h9_the_whole_chain_by_default(foundation: FoundationSpec, videos: Path, tmp_path: Path) -> None:
    run = f"run_dir={tmp_path}"
    steps = ("fit.steps=2", "fit.batch_size=4", "fit.warmup_steps=1", "fit.eval_every=2")
    store = f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"
    for verb, *more in (
        ("curate", "--manifest", str(videos), *words(foundation, "val_share=0.3")),
        ("featurize", *words(foundation)),
        ("align", *words(foundation, *steps)),
        ("adapt", *(word for setting in steps for word in ("--set", setting))),
    ):
        tracked = () if verb == "featurize" else ("--set", store)
        assert main([verb, *more, "--set", run, *tracked]) == 0
    bundle = read_bundle(tmp_path / "adapt/bundle")
    assert bundle.config.encoder["clip_s"] == 1.5
    assert FeatureManifest.read(str(tmp_path / "features")).enlarged["clip"] == 0
    sound = next(videos.rglob("*.mp4"))
    argv = ["--audio", str(sound), "--set", f"bundle={bundle.folder}", "--set", "request.steps=2"]
    assert main(["generate", *argv, "--set", f"out={tmp_path}/pictures", "--set", run]) == 0
    assert {Image.open(file).size for file in (tmp_path / "pictures").glob("*.png")} == {(512, 512)}
