"""Deep layers that are run every few steps only, on a small random UNet."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from aai.painter import Painter
from aai.reuse import reused
from aai.sampling import PaintRequest
from tests.aai.test_painter import pixels, sound


def runs(pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often the outer and the deep blocks run from now on."""
    counts = {"outer": 0, "deep": 0}
    for name, block in (("outer", pipe.unet.up_blocks[-1]), ("deep", pipe.unet.mid_block)):
        forward = type(block).forward

        def counted(self: Any, *args: Any, name: str = name, forward: Any = forward, **kwargs: Any) -> Any:
            counts[name] += 1
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(type(block), "forward", counted)
    return counts


def test_deep_blocks_run_every_few_steps_only(
    painter: Painter, pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = pixels(painter.generate(sound(1), PaintRequest(steps=7)))
    counts = runs(pipe, monkeypatch)
    cached = pixels(painter.generate(sound(1), PaintRequest(steps=7, reuse_steps=3)))
    assert counts == {"outer": 7, "deep": 3}
    assert not np.array_equal(cached, plain)
    assert np.array_equal(cached, pixels(painter.generate(sound(1), PaintRequest(steps=7, reuse_steps=3))))
    assert counts == {"outer": 14, "deep": 6}  # a new picture begins with a whole step
    assert np.array_equal(pixels(painter.generate(sound(1), PaintRequest(steps=7))), plain)  # as before
    assert counts == {"outer": 21, "deep": 13}


def test_what_is_reused_is_the_last_whole_step(pipe: StableDiffusionPipeline) -> None:
    unet = pipe.unet
    first, second = (torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    text = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        whole = [unet(z, 500, encoder_hidden_states=text).sample for z in (first, second)]
        with reused(unet, 2):
            found = [unet(z, 500, encoder_hidden_states=text).sample for z in (first, first, second, first)]
    assert torch.equal(found[0], whole[0])
    torch.testing.assert_close(found[1], whole[0])  # the same input: nothing is lost
    assert torch.equal(found[2], whole[1])
    assert not torch.allclose(found[3], whole[0], atol=1e-3)  # the deep features are those of `second`
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        assert "forward" not in vars(block)


def test_an_error_leaves_the_unet_as_it_was(pipe: StableDiffusionPipeline) -> None:
    with pytest.raises(RuntimeError, match="stop"), reused(pipe.unet, 3):
        raise RuntimeError("stop")
    assert "forward" not in vars(pipe.unet.mid_block)
    assert not pipe.unet._forward_pre_hooks
