"""What people load on top of a diffusion model, A* unchanged: LoRA weights, a ControlNet, another scheduler.

All of it is diffusers' own; files are safetensors. The safety checker that a model's folder holds is used unless it is
switched off.
"""

from pathlib import Path
from typing import Any, Literal

import diffusers
import pydantic
import torch
from diffusers import AutoPipelineForText2Image, ControlNetModel, DiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPImageProcessorPil

from aai.config import Config
from aai.errors import UserError

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "dpm": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
}


class AddOns(Config):
    """What is loaded on top of the diffusion model."""

    lora: str | None = None
    """LoRA weights: a .safetensors file, or a folder with pytorch_lora_weights.safetensors. Needs the package peft."""
    lora_scale: float = pydantic.Field(1.0, ge=-2, le=2)
    controlnet: str | None = None
    """Folder of a ControlNet for this model; generate then takes the picture that guides it (--control)."""
    controlnet_scale: float = pydantic.Field(1.0, ge=0, le=2)
    scheduler: Literal["model", "ddim", "dpm", "euler", "unipc", "lcm"] = "model"
    """Which sampler denoises; model: the one that the model's folder names. lcm is for distilled models: few steps."""
    safety_checker: str = "auto"
    """auto: the one that the model's folder holds, if it holds one; off; or a folder with another. It blackens what it
    takes for unfit."""


def add_to(pipe: DiffusionPipeline, addons: AddOns, folder: str) -> DiffusionPipeline:
    """Puts scheduler, LoRA and safety checker into a pipeline, in place. folder: where the model was loaded from."""
    if addons.scheduler != "model":
        pipe.scheduler = getattr(diffusers, SCHEDULERS[addons.scheduler]).from_config(pipe.scheduler.config)
    if addons.lora:
        _checked("lora", addons.lora, lambda: _fuse(pipe, addons))
    if (checker := _checker_folder(pipe, addons, folder)) is not None:
        pipe.safety_checker, pipe.feature_extractor = _checked(
            "safety_checker",
            addons.safety_checker,
            lambda: (
                StableDiffusionSafetyChecker.from_pretrained(checker[0], use_safetensors=True).to(pipe.device).eval(),
                CLIPImageProcessorPil.from_pretrained(checker[1]),
            ),
        )
    return pipe


def with_controlnet(pipe: DiffusionPipeline, addons: AddOns) -> DiffusionPipeline:
    """The same model, guided by `addons.controlnet`; it takes the guiding picture as `image`."""
    net = _checked(
        "controlnet",
        str(addons.controlnet),
        lambda: ControlNetModel.from_pretrained(addons.controlnet, torch_dtype=pipe.unet.dtype, use_safetensors=True),
    )
    guided = AutoPipelineForText2Image.from_pipe(pipe, controlnet=net.to(pipe.unet.device).eval().requires_grad_(False))
    guided.set_progress_bar_config(disable=True)
    return guided


def _fuse(pipe: DiffusionPipeline, addons: AddOns) -> None:
    """Adds the weights into the model's own: no step is slower, and the text encoder keeps its places for A*."""
    pipe.load_lora_weights(addons.lora, use_safetensors=True)
    pipe.fuse_lora(lora_scale=addons.lora_scale)
    pipe.unload_lora_weights()


def _checker_folder(pipe: DiffusionPipeline, addons: AddOns, folder: str) -> tuple[Path, Path] | None:
    """Where the checker and its image processor lie; None where none is to be used."""
    if addons.safety_checker == "off" or not hasattr(pipe, "safety_checker"):  # XL has no place for one
        return None
    if addons.safety_checker == "auto":
        own = Path(folder) / "safety_checker", Path(folder) / "feature_extractor"
        return own if own[0].is_dir() else None
    return Path(addons.safety_checker), Path(addons.safety_checker)


def _checked(setting: str, value: str, load: Any) -> Any:
    if not Path(value).exists() and value not in ("auto",):
        raise UserError(f"addons.{setting}", value, "does not exist", "give a folder or file")
    try:
        with torch.no_grad():
            return load()
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError) as error:
        reason = str(error).split("\n")[0][:200]
        raise UserError(f"addons.{setting}", value, f"cannot be used ({reason})", "give one for this model") from error
