"""Inversion and masks with small random models: what may not change does not, and each setting does its part."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from aai.editing import MARGIN, Change, Repainting, derived_masks, disagreement, invert, picture_of, repaint, repainted
from aai.errors import UserError
from aai.inject import Injector
from aai.painter import Painter
from aai.sampling import PaintRequest
from aai.silhouette import grown, silhouette

HOW = Repainting(steps=5, painted=4, guidance_scale=3.0, fresh=0.5)
EVERYWHERE = torch.ones(2, 1, 64, 64)


@pytest.fixture(scope="module")
def change(pipe: StableDiffusionPipeline) -> Change:
    injector = Injector(pipe.text_encoder, pipe.tokenizer)
    rows = []
    for text in ("a photo of a big dog in the rain", "a sketch of a small bell at night", ""):
        rows.append(injector.encode([text] * 2)[0].detach())
    return Change(*rows)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def latents(seed: int = 0) -> Tensor:
    return torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_the_way_up_is_the_way_down(pipe: StableDiffusionPipeline, change: Change) -> None:
    """Without guidance and with the old prompt the picture comes back, nearly: each step up takes the slope before."""
    start = latents()
    way = invert(pipe, start, change.source, 50, 50)
    assert len(way) == 51
    assert torch.equal(way[0], start)
    same = Change(change.source, change.source, change.negative)
    ones = torch.ones(2, 1, 8, 8)
    back = repaint(pipe, way, same, ones, 50, 1.0, latents(1), 0.0)
    assert (back - start).std() < 0.1 * start.std()
    other = repaint(pipe, way, same, ones, 50, 1.0, latents(1), 1.0)
    assert (other - start).std() > 0.5 * start.std()


def test_outside_the_mask_nothing_changes(pipe: StableDiffusionPipeline, change: Change, pixels: Tensor) -> None:
    way = invert(pipe, latents(), change.source, 5, 4)
    half = torch.zeros(2, 1, 8, 8)
    half[..., :4] = 1
    done = repaint(pipe, way, change, half, 5, 3.0, latents(1), 0.5)
    assert torch.equal(done[..., 4:], way[0][..., 4:])
    assert not torch.allclose(done[..., :4], way[0][..., :4])
    mask = torch.zeros(2, 1, 64, 64)
    mask[0, :, 10:30, 10:30] = 1
    pictures = repainted(pipe, pixels, change, HOW, [1, 2], mask)
    assert torch.equal(pictures[1], pixels[1])
    outside = mask.expand_as(pixels) == 0
    assert torch.equal(pictures[outside], pixels[outside])
    assert not torch.allclose(pictures[0, :, 10:30, 10:30], pixels[0, :, 10:30, 10:30], atol=0.05)


def test_a_map_tells_where_two_prompts_disagree(pipe: StableDiffusionPipeline, change: Change) -> None:
    both = change.source, change.target
    mask = disagreement(pipe, latents(), *both, [1, 2])
    assert mask.shape == (2, 1, 8, 8)
    assert mask.amax((1, 2, 3)).tolist() == [1, 1]
    assert mask.min() > 0
    alone = disagreement(pipe, latents()[1:], *(part[1:] for part in both), [2])
    torch.testing.assert_close(alone, mask[1:], atol=1e-3, rtol=0)
    assert not torch.allclose(disagreement(pipe, latents(), *both, [3, 2])[0], mask[0], atol=1e-3)
    assert disagreement(pipe, latents(), change.source, change.source, [1, 2]).max() == 0


def test_an_edit_may_change_the_object_and_its_margin_and_a_stylization_all_else(
    pipe: StableDiffusionPipeline, change: Change, pixels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The map of a picture is what its two prompts disagree on; each picture is cut by its own."""
    told = change.source, change.target
    pixels = 0.1 * pixels
    pixels[0, 0, :, 20:44] += 0.8  # a red column, and a blue row
    pixels[1, 2, 20:44] += 0.8
    scaled = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
    likely = disagreement(pipe, scaled, *told, [0, 0])[:, 0].numpy()
    expected = [silhouette(np.asarray(picture_of(x)), at, 0.6) for x, at in zip(pixels, likely, strict=True)]
    assert all(0 < one.mean() < 1 for one in expected)
    assert not np.array_equal(*expected)
    edit, stylize = (derived_masks(pipe, pixels, *told, verb, 0.6) for verb in ("edit", "stylize"))
    for i, one in enumerate(expected):
        assert np.array_equal(edit[i, 0].numpy(), grown(one, MARGIN))
        assert np.array_equal(stylize[i, 0].numpy(), ~one)
    nowhere = [derived_masks(pipe, pixels, *told, verb, 1.0).mean().item() for verb in ("edit", "stylize")]
    assert nowhere == [0, 1]


def test_a_mask_in_between_mixes_what_is_painted_with_what_was_there(
    pipe: StableDiffusionPipeline, change: Change, pixels: Tensor
) -> None:
    whole = repainted(pipe, pixels, change, HOW, [1, 2], EVERYWHERE)
    part = repainted(pipe, pixels, change, HOW, [1, 2], 0.25 * EVERYWHERE)
    torch.testing.assert_close(part, 0.25 * whole + 0.75 * pixels)


def test_prompts_that_say_the_same_find_no_object(
    pipe: StableDiffusionPipeline, change: Change, pixels: Tensor
) -> None:
    mask = derived_masks(pipe, pixels, change.source, change.source, "edit", 0.7)
    assert mask.max() == 0
    assert torch.equal(repainted(pipe, pixels, change, HOW, [1, 2], mask), pixels)


def test_each_setting_counts(pipe: StableDiffusionPipeline, change: Change, pixels: Tensor) -> None:
    def painted(seeds: tuple[int, int] = (1, 2), **changes: float) -> Tensor:
        return repainted(pipe, pixels, change, Repainting(**{**vars(HOW), **changes}), seeds, EVERYWHERE)

    first = painted()
    assert torch.equal(first, painted())
    for other in (
        painted(guidance_scale=1.0),
        painted(painted=2),
        painted(fresh=1.0),
        painted(steps=10),
        painted(reuse_steps=2),
    ):
        assert not torch.allclose(other, first, atol=1e-3)
    another = painted(seeds=(1, 5))
    torch.testing.assert_close(another[0], first[0], atol=1e-3, rtol=0)
    assert not torch.allclose(another[1], first[1], atol=1e-3)


def test_a_map_spreads_to_the_neighbours_of_where_prompts_disagree(
    pipe: StableDiffusionPipeline, change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    def at_one_place(_pipe: object, latents: Tensor, _t: object, embeds: Tensor) -> Tensor:
        told = torch.zeros_like(latents)
        told[len(told) // 2 :, :, 3, 4] = 1
        return told

    monkeypatch.setattr("aai.editing._predict", at_one_place)
    mask = disagreement(pipe, latents(), change.source, change.target, [1, 2])
    assert (mask[0, 0] > 0).nonzero().tolist() == [[row, column] for row in (2, 3, 4) for column in (3, 4, 5)]


def test_a_given_mask_of_one_pixel_opens_its_place(
    pipe: StableDiffusionPipeline, change: Change, pixels: Tensor
) -> None:
    mask = torch.zeros(2, 1, 64, 64)
    mask[:, 0, 11, 13] = 1
    pictures = repainted(pipe, pixels, change, HOW, [1, 2], mask)
    assert (pictures[:, :, 11, 13] - pixels[:, :, 11, 13]).abs().max() > 0.01


def test_fresh_noise_is_mixed_in_at_full_strength(
    pipe: StableDiffusionPipeline, change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise of unit variance again: with less of it than the level has the picture comes out pale."""
    seen: list[Tensor] = []

    def predict(_pipe: object, latents: Tensor, _t: object, _embeds: Tensor) -> Tensor:
        seen.append(latents)
        return torch.zeros_like(latents)

    monkeypatch.setattr("aai.editing._predict", predict)
    still = torch.zeros(2, 8, 64, 64)
    level = float(1 - pipe.scheduler.alphas_cumprod[1]) ** 0.5  # of the only step
    own = level * torch.randn(still.shape, generator=torch.Generator().manual_seed(1))
    fresh = torch.randn(still.shape, generator=torch.Generator().manual_seed(2))
    for share in (0.0, 0.5, 1.0):
        seen.clear()
        repaint(pipe, [still, own], change, torch.ones(2, 1, 64, 64), 1, 1.0, fresh, share)
        assert seen[0][:2].std().item() == pytest.approx(level, rel=0.02), share


def test_latents_have_the_scale_that_the_model_was_trained_on(
    pipe: StableDiffusionPipeline, change: Change, pixels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Tensor] = []

    def stopped(_pipe: object, latents: Tensor, *_: object) -> list[Tensor]:
        started.append(latents)
        raise KeyboardInterrupt

    monkeypatch.setattr("aai.editing.invert", stopped)
    with pytest.raises(KeyboardInterrupt):
        repainted(pipe, pixels, change, HOW, [1, 2], EVERYWHERE)
    expected = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
    torch.testing.assert_close(started[0], expected, atol=1e-4, rtol=0)
    assert pipe.vae.config.scaling_factor != 1


def test_a_velocity_is_turned_into_noise_at_the_level_that_was_asked_for(
    pipe: StableDiffusionPipeline, change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside an oracle: a model whose velocity is exactly that of one noise; its way up is that of this noise."""
    start, noise = latents(), latents(7)
    alphas = pipe.scheduler.alphas_cumprod

    def velocity(_pipe: object, latents: Tensor, t: Tensor, _embeds: Tensor) -> Tensor:
        alpha = alphas[int(t)]
        return (noise - (1 - alpha).sqrt() * latents) / alpha.sqrt()

    monkeypatch.setattr("aai.editing._predict", velocity)
    way = invert(pipe, start, change.source, 10, 6)
    alpha = alphas[501]  # of the sixth of ten levels
    torch.testing.assert_close(way[-1], alpha.sqrt() * start + (1 - alpha).sqrt() * noise, atol=0.02, rtol=0)


def sound_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(16000).astype(np.float32) * 0.1


def as_array(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def test_the_derived_mask_is_of_what_the_picture_shows_whatever_is_heard(
    painter: Painter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each picture has a mask of the words that fit it, and one however often it is given."""
    asked: list[tuple[Any, ...]] = []

    def noted(_pipe: object, shown: torch.Tensor, *told: Any) -> torch.Tensor:
        asked.append((shown, *told))
        mask = torch.zeros_like(shown[:, :1])
        mask[:, :, :, :32] = 1
        return mask

    monkeypatch.setattr("aai.painter.derived_masks", noted)
    pictures = [Image.new("RGB", (64, 64), color) for color in ("white", "black")]
    thrice = [*pictures, pictures[0]]
    request = PaintRequest(steps=4, repaint="invert", mask_threshold=0.6)
    for verb in ("edit", "stylize"):
        for heard in (1, 2):
            target, source = painter.embed_repaint(verb, [sound_of(heard)] * 3, thrice)
            found = as_array(painter.repaint(verb, target, source, thrice, [3, 4, 5], request))
            given = as_array(thrice)
            assert np.array_equal(found[:, :, 32:], given[:, :, 32:])
            assert not np.array_equal(found[:, :, :32], given[:, :, :32])
    texts = painter.concepts.described(painter.concepts.clip.images(pictures))
    assert [verb for *_, verb, _ in asked] == ["edit", "edit", "stylize", "stylize"]
    for shown, named, unnamed, _, threshold in asked:
        assert threshold == 0.6
        assert len(shown) == 2
        torch.testing.assert_close(shown[0], torch.ones(3, 64, 64))
        torch.testing.assert_close(named, painter.embed_text(texts[0]))
        torch.testing.assert_close(unnamed, painter.embed_text(texts[1]))


def test_a_style_has_as_much_of_the_words_for_what_is_heard_as_of_the_sound(painter: Painter) -> None:
    """The least bit of it put all of them in: the slider of the page did nothing but at its end."""
    given, heard = [Image.new("RGB", (64, 64), "white")], [np.sin(np.arange(16_000, dtype=np.float32))]
    rows = [painter.embed_repaint("stylize", heard, given, sound_strength=s)[0] for s in (0.0, 1e-6, 0.5, 1.0)]
    none, least, half, whole = rows
    assert (whole - none).abs().max() > 0.1
    torch.testing.assert_close(least, none, atol=1e-3, rtol=0)
    torch.testing.assert_close(half, (none + whole) / 2)
    plain = painter.embed_text([f"{painter.concepts.head_of(painter.concepts.clip.images(given))} thing"])
    torch.testing.assert_close(none, plain)


def test_pictures_of_sixteen_bits_are_repainted_as_those_of_eight(painter: Painter) -> None:
    greys = np.linspace(0, 65_535, 64 * 64).reshape(64, 64).astype(np.uint16)
    deep, usual = Image.fromarray(greys), Image.fromarray((greys >> 8).astype(np.uint8))
    request, heard = PaintRequest(steps=4, repaint="invert"), np.sin(np.arange(16_000, dtype=np.float32))
    for given, mask, same in ((deep, None, None), (usual, deep, usual)):
        found, told = painter.edit(heard, given, request, mask), painter.edit(heard, usual, request, same)
        assert np.array_equal(np.asarray(found[0]), np.asarray(told[0]))


@pytest.mark.parametrize("verb", ["edit", "stylize"])
@pytest.mark.parametrize("repaint", ["img2img", "invert"])
def test_a_sound_to_keep_away_from_is_refused_by_its_name(painter: Painter, verb: str, repaint: str) -> None:
    request = PaintRequest(steps=4, repaint=repaint, negative_prompt="<sound>")
    with pytest.raises(UserError, match=r"^negative_prompt=<sound>: names a sound"):
        getattr(painter, verb)(np.ones(16_000, np.float32), Image.new("RGB", (64, 64)), request)


def test_a_picture_is_read_on_the_painters_own_device(painter: Painter, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a second GPU, too: CLIP on the first one would be handed what lies on the second."""
    there, asked = copy.copy(painter), []
    monkeypatch.setattr("aai.painter.shared_clip", lambda spec, device: asked.append(device) or painter.concepts.clip)
    there.__dict__.pop("concepts", None)
    there.device = torch.device("cuda:1")
    assert there.concepts.vocabulary == painter.vocabulary
    assert asked == ["cuda:1"]
