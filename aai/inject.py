"""Inject (AAI, stage 3): audio tokens A* take the place of `<sound>` in a prompt of the frozen text encoder.

This is the only module that reaches into a text encoder. A forward hook on its token embedding writes A* at the
placeholder's positions, so any model of transformers with `get_input_embeddings` works unchanged and gradients flow
to A*. Everything else receives prompt embeddings.

Shapes: B prompts, L tokens of context, K tokens of a sound, D_t width of a token embedding, D_h of a hidden state.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save
from torch import Tensor

from aai.errors import UserError
from aai.sounds import PLACEHOLDER

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

MOST_STRENGTH = 2.0


@dataclass(frozen=True)
class Sound:
    """A sound as words: `tokens` [K, D_t]; `strength` 0 leaves the neutral word, 1 is the sound as learned."""

    tokens: Tensor
    strength: float = 1.0


@dataclass(frozen=True)
class Mention:
    """A placeholder of a prompt: `<dog>`, or `<dog*0.6>` for the sound at a strength of its own."""

    name: str
    strength: float = 1.0


@dataclass(frozen=True)
class Slots:
    """A tokenised prompt: `ids` [L], and where each sound's tokens stand in it."""

    ids: list[int]
    places: list[tuple[Mention, range]]
    end: int
    """Position of the end-of-text token, whose hidden state is the prompt's pooled feature."""
    before: list[str]
    """The prompt's text before each of them, other sounds as `<name>`."""


@dataclass(frozen=True)
class Learned:
    """Where an adapter learned its sounds: in `prompt`, or behind a head that `head_pattern` matches."""

    prompt: str
    head_pattern: str

    def place_of(self, name: str, before: str) -> str | None:
        """A prompt with a sound in a place of learning, for one that stands behind this text; None where it does.

        >>> Learned("a photo of <sound>", r"^a \\w+ of").place_of("dog", "a sketch of a house and ")
        'a sketch of <dog>'
        """
        own, text = (" ".join(part.lower().split()) for part in (self.prompt.split("<sound>")[0], before))
        found = re.match(self.head_pattern, text.split("<")[0], re.IGNORECASE)  # other sounds are no part of a head
        head = (found.group().strip() if found else "") or own
        return None if text in (own, head) else f"{head} <{name}>"


def parse(prompt: str) -> list[str | Mention]:
    """A prompt as text and placeholders in turn. Raises UserError for a strength over 2.

    >>> parse("a <dog*0.5> at night")
    ['a ', Mention(name='dog', strength=0.5), ' at night']
    """
    parts: list[str | Mention] = []
    at = 0
    for found in PLACEHOLDER.finditer(prompt):
        mention = Mention(found[1], float(found[2] or 1))
        if mention.strength > MOST_STRENGTH:
            raise UserError("prompt", found[0], f"a strength is 0 to {MOST_STRENGTH:g}", "write e.g. <dog*0.6>")
        parts += [prompt[at : found.start()], mention]
        at = found.end()
    return [*parts, prompt[at:]]


def names_in(prompt: str) -> set[str]:
    """The names of a prompt's placeholders."""
    return {found[1] for found in PLACEHOLDER.finditer(prompt)}


@dataclass(frozen=True)
class Written:
    """Token ids [B, L], and vectors [B, L, D_t] that stand in the place of their embeddings where `where` [B, L]."""

    ids: Tensor
    vectors: Tensor | None = None
    where: Tensor | None = None


class Injector:
    """Encodes prompts with sounds for a frozen text encoder.

    neutral_word: the word that stands where a sound has no say; a sound of strength 0 gives exactly the embedding
    that the plain pipeline computes for the prompt with this word. Not for use from two threads at once.
    """

    learned: Learned | None = None
    """What `embed` knows of the sounds' training: A* says there what it learned wherever else a prompt has it."""

    def __init__(self, text_encoder: "CLIPTextModel", tokenizer: "CLIPTokenizer", neutral_word: str = "thing") -> None:
        self.text_encoder, self.tokenizer, self.neutral_word = text_encoder, tokenizer, neutral_word
        self.neutral_ids: list[int] = tokenizer(neutral_word, add_special_tokens=False).input_ids

    @property
    def embedding(self) -> torch.nn.Embedding:
        """The token embedding; asked for anew, since loading a textual inversion replaces it."""
        return self.text_encoder.get_input_embeddings()

    @property
    def token_dim(self) -> int:
        """D_t."""
        return int(self.embedding.weight.shape[1])

    @property
    def median_norm(self) -> float:
        """Median length of the vocabulary's embeddings: how long an ordinary word is."""
        return float(self.embedding.weight.detach().float().norm(dim=-1).median())

    def slots(self, prompt: str, lengths: Mapping[str, int]) -> Slots:
        """Tokenises a prompt, giving each `<name>` in `lengths` that many positions.

        Raises UserError for a placeholder without a sound, a sound without a placeholder, or a prompt whose sound
        would fall off the encoder's context (text that merely runs over is cut, as diffusers does).
        """
        check_names(prompt, lengths)
        return self._slots(parse(prompt), lengths)

    def _slots(self, parts: Sequence[str | Mention], lengths: Mapping[str, int]) -> Slots:
        limit = int(self.tokenizer.model_max_length)
        ids: list[int] = [self.tokenizer.bos_token_id]
        places: list[tuple[Mention, range]] = []
        before = [""]
        for part in parts:
            if isinstance(part, str):
                ids += self.tokenizer(part, add_special_tokens=False).input_ids
                before[-1] += part
                continue
            places.append((part, range(len(ids), len(ids) + lengths[part.name])))
            before.append(f"{before[-1]}<{part.name}>")
            ids += [self.neutral_ids[0]] * lengths[part.name]
        if any(at.stop > limit - 1 for _, at in places):
            raise UserError(
                "prompt", f"{len(ids) + 1} tokens", f"a sound falls off the {limit} tokens", "shorten the prompt"
            )
        ids = [*ids[: limit - 1], self.tokenizer.eos_token_id]
        end = len(ids) - 1
        return Slots(ids + [self.tokenizer.pad_token_id] * (limit - len(ids)), places, end, before[: len(places)])

    @contextmanager
    def _written(self, vectors: Tensor, where: Tensor) -> Iterator[None]:
        """While active, the token embedding returns `vectors` [B, L, D_t] where the mask `where` [B, L] is set."""

        def write(_module: torch.nn.Module, _args: object, out: Tensor) -> Tensor:
            return torch.where(where[..., None], vectors.to(out.dtype), out)

        handle = self.embedding.register_forward_hook(write)
        try:
            yield
        finally:
            handle.remove()

    def encode(
        self, prompts: Sequence[str], tokens: Tensor | None = None, name: str = "sound"
    ) -> tuple[Tensor, Tensor]:
        """Encodes a batch in which each prompt has one sound; gradients flow to `tokens`.

        tokens: [B, K, D_t], or None for plain prompts -> hidden states [B, L, D_h] (the pipeline's prompt embeddings)
        and the pooled state at the end-of-text token [B, D_h].
        """
        written, ends = self.batch(prompts, tokens, name)
        states = self.run(written).last_hidden_state
        return states, states[torch.arange(len(states), device=states.device), ends]

    def embed(self, prompt: str, sounds: Mapping[str, Sound]) -> Tensor:
        """Prompt embedding [1, L, D_h] of one prompt with several sounds.

        A sound counts with its strength times that of its placeholder. At s the embedding lies at that share of the way
        from what the prompt says with the neutral word to what it says with the sound: in the encoder's output, since
        half-way between two words is no word. Of several strengths the strongest comes first (the Lovasz extension of
        what the prompt says with each set of sounds).
        """
        check_names(prompt, sounds)
        mentions = [part for part in parse(prompt) if isinstance(part, Mention)]
        levels = sorted({0.0, *(part.strength * sounds[part.name].strength for part in mentions)})
        shares = {level: level - below for below, level in pairwise(levels)}
        if levels[-1] != 1:
            shares[math.inf] = 1 - levels[-1]  # no sound has a say
        homes: dict[str, Tensor] = {}
        said = [share * self.said(prompt, sounds, level, homes) for level, share in shares.items()]
        return torch.stack(said).sum(0)

    def said(
        self, prompt: str, sounds: Mapping[str, Sound], level: float, homes: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Prompt embedding [1, L, D_h] with the sounds of at least this strength, and the neutral word for others.

        An adapter learns A* in one place, and behind other words the frozen encoder makes something else of it: so its
        own states are those that it has where it was `learned`. The words around it hear it where it stands.
        homes: such states by their prompts, which other levels need again.
        """
        states, row = self.states(prompt, sounds, level)
        found, homes = states.clone(), {} if homes is None else homes
        for (mention, at), before in zip(row.places, row.before, strict=True):
            home = self.learned.place_of(mention.name, before) if self.learned else None
            if home and home not in homes:
                there, alone = self.states(home, {mention.name: Sound(sounds[mention.name].tokens)}, 1.0)
                ((_, own),) = alone.places
                homes[home] = there[:, own.start : own.stop]
            if home:
                found[:, at.start : at.stop] = homes[home]
        return found

    def states(self, prompt: str, sounds: Mapping[str, Sound], level: float) -> tuple[Tensor, Slots]:
        """What the encoder makes of a prompt with the sounds of at least this strength, and where these stand."""
        row = self.slots_of(prompt, sounds, level)
        return self.run(self.mixed(row, sounds)).last_hidden_state, row

    def batch(self, prompts: Sequence[str], tokens: Tensor | None, name: str) -> tuple[Written, Tensor]:
        """What `encode` writes, and the positions [B] of the end-of-text tokens."""
        lengths = {} if tokens is None else {name: tokens.shape[1]}
        rows = [self.slots(prompt, lengths) for prompt in prompts]
        device = self.embedding.weight.device
        ids = torch.tensor([row.ids for row in rows], device=device)
        ends = torch.tensor([row.end for row in rows], device=device)
        if tokens is None:
            return Written(ids), ends
        source = torch.full(ids.shape, -1, device=device)  # which of the K vectors stands at each position
        for b, row in enumerate(rows):
            for _, at in row.places:
                source[b, at.start : at.stop] = torch.arange(len(at), device=device)
        vectors = tokens.gather(1, source.clamp(min=0)[..., None].expand(-1, -1, tokens.shape[-1]))
        return Written(ids, vectors, source >= 0), ends

    def slots_of(self, prompt: str, sounds: Mapping[str, Sound], level: float) -> Slots:
        """A tokenised prompt with the sounds of at least this strength, and the neutral word for others."""
        parts: list[str | Mention] = [""]
        for part in parse(prompt):
            if isinstance(part, Mention) and part.strength * sounds[part.name].strength < level:
                part = self.neutral_word
            if isinstance(part, str) and isinstance(parts[-1], str):
                parts[-1] += part  # text is tokenised whole, as the plain pipeline does
            else:
                parts.append(part)
        return self._slots(parts, {name: len(sound.tokens) for name, sound in sounds.items()})

    def mixed(self, row: Slots, sounds: Mapping[str, Sound]) -> Written:
        """A tokenised prompt with its sounds' vectors."""
        ids = torch.tensor([row.ids], device=self.embedding.weight.device)
        vectors = self.embedding.weight.detach()[ids].clone()
        where = torch.zeros_like(ids, dtype=torch.bool)
        for mention, at in row.places:
            vectors[0, at.start : at.stop] = sounds[mention.name].tokens.to(vectors)
            where[0, at.start : at.stop] = True
        return Written(ids, vectors, where)

    def run(self, written: Written, **wanted: bool) -> Any:
        """The text encoder's output, with the vectors in their places. wanted: what else it returns."""
        if written.vectors is None or written.where is None:
            return self.text_encoder(input_ids=written.ids, **wanted)
        with self._written(written.vectors, written.where):
            return self.text_encoder(input_ids=written.ids, **wanted)

    def files(self, tokens: Tensor, name: str) -> dict[str, Tensor]:
        """A* [K, D_t] as the tensors of a textual-inversion file."""
        return {f"<{name}>": tokens}


def check_names(prompt: str, sounds: Collection[str]) -> None:
    """Raises UserError unless the prompt's placeholders and the sounds are the same."""
    names = names_in(prompt)
    for name in sounds:
        if name not in names:
            rule = f"has no placeholder <{name}>"
            raise UserError("prompt", repr(prompt), rule, f"write <{name}> where the sound belongs")
    for name in sorted(names.difference(sounds)):
        known = ", ".join(f"<{given}>" for given in sounds) or "none"
        raise UserError("prompt", repr(prompt), f"placeholder <{name}> has no sound (given: {known})", "remove it")


def export_textual_inversion(injector: Injector, tokens: Tensor, path: str, name: str = "sound") -> None:
    """Saves A* [K, D_t] as a textual-inversion file that `pipe.load_textual_inversion(path)` of diffusers reads."""
    Path(path).write_bytes(textual_inversion(injector, tokens, name))


def textual_inversion(injector: Injector, tokens: Tensor, name: str = "sound") -> bytes:
    """A* [K, D_t] as the content of a textual-inversion file (safetensors)."""
    files = injector.files(tokens.detach(), name)
    return save({key: part.float().contiguous().cpu() for key, part in files.items()})


def with_head(caption: str, head_pattern: str, prompt: str) -> str:
    """A caption as what the sound says in its prompt: itself, or, where it has no head, in the sound's place.

    >>> with_head("dog barking", r"^a \\w+ of", "a photo of <sound>")
    'a photo of dog barking'
    """
    return caption if re.match(head_pattern, caption) else prompt.replace("<sound>", caption)
