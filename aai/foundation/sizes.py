"""Sizes of the pictures that a foundation takes, read from its JSON files alone: no weights, no torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aai.errors import UserError
from aai.foundation.identity import FoundationSpec, locate


@dataclass(frozen=True)
class PictureSizes:
    """Smaller pictures than these are enlarged before a model sees them."""

    clip_px: int
    """Shorter side that the CLIP's image processor scales pictures to."""
    diffusion_px: int
    """Edge of the pictures that the diffusion model was trained on."""

    @property
    def largest_px(self) -> int:
        """What is enough for both."""
        return max(self.clip_px, self.diffusion_px)

    def __str__(self) -> str:
        return f"foundation.clip takes {self.clip_px} px, foundation.diffusion {self.diffusion_px} px"


def picture_sizes(spec: FoundationSpec) -> PictureSizes:
    """The sizes of both models. Raises UserError when a file or a key is missing."""
    return PictureSizes(clip_px(spec), diffusion_px(spec))


def clip_px(spec: FoundationSpec) -> int:
    """See PictureSizes. Raises UserError when the processor's file, or its size, is missing."""
    file = "preprocessor_config.json"
    processor = _read(spec.clip, spec.clip_revision, "clip", file)
    # Older folders write a plain number; where crop is the larger one, the picture is enlarged to it.
    edges = [*_edges(processor.get("size")), *_edges(processor.get("crop_size"))]
    if not _edges(processor.get("size")):
        raise _lacks("clip", spec.clip, file, "size")
    return max(edges)


def diffusion_px(spec: FoundationSpec) -> int:
    """See PictureSizes: the UNet's latents times the VAE's factor. Raises UserError when a file or key is missing."""
    unet = _read(spec.diffusion, spec.diffusion_revision, "diffusion", "unet/config.json")
    vae = _read(spec.diffusion, spec.diffusion_revision, "diffusion", "vae/config.json")
    latents, blocks = _edges(unet.get("sample_size")), vae.get("block_out_channels")
    if not latents:
        raise _lacks("diffusion", spec.diffusion, "unet/config.json", "sample_size")
    if not isinstance(blocks, list) or not blocks:
        raise _lacks("diffusion", spec.diffusion, "vae/config.json", "block_out_channels")
    return max(latents) * 2 ** (len(blocks) - 1)  # each block but the last one halves the picture


def _edges(size: Any) -> list[int]:
    """The numbers of a size: one edge, [height, width], or edges by name."""
    values = size.values() if isinstance(size, Mapping) else size if isinstance(size, list) else [size]
    return [value for value in values if isinstance(value, int) and value > 0]


def _read(model_id: str, revision: str | None, setting: str, file: str) -> dict[str, Any]:
    """A JSON file of a model's folder, or of its pinned hub id."""
    where, pinned = locate(model_id, revision, setting)
    path = Path(where) / file
    try:
        if not Path(where).is_dir():
            from huggingface_hub import hf_hub_download  # only here: a folder needs no hub

            path = Path(hf_hub_download(where, file, **pinned))
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0][:200]
        raise UserError(
            f"foundation.{setting}", model_id, f"{file} cannot be read ({reason})", "give a whole model's folder"
        ) from error
    if not isinstance(found, dict):
        raise _lacks(setting, model_id, file, "settings")
    return found


def _lacks(setting: str, model_id: str, file: str, key: str) -> UserError:
    return UserError(f"foundation.{setting}", model_id, f"{file} does not tell {key!r}", "give a whole model's folder")
