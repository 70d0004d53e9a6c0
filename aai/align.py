"""Stage one, align: the audio encoder learns to land where the frozen CLIP puts the clip's pictures and captions."""

import itertools
import math
from typing import Any, Literal

import numpy as np
import pydantic
import torch
from torch import Tensor, nn

from aai.augment import AugmentConfig, augment, mask
from aai.config import Config
from aai.encoders.aligner import embed
from aai.encoders.audio import AudioEncoder
from aai.losses import gather_with_grad, info_nce, mean_over_ranks, own_rows, rows_of_ranks, sigmoid_loss, world_size
from aai.memory import in_chunks
from aai.metrics import retrieval

FIRST_BIAS = -10.0
"""Where the sigmoid loss's bias begins (arXiv 2303.15343, section 3.3)."""


class AlignLossConfig(Config):
    """Loss of the align stage."""

    kind: Literal["info_nce", "sigmoid"] = "info_nce"
    """info_nce: each clip is told from all others of the batch (CLIP). sigmoid: each pair is judged by itself (SigLIP);
    it began with a temperature of 0.1 there."""
    w_image: float = pydantic.Field(1.0, ge=0)
    """Weight of the audio-image term."""
    w_text: float = pydantic.Field(1.0, ge=0)
    """Weight of the audio-text term; 0 trains from pictures alone."""
    frames: Literal["random", "mean"] = "random"
    """Which of a clip's pictures a training step sees: one drawn at random, or the mean of their features."""
    temperature: float = pydantic.Field(0.07, gt=0)
    """Where the (learned) temperature of each term begins."""
    max_logit_scale: float = pydantic.Field(100.0, gt=0)
    """Ceiling of the inverse temperature."""

    @pydantic.model_validator(mode="after")
    def _some_loss(self) -> "AlignLossConfig":
        if self.w_image == 0 and self.w_text == 0:
            raise ValueError("w_image and w_text are both 0: nothing to learn from")
        return self


class AlignTask(nn.Module):
    """Audio encoder and loss of the align stage.

    loss = w_image L(audio, image) + w_text L(audio, text), L being InfoNCE or the sigmoid loss, each term with its own
    temperature (and bias). Copies of a clip are no negatives of one another; in the text term, nor are clips with equal
    captions: their pictures differ, their texts do not. A clip without a picture, or without a caption, has no place in
    that term, and is nobody's negative there.
    """

    def __init__(
        self, encoder: AudioEncoder, config: AlignLossConfig, augment: AugmentConfig, chunk_size: int = 0
    ) -> None:
        """augment: of training sounds alone. chunk_size: clips that go through the encoder at once (see
        `aai.memory.in_chunks`); what is mixed into a clip is another of its chunk."""
        super().__init__()
        self.encoder, self.config, self.augment, self.chunk_size = encoder, config, augment, chunk_size
        self.rate_scales: dict[str, float] = {}
        """See `aai.fit.fit`."""
        start = torch.tensor(math.log(1 / config.temperature))
        weights = {"image": config.w_image, "text": config.w_text}
        self.weights = {term: weight for term, weight in weights.items() if weight > 0}
        self.log_scale = nn.ParameterDict({term: nn.Parameter(start.clone()) for term in self.weights})
        if config.kind == "sigmoid":
            self.bias = nn.ParameterDict({term: nn.Parameter(torch.tensor(FIRST_BIAS)) for term in self.weights})

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """This process's loss of one batch, whose mean over all processes is the loss, and the figures of all.

        batch: audio [B, S] in -1..1, image_features [B, K, D] and text_features [B, T, D] of unit norm, caption_id
        int64 [B] (0 = no caption), clip_hash int64 [B], has_picture bool [B] (False: what image_features holds there
        means nothing; absent: all have one). Negatives come from all processes.
        """
        counts = rows_of_ranks(len(batch["audio"]), batch["audio"].device)
        audio = gather_with_grad(in_chunks(self.encode, self.chunk_size, batch["audio"]), counts)
        seen = batch.get("has_picture", torch.ones_like(batch["caption_id"], dtype=torch.bool))
        known = torch.stack([batch["caption_id"], batch["clip_hash"], seen.long()], dim=1)
        caption, clip, seen = gather_with_grad(known, counts).unbind(1)
        copies = clip[:, None] == clip
        alike = {"image": copies, "text": copies | (caption[:, None] == caption)}
        present = {"image": seen != 0, "text": caption != 0}
        mine = own_rows(counts)
        total, losses = audio.new_zeros(()), {}
        for term, weight in self.weights.items():
            target = gather_with_grad(self._pick(batch[f"{term}_features"]), counts)
            loss = self._loss(term, audio, target, alike[term], present[term], mine)
            total = total + weight * loss
            losses[f"loss_{term}"] = loss.detach()
        losses["loss"] = total.detach()
        of_all = dict(zip(losses, mean_over_ranks(torch.stack(list(losses.values()))), strict=True))
        return total, of_all | {f"temperature_{term}": 1 / self._scale(term).detach() for term in self.weights}

    def _loss(self, term: str, audio: Tensor, target: Tensor, alike: Tensor, present: Tensor, mine: slice) -> Tensor:
        """One term: this process's share of the mean over the clips that are present."""
        # Rows that are left out stay in place, so that every rank's are where they were: masked, and not counted.
        same = alike | ~present[:, None] | ~present
        if self.config.kind == "sigmoid":
            costs = sigmoid_loss(audio, target, self._scale(term), self.bias[term], same, mine)
        else:
            costs = info_nce(audio, target, self._scale(term), same, mine)
        return (costs * present[mine]).sum() * world_size() / present.sum().clamp(min=1)

    def _scale(self, term: str) -> Tensor:
        """The inverse temperature."""
        return self.log_scale[term].exp().clamp(max=self.config.max_logit_scale)

    def encode(self, waveforms: Tensor) -> Tensor:
        """Embeddings [B, D] of waveforms [B, S]; augmented while training."""
        if not self.training:
            embedding: Tensor = self.encoder(waveforms)
            return embedding
        heard = self.encoder.features(augment(waveforms, self.encoder.config.sample_rate_hz, self.augment))
        return self.encoder.embed_features(mask(heard, self.augment.mask_share, self.encoder.blank))

    def _pick(self, features: Tensor) -> Tensor:
        """One feature [B, D] of each clip's several [B, K, D]."""
        if not self.training or self.config.frames == "mean":
            return nn.functional.normalize(features.mean(dim=1), dim=-1)
        chosen = torch.randint(features.shape[1], (len(features),), device=features.device)
        return features[torch.arange(len(features), device=features.device), chosen]


def validate(encoder: AudioEncoder, clips: dict[str, Any]) -> dict[str, float]:
    """Retrieval on held-out clips as `aai.features.load_split` returns them.

    a2v_r1, a2t_r1: the own picture, or an equal caption, comes first. label0_r1, label1_r1, ...: the first picture
    shares the clip's label at that position, for positions whose labels differ and repeat. Clips without a picture are
    in a2t_r1 alone; where none has one, so is everything.
    """
    audio = embed(encoder, clips["audio"]).numpy()
    images = nn.functional.normalize(clips["image_features"].mean(dim=1), dim=-1).numpy()
    texts = nn.functional.normalize(clips["text_features"].mean(dim=1), dim=-1).numpy()
    captions = clips["caption_id"].numpy()
    a2t = {"a2t_r1": retrieval(audio, texts, captions, captions, draws=0)["r1"]}
    seen = clips["has_picture"].numpy() if "has_picture" in clips else np.ones(len(audio), bool)
    if not seen.any():
        return a2t
    audio, images = audio[seen], images[seen]
    out = {"a2v_r1": retrieval(audio, images, draws=0)["r1"], **a2t}
    labels = list(itertools.compress(clips["labels"], seen))
    depth = min((len(of_clip) for of_clip in labels), default=0)
    for position in range(depth):
        keys = np.array([of_clip[position] for of_clip in labels])
        if 1 < len(set(keys)) <= len(keys) / 2:
            out[f"label{position}_r1"] = retrieval(audio, images, keys, keys, draws=0)["r1"]
    return out
