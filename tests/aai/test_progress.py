"""How far a picture is: as many stages as the UNet is called, and previews that come nearer to the picture."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from aai.painter import Painter
from aai.progress import PREVIEWS, DenoisingProgress, ProgressTracker, foreseen
from aai.sampling import PaintRequest, calls_of
from tests.aai.test_painter import sound

GIVEN = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
WHITE = Image.new("L", (64, 64), 255)


def stages(painter: Painter, verb: str, request: PaintRequest, mask: Image.Image | None = None) -> tuple[Any, Any]:
    """What is told while a picture is painted, and the picture."""
    told: list[DenoisingProgress] = []
    seen = ProgressTracker(painter.pipe, verb, request, mask is not None, told.append)

    def hook(_: Any, args: Any, kwargs: Any, out: Any) -> None:
        seen(args[0], args[1], out[0])

    handle = painter.pipe.unet.register_forward_hook(hook, with_kwargs=True)
    try:
        if verb == "generate":
            made = painter.generate(sound(1), request)
        else:
            made = getattr(painter, verb)(sound(1), GIVEN, request, mask)
    finally:
        handle.remove()
    return told, made


@pytest.mark.parametrize(
    ("verb", "changes", "mask", "calls"),
    [
        ("generate", {}, None, 20),
        ("generate", {"num_images": 3, "guidance_scale": 1}, None, 20),
        ("edit", {}, None, 16),
        ("stylize", {"denoise_strength": 0.5}, None, 10),
        ("edit", {"repaint": "invert"}, None, 6 + 18 + 18),
        ("edit", {"repaint": "invert"}, WHITE, 18 + 18),
    ],
)
def test_every_call_of_the_unet_is_a_stage(
    verb: str, changes: dict[str, Any], mask: Image.Image | None, calls: int, painter: Painter
) -> None:
    request = PaintRequest(steps=20, **changes)
    told, _ = stages(painter, verb, request, mask)
    assert [(stage.step, stage.steps) for stage in told] == [(i + 1, calls) for i in range(calls)]
    assert calls_of(verb, request, mask is not None)[0] == calls
    shown = [stage for stage in told if stage.preview is not None]
    assert PREVIEWS <= len(shown) <= PREVIEWS + 2
    assert all(stage.preview.size == (64, 64) for stage in shown)
    assert told[-1].preview is None  # the picture itself comes then


def test_a_single_step_has_no_preview(painter: Painter) -> None:
    told, _ = stages(painter, "generate", PaintRequest(steps=1))
    assert told == [DenoisingProgress(1, 1)]


def test_previews_come_nearer_to_the_picture(painter: Painter) -> None:
    told, made = stages(painter, "generate", PaintRequest(steps=20, seed=4, num_images=2))
    final = np.asarray(made[0], float)
    far = [np.abs(np.asarray(stage.preview, float) - final).mean() for stage in told if stage.preview is not None]
    assert far[-1] < far[0]
    assert far[-1] < np.abs(np.asarray(made[1], float) - final).mean()  # it is the first picture that is shown


def test_a_safety_checker_or_a_lack_of_memory_leaves_no_previews(
    painter: Painter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A preview would show what the checker stops at the end."""
    request = PaintRequest(steps=10)
    assert any(stage.preview for stage in stages(painter, "generate", request)[0])
    with monkeypatch.context() as patch:
        patch.setattr(painter.pipe, "safety_checker", object(), raising=False)
        patch.setattr(painter.pipe, "run_safety_checker", lambda images, *_: (images, [False]))
        told, _ = stages(painter, "generate", request)
    assert [stage.preview for stage in told] == [None] * 10
    decode, calls = painter.pipe.vae.decode, []

    def full(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) <= PREVIEWS:
            raise torch.OutOfMemoryError("no memory")
        return decode(latents, *args, **kwargs)

    monkeypatch.setattr(painter.pipe.vae, "decode", full)
    told, made = stages(painter, "generate", request)
    assert [stage.preview for stage in told] == [None] * 10
    assert len(made) == 1


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_prediction_without_a_flaw_shows_the_picture_itself(kind: str, painter: Painter) -> None:
    own, chance = painter.pipe, torch.Generator().manual_seed(0)
    scheduler = DDIMScheduler.from_config(own.scheduler.config, prediction_type=kind)
    pipe = SimpleNamespace(scheduler=scheduler, unet=own.unet, vae=own.vae, image_processor=own.image_processor)
    edge, channels = own.unet.config.sample_size, own.vae.config.latent_channels
    clean, noise = (torch.randn(1, channels, edge, edge, generator=chance) for _ in range(2))
    alpha = pipe.scheduler.alphas_cumprod[300]
    noisy = alpha**0.5 * clean + (1 - alpha) ** 0.5 * noise
    told = noise if kind == "epsilon" else alpha**0.5 * noise - (1 - alpha) ** 0.5 * clean
    with torch.no_grad():
        expected = pipe.vae.decode(clean / pipe.vae.config.scaling_factor).sample
    wanted = pipe.image_processor.postprocess(expected, do_denormalize=[True])[0]
    found = foreseen(pipe, noisy, torch.tensor(300), told, 1, 3.0)
    assert np.abs(np.asarray(found, int) - np.asarray(wanted, int)).max() <= 1
    guided = foreseen(pipe, noisy.repeat(2, 1, 1, 1), 300, torch.cat([told - 1, told - 1 + 1 / 3]), 1, 3.0)
    assert np.abs(np.asarray(guided, int) - np.asarray(wanted, int)).max() <= 1


def test_a_scheduler_that_asks_once_more_has_no_step_more() -> None:
    told: list[DenoisingProgress] = []
    pipe = SimpleNamespace(scheduler=object())
    seen = ProgressTracker(pipe, "generate", PaintRequest(steps=2), False, told.append)
    for _ in range(3):
        seen(torch.zeros(1), torch.zeros(1), torch.zeros(1))
    assert [(stage.step, stage.steps) for stage in told] == [(1, 2), (2, 2), (2, 2)]


def test_of_several_pictures_the_first_is_foreseen_by_its_own_rows(painter: Painter) -> None:
    pipe, chance = painter.pipe, torch.Generator().manual_seed(1)
    edge, channels = pipe.unet.config.sample_size, pipe.vae.config.latent_channels
    rows = torch.randn(6, channels, edge, edge, generator=chance)
    noisy, plain, guided = rows[:1], rows[2:3], rows[4:5]
    alone = foreseen(pipe, noisy.repeat(2, 1, 1, 1), 300, torch.cat([plain, guided]), 1, 3.0)
    of_two = foreseen(pipe, torch.cat([noisy, rows[1:2]] * 2), 300, rows[2:6], 2, 3.0)
    assert np.abs(np.asarray(alone, int) - np.asarray(of_two, int)).max() <= 1
