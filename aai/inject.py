"""Inject (AAI, stage 3): audio tokens A* take the place of `<sound>` in a prompt of the frozen text encoder.

This is the only module that reaches into a text encoder. A forward hook on its token embedding writes A* at the
placeholder's positions, so any model of transformers with `get_input_embeddings` works unchanged and gradients flow
to A*. Everything else receives prompt embeddings.

Shapes: B prompts, L tokens of context, K tokens of a sound, D_t width of a token embedding, D_h of a hidden state.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from aai.errors import UserError

PLACEHOLDER = re.compile(r"<([a-z][a-z0-9_]*)>")


@dataclass(frozen=True)
class Sound:
    """A sound as words: `tokens` [K, D_t]; `strength` 0 leaves the neutral word, 1 is the sound as learned."""

    tokens: Tensor
    strength: float = 1.0


@dataclass(frozen=True)
class Slots:
    """A tokenised prompt: `ids` [L], and where each sound's tokens stand in it."""

    ids: list[int]
    positions: dict[str, list[int]]
    end: int
    """Position of the end-of-text token, whose hidden state is the prompt's pooled feature."""


class Injector:
    """Encodes prompts with sounds for a frozen text encoder.

    neutral_word: the word that stands where a sound has no say; a sound of strength 0 gives exactly the embedding
    that the plain pipeline computes for the prompt with this word. Not for use from two threads at once.
    """

    def __init__(self, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, neutral_word: str = "thing") -> None:
        self.text_encoder, self.tokenizer, self.neutral_word = text_encoder, tokenizer, neutral_word
        self.neutral_ids: list[int] = tokenizer(neutral_word, add_special_tokens=False).input_ids

    @property
    def embedding(self) -> torch.nn.Embedding:
        """The token embedding; asked for anew, since loading a textual inversion replaces it."""
        return self.text_encoder.get_input_embeddings()

    @property
    def neutral(self) -> Tensor:
        """The neutral word's mean token embedding [D_t]."""
        return self.embedding.weight[self.neutral_ids].detach().mean(0)

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
        limit = int(self.tokenizer.model_max_length)
        names = PLACEHOLDER.findall(prompt)
        for name in lengths:
            if name not in names:
                raise UserError(
                    "prompt", repr(prompt), f"has no placeholder <{name}>", f"write <{name}> where the sound belongs"
                )
        ids: list[int] = [self.tokenizer.bos_token_id]
        positions: dict[str, list[int]] = {}
        for i, part in enumerate(PLACEHOLDER.split(prompt)):
            if i % 2 == 0:
                ids += self.tokenizer(part, add_special_tokens=False).input_ids
                continue
            if part not in lengths:
                known = ", ".join(f"<{name}>" for name in lengths) or "none"
                raise UserError(
                    "prompt", repr(prompt), f"placeholder <{part}> has no sound (given: {known})", "remove it"
                )
            at = list(range(len(ids), len(ids) + lengths[part]))
            positions.setdefault(part, []).extend(at)
            ids += [self.neutral_ids[0]] * lengths[part]
        if any(max(at, default=0) >= limit - 1 for at in positions.values()):
            raise UserError(
                "prompt", f"{len(ids) + 1} tokens", f"a sound falls off the {limit} tokens", "shorten the prompt"
            )
        ids = [*ids[: limit - 1], self.tokenizer.eos_token_id]
        end = len(ids) - 1
        return Slots(ids + [self.tokenizer.pad_token_id] * (limit - len(ids)), positions, end)

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
        lengths = {} if tokens is None else {name: tokens.shape[1]}
        rows = [self.slots(prompt, lengths) for prompt in prompts]
        device = self.embedding.weight.device
        ids = torch.tensor([row.ids for row in rows], device=device)
        ends = torch.tensor([row.end for row in rows], device=device)
        if tokens is None:
            states = self.text_encoder(input_ids=ids).last_hidden_state
        else:
            source = torch.full(ids.shape, -1, device=device)  # which of the K vectors stands at each position
            for b, row in enumerate(rows):
                at = row.positions[name]
                source[b, at] = torch.arange(len(at), device=device) % tokens.shape[1]
            vectors = tokens.gather(1, source.clamp(min=0)[..., None].expand(-1, -1, tokens.shape[-1]))
            with self._written(vectors, source >= 0):
                states = self.text_encoder(input_ids=ids).last_hidden_state
        return states, states[torch.arange(len(rows), device=device), ends]

    def embed(self, prompt: str, sounds: Mapping[str, Sound]) -> Tensor:
        """Prompt embedding [1, L, D_h] of one prompt with several sounds, each at its own strength."""
        for name, sound in sounds.items():
            if f"<{name}>" not in prompt:
                raise UserError(
                    "prompt", repr(prompt), f"has no placeholder <{name}>", f"write <{name}> where the sound belongs"
                )
            if sound.strength == 0:
                prompt = prompt.replace(f"<{name}>", self.neutral_word)
        heard = {name: sound for name, sound in sounds.items() if sound.strength != 0}
        row = self.slots(prompt, {name: len(sound.tokens) for name, sound in heard.items()})
        ids = torch.tensor([row.ids], device=self.embedding.weight.device)
        vectors = self.embedding.weight.detach()[ids].clone()
        where = torch.zeros_like(ids, dtype=torch.bool)
        for name, sound in heard.items():
            at = row.positions[name]
            blended = torch.lerp(self.neutral.expand_as(sound.tokens), sound.tokens.to(vectors), sound.strength)
            vectors[0, at] = blended.repeat(len(at) // len(blended), 1)
            where[0, at] = True
        with self._written(vectors, where):
            return self.text_encoder(input_ids=ids).last_hidden_state


def export_textual_inversion(tokens: Tensor, path: str, name: str = "sound") -> None:
    """Saves A* [K, D_t] as a textual-inversion file that `pipe.load_textual_inversion(path)` of diffusers reads."""
    save_file({f"<{name}>": tokens.detach().float().contiguous().cpu()}, path)


def with_head(caption: str, head_pattern: str, prompt: str) -> str:
    """A caption as what the sound says in its prompt: itself, or, where it has no head, in the sound's place.

    >>> with_head("dog barking", r"^a \\w+ of", "a photo of <sound>")
    'a photo of dog barking'
    """
    return caption if re.match(head_pattern, caption) else prompt.replace("<sound>", caption)
