"""What a painter is asked for: settings of sampling, prompt and seeds, and what of them cannot be painted."""

import math
from typing import Any, Literal

import pydantic

from aai.config import Config
from aai.errors import UserError
from aai.sounds import Window

DEFAULT_PROMPT = "a photo of <sound>"
HEAD_PATTERN = r"^a \w+ of\b"
Mixing = Literal["regions", "words"]
REPAINT = {"img2img": 0.8, "invert": 0.9}
"""How much of the given picture each way of repainting paints anew by default."""
MASK_DRAWS = 6
"""Noisy versions of a picture whose predictions are compared for its mask (see `aai.editing`)."""


class SamplingConfig(Config):
    """How the diffusion model paints; the bounds protect a service."""

    negative_prompt: str = pydantic.Field("", max_length=500)
    steps: int = pydantic.Field(20, ge=1, le=100)
    """Denoising steps."""
    guidance_scale: float = pydantic.Field(3.0, ge=0, le=30)
    reuse_steps: int = pydantic.Field(1, ge=1, le=10)
    """Only every so many steps the whole UNet runs, between them its outer blocks alone (DeepCache); 1 = always the
    whole. 2 or 3 save a third to a half of the time."""
    denoise_strength: float | None = pydantic.Field(None, gt=0, le=1)
    """Edit and stylize: how much of the way to noise the picture goes and comes back from; empty = 0.8, with
    repaint=invert 0.9."""
    repaint: Literal["img2img", "invert"] = "img2img"
    """Edit and stylize: img2img adds noise to the whole picture and paints it anew (SDEdit); invert changes a mask,
    given or derived, and keeps every pixel outside. Derived is that of the picture's object: an edit changes it and a
    margin around it, a stylization all else."""
    mask_threshold: float = pydantic.Field(0.7, ge=0, le=1)
    """invert without a mask: how far predictions with and without the picture's object must disagree at a place for it
    to be sought there. Less mostly finds larger objects; at 1 none is found, at 0 everything is one."""
    fresh_noise: float = pydantic.Field(0.8, ge=0, le=1)
    """invert: 0 keeps the old shapes within the mask most, 1 forgets them."""


class PaintRequest(SamplingConfig):
    """What to paint and how."""

    prompt: str | None = pydantic.Field(None, max_length=500)
    """Text with <sound> where the sound belongs; of several sounds the <NAME> of each, or <NAME*0.6> for one at six
    tenths of its strength. Empty = the bundle's own ("a photo of <sound>"); edit and stylize read the medium off the
    picture instead. Of generate the negative prompt may name sounds as well."""
    mixing: Mixing = "regions"
    """Several sounds of a prompt: regions gives each a strip of the picture, from left to right in the order of the
    prompt, and the rest of the prompt to all; words leaves it to the prompt, of which one sound mostly wins."""
    sound_parts: int | None = pydantic.Field(None, ge=1, le=4)
    """Generate, with mixing=regions: equal parts in time of each sound, which are painted side by side. Empty = two
    where the only sound's halves tell of different things, by what the bundle knows of its own training; else one."""
    num_images: int = pydantic.Field(1, ge=1, le=8)
    seed: int = pydantic.Field(0, ge=0, lt=2**63 - 8)
    """Picture i of a request uses seed + i."""
    sound_strength: float = pydantic.Field(1.0, ge=0, le=2)
    """0 ignores the sound, 1 is the sound as learned; of all sounds, times what the prompt says of one."""
    window: Window = "middle"
    """What is heard of a sound longer than the model's clips: its middle, the loudest part, or the mean of parts."""


def check_repaint(request: SamplingConfig) -> float:
    """The denoise strength with which a request repaints. Raises UserError when not one step would be painted.

    Of N denoising steps the last floor(N * strength) are painted (SDEdit, Meng et al. 2022).
    """
    strength = request.denoise_strength or REPAINT[request.repaint]
    fewest = 2 if request.repaint == "invert" else 1  # the lowest noise level alone changes next to nothing
    if int(request.steps * strength) < fewest:
        enough = math.ceil(100 * fewest / request.steps) / 100
        remedy = f"raise it to {enough:g}, or give more steps" if enough <= 1 else f"give at least {fewest} steps"
        rule = f"times {request.steps} steps is below {fewest}: there is no step to paint"
        raise UserError("denoise_strength", strength, rule, remedy)
    return strength


def calls_of(verb: str, request: SamplingConfig, masked: bool) -> tuple[int, int]:
    """How often a request calls the UNet, and how many of these calls, the last ones, denoise its pictures."""
    if verb == "generate":
        return request.steps, request.steps
    painted = int(request.steps * check_repaint(request))
    if request.repaint == "img2img":
        return painted, painted
    return (0 if masked else MASK_DRAWS) + 2 * painted, painted


def check_steps(scheduler: Any, steps: int) -> None:
    """Raises UserError for more steps than a scheduler of distilled models was made for."""
    most = getattr(scheduler.config, "original_inference_steps", None)
    if most is not None and steps > most:
        raise UserError("steps", steps, f"addons.scheduler=lcm takes at most {most}", "a distilled model needs 4 to 8")
