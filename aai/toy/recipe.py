"""The foundation recipe: trains the small CLIP and the small latent diffusion model from captioned pictures.

The result is two folders in Hugging Face layout (a `transformers.CLIPModel` and a diffusers Stable Diffusion
pipeline), the same classes as the real weights, only smaller. `fetch` gives captioned pictures; nothing here knows the
toy world's grammar.
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
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextModel,
    CLIPTokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from aai.config import Config

log = logging.getLogger(__name__)

BOS, EOS = "<|startoftext|>", "<|endoftext|>"


class StageConfig(Config):
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
    clip: StageConfig = StageConfig(steps=1300, batch_size=128, learning_rate=1e-3)
    vae: StageConfig = StageConfig(steps=2200, batch_size=32, learning_rate=2e-3)
    unet: StageConfig = StageConfig(steps=8000, batch_size=32, learning_rate=1e-3)
    seed: int = 0


# ---------------------------------------------------------------- shared


def _batches(count: int, stage: StageConfig, seed: int) -> Iterator[Tensor]:
    """`stage.steps` batches of row numbers, reshuffled whenever all rows were used."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator)
    at = 0
    for _ in range(stage.steps):
        if at + stage.batch_size > count:
            order, at = torch.randperm(count, generator=generator), 0
        yield order[at : at + stage.batch_size]
        at += stage.batch_size


def _train(
    name: str,
    params: list[nn.Parameter],
    count: int,
    stage: StageConfig,
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
    """bf16 where the CPU multiplies it natively, on CUDA always."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.autocast(device, torch.bfloat16)


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 [N, H, W, 3] -> float [N, 3, H, W] in [-1, 1]."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


# ---------------------------------------------------------------- tokenizer and CLIP


def build_tokenizer(captions: list[str], merges: int, max_length: int) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges are learned from captions (Sennrich et al. 2016, arXiv 1508.07909)."""
    words = Counter(word for text in captions for word in text.lower().split())
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
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (processor.image_mean, processor.image_std))
    texts = sorted(set(captions))
    number = {text: i for i, text in enumerate(texts)}
    which = torch.tensor([number[text] for text in captions])
    tokens = tokenizer(texts, padding="longest", return_tensors="pt")

    def loss_of(rows: Tensor) -> Tensor:
        x = ((to_unit(pixels[rows]) + 1) / 2 - mean) / std
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

    _train("clip", list(model.parameters()), len(pixels), cfg.clip, cfg.seed, loss_of)
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    processor.save_pretrained(out)


# ---------------------------------------------------------------- diffusion


def build_vae(cfg: FoundationConfig) -> AutoencoderKL:
    """A small KL autoencoder: 8x8 pixels to one latent position."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=cfg.latent_channels,
        sample_size=cfg.image_size_px,
        mid_block_add_attention=False,
    )


def build_unet(cfg: FoundationConfig) -> UNet2DConditionModel:
    """A small conditional UNet; it attends to the text at half the latent resolution, where attention is cheap."""
    return UNet2DConditionModel(
        sample_size=cfg.image_size_px // 8,
        in_channels=cfg.latent_channels,
        out_channels=cfg.latent_channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        block_out_channels=cfg.unet_channels,
        layers_per_block=1,
        cross_attention_dim=cfg.hidden_size,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=16,
    )


def noise_scheduler() -> DPMSolverMultistepScheduler:
    """Stable Diffusion's noise schedule with v-prediction (Salimans & Ho 2022, arXiv 2202.00512)."""
    return DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        steps_offset=1,
    )


def train_vae(cfg: FoundationConfig, pixels: Tensor) -> AutoencoderKL:
    """Trains the autoencoder on L1 + MSE of pixels and of their gradients, with a faint KL term.

    Sets `scaling_factor` so that latents have unit variance, as the diffusion model expects.
    """
    torch.manual_seed(cfg.seed)
    vae = build_vae(cfg)

    def edges(x: Tensor) -> tuple[Tensor, Tensor]:
        return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]

    def loss_of(rows: Tensor) -> Tensor:
        x = to_unit(pixels[rows])
        with autocast():
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample
        y = y.float()
        detail = sum(F.l1_loss(a, b) for a, b in zip(edges(x), edges(y), strict=True))
        return F.l1_loss(y, x) + F.mse_loss(y, x) + detail + 1e-5 * posterior.kl().float().mean()

    _train("vae", list(vae.parameters()), len(pixels), cfg.vae, cfg.seed, loss_of)
    latents = encode_latents(vae, pixels[:2048])
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    return vae.eval()


@torch.no_grad()
def encode_latents(vae: AutoencoderKL, pixels: Tensor, batch_size: int = 256) -> Tensor:
    """Unscaled posterior means [N, C, h, w] of uint8 pictures [N, H, W, 3]."""
    return torch.cat([vae.encode(to_unit(x)).latent_dist.mean for x in pixels.split(batch_size)])


@torch.no_grad()
def encode_captions(model: CLIPTextModel, tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Hidden states [N, L, D] of captions, padded as a diffusers pipeline pads them."""
    tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return torch.cat([model(input_ids=part).last_hidden_state for part in tokens.split(64)])


def train_unet(
    cfg: FoundationConfig,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    pixels: Tensor,
    captions: list[str],
    on_progress: Callable[[UNet2DConditionModel], None] | None = None,
) -> UNet2DConditionModel:
    """Trains the UNet on cached latents and caption states; a tenth of the captions is dropped for guidance.

    Returns the exponential moving average of the weights. `on_progress` gets it every 1,000 steps.
    """
    torch.manual_seed(cfg.seed)
    both = torch.cat([pixels, pixels.flip(2)])  # a mirrored scene is a scene
    latents = encode_latents(vae, both) * vae.config.scaling_factor
    texts = sorted({*captions, ""})
    number = {text: i for i, text in enumerate(texts)}
    which = torch.tensor([number[text] for text in captions] * 2)
    states = encode_captions(text_encoder, tokenizer, texts)
    unet, scheduler = build_unet(cfg), noise_scheduler()
    average = torch.optim.swa_utils.AveragedModel(unet, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998))
    done = 0

    def loss_of(rows: Tensor) -> Tensor:
        z = latents[rows]
        noise = torch.randn_like(z)
        t = torch.randint(0, scheduler.config.num_train_timesteps, (len(z),))
        keep = torch.rand(len(z)) >= 0.1
        context = states[torch.where(keep, which[rows], number[""])]
        with autocast():
            v = unet(scheduler.add_noise(z, noise, t), t, encoder_hidden_states=context).sample
        alpha = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
        return F.mse_loss(v.float(), alpha.sqrt() * noise - (1 - alpha).sqrt() * z)

    def after_step() -> None:
        nonlocal done
        average.update_parameters(unet)
        done += 1
        if on_progress and done % 1000 == 0:
            on_progress(average.module)

    _train("unet", list(unet.parameters()), len(latents), cfg.unet, cfg.seed, loss_of, after_step)
    return average.module


def save_pipeline(
    out: Path, vae: AutoencoderKL, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> None:
    """Writes a diffusers Stable Diffusion folder in fp16."""
    pipe = StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=noise_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(dtype=torch.float16)
    pipe.save_pretrained(out)
    pipe.to(dtype=torch.float32)


def train_diffusion(cfg: FoundationConfig, pixels: Tensor, captions: list[str], clip_dir: Path, out: Path) -> None:
    """Trains VAE and UNet around the CLIP's text tower and saves the pipeline, also after every 1,000 steps.

    A finished VAE in `out` is used again.
    """
    tokenizer = CLIPTokenizer.from_pretrained(clip_dir)
    text_encoder = CLIPTextModel.from_pretrained(clip_dir, dtype=torch.float32).eval()
    if (out / "vae" / "config.json").exists():
        vae = AutoencoderKL.from_pretrained(out / "vae", dtype=torch.float32).eval()
    else:
        vae = train_vae(cfg, pixels)
        vae.save_pretrained(out / "vae")
    unet = train_unet(
        cfg,
        vae,
        text_encoder,
        tokenizer,
        pixels,
        captions,
        on_progress=lambda current: save_pipeline(out, vae, current, text_encoder, tokenizer),
    )
    save_pipeline(out, vae, unet, text_encoder, tokenizer)
