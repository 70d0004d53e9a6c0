import pytest
import torch
from pydantic import ValidationError

from aai.encoders.audio import AudioEncoder, AudioEncoderConfig
from aai.encoders.convolutions import IN_CACHE, ConvBackbone


def test_each_pair_halves_time_and_frequency_and_the_last_is_as_wide_as_asked() -> None:
    tower = ConvBackbone(48, 3)
    assert [layer[3].out_channels for layer in tower.layers] == [8, 24, 48]
    assert tower(torch.randn(2, 100, 64)).shape == (2, 13, 48)


def test_its_states_stand_in_the_order_of_time() -> None:
    torch.manual_seed(0)
    tower = ConvBackbone(16, 2).eval()
    quiet, late = torch.zeros(1, 64, 16), torch.zeros(1, 64, 16)
    late[:, 60:] = 5.0
    with torch.no_grad():
        changed = (tower(quiet) - tower(late)).abs().mean(-1)[0]  # group norm moves all a little
    assert changed.argmax() >= 14


def test_its_settings_are_checked_and_its_bundle_needs_no_others() -> None:
    for wrong, rule in (
        ({"pretrained": "/a/folder"}, "no published"),
        ({"hidden_size": 36}, "hidden_size 36"),
        ({"num_layers": 7}, "num_layers 7"),
    ):
        with pytest.raises(ValidationError, match=rule):
            AudioEncoderConfig(backbone="cnn", **wrong)
    AudioEncoderConfig(backbone="cnn", hidden_size=24, num_heads=5)  # it has no heads
    config = AudioEncoderConfig(backbone="cnn", hidden_size=32, num_layers=2)
    again = AudioEncoderConfig(**config.model_dump())
    AudioEncoder(again).load_state_dict(AudioEncoder(config).state_dict())


def test_clips_beyond_what_the_cache_holds_have_the_same_states_and_gradients() -> None:
    torch.manual_seed(0)
    tower, features = ConvBackbone(16, 2), torch.randn(2 * IN_CACHE + 3, 20, 16)
    found = tower(features)
    found.square().mean().backward()
    in_parts = [p.grad.clone() for p in tower.parameters() if p.grad is not None]
    tower.zero_grad()
    whole = features.unsqueeze(1)
    for layer in tower.layers:
        whole = layer(whole)
    at_once = whole.mean(dim=3).transpose(1, 2)
    torch.testing.assert_close(found, at_once)
    at_once.square().mean().backward()
    torch.testing.assert_close(in_parts, [p.grad for p in tower.parameters()])
    assert tower(features[:0]).shape == (0, 5, 16)
