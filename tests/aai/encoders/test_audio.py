import json
import shutil
from pathlib import Path

import pytest
import torch

from aai.encoders.audio import AudioEncoder, AudioEncoderConfig, described, fit_length, mel_statistics
from aai.errors import UserError
from tests.tiny import BACKBONES, write_ast, write_clap

SMALL = AudioEncoderConfig(hidden_size=32, num_layers=2, num_heads=2, clip_s=1.0, embed_dim=16, head_size=24)


def noise(batch: int, samples: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(batch, samples, generator=torch.Generator().manual_seed(seed))


KINDS = ["scratch", "cnn", *BACKBONES]


def encoder_of(backbone: str, tmp_path: Path) -> AudioEncoder:
    torch.manual_seed(0)
    if backbone == "scratch":
        return AudioEncoder(SMALL).eval()
    if backbone == "cnn":
        return AudioEncoder(SMALL.model_copy(update={"backbone": "cnn"})).eval()
    folder = BACKBONES[backbone](tmp_path / backbone)
    config = AudioEncoderConfig(backbone=backbone, pretrained=str(folder), embed_dim=16, head_size=24, clip_s=0.8)
    return AudioEncoder(described(config), from_pretrained=True).eval()


@pytest.mark.parametrize("backbone", KINDS)
def test_an_embedding_depends_on_its_clip_alone(backbone: str, tmp_path: Path) -> None:
    encoder = encoder_of(backbone, tmp_path)
    sounds = noise(5, encoder.config.clip_samples)
    sounds[2] *= 5
    with torch.no_grad():
        together = encoder(sounds)
        alone = torch.cat([encoder(sound[None]) for sound in sounds])
    assert together.shape == (5, 16)
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(5))
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    assert (together[0] - together[1]).abs().max() > 1e-4


@pytest.mark.parametrize("backbone", KINDS)
def test_every_trainable_parameter_gets_a_gradient(backbone: str, tmp_path: Path) -> None:
    encoder = encoder_of(backbone, tmp_path).train()
    encoder(noise(3, encoder.config.clip_samples))[:, 0].sum().backward()
    without = [name for name, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


@pytest.mark.parametrize("backbone", KINDS)
def test_the_whole_stands_before_its_parts(backbone: str, tmp_path: Path) -> None:
    encoder = encoder_of(backbone, tmp_path)
    sounds = noise(2, encoder.config.clip_samples)
    with torch.no_grad():
        rows = encoder.parts(sounds, 3)
        torch.testing.assert_close(rows[:, 0], encoder(sounds), atol=1e-5, rtol=0)
        torch.testing.assert_close(encoder.parts(sounds, 0), rows[:, :1], atol=1e-5, rtol=0)
    assert rows.shape == (2, 4, 16)
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(2, 4))
    assert (rows[:, 1] - rows[:, 3]).abs().max() > 1e-4


def test_batch_norms_stay_still_while_training(tmp_path: Path) -> None:
    encoder = encoder_of("clap", tmp_path).train()
    assert encoder.training
    encoder.head.eval()
    norms = [m for m in encoder.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms
    assert not any(m.training for m in norms)


@pytest.mark.parametrize("backbone", KINDS)
def test_an_encoder_is_built_again_from_its_settings_alone(backbone: str, tmp_path: Path) -> None:
    encoder = encoder_of(backbone, tmp_path)
    settings = json.loads(encoder.config.model_dump_json())
    for folder in tmp_path.iterdir():
        shutil.rmtree(folder)
    again = AudioEncoder(AudioEncoderConfig.parse(settings)).eval()
    again.load_state_dict(encoder.state_dict())
    sounds = noise(2, encoder.config.clip_samples)
    with torch.no_grad():
        assert torch.equal(again(sounds), encoder(sounds))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_pretrained_weights_arrive(backbone: str, tmp_path: Path) -> None:
    encoder = encoder_of(backbone, tmp_path)
    random, again = AudioEncoder(encoder.config), encoder_of(backbone, tmp_path)
    loaded = encoder.backbone.state_dict()
    assert all(torch.equal(again.backbone.state_dict()[name], x) for name, x in loaded.items())
    assert not all(torch.equal(random.backbone.state_dict()[name], x) for name, x in loaded.items())


def test_short_clips_are_padded_and_long_ones_cut_in_the_middle() -> None:
    clip = torch.arange(1.0, 6.0)[None]
    assert fit_length(clip, 7).tolist() == [[1, 2, 3, 4, 5, 0, 0]]
    assert fit_length(clip, 3).tolist() == [[2, 3, 4]]
    encoder = AudioEncoder(SMALL).eval()
    sound = noise(1, 9_000)
    padded = torch.nn.functional.pad(sound, (0, 7_000))
    with torch.no_grad():
        torch.testing.assert_close(encoder(sound), encoder(padded))


def test_mel_statistics_normalise_the_data() -> None:
    sounds = noise(8, 16_000)
    mean, std = mel_statistics(SMALL, sounds)
    mel = AudioEncoder(SMALL.model_copy(update={"mel_mean": mean, "mel_std": std})).features(sounds)
    assert abs(float(mel.mean())) < 1e-3
    assert abs(float(mel.std()) - 1) < 1e-3


def test_the_blank_of_clap_is_the_mean_that_its_batch_norm_knows(tmp_path: Path) -> None:
    encoder = encoder_of("clap", tmp_path)
    assert encoder.features(noise(1, 38_400)).shape[2] == 16
    assert torch.equal(torch.as_tensor(encoder.blank), torch.full((16,), -40.0))
    assert AudioEncoder(SMALL).blank == 0.0


def test_a_pretrained_backbone_has_its_own_front_end(tmp_path: Path) -> None:
    folder = str(write_ast(tmp_path / "ast"))
    given = {"num_mel_bins": 16, "hop_ms": 10, "hidden_size": 32, "extractor": {}, "architecture": {}}
    for name, value in given.items():
        with pytest.raises(UserError, match=rf"encoder\.{name}.*its own sizes and spectrogram.*leave it out"):
            described(AudioEncoderConfig(pretrained=folder, clip_s=0.8, **{name: value}))
    with pytest.raises(UserError, match=r"clip_s=2.*set it to 1 or less"):
        described(AudioEncoderConfig(pretrained=folder))
    clap = str(write_clap(tmp_path / "clap"))
    with pytest.raises(UserError, match=r"sample_rate_hz=16000.*48000 Hz"):
        described(AudioEncoderConfig(backbone="clap", pretrained=clap, sample_rate_hz=16_000))
    assert described(AudioEncoderConfig(backbone="clap", pretrained=clap)).sample_rate_hz == 48_000
    assert described(SMALL) is SMALL


def test_mistakes_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"encoder.extractor.*align again"):
        AudioEncoder(AudioEncoderConfig(pretrained=str(tmp_path)))
    with pytest.raises(UserError, match="set pretrained"):
        AudioEncoderConfig.parse({"backbone": "whisper"})
    with pytest.raises(ValueError, match="S > 0"):
        AudioEncoder(SMALL)(torch.zeros(2, 0))


def test_a_frozen_backbone_leaves_only_the_head(tmp_path: Path) -> None:
    encoder = AudioEncoder(SMALL.model_copy(update={"freeze_backbone": True}))
    assert {n.split(".")[0] for n, p in encoder.named_parameters() if p.requires_grad} == {"head"}
