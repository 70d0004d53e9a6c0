"""adapt on real Ray with two workers, on a table of 16 toy clips and random small models."""

import io
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from aai import storage
from aai.adapt import prompt_of
from aai.bundle import read_bundle
from aai.errors import UserError
from aai.features import FeatureManifest, load_split
from aai.foundation.identity import FoundationSpec
from aai.foundation.loaders import load_diffusion
from aai.inject import Injector
from aai.memory import PeakMemory, StepCost
from aai.painter import Painter
from aai.sampling import PaintRequest
from aai.schema import NO_PICTURE, STILL_PICTURE
from pipelines import adapt, featurize
from pipelines.adapt import AdaptConfig, AdaptRecipe
from pipelines.engine.cluster import connect, shutdown
from pipelines.settings import ClusterConfig, TrainClusterConfig
from pipelines.training.following import samples
from pipelines.training.stage import make_work
from tests.pipelines.conftest import no_models_here, run_here
from tests.tiny import of_kinds, write_bundle_of, write_clip, write_clip_table, write_diffusion


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[dict[str, Any]]:
    root = tmp_path_factory.mktemp("adapt")
    shutil.copy(empty_store, root / "mlflow.db")
    clip = write_clip(root / "clip")
    spec = FoundationSpec(clip=str(clip), diffusion=str(write_diffusion(root / "diffusion", clip)))
    clips = str(write_clip_table(root / "accepted", 2, 8))
    table = {"input": clips, "out": str(root / "features"), "foundation": spec.model_dump()}
    with pytest.MonkeyPatch.context() as patch:
        run_here(patch)
        featurize.run(featurize.FeaturizeConfig.parse(table))
    connect(ClusterConfig())
    yield {
        "features": str(root / "features"),
        "bundle": str(write_bundle_of(root / "aligned", spec)),
        "out": str(root / "adapt"),
        "adapter": {"num_tokens": 2, "hidden_size": 16},
        "neutral_word": "sound",
        "loss": {"prompt": "a sketch of <sound>", "head_pattern": "^an? [a-z]+ of"},
        "fit": {"steps": 3, "batch_size": 4, "log_every": 1, "warmup_steps": 1},
        "tracking": {"uri": f"sqlite:///{root}/mlflow.db"},
    }
    shutdown()


def test_adapt_trains_and_writes_a_bundle_without_a_model_on_the_driver(settings: dict[str, Any]) -> None:
    config = AdaptConfig.parse(settings)
    with no_models_here():
        result = adapt.run(config)
        assert adapt.run(config) == result  # nothing to do
    assert result["steps"] == 3
    assert {"val_loss", "val_denoise", "val_hidden", "val_norm"} <= result["metrics"].keys()
    parent, bundle = read_bundle(config.bundle), read_bundle(result["bundle"])
    assert bundle.sha == result["sha"]
    assert bundle.meta["parents"] == [parent.sha]
    assert bundle.meta["data_fingerprint"] == FeatureManifest.read(config.features).fingerprint
    assert (bundle.config.neutral_word, bundle.config.prompt) == ("sound", "a sketch of <sound>")
    assert bundle.config.head_pattern == "^an? [a-z]+ of"
    sizes = {"num_tokens": 2, "parts": 0, "hidden_size": 16, "embed_dim": 32, "token_dim": 32}
    assert bundle.config.adapter == sizes
    for name, value in parent.aligner().items():
        assert torch.equal(bundle.aligner()[name], value), name

    pipe = load_diffusion(bundle.config.foundation)
    median = Injector(pipe.text_encoder, pipe.tokenizer).median_norm
    assert float(bundle.adapter()["scale"]) == pytest.approx(median)
    torch.manual_seed(config.fit.seed)
    untrained = AdaptRecipe(config).build().adapter.state_dict()
    assert untrained.keys() == bundle.adapter().keys()
    assert not torch.equal(untrained["net.0.weight"], bundle.adapter()["net.0.weight"])
    check_samples(config, Painter.load(result["bundle"]))

    made = {file: Path(file).stat().st_mtime_ns for file in storage.list_files(config.aligned, ".parquet")}
    assert len(made) == len(storage.list_files(config.features, ".parquet"))
    assert config.aligned == f"{config.features}-aligned"
    AdaptRecipe(config.model_copy(update={"out": f"{config.out}-again"})).precompute()
    assert {file: Path(file).stat().st_mtime_ns for file in made} == made, "another run of this aligner embeds nothing"


@pytest.mark.accept
def test_another_run_of_the_same_settings_has_the_same_weights(settings: dict[str, Any]) -> None:
    """A sample: the third stage of test_recipe.py, which is trained twice."""
    first, second = (adapt.run(AdaptConfig.parse({**settings, "out": f"{settings['out']}-{n}"})) for n in (1, 2))
    weights = read_bundle(first["bundle"]).adapter()
    for name, value in read_bundle(second["bundle"]).adapter().items():
        assert torch.equal(weights[name], value), name


def check_samples(config: AdaptConfig, painter: Painter) -> None:
    """The pictures after the last step are of the adapter that is in the bundle, beside the clips' own."""
    assert painter.adapter.cfg.num_tokens == 2
    ((step, png),) = samples(config.out)
    assert step == 3
    shown = np.asarray(Image.open(io.BytesIO(png)))
    px = painter.size_px
    assert shown.shape == (2 * px, 4 * px, 3)
    what = 0, AdaptRecipe.columns, config.max_val_clips, AdaptRecipe(config).cache
    held_out = load_split(config.features, "val", *what)
    last = 3 * len(held_out["caption"]) // 4
    prompt = prompt_of(held_out["caption"][last], config.loss)
    with torch.no_grad():
        embeds, _ = painter.injector.encode([prompt], painter.adapter(held_out["aligned"][last : last + 1]))
        decoded = painter.pipe.vae.decode(
            held_out["latents"][last : last + 1].float() / painter.pipe.vae.config.scaling_factor
        )
    (painted,) = painter.paint(embeds, [3], PaintRequest(steps=config.sample_steps))
    (own,) = painter.pipe.image_processor.postprocess(decoded.sample)
    for found, picture in ((shown[px:, 3 * px :], painted), (shown[:px, 3 * px :], own)):
        assert np.abs(found - np.asarray(picture, np.float32)).max() <= 1, "all but what a batch rounds"
    assert np.abs(np.asarray(own, np.float32) - np.asarray(painted)).max() > 20


def test_the_plan_tells_what_a_step_takes(settings: dict[str, Any], tmp_path: Path) -> None:
    """The forecast, of fake tensors, beside a real step."""
    config = AdaptConfig.parse(settings)
    forecast = config.step_cost()
    assert isinstance(forecast, StepCost)
    task = AdaptRecipe(config).build().train()
    batch = {
        "aligned": torch.ones(2, 32),
        "image_features": torch.ones(2, 2, 32),
        "latents": torch.ones(2, 8, 8, 8),
        "caption": ["caption 0", "caption 1"],
    }
    with PeakMemory() as memory:
        memory.count(*task.parameters(), *task.buffers())
        optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad])
        for _ in range(2):
            optimizer.zero_grad()
            task(batch)[0].backward()
            optimizer.step()
    assert forecast.num_bytes == pytest.approx(memory.peak, rel=0.15)
    assert forecast.flop == memory.flop / 2
    told = config.plan().training
    assert told["batch"] == "4 clips a step = 2 workers x 2"
    assert told["memory"] == f"{forecast.num_bytes / 1e9:.1f} GB a worker, by PyTorch's fake tensors"
    assert re.fullmatch(
        r"[\d.e+-]+ s a step, .* for all, .* an epoch: .* TFLOP a worker at 0\.03 TFLOP/s, .*", told["time"]
    )
    small = config.model_copy(update={"cluster": TrainClusterConfig(gb_per_worker=1e-4)})
    with pytest.raises(UserError, match=r"fit\.chunk_size=0: a step of 2 clips is forecast to need 0\.0 GB, more than"):
        adapt.run(small.model_copy(update={"out": str(tmp_path / "out")}))
    with pytest.raises(UserError, match=r"nine tenths of cluster\.gb_per_worker=0\.0001"):
        small.plan()
    assert AdaptConfig.parse({**settings, "bundle": str(tmp_path / "none")}).step_cost() == forecast, "before align"
    away = AdaptConfig.parse({**settings, "features": str(tmp_path / "none")}).plan().training
    assert away["memory"] == "told when the features are there"


def test_denoised_clips_are_shared_out_evenly(settings: dict[str, Any]) -> None:
    recipe = AdaptRecipe(AdaptConfig.parse({**settings, "loss": {"denoise_rows": 3}}))
    with pytest.raises(UserError, match=r"loss\.denoise_rows=3: is not a multiple of the 2 workers"):
        recipe.prepare(FeatureManifest.read(recipe.config.features))


def test_an_encoder_that_hears_too_little_of_the_clips_is_refused(settings: dict[str, Any]) -> None:
    recipe = AdaptRecipe(AdaptConfig.parse(settings))
    manifest = FeatureManifest.read(recipe.config.features)
    recipe.prepare(manifest)
    recipe.encoder = recipe.encoder.model_copy(update={"clip_s": 0.5})
    with pytest.raises(UserError, match=r"encoder\.clip_s=0\.5: cuts away 75% of the sound"):
        recipe.prepare(manifest)


def test_a_bundle_may_move_but_another_setting_is_another_run(settings: dict[str, Any], tmp_path: Path) -> None:
    """Needs the run above."""
    moved = Path(settings["bundle"]).rename(tmp_path / "moved")  # where it lies does not count
    assert adapt.run(AdaptConfig.parse({**settings, "bundle": str(moved)}))["steps"] == 3
    moved.rename(settings["bundle"])
    wrong = AdaptConfig.parse({**settings, "adapter": {"token_dim": 64}, "out": str(tmp_path / "out")})
    with pytest.raises(UserError, match=r"adapter\.token_dim=64: is decided by data and models"):
        adapt.run(wrong)
    for change in ({"neutral_word": "thing"}, {"loss": {"w_norm": 0.5}}, {"fit": {"steps": 4, "batch_size": 4}}):
        with pytest.raises(UserError, match="other settings or data"):
            adapt.run(AdaptConfig.parse({**settings, **change}))


def test_the_encoder_must_hear_the_rate_of_the_features(settings: dict[str, Any]) -> None:
    manifest = FeatureManifest.read(settings["features"])
    recipe = AdaptRecipe(AdaptConfig.parse(settings))
    assert recipe.prepare(manifest) == recipe.config
    with pytest.raises(UserError, match=r"bundle=.*: hears 16000 Hz, the features hold 8000 Hz"):
        recipe.prepare(manifest.model_copy(update={"sample_rate_hz": 8_000}))


def test_clips_of_sound_and_text_alone_are_left_out(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Twelve clips of train and four of val, every other one of which has no picture."""
    run_here(monkeypatch)
    spec = read_bundle(settings["bundle"]).config.foundation
    clips = of_kinds(write_clip_table(tmp_path / "accepted", 2, 8), [NO_PICTURE, STILL_PICTURE])
    features = {"input": clips, "out": str(tmp_path / "features"), "foundation": spec.model_dump()}
    featurize.run(featurize.FeaturizeConfig.parse(features))
    config = AdaptConfig.parse({**settings, "features": features["out"], "out": str(tmp_path / "out")})
    recipe = AdaptRecipe(config)
    with caplog.at_level(logging.INFO):
        recipe.prepare(FeatureManifest.read(config.features))
    assert "adapt: 8 of 12 clips of train have no picture and are left out" in caplog.text
    assert config.plan().training["steps"] == "3 = 3.0 epochs of 4 clips"
    recipe.precompute()
    work = make_work(0, 1, (AdaptRecipe, config.model_dump(mode="json"), 1))
    for _, batch in zip(range(3), work.batches(0), strict=False):
        assert batch["has_picture"].all()
        assert {clip[-1] for clip in batch["clip_id"]} <= {"1", "5"}
    assert work.evaluate is not None
    assert all(np.isfinite(value) for value in work.evaluate().values())
