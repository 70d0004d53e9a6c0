"""Repainting a part of a picture and keeping the rest, pixel by pixel.

The picture is carried up to the noise from which it would come by itself (DDIM inversion, Song et al. 2020, arXiv
2010.02502), then denoised under the new prompt. Outside a mask each step goes back to the way the picture came, and
the finished picture has the given pixels there. Without a mask one is derived: where a prediction that is told of the
picture's object differs from one that is not (DiffEdit, Couairon et al. 2022, arXiv 2210.11427), cut out along its
outline (`aai.silhouette`). An edit changes this object and a margin around it, a stylization everything else.

Shapes: B pictures, C channels of h x w latents, 8h x 8w pixels.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from aai.errors import UserError
from aai.reuse import reused
from aai.sampling import MASK_DRAWS
from aai.sdxl import conditions, pooled_dim
from aai.silhouette import grown, silhouette

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

MASK_LEVEL = 0.3
"""How noisy the versions of a picture are that its mask is derived from, as a share of the noise schedule."""
MARGIN = 0.12
"""Around the object that an edit replaces, for the outline of another one: a share of the picture's edge."""


@dataclass(frozen=True)
class Change:
    """What a picture says now, what it shall say, and what to keep away from: prompt embeddings [B, L, D_h] each."""

    source: Tensor
    target: Tensor
    negative: Tensor


def _steps(pipe: "DiffusionPipeline", kind: str, steps: int, **changes: Any) -> Any:
    """A deterministic scheduler over the model's own noise levels, evenly spaced."""
    import diffusers

    scheduler = getattr(diffusers, kind).from_config(
        pipe.scheduler.config, clip_sample=False, timestep_spacing="leading", **changes
    )
    scheduler.set_timesteps(steps, device=pipe.unet.device)
    return scheduler


def _predict(pipe: "DiffusionPipeline", latents: Tensor, t: Tensor, embeds: Tensor) -> Tensor:
    edge_px = pipe.vae_scale_factor * latents.shape[-1]
    told: Tensor = pipe.unet(latents, t, **conditions(pipe.unet, embeds, edge_px)).sample
    return told


@torch.no_grad()
def disagreement(
    pipe: "DiffusionPipeline", latents: Tensor, these: Tensor, those: Tensor, seeds: Sequence[int]
) -> Tensor:
    """How much two prompts [B, L, D_h] disagree at each place, [B, 1, h, w]; 1: as much as in the most torn twentieth.

    What is found of a picture depends on its own seed alone.
    """
    scheduler = _steps(pipe, "DDIMScheduler", 100)
    t = scheduler.timesteps[round((1 - MASK_LEVEL) * 99)]
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    both, total = torch.cat([these, those]), torch.zeros_like(latents[:, :1], dtype=torch.float32)
    for _ in range(MASK_DRAWS):
        noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in generators]).to(latents)
        noisy = scheduler.add_noise(latents, noise, t)
        one, other = _predict(pipe, torch.cat([noisy] * 2), t, both).float().chunk(2)
        total += (other - one).abs().mean(1, keepdim=True)
    smooth = F.avg_pool2d(F.pad(total, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    most = torch.quantile(smooth.flatten(1), 0.95, dim=1).view(-1, 1, 1, 1).clamp(min=1e-8)
    return (smooth / most).clamp(max=1)


@torch.no_grad()
def invert(pipe: "DiffusionPipeline", latents: Tensor, source: Tensor, steps: int, painted: int) -> list[Tensor]:
    """Latents on their way up through the lowest `painted` of `steps` noise levels, the given ones first.

    A predicted velocity is turned into noise at the level that the model was asked for; the library would take that of
    the level below, and lose a third more on the way up and down.
    """
    kind = pipe.scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        rule = f"the model predicts {kind!r}, neither noise nor velocity"
        raise UserError("request.repaint", "invert", rule, "set request.repaint=img2img")
    scheduler = _steps(pipe, "DDIMInverseScheduler", steps, prediction_type="epsilon")
    way = [latents]
    for t in scheduler.timesteps[:painted]:
        noise = _predict(pipe, way[-1], t, source)
        if kind == "v_prediction":
            alpha = float(scheduler.alphas_cumprod[int(t)])
            noise = alpha**0.5 * noise + (1 - alpha) ** 0.5 * way[-1]
        way.append(scheduler.step(noise, t, way[-1]).prev_sample)
    return way


@torch.no_grad()
def repaint(
    pipe: "DiffusionPipeline",
    way: Sequence[Tensor],
    change: Change,
    mask: Tensor,
    steps: int,
    guidance_scale: float,
    noise: Tensor,
    fresh: float,
    reuse_steps: int = 1,
) -> Tensor:
    """Latents [B, C, h, w] denoised from the end of `way` (see `invert`) under the new prompt, within the mask.

    mask: [B, 1, h, w], 1 where it may change, 0 where every step goes back to `way`. fresh: share of the noise that
    `noise` [B, C, h, w] replaces before the first step: 0 keeps the old shapes most, 1 forgets them. reuse_steps: see
    `aai.reuse`.
    """
    scheduler = _steps(pipe, "DDIMScheduler", steps)
    levels = scheduler.timesteps[len(scheduler.timesteps) - (len(way) - 1) :]
    alpha = float(scheduler.alphas_cumprod[int(levels[0])])  # in half the precision it may round to 1
    own = (way[-1].float() - alpha**0.5 * way[0].float()) / (1 - alpha) ** 0.5
    mixed = alpha**0.5 * way[0].float() + (1 - alpha) ** 0.5 * ((1 - fresh**2) ** 0.5 * own + fresh * noise.float())
    latents = torch.where(mask > 0, mixed.to(way[0].dtype), way[-1])
    scale = max(guidance_scale, 1.0)  # as in diffusers' pipelines: below 1 there is no guidance
    both = torch.cat([change.negative, change.target])
    with reused(pipe.unet, reuse_steps):
        for done, t in enumerate(levels, start=1):
            without, wanted = _predict(pipe, torch.cat([latents] * 2), t, both).chunk(2)
            latents = scheduler.step(without + scale * (wanted - without), t, latents).prev_sample
            latents = torch.where(mask > 0, latents, way[len(way) - 1 - done])
    return latents


@contextmanager
def same_dtype(part: Any) -> Iterator[None]:
    """Afterwards a part of a pipeline is of the type it was, also where diffusers failed between two changes of it."""
    before = part.dtype
    try:
        yield
    finally:
        if part.dtype != before:
            part.to(dtype=before)


@contextmanager
def upcast_vae(pipe: "DiffusionPipeline") -> Iterator[Any]:
    """The VAE; XL's, which overflows in float16, in float32 meanwhile, as in diffusers' own pipelines."""
    overflows = pooled_dim(pipe.unet) > 0 and pipe.vae.dtype == torch.float16 and pipe.vae.config.force_upcast
    with same_dtype(pipe.vae):
        if overflows:
            pipe.vae.to(dtype=torch.float32)
        yield pipe.vae


@dataclass(frozen=True)
class Repainting:
    """How a picture is repainted: steps in all and how many of them, guidance, and the settings of `repaint`."""

    steps: int
    painted: int
    guidance_scale: float
    fresh: float
    reuse_steps: int = 1


def _encoded(pipe: "DiffusionPipeline", pixels: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] in -1..1 -> latents [B, C, h, w]."""
    with upcast_vae(pipe) as vae:
        latents = vae.encode(pixels.to(vae.dtype)).latent_dist.mean * pipe.vae.config.scaling_factor
    return latents.to(pipe.unet.dtype)


@torch.no_grad()
def derived_masks(
    pipe: "DiffusionPipeline",
    pixels: Tensor,
    named: Tensor,
    unnamed: Tensor,
    verb: str,
    threshold: float,
) -> Tensor:
    """Masks [B, 1, H, W] of pictures [B, 3, H, W] in -1..1: above 0 where `edit` or `stylize` may change them.

    named, unnamed: prompt embeddings [B, L, D_h] of what each shows, and of the same with the object left open.
    threshold: how far they must disagree at a place to begin there; at 1 no object is found at all. A picture has one
    mask, whatever it is painted over with: the noise under which the two are asked is always the same.
    """
    likely = disagreement(pipe, _encoded(pipe, pixels), named, unnamed, [0] * len(pixels))[:, 0].cpu().numpy()
    masks = []
    for picture, there in zip(pixels, likely, strict=True):
        found = silhouette(np.asarray(picture_of(picture)), there, threshold)
        masks.append(grown(found, MARGIN) if verb == "edit" else np.float32(~found))
    return torch.from_numpy(np.stack(masks))[:, None].to(pixels)


@torch.no_grad()
def repainted(
    pipe: "DiffusionPipeline", pixels: Tensor, change: Change, how: Repainting, seeds: Sequence[int], mask: Tensor
) -> Tensor:
    """Pictures [B, 3, H, W] in -1..1 changed within their masks.

    mask: [B, 1, H, W] in 0..1, the share of what is painted anew. Where it is 0 the pixels are the given ones.
    """
    scale, latents = pipe.vae.config.scaling_factor, _encoded(pipe, pixels)
    small = (F.adaptive_max_pool2d(mask, latents.shape[-2:]) > 0).to(latents)
    noise = [torch.randn(latents.shape[1:], generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds]
    way = invert(pipe, latents, change.source, how.steps, how.painted)
    parts = how.steps, how.guidance_scale, torch.stack(noise).to(latents), how.fresh, how.reuse_steps
    done = repaint(pipe, way, change, small, *parts) / scale
    with upcast_vae(pipe) as vae:
        painted = vae.decode(done.to(vae.dtype)).sample.float().clamp(-1, 1)
    return torch.where(mask > 0, mask * painted + (1 - mask) * pixels, pixels)


def unit_of(image: Image.Image) -> Tensor:
    """An RGB picture -> [3, H, W] in -1..1."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def white_of(mask: Image.Image) -> Tensor:
    """1 where a mask is nearer to white than to black, else 0, [1, H, W]."""
    return (unit_of(mask.convert("L").convert("RGB"))[:1] > 0).float()


def picture_of(pixels: Tensor) -> Image.Image:
    """[3, H, W] in -1..1 -> an RGB picture."""
    return Image.fromarray(((pixels.permute(1, 2, 0) + 1) * 127.5).round().byte().cpu().numpy())
