"""Adapt (AAI, stage 2): an aligned audio embedding becomes K audio tokens A* that act like ordinary words.

The adapter trains through the frozen text encoder and the frozen UNet, on cached latents: no picture is decoded and
no foundation weight changes. The paper's architecture and weights are not public; these are our choices.

Shapes: B clips, D CLIP space, K tokens, D_t token embedding, L context, [C, h, w] latents.
"""

import re
from functools import partial
from typing import TYPE_CHECKING, Any

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aai.config import Config
from aai.errors import UserError
from aai.inject import with_head
from aai.losses import gather_with_grad, info_nce, mean_over_ranks, own_rows, rows_of_ranks
from aai.memory import in_chunks
from aai.sdxl import DoubleInjector, conditions, injector_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from aai.foundation.loaders import DiffusionSkeleton

HEADS = 4
"""Of the adapter's attention."""


class AdapterConfig(Config):
    """The audio adapter's shape."""

    num_tokens: int = pydantic.Field(1, ge=1, le=16)
    """K: how many words a sound becomes."""
    parts: int = pydantic.Field(0, ge=0, le=64)
    """0: all words are made of the sound's one embedding. Else each word attends for itself to it and to those of so
    many parts of the sound (attention pooling with K queries, as in arXiv 2205.01917)."""
    hidden_size: int = pydantic.Field(512, ge=8)
    embed_dim: int = pydantic.Field(128, ge=1)
    """D of the aligned space; set from the aligner."""
    token_dim: int = pydantic.Field(128, ge=1)
    """D_t of the text encoder; set from the diffusion model."""

    @pydantic.model_validator(mode="after")
    def _heads_fit(self) -> "AdapterConfig":
        if self.parts and self.hidden_size % HEADS:
            raise ValueError(f"with parts, hidden_size {self.hidden_size} must be a multiple of {HEADS}")
        return self


class AdaptLossConfig(Config):
    """Weights of the adapter's losses; 0 leaves a term out."""

    w_denoise: float = pydantic.Field(1.0, ge=0)
    """Denoising MSE through the frozen UNet."""
    denoise_rows: int = pydantic.Field(0, ge=0)
    """Clips of a step, over all workers, that take the denoising term, the costly one; 0 = all."""
    w_clip: float = pydantic.Field(0.5, ge=0)
    """1 - cosine of the prompt's pooled text feature to the clip's image feature."""
    w_contrast: float = pydantic.Field(0.0, ge=0)
    """InfoNCE of the prompt's pooled text feature and the clip's image feature among the step's clips: the prompt must
    say what tells this picture from the others, also where their captions are equal."""
    contrast_temperature: float = pydantic.Field(0.05, gt=0)
    """Of this term; CLIP's own is 0.01, which one clip's details would rule."""
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
        if not (self.w_denoise or self.w_clip or self.w_contrast or self.w_hidden):
            raise ValueError("w_denoise, w_clip, w_contrast and w_hidden are all 0: nothing to learn from")
        return self


class AttentionPool(nn.Module):
    """K learned queries, each of which gathers what it wants of a sound's embeddings."""

    def __init__(self, cfg: AdapterConfig) -> None:
        super().__init__()
        width = cfg.hidden_size
        self.rise = nn.Linear(cfg.embed_dim, width)
        self.place = nn.Parameter(0.02 * torch.randn(1 + cfg.parts, width))
        self.queries = nn.Parameter(torch.randn(cfg.num_tokens, width))
        self.attend = nn.MultiheadAttention(width, HEADS, batch_first=True)
        self.out = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, width),
            nn.GELU(),
            nn.LayerNorm(width),
            nn.Linear(width, cfg.token_dim),
        )

    def forward(self, rows: Tensor) -> Tensor:
        """rows [B, 1 + parts, D], of which the first is of the whole sound -> [B, K, D_t]."""
        if rows.shape[1:-1] != self.place.shape[:1]:
            raise ValueError(f"rows of {tuple(rows.shape)}, not [B, {len(self.place)}, D]: a sound and its parts")
        seen = F.gelu(self.rise(rows)) + self.place
        queries = self.queries.expand(len(rows), -1, -1)
        gathered, _ = self.attend(queries, seen, seen, need_weights=False)
        found: Tensor = self.out(queries + gathered)
        return found


class AudioAdapter(nn.Module):
    """From the aligned embedding to A*, an MLP or attention (`parts`); starts at the vocabulary's median length."""

    def __init__(self, cfg: AdapterConfig, median_norm: float = 1.0) -> None:
        """median_norm: how long an ordinary word is (`Injector.median_norm`)."""
        super().__init__()
        self.cfg = cfg
        if cfg.parts:
            pool = AttentionPool(cfg)
            self.net: nn.Module = pool
            last = pool.out[-1]
        else:
            self.net = nn.Sequential(
                nn.Linear(cfg.embed_dim, cfg.hidden_size),
                nn.GELU(),
                nn.LayerNorm(cfg.hidden_size),
                nn.Linear(cfg.hidden_size, cfg.hidden_size),
                nn.GELU(),
                nn.LayerNorm(cfg.hidden_size),
                nn.Linear(cfg.hidden_size, cfg.num_tokens * cfg.token_dim),
            )
            last = self.net[-1]
        self.register_buffer("scale", torch.tensor(median_norm))
        nn.init.normal_(last.weight, std=(cfg.hidden_size * cfg.token_dim) ** -0.5)
        nn.init.zeros_(last.bias)

    def forward(self, audio_embed: Tensor) -> Tensor:
        """audio_embed [B, D], unit norm; with parts [B, 1 + parts, D] -> A* [B, K, D_t] in token-embedding space."""
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
        pipe: "DiffusionPipeline | DiffusionSkeleton",
        text_projection: nn.Linear | None,
        cfg: AdaptLossConfig,
        neutral_word: str = "thing",
        chunk_size: int = 0,
    ) -> None:
        """chunk_size: clips that go through the UNet at once (see `aai.memory.in_chunks`)."""
        super().__init__()
        if text_projection is None and not (cfg.w_denoise or cfg.w_hidden):
            rule = "and loss.w_contrast are the only losses, and the diffusion model's text encoder is not the CLIP's"
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
        terms = self.terms(batch, denoised, counts)
        weight = share * len(counts)  # 1 where all processes hold equally many rows
        told = mean_over_ranks(weight * torch.stack(list(terms.values())))
        return weight * self.total(terms), dict(zip(terms, told, strict=True))

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """The loss of its terms."""
        cfg = self.cfg
        weights = {
            "denoise": cfg.w_denoise,
            "clip": cfg.w_clip,
            "contrast": cfg.w_contrast,
            "hidden": cfg.w_hidden,
            "norm": cfg.w_norm,
        }
        return torch.stack([weights[name] * term for name, term in terms.items()]).sum()

    def terms(self, batch: dict[str, Any], denoise_rows: int = 0, counts: list[int] | None = None) -> dict[str, Tensor]:
        """The means of this process's rows, of what has a weight.

        batch: aligned [B, D] (with parts [B, 1 + parts, D]), latents [B, C, h, w], image_features [B, N, D], caption
        list[str], clip_hash [B] for the contrast. denoise_rows: so many of the rows, the first, take the denoising
        term; 0 = all. counts: rows of each process, of which each has to be here; without it other processes' clips
        are no negatives.
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
        if (cfg.w_clip or cfg.w_contrast) and self.text_projection is not None:
            target = F.normalize(batch["image_features"].float().mean(1), dim=-1)
            told = F.normalize(self.text_projection(pooled).float(), dim=-1)
            if cfg.w_clip:
                terms["clip"] = 1 - (told * target).sum(-1).mean()
            if cfg.w_contrast:
                terms["contrast"] = self._contrast(told, target, batch["clip_hash"], counts or [len(told)])
        if cfg.w_hidden:
            wanted = [with_head(c, cfg.head_pattern, cfg.prompt) for c in batch["caption"]]
            terms["hidden"] = self._hidden_distance(states, pooled, wanted)
        if cfg.w_norm:
            terms["norm"] = (tokens.norm(dim=-1) / self.adapter.scale - 1).square().mean()
        return terms

    def _contrast(self, told: Tensor, target: Tensor, clip: Tensor, counts: list[int]) -> Tensor:
        """InfoNCE of this process's rows among those of all; copies of a clip are no negatives of one another."""
        told, target, clip = (gather_with_grad(part, counts) for part in (told, target, clip))
        scale = 1 / self.cfg.contrast_temperature
        return info_nce(told, target, scale, clip[:, None] == clip, own_rows(counts)).mean()

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
