"""Several sounds in one prompt, each in a strip of the picture of its own, from left to right.

A* says a whole scene, and of two scenes in one prompt a diffusion model paints one. So each sound has a prompt of its
own (`own_prompt`), and in the UNet's cross-attention each strip attends to the prompt of its sound alone, and to one of
words that says how many there are. All else of the UNet sees the whole picture and makes one of it. There is one pass,
as of a prompt with one sound.

Shapes: B prompts, R blocks of L tokens (one for each strip from the left, and the last one for all), Q places of an
attention's map, row by row.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from aai.errors import UserError
from aai.inject import Injector, Learned, Mention, Sound, check_names, names_in, parse
from aai.sounds import PLACEHOLDER

_PLACE = re.compile(rf"(?:\b(?i:an?|the)\s+)?{PLACEHOLDER.pattern}")
_JOINT = r"[\s,;&+]*(?:\b(?i:and|with|beside|next to)\b[\s,;&+]*)*"
_RUN = re.compile(rf"{_PLACE.pattern}(?:{_JOINT}{_PLACE.pattern})+")


def embed_in_regions(injector: Injector, prompt: str, sounds: Mapping[str, Sound], anything: str) -> Tensor:
    """Prompt embedding [1, R L, D_h] in which each sound that has a say has a prompt of its own (see `side_by_side`).

    anything: the words that stand for each of them, with its article, in the others' prompts and in the prompt of all
    ("a thing and a thing"). With one such sound, or none, it is `Injector.embed`'s [1, L, D_h].
    """
    check_names(prompt, sounds)
    mentions = [part for part in parse(prompt) if isinstance(part, Mention)]
    heard = list(dict.fromkeys(one.name for one in mentions if one.strength * sounds[one.name].strength > 0))
    if len(heard) < 2:
        return injector.embed(prompt, sounds)
    rows = []
    for own in heard:
        text = own_prompt(prompt, own, dict.fromkeys(heard, anything), injector.learned)
        silent = {name: replace(sounds[name], strength=0.0) for name in names_in(text)}
        rows.append(injector.embed(text, silent | {own: sounds[own]}))
    silent_word = injector.neutral_word
    text = _PLACE.sub(lambda at: anything if at[1] in heard else PLACEHOLDER.sub(silent_word, at[0]), prompt)
    rows.append(injector.embed(text, {}))
    return side_by_side(rows, injector.tokenizer.model_max_length)


def own_prompt(prompt: str, own: str, words: Mapping[str, str], learned: Learned | None = None) -> str:
    """The prompt of a sound's own strip: of sounds that are only joined it comes first, the others as `words` by name.

    An adapter learns A* behind the same words each time; behind other sounds, or words for them, it says less. Words
    right before the first sound, but for those it was `learned` behind, are that sound's own: then all stay in place.

    >>> own_prompt("a photo of a <dog> and a <bell*0.5> at night", "bell", {"dog": "a thing"})
    'a photo of a <bell*0.5> and a thing at night'
    """

    def own_first(run: re.Match[str]) -> str:
        before, places = prompt[: run.start()], list(_PLACE.finditer(run[0]))
        mine = sorted((at for at in places if at[1] == own), key=lambda at: float(at[2] or 1) == 0)  # silent ones last
        if not mine or (learned and before.strip() and learned.place_of(own, before)):
            return run[0]
        texts = iter([at[0] for at in mine] + [words.get(at[1], at[0]) for at in places if at[1] != own])
        return _PLACE.sub(lambda _: next(texts), run[0])

    return _RUN.sub(own_first, prompt)


def side_by_side(rows: Sequence[Tensor], length: int) -> Tensor:
    """Prompt embeddings [B, L, D_h] of each block -> one of them all [B, R L, D_h]. length: L.

    The pooled embedding, which XL has as one more row, is their mean.
    """
    pooled = torch.stack([row[:, length:] for row in rows]).mean(0)
    return torch.cat([*(row[:, :length] for row in rows), pooled], dim=1)


def block_count(embeds: Tensor, length: int) -> int:
    """R of prompt embeddings [B, R L, D_h] (or one row more, see above)."""
    return embeds.shape[1] // length


def joined(rows: Sequence[Tensor], length: int) -> Tensor:
    """Prompt embeddings [1, R L, D_h] as one batch [B, R L, D_h]; of fewer strips than others, as equal blocks."""
    blocks = max(block_count(row, length) for row in rows)
    return torch.cat([widened(row, blocks, length) for row in rows])


def widened(embeds: Tensor, blocks: int, length: int) -> Tensor:
    """Prompt embeddings [B, L, D_h] as those of R equal blocks [B, R L, D_h]; those of so many blocks as they are."""
    return embeds if block_count(embeds, length) == blocks else side_by_side([embeds] * blocks, length)


@contextmanager
def in_regions(models: Sequence[nn.Module], blocks: int, length: int) -> Iterator[None]:
    """While active, in the models' cross-attention each strip of the map attends to its own block and to the last.

    Calls with prompts of L tokens are not touched, so that requests of one UNet may differ in this.
    """

    def mask(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        states = kwargs.get("encoder_hidden_states")
        if states is None or (found := block_count(states, length)) < 2:
            return args, kwargs
        places = args[0] if args else kwargs["hidden_states"]
        bias = strips(places.shape[1], found, length).to(places)
        return args, {**kwargs, "attention_mask": bias.expand(len(places), -1, -1)}

    if blocks == 1:
        yield
        return
    from diffusers.models.attention_processor import Attention

    parts = [part for model in models for part in model.modules() if isinstance(part, Attention)]
    handles = [part.register_forward_pre_hook(mask, with_kwargs=True) for part in parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def strips(places: int, blocks: int, length: int) -> Tensor:
    """What is added to the attention of Q places of a square map to R L tokens, [1, Q, R L]: 0, or a lot less.

    Raises UserError for more strips than the map has columns.
    """
    edge, regions = math.isqrt(places), blocks - 1
    if regions > edge:
        rule = f"the model's coarsest attention has {edge} columns, one for each sound at most"
        raise UserError("request.mixing", f"regions, of {regions} sounds", rule, "set request.mixing=words")
    strip = (torch.arange(edge) + 0.5).mul(regions / edge).long().repeat(edge)
    block = torch.arange(blocks).repeat_interleave(length)
    apart = (strip[:, None] != block) & (block < regions)
    return apart[None] * -1e4  # which float16 holds
