"""Painting with small random models: seeds, batches, strength, editing; and the floors beside it."""

import numpy as np
import pytest
import torch
from PIL import Image

from aai.adapt import AdapterConfig, AudioAdapter
from aai.concepts import Vocabulary
from aai.conditions import CONDITIONS, Conditions, HeldOutClip
from aai.encoders.audio import AudioEncoder, AudioEncoderConfig
from aai.errors import UserError
from aai.foundation.clip import FrozenClip
from aai.foundation.identity import FoundationSpec
from aai.foundation.loaders import load_diffusion
from aai.painter import Painter, PaintRequest, check_repaint
from tests import tiny

VOCABULARY = Vocabulary(objects=("a dog", "a bell", "a clock"), ambiences=("at night", "in the rain"))
REQUEST = PaintRequest(steps=2)


def sound(seed: int) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(32000)).astype(np.float32)


@pytest.fixture(scope="module")
def painter(tmp_path_factory: pytest.TempPathFactory) -> Painter:
    folder = tmp_path_factory.mktemp("tiny")
    clip = tiny.write_clip(folder / "clip")
    spec = FoundationSpec(clip=str(clip), diffusion=str(tiny.write_diffusion(folder / "diffusion", clip)))
    torch.manual_seed(0)
    aligner = AudioEncoder(AudioEncoderConfig(hidden_size=32, num_layers=1, num_heads=2, head_size=32, embed_dim=32))
    pipe = load_diffusion(spec)
    adapter = AudioAdapter(AdapterConfig(num_tokens=2, hidden_size=32, embed_dim=32, token_dim=32), 1.0)
    return Painter(pipe, aligner.eval(), adapter.eval(), spec, VOCABULARY)


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image, np.int16) for image in images])


def test_same_seed_same_pixels_other_sound_other_pixels(painter: Painter) -> None:
    first = pixels(painter.generate(sound(1), REQUEST))
    assert first.shape == (1, 64, 64, 3)
    assert np.array_equal(first, pixels(painter.generate(sound(1), REQUEST)))
    assert not np.array_equal(first, pixels(painter.generate(sound(2), REQUEST)))


def test_picture_i_of_a_request_is_the_picture_of_seed_plus_i(painter: Painter) -> None:
    three = pixels(painter.generate(sound(1), PaintRequest(steps=2, num_images=3, seed=5)))
    alone = pixels(painter.generate(sound(1), PaintRequest(steps=2, seed=7)))
    assert np.abs(three[2] - alone[0]).max() <= 1  # rounding of another batch size


def test_strength_zero_paints_what_plain_diffusion_paints(painter: Painter) -> None:
    silent = pixels(painter.generate(sound(1), PaintRequest(steps=2, sound_strength=0)))
    plain = painter.paint(painter.embed_text(["a photo of thing"]), [0], REQUEST)
    assert np.array_equal(silent, pixels(plain))


def test_editing_starts_from_the_given_picture(painter: Painter) -> None:
    white, black = Image.new("RGB", (100, 80), "white"), Image.new("RGB", (100, 80), "black")
    little = PaintRequest(steps=10, denoise_strength=0.1)
    for verb in (painter.edit, painter.stylize):
        a, b = pixels(verb(sound(1), white, little)), pixels(verb(sound(1), black, little))
        assert a.shape == (1, 64, 64, 3)
        assert not np.array_equal(a, b)


def test_a_repaint_paints_at_least_one_step(painter: Painter) -> None:
    black = Image.new("RGB", (64, 64))
    with pytest.raises(UserError, match=r"^denoise_strength=0\.3: times 3 steps is below 1: .*; raise it to 0\.34"):
        painter.edit(sound(1), black, PaintRequest(steps=3, denoise_strength=0.3))
    assert painter.edit(sound(1), black, PaintRequest(steps=3, denoise_strength=0.34))
    for steps in range(1, 101):  # the remedy is one, also at the smallest strength there is
        with pytest.raises(UserError) as error:
            check_repaint("stylize", PaintRequest(steps=steps, denoise_strength=5e-324))
        enough = float(error.value.remedy.split()[3].rstrip(","))
        check_repaint("stylize", PaintRequest(steps=steps, denoise_strength=enough))


def test_several_sounds_by_name(painter: Painter) -> None:
    both = {"dog": sound(1), "rain": sound(2)}
    request = PaintRequest(steps=2, prompt="a photo of <dog> in <rain>")
    swapped = {"dog": sound(2), "rain": sound(1)}
    assert not np.array_equal(pixels(painter.generate(both, request)), pixels(painter.generate(swapped, request)))


def test_no_sound_is_refused(painter: Painter) -> None:
    with pytest.raises(UserError, match="holds no sound"):
        painter.generate(np.zeros(0, np.float32), REQUEST)


def test_every_condition_gives_a_prompt_and_none_depends_on_its_batch(painter: Painter) -> None:
    captions = ["a sketch of a big dog in the rain", "a photo of a bell at night"]
    conditions = Conditions(painter, FrozenClip(painter.foundation), captions, torch.zeros(32))
    clips = [HeldOutClip(sound(i), captions[i % 2], i) for i in range(3)]
    seen = {}
    for name in CONDITIONS:
        seen[name] = conditions.embed(name, clips)
        assert seen[name].shape == (3, 32, 32)
        assert torch.allclose(conditions.embed(name, clips[1:2]), seen[name][1:2], atol=1e-4), name
    assert torch.equal(seen["ceiling"][0], painter.embed_text(["a photo of a big dog in the rain"])[0])
    assert not torch.allclose(seen["random_token"], seen["sound"])


def test_concepts_move_an_embedding_to_what_a_picture_shows(painter: Painter) -> None:
    concepts = painter.concepts
    for kind in ("objects", "ambiences"):
        features = concepts.features[kind]
        target = torch.eye(len(features))[:1]
        moved = concepts.move(features[1:2], kind, target, amount=2.0)
        assert moved @ features[0] > features[1] @ features[0]
