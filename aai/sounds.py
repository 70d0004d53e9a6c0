"""The sounds of a request: their names in the prompt, and which part of a long recording is heard."""

import re
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from aai.errors import UserError

Sounds = np.ndarray | Sequence[np.ndarray] | Mapping[str, np.ndarray]
"""One mono waveform float32 [S] at the bundle's sample rate, or several: in order, or by placeholder name."""
PLACEHOLDER = re.compile(r"<([a-z][a-z0-9_]*)(?:\*([0-9]*\.?[0-9]+))?>")
Window = Literal["middle", "loudest", "mean"]
MOST_SOUNDS = 8


def name_of(number: int) -> str:
    """The placeholder of sound `number` (from 0) that was given without a name: sound, sound2, sound3, ..."""
    return "sound" if number == 0 else f"sound{number + 1}"


def named(sounds: Sounds) -> dict[str, np.ndarray]:
    """The sounds by name. Raises UserError for none, more than 8, or a name that no placeholder can have."""
    if isinstance(sounds, np.ndarray):
        sounds = [sounds]
    if not isinstance(sounds, Mapping):
        sounds = {name_of(i): audio for i, audio in enumerate(sounds)}
    if not 0 < len(sounds) <= MOST_SOUNDS:
        raise UserError("audio", f"{len(sounds)} sounds", f"is not 1 to {MOST_SOUNDS}", "give as many")
    for name in sounds:
        if not PLACEHOLDER.fullmatch(f"<{name}>") or "*" in name:
            raise UserError("audio", name, "is no name of a placeholder", "write a small letter, then a-z, 0-9, _")
    return dict(sounds)


def prompt_for(prompt: str, names: Sequence[str]) -> str:
    """A prompt with `<sound>`, for several sounds.

    >>> prompt_for("a photo of <sound>", ["dog", "rain"])
    'a photo of <dog> and <rain>'
    """
    return prompt.replace("<sound>", " and ".join(f"<{name}>" for name in names))


def windows(audio: np.ndarray, samples: int, window: Window) -> np.ndarray:
    """What is heard of a waveform [S]: [W, samples], or all of it [1, S] when it is no longer, or for the middle.

    loudest: the window of the greatest energy; mean: windows that overlap by half, from the first sample to the last.
    """
    last = len(audio) - samples
    if last <= 0 or window == "middle":  # the encoder itself takes the middle
        return audio[None]
    if window == "loudest":
        energy = np.cumsum(np.square(audio, dtype=np.float64))
        within = energy[samples - 1 :] - np.concatenate([[0.0], energy[:last]])
        start = int(within.argmax())
        return audio[None, start : start + samples]
    starts = [*range(0, last, max(1, samples // 2)), last]
    return np.stack([audio[start : start + samples] for start in starts])
