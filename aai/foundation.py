"""The frozen foundation models by id: a CLIP and a Stable Diffusion, each a local folder, a hub id, or `toy:NAME`."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from aai.config import Config
from aai.errors import UserError

TOY_WEIGHTS = Path(__file__).parent / "toy" / "weights"


class FoundationSpec(Config):
    """Which frozen models a run stands on; they are recorded in every table and bundle."""

    clip: str = "toy:clip"
    """CLIPModel: local folder, hub id, or toy:clip (in the package)."""
    clip_revision: str | None = None
    """Commit of the hub id; required for a hub id so that a run can be repeated."""
    diffusion: str = "toy:diffusion"
    """Stable Diffusion pipeline folder, hub id, or toy:diffusion (in the package)."""
    diffusion_revision: str | None = None


def _locate(model_id: str, revision: str | None, setting: str) -> tuple[str, dict[str, Any]]:
    """The argument for `from_pretrained`: a folder, or a pinned hub id."""
    if model_id.startswith("toy:"):
        model_id = str(TOY_WEIGHTS / model_id.removeprefix("toy:"))
    if os.path.isdir(model_id):
        return model_id, {"local_files_only": True}
    if model_id.startswith(("/", ".", "s3://")) or model_id.count("/") != 1:
        raise UserError(
            f"foundation.{setting}", model_id, "is neither a folder nor a hub id", "give an existing folder"
        )
    if not revision:
        raise UserError(
            f"foundation.{setting}_revision", "(missing)", f"hub id {model_id} is not pinned", "give its commit hash"
        )
    return model_id, {"revision": revision}


def _load(setting: str, model_id: str, load: Callable[[], Any]) -> Any:
    """Loads without the libraries' bars and notices (a tower of a whole CLIP is loaded with parts left over)."""
    for library in (transformers.utils.logging, diffusers.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
    try:
        return load()
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).split("\n")[0][:200]
        raise UserError(
            f"foundation.{setting}", model_id, f"cannot be loaded ({reason})", "give a folder or a reachable hub id"
        ) from error


def load_clip(
    spec: FoundationSpec, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[CLIPModel, CLIPTokenizer, CLIPImageProcessorPil]:
    """The frozen CLIP with its tokenizer and PIL image processor, in eval mode without gradients."""
    where, kwargs = _locate(spec.clip, spec.clip_revision, "clip")
    model = _load(
        "clip", spec.clip, lambda: CLIPModel.from_pretrained(where, dtype=dtype, use_safetensors=True, **kwargs)
    )
    tokenizer = _load("clip", spec.clip, lambda: CLIPTokenizer.from_pretrained(where, **kwargs))
    processor = _load("clip", spec.clip, lambda: CLIPImageProcessorPil.from_pretrained(where, **kwargs))
    return model.to(device).eval().requires_grad_(False), tokenizer, processor


def load_diffusion(
    spec: FoundationSpec, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> StableDiffusionPipeline:
    """The frozen diffusion pipeline, without safety checker, every part in eval mode without gradients."""
    where, kwargs = _locate(spec.diffusion, spec.diffusion_revision, "diffusion")
    pipe = _load(
        "diffusion",
        spec.diffusion,
        lambda: StableDiffusionPipeline.from_pretrained(
            where,
            dtype=dtype,
            low_cpu_mem_usage=False,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            use_safetensors=True,
            **kwargs,
        ),
    )
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.vae, pipe.unet, pipe.text_encoder):
        part.eval().requires_grad_(False)
    return pipe


def load_vae(
    spec: FoundationSpec, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[AutoencoderKL, int]:
    """The frozen VAE of the diffusion model alone, and the edge in pixels of the pictures it was trained on."""
    where, kwargs = _locate(spec.diffusion, spec.diffusion_revision, "diffusion")
    vae = _load(
        "diffusion",
        spec.diffusion,
        lambda: AutoencoderKL.from_pretrained(
            where, subfolder="vae", torch_dtype=dtype, use_safetensors=True, low_cpu_mem_usage=False, **kwargs
        ),
    )
    unet = _load(
        "diffusion", spec.diffusion, lambda: UNet2DConditionModel.load_config(where, subfolder="unet", **kwargs)
    )
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    return vae.to(device).eval().requires_grad_(False), int(unet["sample_size"]) * factor


def identity(spec: FoundationSpec) -> dict[str, str]:
    """What pins the foundation: for a hub id its revision, for a folder the hash of its safetensors files."""
    out = {}
    for name, model_id, revision in (
        ("clip", spec.clip, spec.clip_revision),
        ("diffusion", spec.diffusion, spec.diffusion_revision),
    ):
        where, _ = _locate(model_id, revision, name)
        out[name] = model_id
        out[f"{name}_revision"] = _folder_hash(Path(where)) if os.path.isdir(where) else str(revision)
    return out


def _folder_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.safetensors")):
        digest.update(file.relative_to(folder).as_posix().encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
