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
