"""The foundation recipe: sizes, the training loop, and the small CLIP (recipe_diffusion has the diffusion model).

The result is two folders in Hugging Face layout (a `transformers.CLIPModel` and a diffusers Stable Diffusion
pipeline), the same classes as the real weights, only smaller. Nothing here knows the toy world's grammar.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from aai.config import Config
from aai.precision import native_bfloat16

log = logging.getLogger(__name__)

BOS, EOS = "<|startoftext|>", "<|endoftext|>"


class TrainSteps(Config):
    """How long and how fast one model trains."""

    steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 1e-3


class FoundationConfig(Config):
    """Sizes and training lengths of the small foundation models."""

    image_size_px: int = 64
    hidden_size: int = 128
    latent_channels: int = 8
    unet_channels: tuple[int, int] = (96, 144)
    merges: int = 300
    """Byte-pair merges of the tokenizer."""
    context_length: int = 32
    """Tokens of a prompt, start and end included (77 in the published models)."""
    clip: TrainSteps = TrainSteps(steps=1300, batch_size=128, learning_rate=1e-3)
    vae: TrainSteps = TrainSteps(steps=2200, batch_size=32, learning_rate=2e-3)
    decoder: TrainSteps = TrainSteps(steps=2500, batch_size=32, learning_rate=1e-3)
    """The VAE's decoder alone, on latents with noise; it leaves the latents, and so the UNet, as they are."""
    unet: TrainSteps = TrainSteps(steps=8000, batch_size=32, learning_rate=1e-3)
    seed: int = 0


# ---------------------------------------------------------------- shared


def _batches(count: int, stage: TrainSteps, seed: int) -> Iterator[Tensor]:
    """`stage.steps` batches of row numbers, reshuffled whenever all rows were used."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator)
    at = 0
    for _ in range(stage.steps):
        if at + stage.batch_size > count:
            order, at = torch.randperm(count, generator=generator), 0
        yield order[at : at + stage.batch_size]
        at += stage.batch_size


def train_steps(
    name: str,
    params: list[nn.Parameter],
    count: int,
    stage: TrainSteps,
    seed: int,
    loss_of: Callable[[Tensor], Tensor],
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """AdamW with warm-up and cosine decay over `loss_of(rows)`; logs the mean loss every 100 steps."""
    optimizer = torch.optim.AdamW(params, lr=stage.learning_rate, weight_decay=0.01)
    warmup = min(100, stage.steps // 10 + 1)

    def rate(step: int) -> float:
        progress = min(1.0, step / max(1, stage.steps))
        return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    total = 0.0
    for step, rows in enumerate(_batches(count, stage, seed), 1):
        loss = loss_of(rows)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
        after_step()
        total += loss.item()
        if step % 100 == 0 or step == stage.steps:
            log.info("%s step %d/%d loss %.4f", name, step, stage.steps, total / (step % 100 or 100))
            total = 0.0


def autocast() -> Any:
    """bfloat16 where the device multiplies it natively."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.autocast(device, torch.bfloat16, enabled=native_bfloat16(device))


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 [N, H, W, 3] -> float [N, 3, H, W] in [-1, 1]."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def clip_input(x: Tensor) -> Tensor:
    """Pictures [N, 3, H, W] in [-1, 1] -> what CLIP's preprocessing makes of them at that size."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return ((x + 1) / 2 - mean) / std


# ---------------------------------------------------------------- tokenizer and CLIP


def build_tokenizer(captions: list[str], merges: int, max_length: int) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges are learned from captions (Sennrich et al. 2016, arXiv 1508.07909)."""
    words: Counter[str] = Counter()
    for text in captions:
        words.update(text.lower().split())
    spelled = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    learned: list[tuple[str, str]] = []
    for _ in range(merges):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in spelled.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        learned.append(best)
        for word, parts in spelled.items():
            spelled[word] = _merge(parts, best)
    alphabet = list(bytes_to_unicode().values())
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *dict.fromkeys(a + b for a, b in learned), BOS, EOS]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=learned, model_max_length=max_length)


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return out


def build_clip(cfg: FoundationConfig, tokenizer: CLIPTokenizer) -> CLIPModel:
    """A small CLIP with random weights."""
    width = cfg.hidden_size
    shared = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config={
            **shared,
            "num_hidden_layers": 4,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": tokenizer.model_max_length,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**shared, "num_hidden_layers": 4, "image_size": cfg.image_size_px, "patch_size": 8},
        projection_dim=width,
    )
    return CLIPModel(config)


def image_processor(size_px: int) -> CLIPImageProcessorPil:
    """CLIP's own preprocessing at another picture size."""
    edge = {"height": size_px, "width": size_px}
    return CLIPImageProcessorPil(size={"shortest_edge": size_px}, crop_size=edge)


def train_clip(cfg: FoundationConfig, pixels: Tensor, captions: list[str], out: Path) -> None:
    """Contrastive training of both towers; equal captions in a batch are positives of one another.

    pixels: uint8 [N, H, W, 3] at `image_size_px`. Saves model, tokenizer and image processor to `out`.
    """
    torch.manual_seed(cfg.seed)
    tokenizer = build_tokenizer(captions, cfg.merges, cfg.context_length)
    model = build_clip(cfg, tokenizer)
    processor = image_processor(cfg.image_size_px)
    texts = sorted(set(captions))
    number = {text: i for i, text in enumerate(texts)}
    which = torch.tensor([number[text] for text in captions])
    tokens = tokenizer(texts, padding="longest", return_tensors="pt")

    def loss_of(rows: Tensor) -> Tensor:
        """Mean of picture -> caption and caption -> picture cross-entropy of the rows [B]: a scalar."""
        x = clip_input(to_unit(pixels[rows]))
        uniq, inverse = which[rows].unique(return_inverse=True)
        with autocast():
            image = model.get_image_features(pixel_values=x).pooler_output
            text = model.get_text_features(
                input_ids=tokens.input_ids[uniq], attention_mask=tokens.attention_mask[uniq]
            ).pooler_output
        image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
        logits = model.logit_scale.exp().clamp(max=100) * image @ text.T  # [B, U]
        share = F.one_hot(inverse, len(uniq)).float()
        to_image = share.T / share.sum(0)[:, None]
        return (F.cross_entropy(logits, inverse) + F.cross_entropy(logits.T, to_image)) / 2

    train_steps("clip", list(model.parameters()), len(pixels), cfg.clip, cfg.seed, loss_of)
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    processor.save_pretrained(out)
