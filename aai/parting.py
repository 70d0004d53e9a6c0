"""A sound that tells of one thing after another, as several sounds: each part in time paints a strip of the picture.

A* says a whole scene, and of two things that sound one after the other a picture shows one. Where the halves of a sound
say different things, each has an A* of its own and a strip of its own (`aai.regions`).
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from aai.encoders.audio import AudioEncoderConfig
from aai.errors import UserError
from aai.inject import names_in
from aai.sampling import PaintRequest
from aai.sounds import MOST_SOUNDS, PLACEHOLDER

SOFTEST = 0.1
"""A half of less than this share of the other one's amplitude tells of nothing."""
_FEWEST = 8
_NEARER = 2 / 3  # chosen on val of the toy world's demo


def parts_in_time(audio: np.ndarray, count: int, samples: int) -> list[np.ndarray]:
    """Equal parts of a waveform [S], one after the other, each repeated until it is `samples` long."""
    if len(audio) < count:
        return [audio]
    return [np.resize(part, samples) if len(part) < samples else part for part in np.array_split(audio, count)]


@torch.no_grad()
def apart_below(embed: Callable[[Tensor], Tensor], waveforms: Tensor) -> float | None:
    """The cosine below which the halves of a sound tell of different things, of an encoder [N, S] -> [N, D] unit rows.

    Between the median of halves of different clips and that of a clip's own, so that it holds for any encoder; nearer
    to the latter, for two things of one clip have their surroundings in common. None where these do not differ, and for
    few clips.
    """
    size = waveforms.shape[1] // 2
    if len(waveforms) < _FEWEST or not size:
        return None
    first, second = (embed(waveforms[:, at : at + size].tile(1, 2)) for at in (0, size))
    own, others = ((first * second.roll(step, 0)).sum(-1).median().item() for step in (0, 1))
    return others + _NEARER * (own - others) if own > others else None


def in_time(
    prompt: str,
    sounds: Mapping[str, np.ndarray],
    request: PaintRequest,
    listen: Callable[[np.ndarray], Tensor],
    encoder: AudioEncoderConfig,
) -> tuple[str, dict[str, np.ndarray]]:
    """A prompt and its sounds, those of several parts in time as so many sounds: `<dog>` as `<dog_1> and <dog_2>`.

    listen: waveform [S] -> embedding [1, D], by the encoder. Raises UserError for more than 8 sounds.
    """
    given = dict(sounds)
    if request.mixing != "regions":
        return prompt, given
    for name in [name for name in sounds if name in names_in(prompt)]:
        count = request.sound_parts or 1
        if request.sound_parts is None and len(sounds) == 1 and tells_of_two(sounds[name], listen, encoder):
            count = 2
        parts = parts_in_time(sounds[name], count, encoder.clip_samples)
        if len(parts) == 1:
            continue
        if name not in names_in(request.negative_prompt):
            del given[name]
        prompt, named_parts = _renamed(prompt, name, parts, taken=given)
        given |= named_parts
    if len(given) > MOST_SOUNDS:
        rule = f"makes {len(given)} sounds of {len(sounds)}, where {MOST_SOUNDS} are the most"
        raise UserError("request.sound_parts", request.sound_parts, rule, "lower it, or give fewer sounds")
    return prompt, given


def tells_of_two(audio: np.ndarray, listen: Callable[[np.ndarray], Tensor], encoder: AudioEncoderConfig) -> bool:
    """Whether the halves of a sound tell of different things, and neither is next to silent beside the other."""
    below, halves = encoder.apart_below, parts_in_time(audio, 2, encoder.clip_samples)
    if below is None or len(halves) < 2:
        return False
    levels = sorted(float(np.sqrt(np.mean(np.square(half)))) for half in halves)
    if levels[0] <= SOFTEST * levels[1]:
        return False
    first, second = (listen(half)[0] for half in halves)
    return bool((first @ second).item() < below)


def _renamed(
    prompt: str, name: str, parts: list[np.ndarray], taken: Mapping[str, np.ndarray]
) -> tuple[str, dict[str, np.ndarray]]:
    """The prompt with a placeholder for each part, at the strength that the whole has, and the parts by these."""
    stem = f"{name}_"
    while any(f"{stem}{i}" in taken for i in range(1, len(parts) + 1)):
        stem += "_"
    names = [f"{stem}{i}" for i in range(1, len(parts) + 1)]
    prompt = PLACEHOLDER.sub(
        lambda found: " and ".join(found[0].replace(name, new, 1) for new in names) if found[1] == name else found[0],
        prompt,
    )
    return prompt, dict(zip(names, parts, strict=True))
