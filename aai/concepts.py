"""Concepts: what a picture already says, and moving a sound's embedding along it.

To edit a picture by a sound, only part of what the sound says may enter: its object, not its ambience; to stylize,
its ambience alone. Both live in one embedding, so what is to be painted is moved along directions given by the
frozen CLIP's text features of a small vocabulary: for an edit the sound's embedding, to the picture's ambience; for a
style the picture's, to the sound's ambience. This is our own choice: the paper's editing algorithm is not public.
"""

from typing import Literal

import pydantic
import torch.nn.functional as F
from torch import Tensor

from aai.config import Config
from aai.foundation.clip import FrozenClip

Kind = Literal["heads", "objects", "ambiences"]


class Vocabulary(Config):
    """Words for what pictures show; a bundle carries the vocabulary of its data."""

    heads: tuple[str, ...] = pydantic.Field(("a photo of", "a sketch of", "a painting of"), min_length=1)
    """Beginnings of a prompt that name the medium."""
    objects: tuple[str, ...] = pydantic.Field(min_length=2)
    """Noun phrases of the things that sound."""
    ambiences: tuple[str, ...] = pydantic.Field(min_length=2)
    """Phrases of the surroundings, as they follow the object in a caption."""
    any_object: str = "a thing"
    """Noun phrase that leaves the object open."""


STYLE = 1.5
"""How far stylize moves a picture's embedding to the ambience that is heard: with 1 a quarter of the demo's pictures
kept their old one, with 1.5 one of fourteen."""


class Concepts:
    """CLIP text features of a vocabulary, on the CLIP's device: reads embeddings there and moves them."""

    def __init__(self, clip: FrozenClip, vocabulary: Vocabulary) -> None:
        self.clip, self.vocabulary = clip, vocabulary
        head, thing = vocabulary.heads[0], vocabulary.any_object
        texts = {
            "heads": [f"{h} {thing}" for h in vocabulary.heads],
            "objects": [f"{head} {o}" for o in vocabulary.objects],
            "ambiences": [f"{head} {thing} {a}" for a in vocabulary.ambiences],
        }
        self.features: dict[str, Tensor] = {kind: clip.texts(rows).to(clip.device) for kind, rows in texts.items()}

    def read(self, embed: Tensor, kind: Kind, sharpness: float = 50.0) -> Tensor:
        """Weights [B, n] over the vocabulary (softmax of cosine x sharpness) of embeddings [B, D] in CLIP space."""
        return (sharpness * F.normalize(embed, dim=-1) @ self.features[kind].T).softmax(-1)

    def move(self, embed: Tensor, kind: Kind, target: Tensor, amount: float = 1.0) -> Tensor:
        """Moves embeddings [B, D] from what they say of `kind` to `target` weights [B, n]; unit norm again.

        Those of a sound's parts, [B, R, D], are all moved to the same.
        """
        target = target.view(len(target), *[1] * (embed.ndim - 2), -1)
        step = (target - self.read(embed, kind)) @ self.features[kind]
        return F.normalize(embed + amount * step, dim=-1)

    def described(self, pictures: Tensor) -> tuple[list[str], list[str]]:
        """What the pictures of CLIP features [B, D] show, in words, and the same with the object left open."""
        objects, ambiences = (self.read(pictures, kind).argmax(-1).tolist() for kind in ("objects", "ambiences"))
        named, unnamed = [], []
        for picture, thing, around in zip(pictures, objects, ambiences, strict=True):
            head, where = self.head_of(picture[None]), self.vocabulary.ambiences[around]
            named.append(f"{head} {self.vocabulary.objects[thing]} {where}")
            unnamed.append(f"{head} {self.vocabulary.any_object} {where}")
        return named, unnamed

    def repainting(self, verb: str, shown: Tensor, heard: Tensor) -> tuple[Tensor, Tensor, str]:
        """Embeddings [1, D] of what a picture shall say when a sound repaints it, and of what of that it says now.

        shown: the picture's [1, D]; heard: the sound's [1, D], or with parts [1, R, D], then so are the results. Also
        the words for the ambience that a style takes from the sound; empty for an edit.
        """
        if verb == "edit":
            wanted = self.move(heard, "ambiences", self.read(shown, "ambiences"))
            return wanted, self.move(wanted, "objects", self.read(shown, "objects")), ""
        now = shown.view(1, *[1] * (heard.ndim - 2), -1).expand_as(heard)
        around = self.read(heard.view(1, -1, heard.shape[-1])[:, 0], "ambiences")
        return self.move(now, "ambiences", around, STYLE), now, self.vocabulary.ambiences[int(around.argmax())]

    def head_of(self, picture: Tensor) -> str:
        """The prompt head that fits a picture's CLIP feature [1, D] best."""
        return self.vocabulary.heads[int(self.read(picture, "heads").argmax())]
