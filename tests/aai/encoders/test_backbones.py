"""Pretrained towers out of folders of transformers: alone, inside a whole model, and wrong ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    ASTForAudioClassification,
    ASTModel,
    ClapConfig,
    ClapModel,
    ModernBertConfig,
    PeAudioConfig,
    PeAudioFeatureExtractor,
    PeAudioModel,
    WhisperForConditionalGeneration,
)

from aai.encoders import backbones
from aai.encoders.backbones import FAMILIES, BackboneName
from aai.errors import UserError
from tests.tiny import BACKBONES, CLAP_SIZES, PE_AUDIO_SIZES, clap_extractor, write_ast, write_clap

NAMES: list[BackboneName] = ["ast", "whisper", "clap", "pe_audio"]


def test_every_family_has_a_folder_here() -> None:
    assert set(BACKBONES) == set(FAMILIES) == set(NAMES)


def write_whole(backbone: BackboneName, tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """The folder of a whole model around a tower, and the tower's weights in it."""
    folder = tmp_path / "whole"
    BACKBONES[backbone](folder)
    if backbone == "ast":
        model: Any = ASTForAudioClassification(ASTModel.from_pretrained(folder).config)
        tower = model.audio_spectrogram_transformer
    elif backbone == "whisper":
        model = WhisperForConditionalGeneration.from_pretrained(folder)
        tower = model.model.encoder
    elif backbone == "clap":
        text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        model = ClapModel(ClapConfig(text_config=text | {"vocab_size": 32}, audio_config=CLAP_SIZES))
        tower = model.audio_model
        clap_extractor("rand_trunc").save_pretrained(folder)
    else:
        narrow = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        ends = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        ends |= {"cls_token_id": 1, "sep_token_id": 2}
        config = PeAudioConfig(text_config=ModernBertConfig(**narrow, **ends).to_dict(), audio_config=PE_AUDIO_SIZES)
        model = PeAudioModel(config)
        tower = model.audio_encoder
        PeAudioFeatureExtractor(hop_length=32).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder, tower.state_dict()


@pytest.mark.parametrize("backbone", NAMES)
def test_a_whole_model_gives_its_tower(backbone: BackboneName, tmp_path: Path) -> None:
    folder, expected = write_whole(backbone, tmp_path)
    architecture, _ = backbones.describe(backbone, str(folder), None)
    found = backbones.load(backbone, architecture, str(folder), None).state_dict()
    assert found.keys() == expected.keys()
    for name, weights in expected.items():
        assert torch.equal(found[name], weights), name


def test_the_tower_of_a_whole_audio_video_model(tmp_path: Path) -> None:
    folder, expected = write_whole("pe_audio", tmp_path)
    # The published PE-AV folders hold the audio model as a part of an audio-video one.
    whole = {f"audio_model.{name}": x for name, x in load_file(folder / "model.safetensors").items()}
    save_file(whole, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    audio_video = {"model_type": "pe_audio_video_encoder", "audio_config": config["audio_config"]}
    config = {"model_type": "pe_audio_video", "text_config": config["text_config"], "audio_video_config": audio_video}
    (folder / "config.json").write_text(json.dumps(config))
    architecture, _ = backbones.describe("pe_audio", str(folder), None)
    found = backbones.load("pe_audio", architecture, str(folder), None).state_dict()
    assert all(torch.equal(found[name], weights) for name, weights in expected.items())


@pytest.mark.parametrize("backbone", NAMES)
def test_what_a_folder_says_of_itself_builds_the_tower_again(backbone: BackboneName, tmp_path: Path) -> None:
    folder = BACKBONES[backbone](tmp_path / "folder")
    architecture, extractor = backbones.describe(backbone, str(folder), None)
    assert str(tmp_path) not in json.dumps([architecture, extractor])
    loaded = backbones.load(backbone, architecture, str(folder), None)
    again = backbones.build(backbone, json.loads(json.dumps(architecture)))
    assert again.load_state_dict(loaded.state_dict())
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in again.named_parameters() if p.requires_grad
    }
    heard = backbones.front_end(backbone, json.loads(json.dumps(extractor)))(torch.randn(1, extractor["sampling_rate"]))
    assert heard.isfinite().all()


def test_a_fused_clap_hears_each_clip_alone(tmp_path: Path) -> None:
    folder = write_clap(tmp_path / "fused", fusion=True)
    architecture, extractor = backbones.describe("clap", str(folder), None)
    tower = backbones.load("clap", architecture, str(folder), None).eval()
    heard = backbones.front_end("clap", extractor)(0.1 * torch.randn(3, 48_000))
    together = backbones.encode("clap", tower, heard, 48_000, 480)[0]
    alone = torch.cat([backbones.encode("clap", tower, one[None], 48_000, 480)[0] for one in heard])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_whisper_pools_the_sound_and_not_the_silence_after_it(tmp_path: Path) -> None:
    folder = BACKBONES["whisper"](tmp_path / "whisper")
    architecture, _ = backbones.describe("whisper", str(folder), None)
    tower = backbones.load("whisper", architecture, str(folder), None).eval()
    heard = torch.randn(2, 200, 80)
    states = tower(heard.transpose(1, 2)).last_hidden_state
    pooled, own = backbones.encode("whisper", tower, heard, 16_000, 160)  # 1 s: 100 frames, 50 states
    torch.testing.assert_close(pooled, states[:, :50].mean(dim=1))
    torch.testing.assert_close(own, states[:, :50])


@pytest.mark.parametrize("backbone", ["ast", "clap"])
def test_states_stand_in_the_order_of_time(backbone: BackboneName, tmp_path: Path) -> None:
    folder = BACKBONES[backbone](tmp_path / backbone)
    architecture, extractor = backbones.describe(backbone, str(folder), None)
    tower = backbones.load(backbone, architecture, str(folder), None).eval()
    heard = backbones.front_end(backbone, extractor)(0.1 * torch.randn(1, 48_000)).repeat(2, 1, 1)
    late = heard.shape[1] * 7 // 8
    heard[1, late:] = heard[1, late:] + 3
    with torch.no_grad():
        _, states = backbones.encode(backbone, tower, heard, 48_000, 480)
    changed = (states[0] - states[1]).abs().mean(-1)
    assert len(changed) < 200
    assert changed.argmax() >= 0.75 * len(changed) - 1


def test_longest_sounds(tmp_path: Path) -> None:
    found = {}
    for name in NAMES:
        folder = BACKBONES[name](tmp_path / name)
        found[name] = backbones.longest_s(name, backbones.describe(name, str(folder), None)[1])
    assert found == {"ast": 1.0, "whisper": 2.0, "clap": 2.0, "pe_audio": float("inf")}


def test_folders_that_do_not_fit_are_user_errors(tmp_path: Path) -> None:
    folder = write_ast(tmp_path / "ast")
    with pytest.raises(UserError, match="type audio-spectrogram-transformer"):
        backbones.describe("clap", str(write_mixed(tmp_path, folder)), None)
    with pytest.raises(UserError, match="not pinned"):
        backbones.describe("ast", "somebody/something", None)
    with pytest.raises(UserError, match="no readable config"):
        backbones.describe("ast", str(tmp_path), None)
    changed = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(changed | {"num_mel_bins": 32}))
    with pytest.raises(UserError, match="has num_mel_bins 32, its model takes 16"):
        backbones.describe("ast", str(folder), None)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="extractor is saved beside it"):
        backbones.describe("ast", str(folder), None)


def test_what_a_tower_cannot_take_is_found_before_it_trains(tmp_path: Path) -> None:
    clap = write_clap(tmp_path / "clap")
    clap_extractor("rand_trunc", max_length_s=3).save_pretrained(clap)
    with pytest.raises(UserError, match=r"max_length_s \(in frames\) 301, its model takes 256"):
        backbones.describe("clap", str(clap), None)
    whisper = BACKBONES["whisper"](tmp_path / "whisper")
    config = json.loads((whisper / "config.json").read_text())
    (whisper / "config.json").write_text(json.dumps(config | {"encoder_layerdrop": 0.9}))
    architecture, _ = backbones.describe("whisper", str(whisper), None)
    assert architecture["encoder_layerdrop"] == 0, "a dropped layer has no gradient, for which DDP would wait"


def write_mixed(tmp_path: Path, ast: Path) -> Path:
    """An AST with the extractor of a CLAP."""
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    (mixed / "config.json").write_text((ast / "config.json").read_text())
    clap_extractor("rand_trunc").save_pretrained(mixed)
    return mixed


def test_weights_that_are_absent_are_a_user_error(tmp_path: Path) -> None:
    folder = write_ast(tmp_path / "ast")
    architecture, _ = backbones.describe("ast", str(folder), None)
    weights = load_file(folder / "model.safetensors")
    gone = sorted(weights)[-1]
    save_file({name: x for name, x in weights.items() if name != gone}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"lacks 1 weights of the tower, such as {gone}"):
        backbones.load("ast", architecture, str(folder), None)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        backbones.load("ast", architecture, str(folder), None)
