"""Inversion and masks with small random models: what may not change does not, and each setting does its part."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from aai.editing import Change, Repainting, derive_mask, invert, repaint, repainted
from aai.inject import Injector

HOW = Repainting(steps=5, painted=4, guidance_scale=3.0, threshold=0.5, fresh=0.5)


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
    pictures, masks = repainted(pipe, pixels, change, HOW, [1, 2], mask)
    assert torch.equal(masks, mask)
    assert torch.equal(pictures[1], pixels[1])
    outside = mask.expand_as(pixels) == 0
    assert torch.equal(pictures[outside], pixels[outside])
    assert not torch.allclose(pictures[0, :, 10:30, 10:30], pixels[0, :, 10:30, 10:30], atol=0.05)


def test_the_mask_is_where_the_prompts_disagree(pipe: StableDiffusionPipeline, change: Change) -> None:
    mask = derive_mask(pipe, latents(), change, [1, 2])
    assert mask.shape == (2, 1, 8, 8)
    assert mask.amax((1, 2, 3)).tolist() == [1, 1]
    assert mask.min() > 0
    alone = Change(*(part[1:] for part in (change.source, change.target, change.negative)))
    torch.testing.assert_close(derive_mask(pipe, latents()[1:], alone, [2]), mask[1:], atol=1e-3, rtol=0)
    assert not torch.allclose(derive_mask(pipe, latents(), change, [3, 2])[0], mask[0], atol=1e-3)
    nowhere = Change(change.source, change.source, change.negative)
    assert derive_mask(pipe, latents(), nowhere, [1, 2]).max() == 0


def test_prompts_that_say_the_same_change_nothing(
    pipe: StableDiffusionPipeline, change: Change, pixels: Tensor
) -> None:
    pictures, masks = repainted(pipe, pixels, Change(change.source, change.source, change.negative), HOW, [1, 2])
    assert masks.max() == 0
    assert torch.equal(pictures, pixels)


def test_each_setting_counts(pipe: StableDiffusionPipeline, change: Change, pixels: Tensor) -> None:
    def painted(seeds: tuple[int, int] = (1, 2), **changes: float) -> Tensor:
        return repainted(pipe, pixels, change, Repainting(**{**vars(HOW), **changes}), seeds)[0]

    first = painted()
    assert torch.equal(first, painted())
    for other in (
        painted(guidance_scale=1.0),
        painted(painted=2),
        painted(threshold=0.9),
        painted(fresh=1.0),
        painted(steps=10),
        painted(reuse_steps=2),
    ):
        assert not torch.allclose(other, first, atol=1e-3)
    another = painted(seeds=(1, 5))
    torch.testing.assert_close(another[0], first[0], atol=1e-3, rtol=0)
    assert not torch.allclose(another[1], first[1], atol=1e-3)
    everywhere, nowhere = (
        repainted(pipe, pixels, change, Repainting(**{**vars(HOW), "threshold": t}), [1, 2])[1] for t in (0.0, 1.0)
    )
    assert everywhere.min() == 1
    assert nowhere.max() == 0


def test_a_mask_spreads_to_the_neighbours_of_where_prompts_disagree(
    pipe: StableDiffusionPipeline, change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    def at_one_place(_pipe: object, latents: Tensor, _t: object, embeds: Tensor) -> Tensor:
        told = torch.zeros_like(latents)
        told[len(told) // 2 :, :, 3, 4] = 1
        return told

    monkeypatch.setattr("aai.editing._predict", at_one_place)
    mask = derive_mask(pipe, latents(), change, [1, 2])
    assert (mask[0, 0] > 0).nonzero().tolist() == [[row, column] for row in (2, 3, 4) for column in (3, 4, 5)]


def test_a_given_mask_of_one_pixel_opens_its_place(
    pipe: StableDiffusionPipeline, change: Change, pixels: Tensor
) -> None:
    mask = torch.zeros(2, 1, 64, 64)
    mask[:, 0, 11, 13] = 1
    pictures, _ = repainted(pipe, pixels, change, HOW, [1, 2], mask)
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
        repainted(pipe, pixels, change, HOW, [1, 2])
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
