"""Strips with small random models: one seed, one thing that changes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from aai.adapt import AdapterConfig, AudioAdapter
from aai.bundle import read_bundle, write_bundle
from aai.errors import UserError
from aai.foundation.identity import FoundationSpec
from aai.painter import Painter
from aai.sampling import PaintRequest
from aai.strips import along, joined, paint_strip
from tests.aai.test_painter import pixels, sound
from tests.tiny import write_bundle_of

REQUEST = PaintRequest(steps=1, seed=3)


def test_a_morph_begins_at_one_sound_and_ends_at_the_other(painter: Painter) -> None:
    strip = paint_strip(painter, "morph", [sound(1), sound(2)], REQUEST, 3)
    assert [label for label, _ in strip] == ["0.00", "0.50", "1.00"]
    for (_, picture), number in ((strip[0], 1), (strip[2], 2)):
        alone = painter.generate(sound(number), REQUEST)
        assert np.abs(pixels([picture]) - pixels(alone)).max() <= 1
    between = pixels([strip[1][1]])
    assert not np.array_equal(between, pixels([strip[0][1]]))
    assert not np.array_equal(between, pixels([strip[2][1]]))
    with pytest.raises(UserError, match="1 sounds: a morph goes from one sound to another"):
        paint_strip(painter, "morph", sound(1), REQUEST)


def test_a_morph_heeds_strength_and_window(painter: Painter) -> None:
    long = np.concatenate([4 * sound(3), sound(4), sound(5)])  # three clips
    request = REQUEST.model_copy(update={"sound_strength": 0.5, "window": "loudest"})
    (_, first), *_ = paint_strip(painter, "morph", [long, sound(2)], request, 2)
    assert np.abs(pixels([first]) - pixels(painter.generate(long, request))).max() <= 1
    for other in ({"window": "middle"}, {"sound_strength": 1.0}):
        (_, changed), *_ = paint_strip(painter, "morph", [long, sound(2)], request.model_copy(update=other), 2)
        assert not np.array_equal(pixels([changed]), pixels([first]))


def test_a_morph_turns_by_equal_angles() -> None:
    start, end = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    for share in (0.0, 0.25, 1.0):
        angle = torch.tensor(share * torch.pi / 2)
        torch.testing.assert_close(along(start, end, share), torch.stack([angle.cos(), angle.sin()]))
    torch.testing.assert_close(along(start, start, 0.5), start)


def test_strength_begins_at_the_neutral_word_and_ends_at_the_request(painter: Painter) -> None:
    request = REQUEST.model_copy(update={"sound_strength": 1.5})
    strip = paint_strip(painter, "strength", sound(1), request, 3)
    for (_, picture), strength in zip(strip, (0.0, 0.75, 1.5), strict=True):
        alone = painter.generate(sound(1), request.model_copy(update={"sound_strength": strength}))
        assert np.abs(pixels([picture]) - pixels(alone)).max() <= 1


def test_strength_of_two_sounds_begins_at_the_neutral_word(painter: Painter) -> None:
    strip = paint_strip(painter, "strength", [sound(1), sound(2)], REQUEST, 2)
    for (_, picture), strength in zip(strip, (0.0, 1.0), strict=True):
        alone = painter.generate([sound(1), sound(2)], REQUEST.model_copy(update={"sound_strength": strength}))
        assert np.abs(pixels([picture]) - pixels(alone)).max() <= 1


def test_loudness_falls_by_equal_steps(painter: Painter) -> None:
    strip = paint_strip(painter, "loudness", sound(1), REQUEST, 9)  # more than are painted at once
    assert [label for label, _ in strip[:1] + strip[4:5] + strip[8:]] == ["-30 dB", "-15 dB", "0 dB"]
    for i, gain in ((0, 10**-1.5), (4, 10**-0.75), (8, 1.0)):
        alone = painter.generate(gain * sound(1), REQUEST)
        assert np.abs(pixels([strip[i][1]]) - pixels(alone)).max() <= 1
    assert joined(strip).size == (9 * 64, 64 + 14)


def test_an_adapter_that_attends_to_parts_is_given_them(spec: FoundationSpec, tmp_path: Path) -> None:
    made = read_bundle(str(write_bundle_of(tmp_path / "whole", spec)))
    torch.manual_seed(0)
    shape = AdapterConfig(num_tokens=2, parts=3, hidden_size=32, embed_dim=32, token_dim=32)
    config = made.config.model_copy(update={"adapter": shape.model_dump(mode="json")})
    write_bundle(tmp_path / "parts", config, made.aligner(), AudioAdapter(shape, 1.0).state_dict(), {})
    painter = Painter.load(str(tmp_path / "parts"))
    rows = painter.parts(sound(1))
    assert rows.shape == (1, 4, 32)
    assert torch.equal(painter.listen(sound(1)), rows[:, 0])
    assert torch.equal(painter.hear(sound(1)), painter.adapter(rows)[0])
    with pytest.raises(ValueError, match="a sound and its parts"):
        painter.adapter(rows[:, :1])
    request = PaintRequest(steps=1)
    assert len(painter.generate(sound(1), request)) == 1
    strip = paint_strip(painter, "morph", [sound(1), sound(2)], request, 2)
    assert [label for label, _ in strip] == ["0.00", "1.00"]
    picture = Image.new("RGB", (64, 64), "gray")
    assert len(painter.edit(sound(1), picture, PaintRequest(steps=2))) == 1
