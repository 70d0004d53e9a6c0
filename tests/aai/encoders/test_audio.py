from pathlib import Path

import pytest
import torch
from transformers import ClapAudioConfig, ClapAudioModel, WhisperConfig, WhisperModel

from aai.encoders.audio import AudioEncoder, AudioEncoderConfig, fit_length, mel_statistics
from aai.errors import UserError
from tests.tiny import write_ast

SMALL = AudioEncoderConfig(hidden_size=32, num_layers=2, num_heads=2, clip_s=1.0, embed_dim=16, head_size=24)


def noise(batch: int, samples: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(batch, samples, generator=torch.Generator().manual_seed(seed))


def encoder_of(backbone: str, tmp_path: Path) -> AudioEncoder:
    torch.manual_seed(0)
    if backbone == "scratch":
        return AudioEncoder(SMALL).eval()
    folder = tmp_path / backbone
    settings = {"pretrained": str(folder), "embed_dim": 16, "head_size": 24, "num_mel_bins": 16, "clip_s": 0.8}
    if backbone == "ast":
        write_ast(folder)
    elif backbone == "whisper":
        sizes = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
        rest = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 64, "vocab_size": 16}
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
        config = WhisperConfig(**sizes, **rest, **special, num_mel_bins=16, max_source_positions=60)
        WhisperModel(config).save_pretrained(folder)
    else:
        config = ClapAudioConfig(
            num_mel_bins=16,
            spec_size=64,
            window_size=4,
            depths=[1, 1],
            num_attention_heads=[2, 2],
            hidden_size=64,
            patch_embeds_hidden_size=32,
            num_classes=2,
            enable_fusion=False,
        )
        ClapAudioModel(config).save_pretrained(folder)
    return AudioEncoder(AudioEncoderConfig(backbone=backbone, **settings)).eval()


@pytest.mark.parametrize("backbone", ["scratch", "ast", "whisper", "clap"])
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


@pytest.mark.parametrize("backbone", ["scratch", "ast", "whisper", "clap"])
def test_every_trainable_parameter_gets_a_gradient(backbone: str, tmp_path: Path) -> None:
    encoder = encoder_of(backbone, tmp_path).train()
    encoder(noise(3, encoder.config.clip_samples))[:, 0].sum().backward()
    without = [name for name, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_batch_norms_stay_still_while_training(tmp_path: Path) -> None:
    encoder = encoder_of("clap", tmp_path).train()
    assert encoder.training
    encoder.head.eval()
    norms = [m for m in encoder.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms
    assert not any(m.training for m in norms)


def test_log_mel_shape_and_loudness() -> None:
    encoder = AudioEncoder(SMALL)
    quiet, loud = encoder.log_mel(torch.cat([noise(1, 16_000), 4 * noise(1, 16_000)]))
    assert quiet.shape == (100, 64)
    # Loudness must survive: 4 times the amplitude is 16 times the power in every cell.
    torch.testing.assert_close((loud - quiet).mean(), torch.tensor(16.0).log(), atol=0.02, rtol=0)


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
    mel = AudioEncoder(SMALL.model_copy(update={"mel_mean": mean, "mel_std": std})).log_mel(sounds)
    assert abs(float(mel.mean())) < 1e-3
    assert abs(float(mel.std()) - 1) < 1e-3


def test_mistakes_are_user_errors(tmp_path: Path) -> None:
    folder = str(write_ast(tmp_path / "ast"))
    with pytest.raises(UserError, match="num_mel_bins=64"):
        AudioEncoder(AudioEncoderConfig(pretrained=folder))
    with pytest.raises(UserError, match="clip_s=2"):
        AudioEncoder(AudioEncoderConfig(pretrained=folder, num_mel_bins=16))
    with pytest.raises(UserError, match="cannot be loaded"):
        AudioEncoder(AudioEncoderConfig(pretrained=str(tmp_path), num_mel_bins=16))
    with pytest.raises(UserError, match="not pinned"):
        AudioEncoder(AudioEncoderConfig(pretrained="somebody/something"))
    with pytest.raises(UserError, match="set pretrained"):
        AudioEncoderConfig.parse({"backbone": "whisper"})
    with pytest.raises(ValueError, match="S > 0"):
        AudioEncoder(SMALL)(torch.zeros(2, 0))


def test_a_frozen_backbone_leaves_only_the_head(tmp_path: Path) -> None:
    encoder = AudioEncoder(SMALL.model_copy(update={"freeze_backbone": True}))
    assert {n.split(".")[0] for n, p in encoder.named_parameters() if p.requires_grad} == {"head"}
