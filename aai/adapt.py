"""Adapt (AAI, stage 2): an aligned audio embedding becomes K audio tokens A* that act like ordinary words.

The adapter trains through the frozen text encoder and the frozen UNet, on cached latents: no picture is decoded and
no foundation weight changes. The paper's architecture and weights are not public; these are our choices.

Shapes: B clips, D CLIP space, K tokens, D_t token embedding, L context, [C, h, w] latents.
"""

import re
from functools import partial
from typing import Any

import pydantic
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from aai.config import Config
from aai.errors import UserError
from aai.foundation.loaders import DiffusionSkeleton
from aai.inject import with_head
from aai.losses import mean_over_ranks, rows_of_ranks
from aai.memory import in_chunks
from aai.sdxl import DoubleInjector, conditions, injector_of


class AdapterConfig(Config):
    """The audio adapter's shape."""

    num_tokens: int = pydantic.Field(1, ge=1, le=16)
    """K: how many words a sound becomes."""
    hidden_size: int = pydantic.Field(512, ge=8)
    embed_dim: int = pydantic.Field(128, ge=1)
    """D of the aligned space; set from the aligner."""
    token_dim: int = pydantic.Field(128, ge=1)
    """D_t of the text encoder; set from the diffusion model."""


class AdaptLossConfig(Config):
    """Weights of the adapter's losses; 0 leaves a term out."""

    w_denoise: float = pydantic.Field(1.0, ge=0)
    """Denoising MSE through the frozen UNet."""
    denoise_rows: int = pydantic.Field(0, ge=0)
    """Clips of a step, over all workers, that take the denoising term, the costly one; 0 = all."""
    w_clip: float = pydantic.Field(0.5, ge=0)
    """1 - cosine of the prompt's pooled text feature to the clip's image feature."""
    w_hidden: float = pydantic.Field(1.0, ge=0)
    """MSE of the prompt's hidden states, from its end of text on, to the caption's (to `prompt` with the caption in the
    sound's place, where the caption has no head: a bare label says less than the prompt)."""
    w_norm: float = pydantic.Field(0.01, ge=0)
    """Squared relative distance of each token's length from the vocabulary's median."""
    head_pattern: str = r"^a \w+ of\b"
    """What a caption says that cannot be heard; it stays text in front of <sound>. No match: `prompt` is used."""
    prompt: str = "a photo of <sound>"

    @pydantic.model_validator(mode="after")
    def _some_loss(self) -> "AdaptLossConfig":
        if not (self.w_denoise or self.w_clip or self.w_hidden):
            raise ValueError("w_denoise, w_clip and w_hidden are all 0: nothing to learn from")
        return self


class AudioAdapter(nn.Module):
    """MLP from the aligned embedding to A*; starts at the vocabulary's median length."""

    def __init__(self, cfg: AdapterConfig, median_norm: float = 1.0) -> None:
        """median_norm: how long an ordinary word is (`Injector.median_norm`)."""
        super().__init__()
        self.cfg = cfg
        self.net = nn.Sequential(
            nn.Linear(cfg.embed_dim, cfg.hidden_size),
            nn.GELU(),
            nn.LayerNorm(cfg.hidden_size),
            nn.Linear(cfg.hidden_size, cfg.hidden_size),
            nn.GELU(),
            nn.LayerNorm(cfg.hidden_size),
            nn.Linear(cfg.hidden_size, cfg.num_tokens * cfg.token_dim),
        )
        self.register_buffer("scale", torch.tensor(median_norm))
        last = self.net[-1]
        nn.init.normal_(last.weight, std=(cfg.hidden_size * cfg.token_dim) ** -0.5)
        nn.init.zeros_(last.bias)

    def forward(self, audio_embed: Tensor) -> Tensor:
        """audio_embed [B, D], unit norm -> A* [B, K, D_t] in token-embedding space."""
        out = self.net(audio_embed * audio_embed.shape[-1] ** 0.5)
        return self.scale * out.view(-1, self.cfg.num_tokens, self.cfg.token_dim)


def prompt_of(caption: str, cfg: AdaptLossConfig) -> str:
    """The training prompt of a caption: its unheard head, then the sound.

    >>> prompt_of("a sketch of a big dog in the rain", AdaptLossConfig())
    'a sketch of <sound>'
    """
    head = re.match(cfg.head_pattern, caption)
    return f"{head.group()} <sound>" if head else cfg.prompt


def denoising_loss(
    unet: nn.Module, scheduler: Any, latents: Tensor, states: Tensor, timesteps: Tensor, noise: Tensor
) -> Tensor:
    """Denoising loss per clip [B] of frozen `unet` (Ho et al. 2020, eq. 14), for epsilon- and v-prediction.

    latents [B, C, h, w] scaled; states [B, L, D_h]; timesteps [B]; noise like latents.
    """
    alpha = scheduler.alphas_cumprod.to(latents.device)[timesteps].view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    edge_px = 8 * latents.shape[-1]  # every Stable Diffusion's VAE makes one latent of 8 pixels
    predicted = unet(noisy.to(states.dtype), timesteps, **conditions(unet, states, edge_px)).sample
    kind = scheduler.config.prediction_type
    target = noise if kind == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    return F.mse_loss(predicted.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))


class AdaptTask(nn.Module):
    """Adapter + losses; only the adapter has gradients.

    Sounds come as aligned embeddings that were computed once (`aai.aligned`). text_projection maps the text encoder's
    pooled state into CLIP space ([D, D_h] linear), or None when the diffusion model's text encoder is not the CLIP's.
    """

    def __init__(
        self,
        adapter: AudioAdapter,
        pipe: DiffusionPipeline | DiffusionSkeleton,
        text_projection: nn.Linear | None,
        cfg: AdaptLossConfig,
        neutral_word: str = "thing",
        chunk_size: int = 0,
    ) -> None:
        """chunk_size: clips that go through the UNet at once (see `aai.memory.in_chunks`)."""
        super().__init__()
        if text_projection is None and not (cfg.w_denoise or cfg.w_hidden):
            rule = "is the only loss, and the diffusion model's text encoder is not the CLIP's"
            raise UserError("loss.w_clip", cfg.w_clip, rule, "set loss.w_denoise or loss.w_hidden")
        self.adapter, self.cfg, self.chunk_size = adapter, cfg, chunk_size
        self.unet = pipe.unet.eval().requires_grad_(False)
        self.text_encoder = pipe.text_encoder.eval().requires_grad_(False)
        self.text_projection = text_projection.requires_grad_(False) if text_projection else None
        self.scheduler = pipe.scheduler
        self.injector = injector_of(pipe, neutral_word)
        if isinstance(self.injector, DoubleInjector):  # a part of the task, so that it moves to its device
            self.text_encoder_2 = self.injector.second.text_encoder.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "AdaptTask":
        """Only the adapter ever leaves eval mode."""
        super().train(False)
        self.adapter.train(mode)
        return self

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """This process's loss of one batch, whose mean over all processes is the loss, and the terms of all.

        batch: see `terms`.
        """
        rows = len(batch["aligned"])
        counts = rows_of_ranks(rows, batch["aligned"].device)
        share = rows / sum(counts)
        denoised = max(1, round(self.cfg.denoise_rows * share)) if self.cfg.denoise_rows else 0
        terms = self.terms(batch, denoised)
        weight = share * len(counts)  # 1 where all processes hold equally many rows
        told = mean_over_ranks(weight * torch.stack(list(terms.values())))
        return weight * self.total(terms), dict(zip(terms, told, strict=True))

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """The loss of its terms."""
        cfg = self.cfg
        weights = {"denoise": cfg.w_denoise, "clip": cfg.w_clip, "hidden": cfg.w_hidden, "norm": cfg.w_norm}
        return torch.stack([weights[name] * term for name, term in terms.items()]).sum()

    def terms(self, batch: dict[str, Any], denoise_rows: int = 0) -> dict[str, Tensor]:
        """The means of this process's rows, of what has a weight.

        batch: aligned [B, D], latents [B, C, h, w], image_features [B, N, D], caption list[str]. denoise_rows: so many
        of the rows, the first, take the denoising term; 0 = all.
        """
        cfg = self.cfg
        tokens = self.adapter(batch["aligned"])
        states, pooled = self.injector.encode([prompt_of(c, cfg) for c in batch["caption"]], tokens)
        terms: dict[str, Tensor] = {}
        if cfg.w_denoise:
            latents = batch["latents"][: denoise_rows or None].float()
            steps = self.scheduler.config.num_train_timesteps
            timesteps = torch.randint(0, steps, (len(latents),), device=latents.device)
            noise = torch.randn_like(latents)
            parts = latents, states[: len(latents)], timesteps, noise
            run = partial(denoising_loss, self.unet, self.scheduler)
            terms["denoise"] = in_chunks(run, self.chunk_size, *parts).mean()
        if cfg.w_clip and self.text_projection is not None:
            target = F.normalize(batch["image_features"].float().mean(1), dim=-1)
            terms["clip"] = 1 - F.cosine_similarity(self.text_projection(pooled), target).mean()
        if cfg.w_hidden:
            wanted = [with_head(c, cfg.head_pattern, cfg.prompt) for c in batch["caption"]]
            terms["hidden"] = self._hidden_distance(states, pooled, wanted)
        if cfg.w_norm:
            terms["norm"] = (tokens.norm(dim=-1) / self.adapter.scale - 1).square().mean()
        return terms

    def _hidden_distance(self, states: Tensor, pooled: Tensor, captions: list[str]) -> Tensor:
        """MSE to the caption's states at its pooled position and over the padding, where both prompts say the same.

        Before its end a prompt of K tokens and a caption of many words stand at different positions.
        """
        texts = sorted(set(captions))
        rows = torch.tensor([texts.index(caption) for caption in captions], device=states.device)
        with torch.no_grad():
            want, want_pooled = self.injector.encode(texts)
        tail = states.shape[1] // 2
        return F.mse_loss(states[:, tail:], want[rows, tail:]) + F.mse_loss(pooled, want_pooled[rows])
