"""Features of the frozen CLIP (Radford et al. 2021, arXiv 2103.00020): the space that sound is aligned to."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from aai.foundation import FoundationSpec, identity, load_clip


class FrozenClip:
    """Both CLIP towers without gradients; all features are float32 with unit norm."""

    def __init__(
        self,
        spec: FoundationSpec,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 256,
    ) -> None:
        """Loads the model. batch_size: pictures or texts per forward pass. Raises UserError if it is not there."""
        self.spec, self.device, self.dtype, self.batch_size = spec, device, dtype, batch_size
        self.model, self.tokenizer, self.processor = load_clip(spec, device, dtype)
        self.dim: int = self.model.config.projection_dim

    @torch.inference_mode()
    def images(self, frames: Sequence[Image.Image] | np.ndarray) -> Tensor:
        """Features [N, D] of pictures: a list of PIL pictures or uint8 [N, H, W, 3]."""
        parts = [torch.empty(0, self.dim)]
        for start in range(0, len(frames), self.batch_size):
            chosen = [_rgb(frame) for frame in frames[start : start + self.batch_size]]
            pixels = self.processor(images=chosen, return_tensors="pt")["pixel_values"]
            output = self.model.get_image_features(pixel_values=pixels.to(self.device, self.dtype))
            parts.append(_unit(output.pooler_output))
        return torch.cat(parts)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Features [N, D] of texts; a text over the context length is cut there."""
        parts = [torch.empty(0, self.dim)]
        for start in range(0, len(texts), self.batch_size):
            chosen = list(texts[start : start + self.batch_size])
            tokens = self.tokenizer(chosen, padding=True, truncation=True, return_tensors="pt").to(self.device)
            output = self.model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
            parts.append(_unit(output.pooler_output))
        return torch.cat(parts)

    def describe(self) -> dict[str, str]:
        """What a table of these features must record: id, revision or hash, processor class, dtype."""
        known = identity(self.spec)
        return {
            "clip": known["clip"],
            "clip_revision": known["clip_revision"],
            "processor": type(self.processor).__name__,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


def _rgb(frame: Image.Image | np.ndarray) -> Image.Image:
    picture = frame if isinstance(frame, Image.Image) else Image.fromarray(frame)
    return picture.convert("RGB")


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=-1).cpu()
