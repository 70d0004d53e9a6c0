import pytest
import torch
from pydantic import ValidationError

from aai.encoders.audio import AudioEncoder, AudioEncoderConfig
from aai.encoders.convolutions import ConvBackbone


def test_each_pair_halves_time_and_frequency_and_the_last_is_as_wide_as_asked() -> None:
    tower = ConvBackbone(48, 3)
    assert [layer[3].out_channels for layer in tower.layers] == [8, 24, 48]
    assert tower(torch.randn(2, 100, 64)).shape == (2, 13 * 8, 48)


def test_time_stands_slowest_in_its_states() -> None:
    torch.manual_seed(0)
    tower = ConvBackbone(16, 2).eval()
    quiet, late = torch.zeros(1, 64, 16), torch.zeros(1, 64, 16)
    late[:, 60:] = 5.0
    with torch.no_grad():
        changed = (tower(quiet) - tower(late)).abs().mean(-1)[0].view(16, 4)  # group norm moves all a little
    assert changed.sum(1).argmax() >= 14


def test_its_settings_are_checked_and_its_bundle_needs_no_others() -> None:
    for wrong in ({"pretrained": "/a/folder"}, {"hidden_size": 36}, {"num_layers": 7}):
        with pytest.raises(ValidationError, match="backbone cnn"):
            AudioEncoderConfig(backbone="cnn", **wrong)
    config = AudioEncoderConfig(backbone="cnn", hidden_size=32, num_layers=2)
    again = AudioEncoderConfig(**config.model_dump())
    AudioEncoder(again).load_state_dict(AudioEncoder(config).state_dict())
