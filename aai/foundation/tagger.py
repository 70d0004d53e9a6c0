"""What is heard in a sound, by any audio classifier of transformers, such as AST of AudioSet (arXiv 2104.01778).

Told are shares of the time, so that it does not matter how a model's scores are scaled.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchaudio.functional import resample

from aai.errors import UserError
from aai.foundation.batches import Batches
from aai.foundation.identity import locate
from aai.media.waveform import read_sound, sound_rate_hz

OTHER = "other"
"""The group of all tags that no other group names."""
MIN_WINDOW_S = 0.1
"""A shorter sound is filled up with silence: spectrograms need a few windows."""


def groups_of(labels: Mapping[int, str], tags: Mapping[str, Sequence[str]]) -> np.ndarray:
    """int64 [labels]: the place in (*tags, OTHER) of each of a classifier's labels {id: name}.

    Raises UserError for a tag that the classifier does not know, or that two groups name.
    """
    known = {name: place for place, name in labels.items()}
    groups = np.full(len(labels), len(tags))
    for group, (name, wanted) in enumerate(tags.items()):
        for tag in wanted:
            if tag not in known:
                close = difflib.get_close_matches(tag, known, 3) or list(known)[:3]
                remedy = f"such are {', '.join(close)}"
                raise UserError(f"scores.tags.{name}", tag, "is no tag of the classifier", remedy)
            if groups[known[tag]] != len(tags):
                raise UserError(f"scores.tags.{name}", tag, "stands in two groups", "leave it in one")
            groups[known[tag]] = group
    return groups


def check_tags(model_id: str, revision: str | None, tags: Mapping[str, Sequence[str]]) -> None:
    """Raises UserError for a classifier that is not there, or does not know the tags; reads its config alone."""
    from transformers import AutoConfig

    where, pinned = locate(model_id, revision, "tagger", "scores")
    groups_of(_load(model_id, lambda: AutoConfig.from_pretrained(where, **pinned)).id2label, tags)


def _load(model_id: str, load: Any) -> Any:
    try:
        return load()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).split("\n")[0][:200]
        remedy = "give a folder or hub id of transformers' audio classification, with safetensors"
        raise UserError("scores.tagger", model_id, f"cannot be loaded ({reason})", remedy) from error


class SoundTagger:
    """A frozen classifier of sounds, asked which group of its tags is the likeliest in each part of a sound."""

    def __init__(
        self,
        model_id: str,
        revision: str | None,
        tags: Mapping[str, Sequence[str]],
        window_s: float = 2.0,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 64,
    ) -> None:
        """tags: {group: labels of the classifier}; window_s: length of a part; batch_size: parts per forward pass."""
        from transformers import AutoFeatureExtractor, AutoModelForAudioClassification

        where, pinned = locate(model_id, revision, "tagger", "scores")
        model = _load(
            model_id,
            lambda: AutoModelForAudioClassification.from_pretrained(where, dtype=dtype, use_safetensors=True, **pinned),
        )
        self.model = model.to(device).eval().requires_grad_(False)
        self.extractor = _load(model_id, lambda: AutoFeatureExtractor.from_pretrained(where, **pinned))
        self.groups, self.num_groups = groups_of(model.config.id2label, tags), len(tags) + 1
        self.window_s, self.device, self.dtype, self.batches = window_s, device, dtype, Batches(batch_size)

    def shares(self, sounds: Sequence[bytes]) -> np.ndarray:
        """float32 [N, groups]: in what share of each sound's time (FLAC or WAV) a tag of each group is the likeliest.

        Groups are those of `tags` in their order, then OTHER; the shares of a sound sum to 1.
        """
        parts = [self._parts(sound) for sound in sounds]
        flat = [part for of_sound in parts for part in of_sound]
        if not flat:
            return np.zeros((0, self.num_groups), np.float32)
        likeliest = torch.cat(self.batches.map(self._likeliest, flat)).numpy()
        heard = np.eye(self.num_groups, dtype=np.float32)[self.groups[likeliest]]
        ends = np.cumsum([len(of_sound) for of_sound in parts])
        return np.stack([part.mean(0) for part in np.split(heard, ends[:-1])])

    def _parts(self, sound: bytes) -> list[np.ndarray]:
        """Equal parts of about `window_s`, at the classifier's rate."""
        rate_hz = self.extractor.sampling_rate
        wave = resample(torch.from_numpy(read_sound(sound)), sound_rate_hz(sound), rate_hz).numpy()
        wave = np.pad(wave, (0, max(0, round(MIN_WINDOW_S * rate_hz) - len(wave))))
        return np.array_split(wave, max(1, round(len(wave) / (self.window_s * rate_hz))))

    @torch.inference_mode()
    def _likeliest(self, parts: Sequence[np.ndarray]) -> Tensor:
        """int64 [N], on the CPU: the likeliest label of each part."""
        inputs = []
        for part in parts:
            inputs.append(dict(self.extractor(part, sampling_rate=self.extractor.sampling_rate, return_tensors="pt")))
        found = torch.empty(len(parts), dtype=torch.int64)
        for places in _alike(inputs):  # a part's tag must not depend on what it is padded to
            batch = {}
            for name in inputs[0]:
                stacked = torch.cat([inputs[place][name] for place in places]).to(self.device)
                batch[name] = stacked.to(self.dtype) if stacked.is_floating_point() else stacked
            found[places] = self.model(**batch).logits.argmax(-1).cpu()
        return found


def _alike(inputs: Sequence[Mapping[str, Tensor]]) -> list[list[int]]:
    """Places of the inputs by their shape."""
    by_shape: dict[tuple[torch.Size, ...], list[int]] = {}
    for place, tensors in enumerate(inputs):
        by_shape.setdefault(tuple(tensor.shape for tensor in tensors.values()), []).append(place)
    return list(by_shape.values())
