"""Small foundation models with random weights, saved as ordinary Hugging Face folders."""

from pathlib import Path

import torch
from transformers import ASTConfig, ASTModel, CLIPTextModel, CLIPTokenizer

from aai.toy.recipe import (
    FoundationConfig,
    build_clip,
    build_tokenizer,
    build_unet,
    build_vae,
    image_processor,
    save_pipeline,
)

SIZES = FoundationConfig(image_size_px=64, hidden_size=32, unet_channels=(32, 32), merges=60)
CAPTIONS = ["a photo of a big dog in the rain", "a sketch of a small bell at night", "a clock", "thing"]


def write_clip(folder: str | Path) -> Path:
    """A random CLIPModel (64 px, 32 features) with tokenizer and image processor."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(CAPTIONS, SIZES.merges, SIZES.context_length)
    build_clip(SIZES, tokenizer).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    image_processor(SIZES.image_size_px).save_pretrained(folder)
    return Path(folder)


def write_diffusion(folder: str | Path, clip_folder: str | Path) -> Path:
    """A random Stable Diffusion pipeline around the text tower of `write_clip`'s folder (8x8x8 latents)."""
    torch.manual_seed(1)
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
    text_encoder = CLIPTextModel.from_pretrained(clip_folder, dtype=torch.float32)
    save_pipeline(Path(folder), build_vae(SIZES).eval(), build_unet(SIZES).eval(), text_encoder, tokenizer)
    return Path(folder)


def write_ast(folder: str | Path) -> Path:
    """A random ASTModel (16 mel bins, 100 frames)."""
    torch.manual_seed(2)
    config = ASTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, patch_size=8,
        frequency_stride=8, time_stride=8, max_length=100, num_mel_bins=16,
    )
    ASTModel(config).save_pretrained(folder)
    return Path(folder)
