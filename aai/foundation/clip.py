"""Features of the frozen CLIP (Radford et al. 2021, arXiv 2103.00020): the space that sound is aligned to."""

import functools
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from aai.foundation.batches import Batches
from aai.foundation.identity import FoundationSpec, identity
from aai.foundation.loaders import load_clip
from aai.media.still import eight_bit

Frames = Sequence[Image.Image] | Sequence[bytes] | np.ndarray


class FrozenClip:
    """Both CLIP towers without gradients; all features are float32 with unit norm.

    `images` and `texts` return them on the CPU, whatever the device: they go into tables. Who computes with them
    beside a model moves them to its device. Only `embed` leaves them there.
    """

    def __init__(
        self,
        spec: FoundationSpec,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 256,
        threads: int = 1,
    ) -> None:
        """Loads the model. Raises UserError if it is not there.

        batch_size: pictures or texts per forward pass, or fewer where they do not fit; threads: that prepare pictures.
        """
        self.spec, self.device, self.dtype, self.batches = spec, device, dtype, Batches(batch_size)
        self.model, self.tokenizer, self.processor = load_clip(spec, device, dtype)
        self.dim: int = self.model.config.projection_dim
        self.logit_scale = float(self.model.logit_scale.exp())
        self.pool = ThreadPoolExecutor(threads, "frame") if threads > 1 else None
        mean, std = (torch.tensor(self.processor.image_mean), torch.tensor(self.processor.image_std))
        self.mean, self.std = (values.view(1, 3, 1, 1).to(device) for values in (mean, std))

    @torch.inference_mode()
    def images(self, frames: Frames) -> Tensor:
        """Features [N, D], on the CPU, of pictures: PIL pictures or encoded ones (JPEG, ...), or uint8 [N, H, W, 3]."""
        empty = torch.empty(0, self.dim, device=self.device)
        # On a GPU `embed` returns at once: the next batch is decoded and framed while this one is computed.
        parts = self.batches.map(lambda some: self.embed(self.framed(some)), frames)
        return torch.cat([empty, *parts]).cpu()

    def framed(self, frames: Frames) -> np.ndarray:
        """uint8 [N, H, W, 3] for `embed`: resized and cut exactly as the model's processor does it."""
        resample, size, crop = self.processor.resample, self.processor.size, self.processor.crop_size
        edge_px = size.get("shortest_edge")
        plain = self.processor.do_resize and self.processor.do_center_crop and not self.processor.do_pad
        if not (plain and edge_px and max(crop["height"], crop["width"]) <= edge_px):
            pictures = [_rgb(frame) for frame in frames]
            out = self.processor(images=pictures, do_rescale=False, do_normalize=False, return_tensors="np")
            return np.moveaxis(out["pixel_values"], 1, -1)

        # The processor takes ten times as long, most of it for copies between layouts.
        def prepare(frame: Image.Image | bytes | np.ndarray) -> np.ndarray:
            return _framed(_rgb(frame), edge_px, crop["height"], crop["width"], resample)

        return np.stack(list((self.pool.map if self.pool else map)(prepare, frames)))

    @torch.inference_mode()
    def embed(self, pixels: np.ndarray) -> Tensor:
        """Features [N, D] on the device, of at most a batch of pictures from `framed`."""
        raw = torch.from_numpy(np.ascontiguousarray(pixels))
        if self.device != "cpu":
            raw = raw.pin_memory().to(self.device, non_blocking=True)
        scaled = raw.permute(0, 3, 1, 2).float() * self.processor.rescale_factor
        normal = ((scaled - self.mean) / self.std).to(self.dtype, memory_format=torch.contiguous_format)
        return _unit(self.model.get_image_features(pixel_values=normal).pooler_output)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Features [N, D], on the CPU, of texts; a text over the context length is cut there."""
        return torch.cat([torch.empty(0, self.dim), *self.batches.map(self._embed_texts, texts)])

    def _embed_texts(self, texts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(self.device)
        output = self.model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return _unit(output.pooler_output).cpu()

    def describe(self) -> dict[str, str]:
        """What a table of these features must record: id, revision or hash, processor class, dtype."""
        known = identity(self.spec)
        return {
            "clip": known["clip"],
            "clip_revision": known["clip_revision"],
            "processor": type(self.processor).__name__,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


def _rgb(frame: Image.Image | bytes | np.ndarray) -> Image.Image:
    if isinstance(frame, bytes):
        frame = Image.open(io.BytesIO(frame))
    picture = frame if isinstance(frame, Image.Image) else Image.fromarray(frame)
    return eight_bit(picture).convert("RGB")


def _framed(picture: Image.Image, edge_px: int, height: int, width: int, resample: int) -> np.ndarray:
    """uint8 [height, width, 3]: the shorter side scaled to edge_px, the middle cut out."""
    short = min(picture.size)
    if short != edge_px:
        size = (int(edge_px * picture.width / short), int(edge_px * picture.height / short))
        picture = picture.resize(size, Image.Resampling(resample))
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return np.asarray(picture.crop((left, top, left + width, top + height)))


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=-1)


@functools.lru_cache(maxsize=1)
def shared_clip(spec: FoundationSpec, device: str) -> FrozenClip:
    """The frozen CLIP in float32, once a process: for bundles that change over one foundation."""
    return FrozenClip(spec, device)
