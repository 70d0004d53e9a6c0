"""Painting with small random models: seeds, guidance, strength, editing, and what a request may ask."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from aai.adapt import AdapterConfig
from aai.bundle import BundleConfig, write_bundle
from aai.concepts import STYLE
from aai.errors import UserError
from aai.inject import Sound
from aai.painter import REMEMBERED, Painter
from aai.sampling import PaintRequest

REQUEST = PaintRequest(steps=2)


def sound(seed: int) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(32000)).astype(np.float32)


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


def test_several_sounds_stand_where_the_prompt_names_them(painter: Painter) -> None:
    both = {"dog": sound(1), "rain": sound(2)}
    found = painter.generate(both, REQUEST.model_copy(update={"prompt": "<rain*0.5> and <dog>", "mixing": "words"}))
    embeds = painter.injector.embed(
        "<b> and <a>", {"a": Sound(painter.hear(sound(1))), "b": Sound(painter.hear(sound(2)), 0.5)}
    )
    assert np.array_equal(pixels(found), pixels(painter.paint(embeds, [0], REQUEST)))
    default, told = (
        painter.generate([sound(1), sound(2)], REQUEST.model_copy(update={"prompt": prompt}))
        for prompt in (None, "a photo of <sound> and <sound2>")
    )
    assert np.array_equal(pixels(default), pixels(told))
    with pytest.raises(UserError, match="has no placeholder <rain>"):
        painter.generate(both, REQUEST.model_copy(update={"prompt": "a photo of <dog>"}))


def test_a_sound_may_stand_in_the_negative_prompt(painter: Painter) -> None:
    request = PaintRequest(steps=2, seed=9, negative_prompt="<rain> and <sound>", prompt="a photo of <sound>")
    found = pixels(painter.generate({"sound": sound(1), "rain": sound(2)}, request))
    away = painter.injector.embed(
        "<b> and <a>", {"a": Sound(painter.hear(sound(1))), "b": Sound(painter.hear(sound(2)))}
    )
    expected = painter.paint(painter.embed(sound(1), "a photo of <sound>"), [9], request, negative=away)
    assert np.array_equal(found, pixels(expected))
    only = PaintRequest(steps=2, seed=9, negative_prompt="<rain>")
    told = painter.generate({"sound": sound(1), "rain": sound(2)}, only)
    other = painter.generate([sound(1)], REQUEST.model_copy(update={"seed": 9}))
    assert not np.array_equal(pixels(told), pixels(other))


def test_of_a_long_sound_the_asked_part_is_heard(painter: Painter) -> None:
    samples = painter.aligner.config.clip_samples
    rng = np.random.default_rng(0)
    long = (0.01 * rng.standard_normal(3 * samples)).astype(np.float32)
    long[:samples] *= 20
    middle, first, last = long[samples : 2 * samples], long[:samples], long[2 * samples :]
    torch.testing.assert_close(painter.listen(long), painter.listen(middle))
    torch.testing.assert_close(painter.listen(long, "loudest"), painter.listen(first))
    halves = [long[i * samples // 2 : i * samples // 2 + samples] for i in range(5)]
    mean = torch.stack([painter.listen(part) for part in halves]).mean(0)
    torch.testing.assert_close(painter.listen(long, "mean"), mean / mean.norm())
    assert not torch.allclose(painter.listen(long), painter.listen(last))
    longer = (0.01 * rng.standard_normal(12 * samples)).astype(np.float32)  # 23 windows
    changed = longer.copy()
    changed[-samples // 2 :] *= 30
    assert not torch.allclose(painter.listen(longer, "mean"), painter.listen(changed, "mean"), atol=1e-4)
    heard = painter.generate(long, REQUEST.model_copy(update={"window": "loudest"}))
    assert np.array_equal(pixels(heard), pixels(painter.generate(first, REQUEST)))
    given = Image.new("RGB", (64, 64))
    edited = painter.edit(long, given, REQUEST.model_copy(update={"window": "loudest"}))
    assert np.array_equal(pixels(edited), pixels(painter.edit(first, given, REQUEST)))


def test_what_does_not_fit_is_painted_in_halves(painter: Painter, monkeypatch: pytest.MonkeyPatch) -> None:
    request = PaintRequest(steps=2, num_images=5, seed=3)
    whole, given = pixels(painter.generate(sound(1), request)), Image.new("RGB", (64, 64), "white")
    edited = pixels(painter.edit(sound(1), given, request))
    inverting = request.model_copy(update={"steps": 4, "repaint": "invert"})
    inverted = pixels(painter.edit(sound(1), given, inverting))
    decode = type(painter.pipe.vae).decode

    def small(vae: Any, latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(latents) > 2:
            raise torch.OutOfMemoryError("no room")
        return decode(vae, latents, *args, **kwargs)

    monkeypatch.setattr(type(painter.pipe.vae), "decode", small)
    assert np.abs(pixels(painter.generate(sound(1), request)) - whole).max() <= 1
    assert np.abs(pixels(painter.edit(sound(1), given, request)) - edited).max() <= 1
    assert np.abs(pixels(painter.edit(sound(1), given, inverting)) - inverted).max() <= 1

    def none(vae: Any, latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(type(painter.pipe.vae), "decode", none)
    with pytest.raises(torch.OutOfMemoryError):
        painter.generate(sound(1), request)


def test_a_sound_is_listened_to_once(painter: Painter, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(painter, "_heard", {})
    monkeypatch.setattr(
        type(painter.aligner), "parts", lambda self, audio, count: asked.append(audio) or audio[:, None, :32].clone()
    )
    first = painter.listen(sound(1))
    assert torch.equal(painter.listen(sound(1).copy()), first)
    assert len(asked) == 1
    painter.listen(sound(2))
    painter.listen(sound(1), "mean")
    assert len(asked) == 3
    for i in range(REMEMBERED):
        painter.listen(np.full(40, i, np.float32))
    assert len(painter._heard) == REMEMBERED
    painter.listen(sound(1))
    assert len(asked) == 3 + REMEMBERED + 1


def test_editing_starts_from_the_given_picture(painter: Painter) -> None:
    white, black = Image.new("RGB", (100, 80), "white"), Image.new("RGB", (100, 80), "black")
    little = PaintRequest(steps=10, denoise_strength=0.1)
    for verb in (painter.edit, painter.stylize):
        a, b = pixels(verb(sound(1), white, little)), pixels(verb(sound(1), black, little))
        assert a.shape == (1, 64, 64, 3)
        assert not np.array_equal(a, b)


def decoded(painter: Painter, latents: torch.Tensor) -> np.ndarray:
    """What the VAE makes of latents, as int16 [B, H, W, 3]."""
    values = painter.pipe.vae.decode(latents / painter.pipe.vae.config.scaling_factor).sample
    return ((values / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy().astype(np.int16)


@torch.no_grad()
def denoised(
    painter: Painter,
    latents: torch.Tensor,
    embed: torch.Tensor,
    negative: str,
    scale: float,
    steps: int,
    first: int = 0,
) -> np.ndarray:
    """Steps `first` and later, each two passes of the UNet: uncond + scale * (cond - uncond)."""
    scheduler = painter.pipe.scheduler.from_config(painter.pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(first)
    uncond = painter.embed_text([negative])
    for timestep in scheduler.timesteps[first:]:
        without, wanted = (
            painter.pipe.unet(latents, timestep, encoder_hidden_states=e).sample for e in (uncond, embed)
        )
        latents = scheduler.step(without + scale * (wanted - without), timestep, latents).prev_sample
    return decoded(painter, latents)


def by_hand(painter: Painter, embed: torch.Tensor, negative: str, scale: float, seed: int, steps: int) -> np.ndarray:
    """One picture from noise alone."""
    latents = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(seed))
    return denoised(painter, latents, embed, negative, scale, steps)


@pytest.mark.parametrize(("negative", "scale"), [("", 3.0), ("", 7.5), ("in the rain", 3.0), ("in the rain", 1.5)])
def test_a_picture_equals_two_passes_by_hand(painter: Painter, negative: str, scale: float) -> None:
    request = PaintRequest(steps=2, seed=9, negative_prompt=negative, guidance_scale=scale)
    ours = pixels(painter.generate(sound(1), request))
    expected = by_hand(painter, painter.embed(sound(1), "a photo of <sound>"), negative, scale, 9, 2)
    assert np.abs(ours - expected).max() <= 1
    plain = by_hand(painter, painter.embed(sound(1), "a photo of <sound>"), "at night", 5.0, 9, 2)
    assert np.abs(ours - plain).max() > 1


def test_each_picture_depends_on_its_own_seed_alone(painter: Painter) -> None:
    embeds = painter.embed(sound(1), "a photo of <sound>").expand(3, -1, -1)
    first = pixels(painter.paint(embeds, [5, 9, 5], REQUEST))
    second = pixels(painter.paint(embeds, [8, 9, 5], REQUEST))
    assert np.abs(first[0] - first[2]).max() <= 1
    assert np.abs(first[1:] - second[1:]).max() <= 1
    assert np.abs(first[0] - first[1]).max() > 1
    assert np.abs(first[0] - second[0]).max() > 1


def test_steps_and_prompt_of_a_request_count(painter: Painter) -> None:
    one, two = (pixels(painter.generate(sound(1), PaintRequest(steps=steps))) for steps in (1, 2))
    assert not np.array_equal(one, two)
    named = PaintRequest(steps=2, prompt="a sketch of <sound>")
    expected = painter.paint(painter.embed(sound(1), "a sketch of <sound>"), [0], REQUEST)
    assert np.array_equal(pixels(painter.generate(sound(1), named)), pixels(expected))


@pytest.mark.parametrize("strength", [0.1, 0.9])
def test_denoising_begins_at_the_noise_level_of_its_strength(painter: Painter, strength: float) -> None:
    """0.1 of 10 steps: the last one, from little noise; 0.9: all but the first, from nearly nothing but noise."""
    given = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    embeds, request = painter.embed_text(["a clock"]), PaintRequest(steps=10, guidance_scale=4.0, seed=6)
    found = pixels(painter.paint(embeds, [6], request, [given], strength))
    generator, first = torch.Generator().manual_seed(6), 9 if strength == 0.1 else 1
    scheduler = painter.pipe.scheduler.from_config(painter.pipe.scheduler.config)
    scheduler.set_timesteps(10)
    values = torch.from_numpy(np.asarray(given, np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    with torch.no_grad():
        clean = painter.pipe.vae.encode(values).latent_dist.sample(generator) * painter.pipe.vae.config.scaling_factor
    noise = torch.randn(1, 8, 8, 8, generator=generator)
    noisy = scheduler.add_noise(clean, noise, scheduler.timesteps[first : first + 1])
    assert np.abs(found - denoised(painter, noisy, embeds, "", 4.0, 10, first)).max() <= 1


def test_the_requests_denoise_strength_is_the_one_used(painter: Painter) -> None:
    given = Image.new("RGB", (64, 64), "white")
    default, same, less = (
        pixels(painter.edit(sound(1), given, PaintRequest(steps=5, denoise_strength=strength)))
        for strength in (None, 0.8, 0.4)
    )
    assert np.array_equal(default, same)
    assert not np.array_equal(default, less)
    embeds, ten = painter.embed_text(["a clock"]), PaintRequest(steps=10)
    told, short = (painter.paint(embeds, [0], ten, [given], *strength) for strength in ((), (0.7,)))
    assert np.array_equal(pixels(told), pixels(short))


def test_several_edits_of_one_request_have_seeds_of_their_own(painter: Painter) -> None:
    given = Image.new("RGB", (64, 64), "white")
    two = pixels(painter.edit(sound(1), given, PaintRequest(steps=2, num_images=2, seed=3)))
    alone = pixels(painter.edit(sound(1), given, PaintRequest(steps=2, seed=4)))
    assert two.shape == (2, 64, 64, 3)
    assert np.abs(two[1] - alone[0]).max() <= 1
    assert np.abs(two[0] - two[1]).max() > 1


@pytest.mark.parametrize("verb", ["edit", "stylize"])
def test_edit_says_what_is_heard_and_stylize_what_is_shown_in_the_others_ambience(painter: Painter, verb: str) -> None:
    pictures = [Image.new("RGB", (64, 64), color) for color in ("white", "black")]
    sounds = [sound(1), sound(2)]
    embeds, _ = painter.embed_repaint(verb, sounds, pictures, "a photo of <sound> at night")
    concepts, shown = painter.concepts, painter.concepts.clip.images(pictures)
    for row, audio, picture in zip(embeds, sounds, shown, strict=True):
        both = [(painter.listen(audio), picture[None], 1.0), (picture[None], painter.listen(audio), STYLE)]
        expected, swapped = (
            painter.injector.encode(
                ["a photo of <sound> at night"],
                painter.adapter(concepts.move(mine, "ambiences", concepts.read(others, "ambiences"), amount)),
            )[0][0]
            for mine, others, amount in (both if verb == "edit" else reversed(both))
        )
        torch.testing.assert_close(row, expected.detach(), atol=1e-4, rtol=0)
        assert (row - swapped).abs().max() > 1e-3


@pytest.mark.parametrize("verb", ["edit", "stylize"])
def test_the_old_prompt_says_what_the_picture_shows(painter: Painter, verb: str) -> None:
    """In everything else it is the new one: so they disagree where the picture is to change."""
    picture, audio = Image.new("RGB", (64, 64), "white"), sound(1)
    concepts, shown = painter.concepts, painter.concepts.clip.images([picture])
    wanted = concepts.move(painter.listen(audio), "ambiences", concepts.read(shown, "ambiences"))
    edited = concepts.move(wanted, "objects", concepts.read(shown, "objects"))
    now = edited if verb == "edit" else shown
    _, source = painter.embed_repaint(verb, [audio], [picture], "a photo of <sound> at night")
    expected = painter.injector.encode(["a photo of <sound> at night"], painter.adapter(now))[0]
    torch.testing.assert_close(source, expected.detach(), atol=1e-4, rtol=0)


def test_inversion_keeps_what_the_mask_covers(painter: Painter) -> None:
    rng = np.random.default_rng(0)
    given = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    mask = Image.new("L", (128, 128))
    mask.paste(255, (0, 0, 64, 128))
    request = PaintRequest(steps=5, repaint="invert", num_images=2)
    for verb in (painter.edit, painter.stylize):
        found = pixels(verb(sound(1), given, request, mask))
        assert np.array_equal(found[:, :, 32:], np.repeat(pixels([given]), 2, 0)[:, :, 32:])
        assert not np.array_equal(found[0], found[1])  # another seed
        assert not np.array_equal(found[0, :, :32], pixels([given])[0, :, :32])
        alone = pixels(verb(sound(1), given, request.model_copy(update={"num_images": 1, "seed": 1}), mask))
        assert np.abs(found[1] - alone[0]).max() <= 1
        derived = pixels(verb(sound(1), given, request))
        assert not np.array_equal(derived, found)
    whole = request.model_copy(update={"mask_threshold": 1.0})
    assert np.array_equal(pixels(painter.edit(sound(1), given, whole))[0], pixels([given])[0])
    against = request.model_copy(update={"negative_prompt": "a clock"})
    assert not np.array_equal(
        pixels(painter.edit(sound(1), given, against, mask)), pixels(painter.edit(sound(1), given, request, mask))
    )
    with pytest.raises(UserError, match="mask=a picture: img2img changes the whole picture"):
        painter.edit(sound(1), given, PaintRequest(), mask)


def test_repainting_reads_the_medium_off_the_picture(painter: Painter) -> None:
    picture = Image.new("RGB", (64, 64), "white")
    head = painter.concepts.head_of(painter.concepts.clip.images([picture]))
    for strength in (0.0, 0.5, 1.0):
        read, _ = painter.embed_repaint("edit", [sound(1)], [picture], None, strength)
        told, _ = painter.embed_repaint("edit", [sound(1)], [picture], f"{head} <sound>", strength)
        torch.testing.assert_close(read, told)
    heard = int(painter.concepts.read(painter.listen(sound(1)), "ambiences").argmax())
    for strength, said in ((0.0, ""), (1.0, f" {painter.concepts.vocabulary.ambiences[heard]}")):
        style = ("stylize", [sound(1)], [picture])
        (_, then), (told, _), (styled, now) = (painter.embed_repaint(*style, text, strength)
                                    for text in (f"{head} <sound>", f"{head} <sound>{said}", None))  # fmt: skip
        torch.testing.assert_close(torch.stack([styled, now]), torch.stack([told, then]))
    silent, _ = painter.embed_repaint("edit", [sound(1)], [picture], None, 0.0)
    torch.testing.assert_close(silent, painter.embed_text([f"{head} thing"]))
    full, _ = painter.embed_repaint("edit", [sound(1)], [picture], None)
    torch.testing.assert_close(full, read)
    request = PaintRequest(steps=2, sound_strength=0)
    expected = painter.paint(silent, [0], request, [picture], 0.8)
    assert np.array_equal(pixels(painter.edit(sound(1), picture, request)), pixels(expected))
    with pytest.raises(ValueError, match="argument"):
        painter.embed_repaint("edit", [sound(1)], [picture, picture])


def test_painting_keeps_no_gradients(painter: Painter) -> None:
    assert any(p.requires_grad for p in painter.adapter.parameters())
    found = {
        "listen": painter.listen(sound(1)),
        "hear": painter.hear(sound(1)),
        "embed": painter.embed(sound(1), "a photo of <sound>"),
        "embed_text": painter.embed_text(["a clock"]),
        "embed_repaint": painter.embed_repaint("edit", [sound(1)], [Image.new("RGB", (64, 64))])[0],
    }
    assert [name for name, values in found.items() if values.requires_grad] == []


def test_without_a_vocabulary_nothing_is_edited(painter: Painter) -> None:
    bare = Painter(painter.pipe, painter.aligner, painter.adapter, painter.foundation)
    with pytest.raises(UserError, match="vocabulary"):
        bare.edit(sound(1), Image.new("RGB", (64, 64)), REQUEST)
    assert bare.injector.neutral_word == "thing"


def test_a_painter_comes_out_of_a_bundle_as_it_went_in(painter: Painter, tmp_path: Path) -> None:
    assert painter.sample_rate_hz == 16_000
    assert painter.size_px == 64
    config = BundleConfig(
        foundation=painter.foundation,
        encoder=painter.aligner.config.model_dump(),
        adapter=painter.adapter.cfg.model_dump(),
        vocabulary=painter.vocabulary.model_dump() if painter.vocabulary else None,
        neutral_word="a clock",
    )
    weights = {k: v.contiguous() for k, v in painter.aligner.state_dict().items()}
    write_bundle(tmp_path / "whole", config, weights, painter.adapter.state_dict(), {})
    again = Painter.load(tmp_path / "whole")
    assert again.vocabulary == painter.vocabulary
    assert again.injector.neutral_word == "a clock"
    assert AdapterConfig.parse(config.adapter or {}) == again.adapter.cfg
    assert not any(p.requires_grad for part in (again.adapter, again.aligner) for p in part.parameters())
    assert not again.adapter.training
    prompt = "a photo of <sound>"
    torch.testing.assert_close(again.embed(sound(1), prompt), painter.embed(sound(1), prompt))
    half = config.model_copy(update={"adapter": None, "vocabulary": None})
    write_bundle(tmp_path / "half", half, weights, None, {})
    with pytest.raises(UserError, match="has no adapter"):
        Painter.load(tmp_path / "half")


def test_a_repaint_paints_at_least_one_step(painter: Painter) -> None:
    black = Image.new("RGB", (64, 64))
    with pytest.raises(UserError, match=r"^denoise_strength=0\.3: times 3 steps is below 1: .*; raise it to 0\.34"):
        painter.edit(sound(1), black, PaintRequest(steps=3, denoise_strength=0.3))
    assert painter.edit(sound(1), black, PaintRequest(steps=3, denoise_strength=0.34))


def test_several_sounds_by_name(painter: Painter) -> None:
    both = {"dog": sound(1), "rain": sound(2)}
    request = PaintRequest(steps=2, prompt="a photo of <dog> in <rain>")
    swapped = {"dog": sound(2), "rain": sound(1)}
    assert not np.array_equal(pixels(painter.generate(both, request)), pixels(painter.generate(swapped, request)))


def test_no_sound_is_refused(painter: Painter) -> None:
    with pytest.raises(UserError, match="holds no sound"):
        painter.generate(np.zeros(0, np.float32), REQUEST)
