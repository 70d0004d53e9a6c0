"""featurize and align on real Ray with two workers, on a table of 48 toy clips and random small models."""

import logging
import re
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from aai import storage
from aai.align import validate
from aai.augment import AugmentConfig
from aai.bundle import read_bundle
from aai.encoders.aligner import embed, load_aligner
from aai.encoders.audio import AudioEncoder, AudioEncoderConfig
from aai.errors import UserError
from aai.features import FeatureManifest, load_split
from aai.fit import FitConfig
from aai.parting import apart_below
from aai.precision import resolve
from aai.schema import NO_PICTURE, STILL_PICTURE
from pipelines import adapt, align, featurize
from pipelines.align import AlignConfig, AlignRecipe
from pipelines.engine.cluster import connect, shutdown
from pipelines.settings import ClusterConfig
from pipelines.training import following, ray_train
from pipelines.training.recipe import Trained
from pipelines.training.stage import make_work, validates
from tests.pipelines.conftest import no_models_here, run_here
from tests.tiny import BACKBONES, of_kinds, write_ast, write_clap, write_clip, write_clip_table, write_diffusion

ENCODER = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_mel_bins": 32, "head_size": 32}


def featurized(clips: str, out: Path, foundation: dict[str, str]) -> featurize.FeaturizeConfig:
    return featurize.FeaturizeConfig.parse({"input": clips, "out": str(out), "foundation": foundation})


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    root = tmp_path_factory.mktemp("align")
    clip = write_clip(root / "clip")
    foundation = {"clip": str(clip), "diffusion": str(write_diffusion(root / "diffusion", clip))}
    clips = str(write_clip_table(root / "accepted", 3, 16))
    sharp = str(write_clip_table(root / "accepted_48k", 1, 8, sample_rate_hz=48_000))
    connect(ClusterConfig())
    featurize.run(featurized(clips, root / "features", foundation))
    with pytest.MonkeyPatch.context() as patch:
        run_here(patch)  # once is enough on Ray
        featurize.run(featurized(sharp, root / "features_48k", foundation))
    yield {
        "features": str(root / "features"),
        "out": str(root / "align"),
        "foundation": foundation,
        "encoder": ENCODER,
        "fit": {"steps": 6, "batch_size": 8, "log_every": 2, "eval_every": 4, "warmup_steps": 1},
        "tracking": {"uri": f"sqlite:///{root}/mlflow.db"},
    }
    shutdown()


def test_align_trains_and_writes_a_bundle(settings: dict[str, Any]) -> None:
    config = AlignConfig.parse(settings)
    with no_models_here():
        result = align.run(config)
    assert result["steps"] == 6
    assert result["precision"] == resolve("auto", "cpu")
    assert {"val_a2v_r1", "val_a2t_r1"} <= result["metrics"].keys()
    history = following.history(config.out)
    assert [(e["step"], "loss" in e) for e in history] == [(2, True), (4, True), (4, False), (6, True), (6, False)]
    assert not Path(ray_train.checkpoints(config.out)).exists()

    bundle = read_bundle(result["bundle"])
    manifest = FeatureManifest.read(config.features)
    assert bundle.meta["data_fingerprint"] == manifest.fingerprint
    encoder_config = AudioEncoderConfig.parse(bundle.config.encoder)
    assert encoder_config.embed_dim == 32
    assert encoder_config.mel_mean != 0
    assert encoder_config.clip_s == 2.0  # by the clips
    assert -1 < (encoder_config.apart_below or -1) < 1
    assert config.plan().chosen == {"encoder.clip_s": "2 (auto: 95% of 48 clips last 2.00 s or less)"}
    training = config.plan().training
    assert training["steps"] == "6 = 1.3 epochs of 36 clips"
    assert training["batch"] == "8 clips a step = 2 workers x 4"
    assert re.fullmatch(r"0\.\d GB a worker, by PyTorch's fake tensors", training["memory"])
    assert re.fullmatch(r".* s a step, .* for all, .* an epoch: .* TFLOP a worker at .* TFLOP/s, .*", training["time"])
    encoder = AudioEncoder(encoder_config)
    encoder.load_state_dict(bundle.aligner())
    val = load_split(config.features, "val", encoder_config.clip_samples)
    assert apart_below(partial(embed, encoder), val["audio"]) == pytest.approx(encoder_config.apart_below, abs=1e-4)
    assert validate(encoder, val)["a2v_r1"] == pytest.approx(result["metrics"]["val_a2v_r1"])
    torch.manual_seed(config.fit.seed)
    assert not torch.allclose(embed(encoder, val["audio"]), embed(AudioEncoder(encoder_config), val["audio"]))

    assert align.run(config) == result  # nothing to do
    with pytest.raises(UserError, match="other settings or data"):
        align.run(AlignConfig.parse({**settings, "loss": {"w_text": 0}}))


def pretrained_settings(backbone: str, settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """One step of a random pretrained backbone, on features of its rate."""
    rate = "_48k" if backbone in ("clap", "pe_audio") else ""
    folder = BACKBONES[backbone](tmp_path / "pretrained")
    return {
        **settings,
        "features": settings["features"] + rate,
        "out": str(tmp_path / "out"),
        "encoder": {"backbone": backbone, "pretrained": str(folder), "clip_s": 1.0, "head_size": 32},
        "fit": {"steps": 1, "batch_size": 4, "learning_rate": 0.01, "warmup_steps": 0, "log_every": 1},
        "cluster": {"num_workers": 1},
    }


def validated_elsewhere(bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, features: str) -> float:
    """a2v R@1 of a bundle that was moved, with the pretrained folder gone and no hub."""
    shutil.move(bundle, tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "pretrained")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    aligner = load_aligner(read_bundle(tmp_path / "elsewhere"))
    return validate(aligner, load_split(features, "val", aligner.config.clip_samples))["a2v_r1"]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_pretrained_backbone_takes_a_step_and_its_bundle_stands_alone(
    backbone: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AlignConfig.parse(pretrained_settings(backbone, settings, tmp_path))
    recipe = AlignRecipe(config)
    recipe.config = recipe.prepare(FeatureManifest.read(config.features))
    task = recipe.build().train()
    clips = load_split(config.features, "train", recipe.config.encoder.clip_samples)
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=0.1)
    task({name: clips[name][:4] for name in clips if name != "labels"})[0].backward()
    optimizer.step()
    expected = recipe.validate(task, load_split(config.features, "val", recipe.config.encoder.clip_samples))
    module, kept = recipe.export(task)
    trained = Trained(module.state_dict(), kept.model_dump(mode="json"), 1, "float32")
    meta = {"data_fingerprint": "", "metrics": {}, "parents": []}
    recipe.write(str(tmp_path / "bundle"), trained, meta)
    found = validated_elsewhere(str(tmp_path / "bundle"), tmp_path, monkeypatch, config.features)
    assert found == expected["a2v_r1"]


@pytest.mark.accept
@pytest.mark.parametrize("backbone", BACKBONES)
def test_k2_a_pretrained_backbone_trains_on_ray_and_its_bundle_stands_alone(
    backbone: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AlignConfig.parse(pretrained_settings(backbone, settings, tmp_path))
    result = align.run(config)
    found = validated_elsewhere(result["bundle"], tmp_path, monkeypatch, config.features)
    assert found == pytest.approx(result["metrics"]["val_a2v_r1"])


def test_a_dry_run_tells_steps_batches_and_memory(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = str(write_ast(tmp_path / "ast"))
    config = AlignConfig.parse(
        {
            **settings,
            "features": "s3://nobody/features",
            "encoder": {"pretrained": folder, "clip_s": 1.0},
            "fit": {"steps": 9, "batch_size": 1024, "chunk_size": 32},
            "cluster": {"num_workers": 8},
        }
    )
    training = config.plan().training
    assert training["steps"] == "9"
    assert training["batch"] == "1,024 clips a step = 8 workers x 128, in chunks of 32"
    assert training["memory"].endswith("GB a worker, by PyTorch's fake tensors")
    hub = {"pretrained": "somebody/something", "revision": "abc", "clip_s": 1.0}
    told = AlignConfig.parse({**settings, "encoder": hub}).plan().training["memory"]
    assert told == "told when somebody/something is on this machine"
    with pytest.raises(UserError, match="is longer than"):
        AlignConfig.parse({**settings, "encoder": {"pretrained": folder, "clip_s": 9.0}}).plan()


def test_the_augmentation_that_is_set_reaches_the_task_and_decides_the_content(settings: dict[str, Any]) -> None:
    config = AlignConfig.parse({**settings, "augment": {"gain_db": [-3, 3]}})
    assert AlignRecipe(config).build().augment == AugmentConfig(gain_db=(-3, 3))
    assert config.content() != AlignConfig.parse(settings).content()
    with pytest.raises(UserError, match=r"augment\.gain_db"):
        AlignConfig.parse({**settings, "augment": {"gain_db": [3, -3]}})


def test_a_pretrained_backbone_takes_no_settings_of_another(settings: dict[str, Any], tmp_path: Path) -> None:
    pretrained = {"pretrained": str(write_ast(tmp_path / "ast")), "clip_s": 1.0}
    sharp = {"backbone": "clap", "pretrained": str(write_clap(tmp_path / "clap")), "clip_s": 1.0}
    for encoder, message in (
        ({**pretrained, "num_mel_bins": 16}, r"encoder\.num_mel_bins=16: .* has its own sizes and spectrogram"),
        ({**pretrained, "clip_s": 1.5}, r"encoder\.clip_s=1\.5: is longer than .* takes; set it to 1 or less"),
        (sharp, r"hears 48000 Hz, the features hold 16000 Hz; curate with decode\.sample_rate_hz=48000"),
    ):
        with pytest.raises(UserError, match=message):
            align.run(AlignConfig.parse({**settings, "out": str(tmp_path / "out"), "encoder": encoder}))


def test_mistakes_are_found_before_anything_starts(settings: dict[str, Any], tmp_path: Path) -> None:
    fresh = {**settings, "out": str(tmp_path / "out")}
    for wrong, message in (
        ({"fit": {"batch_size": 7}}, "multiple of the 2 workers"),
        ({"features": str(tmp_path)}, "no finished FeatureTable"),
        ({"encoder": {"sample_rate_hz": 48_000}}, "hears 48000 Hz, the features hold 16000 Hz; set it to 16000"),
        ({"encoder": {**ENCODER, "mel_mean": 1.0}}, r"encoder\.mel_mean=1\.0: is decided by data and models"),
        ({"encoder": {**ENCODER, "embed_dim": 32}}, r"encoder\.embed_dim=32: is decided by data and models"),
        ({"encoder": {**ENCODER, "clip_s": 0.5}}, r"encoder\.clip_s=0\.5: cuts away 75% of the sound"),
        ({"foundation": {"clip": str(tmp_path), "diffusion": str(tmp_path)}}, "features were made with"),
    ):
        with pytest.raises(UserError, match=message):
            align.run(AlignConfig.parse({**fresh, **wrong}))
    assert not (tmp_path / "out").exists()
    later = AlignConfig.parse({**fresh, "features": str(tmp_path)}).plan().chosen
    assert later == {"encoder.clip_s": "auto: told when the features are there"}
    assert AlignConfig.parse({**fresh, "max_cut_share": 0.9}).content() == AlignConfig.parse(fresh).content()


def test_validation_is_never_left_out_in_silence(settings: dict[str, Any], tmp_path: Path) -> None:
    manifest = FeatureManifest.read(settings["features"])
    without = manifest.model_copy(update={"rows": {"train": manifest.rows["train"], "test": 12}})
    storage.write_json(str(tmp_path / "features" / "manifest.json"), without.model_dump(mode="json"))
    common = {name: settings[name] for name in ("fit", "tracking")}
    places = {"features": str(tmp_path / "features"), "out": str(tmp_path / "out")}
    for run, config in (
        (align.run, AlignConfig.parse({**common, **places})),
        (adapt.run, adapt.AdaptConfig.parse({**common, **places, "bundle": "unused"})),
    ):
        with pytest.raises(UserError, match=r"fit\.eval_every=4.*no clips of the split val.*val_share=0\.02"):
            run(config)
    assert not (tmp_path / "out").exists()
    assert not validates(FitConfig(eval_every=0), without)
    assert validates(FitConfig(eval_every=4), manifest)


def test_clips_of_sound_and_text_train_the_text_term_alone(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run_here(monkeypatch)
    found = {}
    for name, kinds in (("mixed", (NO_PICTURE, STILL_PICTURE)), ("bare", (NO_PICTURE,))):
        clips = of_kinds(write_clip_table(tmp_path / f"clips-{name}", 1, 8), kinds)
        featurize.run(featurized(clips, tmp_path / name, settings["foundation"]))
        found[name] = {**settings, "features": str(tmp_path / name), "fit": {"batch_size": 6, "warmup_steps": 0}}
    recipe = AlignRecipe(AlignConfig.parse(found["mixed"]))
    manifest = FeatureManifest.read(recipe.config.features)
    caplog.set_level(logging.INFO)
    settled = recipe.prepare(manifest)
    assert "align: 4 of 6 clips of train have no picture: they train the text term alone" in caplog.text
    work = make_work(0, 1, (AlignRecipe, settled.model_dump(mode="json"), 1))
    batch = next(work.batches(0))
    assert int(batch["has_picture"].sum()) == 2
    loss, terms = work.task(batch)
    assert min(terms["loss_image"], terms["loss_text"]) > 0
    assert torch.isfinite(loss)
    assert work.evaluate is not None
    assert work.evaluate().keys() == {"val_a2v_r1", "val_a2t_r1"}

    without_text = AlignConfig.parse({**found["mixed"], "loss": {"w_text": 0}, "fit": {"batch_size": 2}})
    AlignRecipe(without_text).prepare(manifest)
    assert "4 of 6 clips of train have no picture: they are left out, since loss.w_text is 0" in caplog.text
    assert without_text.plan().training["steps"].endswith("epochs of 2 clips")
    bare = FeatureManifest.read(found["bare"]["features"])
    rule = r"loss\.w_image=1.0: none of the 6 clips of train has a picture; set it to 0"
    with pytest.raises(UserError, match=rule):
        AlignRecipe(AlignConfig.parse(found["bare"])).prepare(bare)
    AlignRecipe(AlignConfig.parse({**found["bare"], "loss": {"w_image": 0}})).prepare(bare)
