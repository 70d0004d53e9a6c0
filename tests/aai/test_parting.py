"""Sounds that tell of one thing after another: which are cut, into what, and what is painted of them."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from aai.encoders.audio import AudioEncoderConfig
from aai.errors import UserError
from aai.painter import Painter
from aai.parting import apart_below, in_time, parts_in_time, tells_of_two
from aai.sampling import PaintRequest
from tests.aai.test_painter import sound

ONE, TWO = np.full(8, 0.5, np.float32), np.concatenate([np.full(4, 0.2), np.full(4, 0.9)]).astype(np.float32)


def listen(audio: np.ndarray) -> Tensor:
    """A unit vector whose angle is the sound's mean level, in right angles."""
    angle = float(audio.mean()) * math.pi / 2
    return torch.tensor([[math.cos(angle), math.sin(angle)]])


def encoder(below: float | None = 0.9) -> AudioEncoderConfig:
    """Of clips of eight samples."""
    return AudioEncoderConfig(clip_s=8 / 16_000, apart_below=below)


def cut(prompt: str, sounds: dict[str, np.ndarray], below: float | None = 0.9, **request: object) -> tuple[str, dict]:
    return in_time(prompt, sounds, PaintRequest.parse(request), listen, encoder(below))


def test_parts_follow_one_another_and_are_repeated() -> None:
    assert [part.tolist() for part in parts_in_time(np.arange(4), 2, 5)] == [[0, 1, 0, 1, 0], [2, 3, 2, 3, 2]]
    assert [len(part) for part in parts_in_time(np.arange(10), 3, 3)] == [4, 3, 3]
    assert [part.tolist() for part in parts_in_time(np.arange(3), 4, 8)] == [[0, 1, 2]], "no part is empty"


def test_halves_of_one_thing_and_of_two_are_told_apart_by_what_the_encoder_says_of_clips() -> None:
    def embed(waves: Tensor) -> Tensor:
        return torch.cat([listen(wave.numpy()) for wave in waves])

    assert apart_below(embed, torch.linspace(0, 1, 9)[:8, None].expand(8, 6)) == pytest.approx(
        1 / 3 * math.cos(math.pi / 16) + 2 / 3
    )
    assert apart_below(embed, torch.ones(7, 6)) is None, "few clips"
    assert apart_below(embed, torch.ones(9, 6)) is None, "an encoder that tells nothing apart"
    assert apart_below(embed, torch.ones(9, 1)) is None
    assert tells_of_two(TWO, listen, encoder())
    assert not tells_of_two(ONE, listen, encoder())
    assert not tells_of_two(TWO, listen, encoder(None)), "a bundle of before"
    assert not tells_of_two(TWO * np.repeat([0.1, 1], 4), listen, encoder()), "next to silence is no second thing"
    assert not tells_of_two(np.zeros(8, np.float32), listen, encoder(2.0))


def test_only_a_sound_that_is_alone_is_cut_by_itself() -> None:
    prompt, found = cut("a <dog*0.6> by <dog>", {"dog": TWO})
    assert prompt == "a <dog_1*0.6> and <dog_2*0.6> by <dog_1> and <dog_2>"
    assert {name: part.tolist() for name, part in found.items()} == {
        "dog_1": np.tile(TWO[:4], 2).tolist(), "dog_2": np.tile(TWO[4:], 2).tolist(),
    }  # fmt: skip
    for given, below, request in (
        ({"dog": ONE}, 0.9, {}),
        ({"dog": TWO}, None, {}),
        ({"dog": TWO}, 0.9, {"sound_parts": 1}),
        ({"dog": TWO}, 0.9, {"mixing": "words"}),
        ({"dog": TWO, "cat": ONE}, 0.9, {}),
    ):
        prompt, found = cut("<dog>", given, below, **request)
        assert (prompt, found) == ("<dog>", given)


def test_parts_that_are_asked_for_are_made_of_every_sound() -> None:
    prompt, found = cut("<dog> and <cat>", {"dog": ONE, "cat": TWO}, None, sound_parts=3)
    assert prompt == "<dog_1> and <dog_2> and <dog_3> and <cat_1> and <cat_2> and <cat_3>"
    assert list(found) == ["dog_1", "dog_2", "dog_3", "cat_1", "cat_2", "cat_3"]
    prompt, found = cut("<dog>", {"dog": TWO, "dog_2": ONE}, sound_parts=2)
    assert (prompt, set(found)) == ("<dog__1> and <dog__2>", {"dog_2", "dog__1", "dog__2"})
    prompt, found = cut("<dog>", {"dog": TWO, "cat": ONE}, sound_parts=2, negative_prompt="<cat> and <dog>")
    assert set(found) == {"dog", "cat", "dog_1", "dog_2"}, "what is not wanted is heard whole"
    with pytest.raises(UserError, match="sound_parts=3: makes 9 sounds of 3"):
        cut("<a> <b> <c>", {"a": ONE, "b": ONE, "c": ONE}, sound_parts=3)


def test_a_painter_paints_the_parts_of_a_sound_as_it_paints_so_many_sounds(
    painter: Painter, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = sound(1), sound(2)
    whole, samples = np.concatenate([first, second]), painter.aligner.config.clip_samples
    assert len(first) == samples
    two = painter.embed_request({"a": first, "b": second}, PaintRequest(prompt="a photo of <a> and <b>"))[0]
    assert torch.equal(painter.embed_request(whole, PaintRequest(sound_parts=2))[0], two)
    one = painter.embed_request(whole, PaintRequest(sound_parts=1))[0]
    assert torch.equal(painter.embed_request(whole, PaintRequest())[0], one), "this bundle knows no cosine"
    monkeypatch.setattr(painter.aligner, "config", painter.aligner.config.model_copy(update={"apart_below": 1.1}))
    assert torch.equal(painter.embed_request(whole, PaintRequest())[0], two)
    assert len(painter.generate(whole, PaintRequest(steps=2, num_images=2))) == 2
