"""What people load on top of a diffusion model, A* unchanged: LoRA weights, a ControlNet, another scheduler.

All of it is diffusers' own; files are safetensors. The safety checker that a model's folder holds is used unless it is
switched off.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pydantic
import torch
from PIL import Image

from aai import storage
from aai.config import Config
from aai.digest import digest
from aai.errors import UserError
from aai.foundation.identity import FoundationSpec, locate

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

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


def absolute(addons: AddOns) -> AddOns:
    """The same with paths that hold in any folder of this machine."""
    places = {}
    for name in ("lora", "controlnet", "safety_checker"):
        given = getattr(addons, name)
        if given and given not in ("auto", "off"):
            places[name] = storage.absolute(given)
    return addons.model_copy(update=places)


def check_there(addons: AddOns) -> None:
    """Raises UserError for a file or folder that this machine does not have."""
    for name in ("lora", "controlnet", "safety_checker"):
        given = getattr(addons, name)
        if given and given not in ("auto", "off"):
            _check_there(name, given)


def add_to(pipe: "DiffusionPipeline", addons: AddOns, spec: FoundationSpec) -> "DiffusionPipeline":
    """Puts scheduler, LoRA and safety checker into a pipeline, in place. spec: what the model was loaded from."""
    if addons.scheduler != "model":
        import diffusers

        pipe.scheduler = getattr(diffusers, SCHEDULERS[addons.scheduler]).from_config(pipe.scheduler.config)
    if addons.lora:
        _checked("lora", addons.lora, lambda: _fuse(pipe, addons))
    if addons.safety_checker != "off":
        _add_checker(pipe, addons.safety_checker, spec)
    return pipe


def blackened(pipe: "DiffusionPipeline", picture: Image.Image) -> bool:
    """Whether the pipeline's safety checker stopped a picture, of which it leaves nothing but black."""
    return getattr(pipe, "safety_checker", None) is not None and picture.getbbox() is None


def with_controlnet(pipe: "DiffusionPipeline", addons: AddOns) -> "DiffusionPipeline":
    """The same model, guided by `addons.controlnet`; it takes the guiding picture as `image`.

    Raises UserError for a ControlNet of another model.
    """
    from diffusers import AutoPipelineForText2Image, ControlNetModel

    folder = str(addons.controlnet)
    net = _checked(
        "controlnet",
        folder,
        lambda: ControlNetModel.from_pretrained(folder, torch_dtype=pipe.unet.dtype, use_safetensors=True),
    )
    for name in ("cross_attention_dim", "addition_embed_type", "block_out_channels"):
        theirs, ours = (getattr(part.config, name) for part in (net, pipe.unet))
        if theirs != ours and list(np.ravel(theirs)) != list(np.ravel(ours)):
            rule = f"is for another model: its {name} is {theirs}, the model's {ours}"
            raise UserError("addons.controlnet", folder, rule, "give one for this model")
    guided = AutoPipelineForText2Image.from_pipe(pipe, controlnet=net.to(pipe.unet.device).eval().requires_grad_(False))
    guided.set_progress_bar_config(disable=True)
    return guided


def content(addons: AddOns) -> dict[str, str]:
    """What identifies the add-ons by what they hold: {setting: SHA-256 of its files}."""
    found = {}
    for name in ("lora", "controlnet", "safety_checker"):
        place = Path(str(getattr(addons, name)))
        files = sorted(place.rglob("*")) if place.is_dir() else [place]
        hashes = []
        for file in files:
            if file.is_file():
                with file.open("rb") as opened:
                    hashes.append(hashlib.file_digest(opened, "sha256").hexdigest())
        if hashes:
            found[name] = digest(hashes)
    return found


def _fuse(pipe: "DiffusionPipeline", addons: AddOns) -> None:
    """Adds the weights into the model's own: no step is slower, and the text encoder keeps its places for A*."""
    pipe.load_lora_weights(addons.lora, use_safetensors=True)
    pipe.fuse_lora(lora_scale=addons.lora_scale)
    pipe.unload_lora_weights()


def _add_checker(pipe: "DiffusionPipeline", wanted: str, spec: FoundationSpec) -> None:
    """The model's own (auto), where it has one, or another's. Raises UserError where there is no place for it."""
    takes_one = hasattr(pipe, "safety_checker")
    if wanted != "auto":
        if not takes_one:
            rule = f"a {type(pipe).__name__} has no place for a safety checker"
            raise UserError("addons.safety_checker", wanted, rule, "set it to off")
        checker: tuple[str, dict[str, Any]] = (wanted, {})
        processor = checker
    else:
        where, pinned = locate(spec.diffusion, spec.diffusion_revision, "diffusion")
        index = type(pipe).load_config(where, **pinned)
        named = (index.get("safety_checker") or [None])[0] is not None
        if not takes_one or not (named or (Path(where) / "safety_checker").is_dir()):
            return
        checker = where, {**pinned, "subfolder": "safety_checker"}
        processor = where, {**pinned, "subfolder": "feature_extractor"}
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPImageProcessorPil

    pipe.safety_checker, pipe.feature_extractor = _checked(
        "safety_checker",
        wanted,
        lambda: (
            StableDiffusionSafetyChecker.from_pretrained(checker[0], use_safetensors=True, **checker[1])
            .to(pipe.device, pipe.unet.dtype)
            .eval(),
            CLIPImageProcessorPil.from_pretrained(processor[0], **processor[1]),
        ),
    )


def _check_there(setting: str, value: str) -> None:
    if not Path(value).exists():
        raise UserError(f"addons.{setting}", value, "does not exist", "give a folder or file")


def _checked(setting: str, value: str, load: Callable[[], Any]) -> Any:
    """What `load` makes of a folder or file. Raises UserError when that fails, in whatever way."""
    if value != "auto":
        _check_there(setting, value)
    try:
        with torch.no_grad():
            return load()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # libraries raise many types for files that are not theirs
        reason = str(error).split("\n")[0][:200]
        raise UserError(f"addons.{setting}", value, f"cannot be used ({reason})", "give one for this model") from error
