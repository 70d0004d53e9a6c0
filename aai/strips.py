"""Strips: pictures of one seed between which only the sound changes, so that one sees what it says."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from aai.errors import UserError
from aai.inject import Sound
from aai.painter import Painter
from aai.regions import joined as as_batch
from aai.sampling import PaintRequest
from aai.sounds import Sounds, named

Strip = Literal["morph", "strength", "loudness"]
SOFTEST_DB = -30.0
_AT_ONCE = 8


def paint_strip(
    painter: Painter, kind: Strip, sounds: Sounds, request: PaintRequest, pictures: int = 7
) -> list[tuple[str, Image.Image]]:
    """Pictures with what each shows.

    morph: from the first of two sounds to the second, by the angle between their embeddings; strength: from the
    neutral word to the request's strength; loudness: from 30 dB softer to the sound as given. All have the request's
    seed. Raises UserError for another number of sounds than a morph takes.
    """
    shares = [i / (pictures - 1) for i in range(pictures)]
    labels = [f"{share:.2f}" for share in shares]
    if kind == "morph":
        embeds, negative = _morphed(painter, sounds, request, shares)
    else:
        rows = []
        for i, share in enumerate(shares):
            given, asked = named(sounds), request
            if kind == "strength":
                asked = request.model_copy(update={"sound_strength": share * request.sound_strength})
            else:
                gain_db = (1 - share) * SOFTEST_DB
                given = {name: 10 ** (gain_db / 20) * audio for name, audio in given.items()}
                labels[i] = f"{gain_db + 0.0:.0f} dB"  # no minus before a zero
            rows.append(painter.embed_request(given, asked))
        length = painter.injector.tokenizer.model_max_length
        embeds = as_batch([row for row, _ in rows], length)  # sounds of strength 0 have no strip of their own
        negative = torch.cat([row for _, row in rows])
    painted: list[Image.Image] = []
    for some, against in zip(embeds.split(_AT_ONCE), negative.split(_AT_ONCE), strict=True):
        painted += painter.paint(some, [request.seed] * len(some), request, negative=against)
    return list(zip(labels, painted, strict=True))


@torch.no_grad()
def _morphed(painter: Painter, sounds: Sounds, request: PaintRequest, shares: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Prompt embeddings [P, L, D_h] along the great circle between two sounds, and of the negative prompt."""
    given = list(named(sounds).values())
    if len(given) != 2:
        raise UserError("audio", f"{len(given)} sounds", "a morph goes from one sound to another", "give two")
    start, end = (painter.parts(audio, request.window)[0] for audio in given)
    rows = []
    for share in shares:
        tokens = painter.adapter(along(start, end, share)[None])[0]
        sound = {"sound": Sound(tokens, request.sound_strength)}
        rows.append(painter.injector.embed(request.prompt or painter.prompt, sound))
    return torch.cat(rows), painter.embed_negative(request.negative_prompt).expand(len(rows), -1, -1)


def along(start: Tensor, end: Tensor, share: float) -> Tensor:
    """The direction [..., D] at a share of the angle from one unit vector to another (slerp, Shoemake 1985)."""
    angle = torch.arccos((start * end).sum(-1, keepdim=True).clamp(-1, 1))
    between = torch.sin((1 - share) * angle) * start + torch.sin(share * angle) * end
    return torch.where(angle < 1e-4, start, F.normalize(between, dim=-1))


def joined(painted: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """One picture of all, side by side, each with its label below."""
    edge_px, foot_px = painted[0][1].width, 14
    whole = Image.new("RGB", (edge_px * len(painted), edge_px + foot_px), "white")
    draw = ImageDraw.Draw(whole)
    for i, (label, picture) in enumerate(painted):
        whole.paste(picture, (i * edge_px, 0))
        draw.text(((i + 0.5) * edge_px, edge_px + foot_px / 2), label, fill="black", anchor="mm")
    return whole
