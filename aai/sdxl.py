"""Stable Diffusion XL (Podell et al. 2023, arXiv 2307.01952): two text encoders, a pooled embedding beside the states.

A prompt embedding stays one tensor: the states of both encoders side by side [B, L, D_1 + D_2], and the pooled
embedding of the second one as one more row, with zeros after it. So it can be stacked, repeated and mixed as those of
other models. A* has D_1 + D_2 numbers: for the first encoder, then for the second.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aai.inject import Injector, Learned, Slots, Sound


class DoubleInjector(Injector):
    """An Injector of both text encoders."""

    def __init__(self, first: Injector, second: Injector) -> None:
        super().__init__(first.text_encoder, first.tokenizer, first.neutral_word)
        self.second = second

    @property
    def token_dim(self) -> int:
        """D_1 + D_2."""
        return super().token_dim + self.second.token_dim

    @property
    def median_norm(self) -> float:
        """Of an ordinary word in both encoders together."""
        return float((super().median_norm ** 2 + self.second.median_norm**2) ** 0.5)

    def encode(
        self, prompts: Sequence[str], tokens: Tensor | None = None, name: str = "sound"
    ) -> tuple[Tensor, Tensor]:
        """See Injector: the whole prompt embedding [B, L + 1, D], and the first encoder's pooled state [B, D_1]."""
        own, others = (None, None) if tokens is None else self._split(tokens)
        written, ends = self.batch(prompts, own, name)
        first = self.run(written, output_hidden_states=True)
        second = self.second.run(self.second.batch(prompts, others, name)[0], output_hidden_states=True)
        rows = torch.arange(len(prompts), device=ends.device)
        return _packed(first, second), first.last_hidden_state[rows, ends]

    def states(self, prompt: str, sounds: Mapping[str, Sound], level: float) -> tuple[Tensor, Slots]:
        """See Injector: [1, L + 1, D]. Both encoders cut words alike."""
        own, others = {}, {}
        for name, sound in sounds.items():
            own[name], others[name] = (Sound(part, sound.strength) for part in self._split(sound.tokens))
        row, other = self.slots_of(prompt, own, level), self.second.slots_of(prompt, others, level)
        first = self.run(self.mixed(row, own), output_hidden_states=True)
        second = self.second.run(self.second.mixed(other, others), output_hidden_states=True)
        return _packed(first, second), row

    def files(self, tokens: Tensor, name: str) -> dict[str, Tensor]:
        """By the names that such files have for this model: one tensor for each encoder."""
        return dict(zip(("clip_l", "clip_g"), self._split(tokens), strict=True))

    def _split(self, tokens: Tensor) -> tuple[Tensor, ...]:
        return tokens.split([super().token_dim, self.second.token_dim], dim=-1)


def _packed(first: Any, second: Any) -> Tensor:
    """The last states but one of both encoders, and the second's projected pooled state as the last row."""
    states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    pooled = F.pad(second.text_embeds, (0, states.shape[-1] - second.text_embeds.shape[-1]))
    return torch.cat([states, pooled[:, None]], dim=1)


def injector_of(parts: Any, neutral_word: str = "thing", learned: Learned | None = None) -> Injector:
    """The injector of a diffusion pipeline, or of its skeleton."""
    made = Injector(parts.text_encoder, parts.tokenizer, neutral_word)
    if getattr(parts, "text_encoder_2", None) is not None:
        made = DoubleInjector(made, Injector(parts.text_encoder_2, parts.tokenizer_2, neutral_word))
    made.learned = learned
    return made


def pooled_dim(unet: nn.Module) -> int:
    """Width of the pooled embedding that a UNet takes beside the states; 0 for one that takes none."""
    config: Any = getattr(unet, "config", None)
    if getattr(config, "addition_embed_type", None) != "text_time":
        return 0
    return int(config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim)


def conditions(unet: nn.Module, embeds: Tensor, edge_px: int) -> dict[str, Any]:
    """What a UNet takes of prompt embeddings: for XL also the pooled one, and the picture's size without a crop."""
    if not (width := pooled_dim(unet)):
        return {"encoder_hidden_states": embeds}
    sizes = embeds.new_tensor([edge_px, edge_px, 0, 0, edge_px, edge_px]).expand(len(embeds), -1)
    added = {"text_embeds": embeds[:, -1, :width], "time_ids": sizes}
    return {"encoder_hidden_states": embeds[:, :-1], "added_cond_kwargs": added}


def prompt_arguments(unet: nn.Module, embeds: Tensor, negative: Tensor) -> dict[str, Tensor]:
    """What a pipeline takes of prompt embeddings and of those of negative prompts, both [B, ...]."""
    if not (width := pooled_dim(unet)):
        return {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    return {
        "prompt_embeds": embeds[:, :-1],
        "negative_prompt_embeds": negative[:, :-1],
        "pooled_prompt_embeds": embeds[:, -1, :width],
        "negative_pooled_prompt_embeds": negative[:, -1, :width],
    }
