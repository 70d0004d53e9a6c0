"""The models of a real training with random weights, built in memory: they cost what trained ones cost."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
)

from aai.adapt import AdapterConfig, AdaptLossConfig, AdaptTask, AudioAdapter
from aai.encoders.audio import AudioEncoder, AudioEncoderConfig
from aai.inject import Injector
from aai.toy.recipe_clip import FoundationConfig
from aai.toy.recipe_diffusion import build_unet, build_vae, noise_scheduler
from pipelines.benches.vitl14 import text_sizes, write_model

CONTEXT_TOKENS = 77


@dataclass(frozen=True)
class Sizes:
    """What differs between the sizes of ModelConfig besides the CLIP."""

    clip_s: float
    picture_px: int
    """Edge of the pictures that the VAE takes."""
    clip_dim: int = 768
    """Of both sizes' CLIP."""


SIZES = {"vitl14": Sizes(10.0, 512), "tiny": Sizes(1.0, 64)}


def clip_folder(out: str, size: str) -> Path:
    """The CLIP of `aai bench vitl14`, written once."""
    folder = Path(out) / f"model-{size}"
    if not (folder / "tokenizer_config.json").is_file():  # written last
        write_model(folder, size)
    return folder


def encoder_from_scratch(size: str) -> AudioEncoder:
    """The encoder of align's defaults, for sounds of this size."""
    torch.manual_seed(0)
    sizes = SIZES[size]
    return AudioEncoder(AudioEncoderConfig(clip_s=sizes.clip_s, embed_dim=sizes.clip_dim))


def ast_encoder(size: str) -> AudioEncoder:
    """AST-base (or for tiny a small AST), with the head of configs/align/vggsound_vitl14_gpu8.yaml."""
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    architecture = ASTConfig(**(small if size == "tiny" else {}))
    sizes = SIZES[size]
    config = AudioEncoderConfig(
        pretrained="random weights",
        architecture=json.loads(architecture.to_json_string(use_diff=False)),
        extractor=json.loads(ASTFeatureExtractor().to_json_string()),
        clip_s=sizes.clip_s,
        embed_dim=sizes.clip_dim,
        head_size=1024,
    )
    return AudioEncoder(config)


def build_pipeline(size: str, clip: Path) -> StableDiffusionPipeline:
    """Stable Diffusion 1.5's UNet, VAE and text encoder (or for tiny the toy's, narrow), with the toy's tokenizer."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(clip, local_files_only=True)
    tokenizer.model_max_length = CONTEXT_TOKENS
    text = text_sizes(size)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    positions = {"max_position_embeddings": CONTEXT_TOKENS, "vocab_size": len(tokenizer)}
    text_encoder = CLIPTextModel(CLIPTextConfig(**text, **ends, **positions))
    if size == "tiny":
        narrow = FoundationConfig(
            image_size_px=SIZES[size].picture_px, hidden_size=text["hidden_size"], unet_channels=(32, 32)
        )
        vae, unet = build_vae(narrow), build_unet(narrow)
    else:
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=text["hidden_size"], attention_head_dim=8)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
            sample_size=512,
        )
    parts: dict[str, Any] = {"vae": vae, "unet": unet, "text_encoder": text_encoder, "tokenizer": tokenizer}
    return StableDiffusionPipeline(
        **parts,
        scheduler=noise_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def adapt_task(size: str, pipe: StableDiffusionPipeline, num_tokens: int = 4, hidden_size: int = 1024) -> AdaptTask:
    """The task of `aai adapt` with all its terms, as configs/adapt/vggsound_sd15_gpu8.yaml sets it."""
    injector = Injector(pipe.text_encoder, pipe.tokenizer)
    dims = {"embed_dim": SIZES[size].clip_dim, "token_dim": injector.token_dim}
    adapter = AudioAdapter(AdapterConfig(num_tokens=num_tokens, hidden_size=hidden_size, **dims), injector.median_norm)
    projection = nn.Linear(injector.token_dim, SIZES[size].clip_dim, bias=False)
    return AdaptTask(adapter, pipe, projection, AdaptLossConfig())
