"""Layers of each backbone, counted from below."""

from pathlib import Path

import pytest
from torch import nn

from aai.encoders.audio import AudioEncoder, AudioEncoderConfig, described
from aai.encoders.depth import depths, freeze_lowest, num_layers, rate_scales
from tests.tiny import BACKBONES

FIRST = {
    "ast": "embeddings.cls_token",
    "whisper": "conv1.weight",
    "clap": "audio_encoder.patch_embed.proj.weight",
    "pe_audio": "embedder.dac_encoder.conv1.weight",
}
LAST = {"ast": "layernorm.weight", "whisper": "layer_norm.weight", "clap": "audio_encoder.norm.weight"}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_has_its_layers_between_what_is_below_and_above(backbone: str, tmp_path: Path) -> None:
    folder = BACKBONES[backbone](tmp_path / backbone)
    config = described(AudioEncoderConfig(backbone=backbone, pretrained=str(folder), clip_s=1.0, embed_dim=16))
    tower = AudioEncoder(config).backbone
    found, layers = depths(tower), num_layers(tower)
    assert layers == {"ast": 2, "clap": 2, "whisper": 1, "pe_audio": 1}[backbone]
    assert found.keys() == dict(tower.named_parameters()).keys()
    assert found[FIRST[backbone]] == 0
    assert {depth for name, depth in found.items() if "batch_norm" in name} <= {0}
    assert set(range(layers + 2)) == set(found.values())
    if backbone in LAST:
        assert found[LAST[backbone]] == layers + 1


def tower_of(layers: int) -> nn.Module:
    tower = AudioEncoder(AudioEncoderConfig(hidden_size=32, num_heads=2, num_layers=layers)).backbone
    assert isinstance(tower, nn.Module)
    return tower


def test_lowest_layers_are_frozen() -> None:
    for count in (0, 1, 3):
        tower = tower_of(3)
        freeze_lowest(tower, count)
        free = {depth for name, depth in depths(tower).items() if tower.get_parameter(name).requires_grad}
        assert free == set(range(count + 1 if count else 0, 5))


def test_rates_fall_from_layer_to_layer() -> None:
    tower = tower_of(3)
    scales = rate_scales(tower, 0.5)
    by_depth = {depth: scales[name] for name, depth in depths(tower).items()}
    assert by_depth == {0: 0.0625, 1: 0.125, 2: 0.25, 3: 0.5, 4: 1.0}
    assert set(rate_scales(tower, 1.0).values()) == {1.0}
