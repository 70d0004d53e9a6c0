"""The frozen foundation models by id: a CLIP and a Stable Diffusion, each a local folder, a hub id, or `toy:NAME`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from aai.errors import UserError
from aai.foundation.identity import FoundationSpec, locate
from aai.foundation.sizes import diffusion_px

if TYPE_CHECKING:
    from diffusers import (
        AutoencoderKL,
        DDPMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import (
        CLIPImageProcessorPil,
        CLIPModel,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
    )

XL = "StableDiffusionXLPipeline"


def _load(setting: str, model_id: str, load: Callable[[], Any]) -> Any:
    """Loads without the libraries' bars and notices (a tower of a whole CLIP is loaded with parts left over)."""
    import diffusers
    import transformers

    for library in (transformers.utils.logging, diffusers.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
    try:
        return load()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).split("\n")[0][:200]
        raise UserError(
            f"foundation.{setting}", model_id, f"cannot be loaded ({reason})", "give a folder or a reachable hub id"
        ) from error


def _whole(tokenizer: "CLIPTokenizer") -> "CLIPTokenizer":
    """A tokenizer that knows at least the bytes: where files are missing, transformers makes one up that knows none."""
    if len(tokenizer) < 256:
        raise OSError(f"its tokenizer knows {len(tokenizer)} tokens: are its files missing?")
    return tokenizer


def load_clip(
    spec: FoundationSpec, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> "tuple[CLIPModel, CLIPTokenizer, CLIPImageProcessorPil]":
    """The frozen CLIP with its tokenizer and PIL image processor, in eval mode without gradients."""
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    where, kwargs = locate(spec.clip, spec.clip_revision, "clip")
    model = _load(
        "clip", spec.clip, lambda: CLIPModel.from_pretrained(where, dtype=dtype, use_safetensors=True, **kwargs)
    )
    tokenizer = _load("clip", spec.clip, lambda: _whole(CLIPTokenizer.from_pretrained(where, **kwargs)))
    processor = _load("clip", spec.clip, lambda: CLIPImageProcessorPil.from_pretrained(where, **kwargs))
    return model.to(device).eval().requires_grad_(False), tokenizer, processor


def load_diffusion(
    spec: FoundationSpec, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> "StableDiffusionPipeline | StableDiffusionXLPipeline":
    """The frozen diffusion pipeline, without safety checker, every part in eval mode without gradients.

    Raises UserError for another kind of pipeline than Stable Diffusion 1.x, 2.x or XL.
    """
    where, kwargs = locate(spec.diffusion, spec.diffusion_revision, "diffusion")
    cls, own = _kind(spec, where, kwargs)
    pipe = _load(
        "diffusion",
        spec.diffusion,
        lambda: cls.from_pretrained(where, dtype=dtype, low_cpu_mem_usage=False, use_safetensors=True, **own, **kwargs),
    )
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    if cls.__name__ == XL:  # its pictures of 1024 px are decoded in float32
        pipe.vae.enable_slicing()
    for name, part in pipe.components.items():
        if name.startswith("tokenizer"):
            _load("diffusion", spec.diffusion, partial(_whole, part))
        elif isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    return pipe


def _kind(spec: FoundationSpec, where: str, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The pipeline's class, as the folder names it, and what its loading takes besides."""
    import diffusers

    index = _load("diffusion", spec.diffusion, lambda: diffusers.DiffusionPipeline.load_config(where, **kwargs))
    name = index.get("_class_name") if isinstance(index, dict) else None
    if name == XL:
        return diffusers.StableDiffusionXLPipeline, {"add_watermarker": False}
    if name == "StableDiffusionPipeline":
        return diffusers.StableDiffusionPipeline, {
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        }
    rule = f"holds a {name or 'thing without a pipeline class'}"
    raise UserError("foundation.diffusion", spec.diffusion, rule, "give Stable Diffusion 1.x, 2.x or XL")


def load_vae(
    spec: FoundationSpec, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> "tuple[AutoencoderKL, int]":
    """The frozen VAE of the diffusion model alone, and the edge in pixels of the pictures it was trained on."""
    from diffusers import AutoencoderKL

    where, kwargs = locate(spec.diffusion, spec.diffusion_revision, "diffusion")
    vae = _load(
        "diffusion",
        spec.diffusion,
        lambda: AutoencoderKL.from_pretrained(
            where, subfolder="vae", torch_dtype=dtype, use_safetensors=True, low_cpu_mem_usage=False, **kwargs
        ),
    )
    return vae.to(device).eval().requires_grad_(False), diffusion_px(spec)


@dataclass(frozen=True)
class DiffusionSkeleton:
    """The parts of a diffusion pipeline that a training step runs, with weights of the right shapes and no meaning."""

    unet: "UNet2DConditionModel"
    text_encoder: "CLIPTextModel"
    tokenizer: "CLIPTokenizer"
    scheduler: "DDPMScheduler"
    text_encoder_2: "CLIPTextModelWithProjection | None" = None
    """Of Stable Diffusion XL, as its tokenizer."""
    tokenizer_2: "CLIPTokenizer | None" = None


def diffusion_skeleton(spec: FoundationSpec) -> DiffusionSkeleton:
    """Of the configs alone: to be made where tensors are fake. Raises UserError when they are not on this machine."""
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    where, kwargs = locate(spec.diffusion, spec.diffusion_revision, "diffusion")
    kwargs = {**kwargs, "local_files_only": True}

    def made() -> DiffusionSkeleton:
        text = CLIPTextConfig.from_pretrained(where, subfolder="text_encoder", **kwargs)
        second: dict[str, Any] = {}
        if _kind(spec, where, kwargs)[0].__name__ == XL:
            text_2 = CLIPTextConfig.from_pretrained(where, subfolder="text_encoder_2", **kwargs)
            second["text_encoder_2"] = CLIPTextModelWithProjection(text_2)
            second["tokenizer_2"] = _whole(CLIPTokenizer.from_pretrained(where, subfolder="tokenizer_2", **kwargs))
        return DiffusionSkeleton(
            UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(where, subfolder="unet", **kwargs)),
            CLIPTextModel(text),
            _whole(CLIPTokenizer.from_pretrained(where, subfolder="tokenizer", **kwargs)),
            DDPMScheduler.from_pretrained(where, subfolder="scheduler", **kwargs),
            **second,
        )

    found: DiffusionSkeleton = _load("diffusion", spec.diffusion, made)
    return found
