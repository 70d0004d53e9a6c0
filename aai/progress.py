"""How far a picture is, and what it would be if it were finished now."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from aai.editing import upcast_vae
from aai.sampling import PaintRequest, calls_of

PREVIEWS = 4
"""Previews of a request; each costs as much as decoding one picture."""


@dataclass(frozen=True)
class DenoisingProgress:
    """After `step` of `steps` calls of the UNet; preview: the request's first picture as it is foreseen."""

    step: int
    steps: int
    preview: Image.Image | None = None


@torch.no_grad()
def foreseen(pipe: Any, latents: Tensor, timestep: Any, predicted: Tensor, pictures: int, scale: float) -> Image.Image:
    """The first of `pictures` without the noise that the UNet found in it (DDIM, Song et al. 2020, eq. 12).

    latents, predicted: [R, C, h, w], with guidance the R = 2 x pictures rows without and with the prompt.
    """
    noisy, found = latents[:1], predicted[:1]
    if len(latents) == 2 * pictures:
        found = found + scale * (predicted[pictures : pictures + 1] - found)
    alpha = pipe.scheduler.alphas_cumprod[int(torch.as_tensor(timestep).reshape(-1)[0])].to(noisy)
    if pipe.scheduler.config.prediction_type == "v_prediction":
        clean = alpha**0.5 * noisy - (1 - alpha) ** 0.5 * found
    else:
        clean = (noisy - (1 - alpha) ** 0.5 * found) / alpha**0.5
    with upcast_vae(pipe) as vae:
        pixels = vae.decode((clean / vae.config.scaling_factor).to(vae.dtype)).sample
    return pipe.image_processor.postprocess(pixels.float(), do_denormalize=[True])[0]


class ProgressTracker:
    """Told of each call of the UNet (`aai.batching.Seen`), tells how far the request is.

    There are no previews where a safety checker looks at pictures (it sees the finished ones alone), where the
    scheduler does not know the noise levels of training, or where memory does not hold them.
    """

    def __init__(
        self, pipe: Any, verb: str, request: PaintRequest, masked: bool, tell: Callable[[DenoisingProgress], None]
    ) -> None:
        self._pipe, self._request, self._tell = pipe, request, tell
        self._steps, self._painted = calls_of(verb, request, masked)
        self._step = 0
        checked = getattr(pipe, "safety_checker", None) is not None
        self._shows = hasattr(pipe.scheduler, "alphas_cumprod") and not checked

    def __call__(self, latents: Tensor, timestep: Tensor, predicted: Tensor) -> None:
        """One call more."""
        self._step = min(self._step + 1, self._steps)  # some schedulers ask once more than they have steps
        into = self._step - (self._steps - self._painted)
        every = max(1, self._painted // (PREVIEWS + 1))
        preview, r = None, self._request
        if self._shows and 0 < into < self._painted and into % every == 0:
            with suppress(torch.OutOfMemoryError):
                preview = foreseen(self._pipe, latents, timestep, predicted, r.num_images, r.guidance_scale)
        self._tell(DenoisingProgress(self._step, self._steps, preview))
