"""The conditions under which held-out clips are painted: the sound itself, its floors and its ceiling.

Every claim about a generated picture stands beside what the same diffusion model paints with a random token, with
another clip's sound, with a closed-form projection instead of a trained adapter, with the nearest training caption,
with the true caption, and, in the toy world, with a caption that names what no caption of a clip does.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from aai.foundation.clip import FrozenClip
from aai.inject import with_head
from aai.painter import Painter
from aai.regions import joined
from aai.sampling import PaintRequest
from aai.toy.grammar import caption_of

CONDITIONS = (
    "caption",
    "sound",
    "ceiling",
    "full_caption",
    "nearest_caption",
    "closed_form",
    "shuffled_audio",
    "random_token",
    "sketch",
)
SKETCH = "a sketch of <sound>"
"""What the condition sketch asks for: a medium that no sound tells of, and that a judge looks for."""


@dataclass(frozen=True)
class HeldOutClip:
    """What painting a held-out clip needs: its sound float32 [S] (`shuffled_audio`: another clip's) and caption."""

    audio: np.ndarray
    caption: str
    seed: int
    labels: Sequence[str] = ()
    """In the order of the toy world's; for `full_caption`."""


class Conditions:
    """Prompt embeddings of test clips under each condition.

    What a caption says that cannot be heard (the bundle's head_pattern) is replaced by the head of the bundle's prompt,
    so that all conditions ask for the same medium. audio_mean: mean embedding [D] of training sounds, which the closed
    form is taken around. ridge: its Tikhonov lambda, as a share of the projection's mean squared row length.
    """

    def __init__(
        self,
        painter: Painter,
        clip: FrozenClip,
        train_captions: Sequence[str],
        audio_mean: Tensor,
        ridge: float = 1e-2,
    ) -> None:
        self.painter, self.clip, self.audio_mean, self.ridge = painter, clip, audio_mean, ridge
        self.prompt, self.head_pattern = painter.prompt, painter.head_pattern
        self.captions = sorted({self._with_head(text) for text in train_captions})
        self.caption_features = clip.texts(self.captions)

    def _with_head(self, caption: str) -> str:
        """The caption under the common prompt's head: "a sketch of a dog", or "dog" alone -> "a photo of a dog"."""
        head = self.prompt.split(" <sound>")[0]
        return re.sub(self.head_pattern, head, with_head(caption, self.head_pattern, self.prompt))

    @torch.no_grad()
    def embed(self, condition: str, clips: Sequence[HeldOutClip]) -> Tensor:
        """Prompt embeddings [B, L, D_h], of parts in strips [B, R L, D_h], of clips under a condition of CONDITIONS."""
        if condition == "caption":
            return self.painter.embed_text([clip.caption for clip in clips])
        if condition == "ceiling":
            return self.painter.embed_text([self._with_head(clip.caption) for clip in clips])
        if condition == "full_caption":
            return self.painter.embed_text([self._with_head(caption_of(clip.labels)) for clip in clips])
        if condition == "random_token":
            return self._write(torch.stack([self._random_tokens(clip.seed) for clip in clips]), self.prompt)
        heard = torch.cat([self.painter.listen(clip.audio) for clip in clips])
        if condition == "nearest_caption":
            nearest = (heard.cpu() @ self.caption_features.T).argmax(-1).tolist()
            return self.painter.embed_text([self.captions[i] for i in nearest])
        if condition == "closed_form":
            return self._closed_form(heard)
        if condition in ("sound", "shuffled_audio", "sketch"):
            prompt = SKETCH if condition == "sketch" else self.prompt
            asked = PaintRequest(prompt=prompt)  # as everyone's sounds are painted
            rows = [self.painter.embed_request(clip.audio, asked)[0] for clip in clips]
            return joined(rows, self.painter.injector.tokenizer.model_max_length)
        raise ValueError(f"condition {condition!r} is none of {CONDITIONS}")

    def _write(self, tokens: Tensor, prompt: str) -> Tensor:
        return self.painter.injector.encode([prompt] * len(tokens), tokens)[0]

    def _random_tokens(self, seed: int) -> Tensor:
        """K directions drawn at random, as long as an ordinary word."""
        cfg = self.painter.adapter.cfg
        draw = torch.randn(cfg.num_tokens, cfg.token_dim, generator=torch.Generator().manual_seed(seed))
        tokens = F.normalize(draw, dim=-1) * self.painter.injector.median_norm
        return tokens.to(self.painter.device)  # drawn on the CPU, so that every device paints the same

    def _closed_form(self, heard: Tensor) -> Tensor:
        """Inverts the frozen text projection by Tikhonov least squares: no training at all.

        The pooled state h that the projection W maps nearest to the sound's embedding e, around the mean of the
        training captions: h = mean(h_c) + W^T (W W^T + lambda I)^-1 (e - mean(e)) |W h_c|. Sound and text sit apart in
        CLIP space (the modality gap), so each is taken around its own mean. h replaces the prompt's states from its
        end of text on.
        """
        projection = self.clip.model.text_projection.weight.float().cpu()  # [D, D_h]
        _, pooled = self.painter.injector.encode(self.captions[:512])
        features = pooled.cpu().float() @ projection.T
        length = features.norm(dim=-1).mean()
        offset = (heard - self.audio_mean).cpu() * length
        gram = projection @ projection.T
        scale = self.ridge * gram.diagonal().mean()
        solved = torch.linalg.solve(gram + scale * torch.eye(len(gram)), offset.T).T @ projection
        wanted = pooled.cpu().float().mean(0) + solved
        neutral = self.prompt.replace("<sound>", self.painter.injector.neutral_word)
        base = self.painter.embed_text([neutral]).repeat(len(heard), 1, 1)
        end = self.painter.injector.slots(neutral, {}).end
        base[:, end:] = wanted[:, None].to(base)
        return base
