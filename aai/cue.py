"""AudioCue, the paper's ICASSP version: pictures that fit a sound are retrieved, and A* is tuned on them.

The aligned embedding of the sound finds the k nearest pictures of a FeatureTable (exact search over all rows); A* then
takes a few steps of the denoising loss on their latents, as a textual inversion does (Gal et al. 2022, arXiv
2208.01618), but begins at what the adapter heard. Model and adapter stay as they are.

Our choices: the neighbours show other colours and numbers of things than the sound tells of, so A* is not moved to what
they show. Each is denoised under its own caption's head and with the A* of its own sound, all shifted alike; what is
learned is the shift, that is what the adapter leaves out in this neighbourhood.
"""

import heapq
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pydantic
import torch
from torch import Tensor

from aai import storage
from aai.adapt import AdaptLossConfig, denoising_loss, prompt_of
from aai.config import Config
from aai.errors import UserError
from aai.features import FeatureManifest, arrays_of, open_table, read_group, tensor_of
from aai.foundation.identity import identity, is_identity
from aai.painter import Painter
from aai.sounds import Window

NOISY = 0.5
"""Share of the noise levels that is left out, from the lowest on: at those above it is settled what a picture shows.
Chosen on val of the toy world's demo."""


class CueConfig(Config):
    """Where pictures are retrieved from, and how long A* is tuned."""

    features: str | None = None
    """FeatureTable, made with the bundle's foundation; empty = A* stays as the adapter heard it."""
    split: str = "train"
    """Only clips of this split are retrieved."""
    pictures: int = pydantic.Field(8, ge=1, le=64)
    """k: how many are retrieved."""
    steps: int = pydantic.Field(12, ge=1, le=2000)
    """Of tuning; each denoises all k latents once."""
    learning_rate: float = pydantic.Field(0.002, gt=0)
    """Of Adam: how far each number of A* moves in a step, in units of an ordinary word's length."""


@dataclass(frozen=True)
class Retrieved:
    """The nearest pictures, the best first: their clips, cosines with the sound, captions, waveforms [k, S], and
    latents [k, C, h, w]."""

    clip_ids: list[str]
    cosines: list[float]
    captions: list[str]
    audio: Tensor
    latents: Tensor


@dataclass(frozen=True)
class Examples:
    """What is tuned on: pictures' latents [k, C, h, w], their own sounds' A* [k, K, D_t], and their prompts."""

    latents: Tensor
    tokens: Tensor
    prompts: list[str]


@dataclass(frozen=True)
class Cue:
    """A* [K, D_t] before and after, what it was tuned on, the loss before and after, and what it took."""

    before: Tensor
    after: Tensor
    retrieved: Retrieved
    loss_before: float
    loss_after: float
    seconds: float

    def told(self) -> dict[str, Any]:
        """As JSON values, the same for the same sound: without the seconds."""
        return {
            "retrieved": dict(zip(self.retrieved.clip_ids, self.retrieved.cosines, strict=True)),
            "loss": [self.loss_before, self.loss_after],
        }


def retrieve(features: str, embed: Tensor, split: str, count: int, clip_samples: int) -> Retrieved:
    """The pictures of a FeatureTable nearest to an aligned embedding [D], by the frame whose latents it holds.

    Every row of the split is compared, a row group at a time. clip_samples: S of the waveforms. Raises UserError when
    the split has none.
    """
    manifest = FeatureManifest.read(features)
    wanted = embed.float().cpu().numpy()
    best: list[tuple[float, str, str, int, int]] = []
    for file in storage.list_files(features, ".parquet"):
        table = open_table(file, manifest)
        for group in range(table.num_row_groups):
            for row, clip_id, cosine in _cosines(table, file, group, manifest, split, wanted):
                heapq.heappush(best, (cosine, clip_id, file, group, row))
                if len(best) > count:
                    heapq.heappop(best)
    if not best:
        raise UserError("cue.features", features, f"has no clips of the split {split!r}", "give another cue.split")
    best.sort(key=lambda found: (-found[0], found[1]))
    rows = []
    for _, _, file, group, row in best:
        columns = ["clip_id", "caption", "content_hash", "audio", "latents"]
        part = read_group(open_table(file, manifest), file, group, columns)
        rows.append(arrays_of(part.slice(row, 1), manifest, clip_samples, ["audio", "latents"]))
    audio, latents = (tensor_of(name, np.concatenate([row[name] for row in rows])) for name in ("audio", "latents"))
    captions = [row["caption"][0] for row in rows]
    return Retrieved(
        [clip_id for _, clip_id, *_ in best], [round(cosine, 4) for cosine, *_ in best], captions, audio, latents
    )


def _cosines(
    table: Any, file: str, group: int, manifest: FeatureManifest, split: str, wanted: np.ndarray
) -> Iterator[tuple[int, str, float]]:
    """(row of the group, clip, cosine) of the split's clips."""
    part = read_group(table, file, group, ["clip_id", "caption", "content_hash", "split", "image_features"])
    arrays = arrays_of(part, manifest, 1, ["image_features"])
    pictures = arrays["image_features"][:, manifest.latent_frame].astype(np.float32)
    cosines = pictures @ wanted / np.maximum(np.linalg.norm(pictures, axis=1) * np.linalg.norm(wanted), 1e-8)
    for row, own in enumerate(part["split"].to_pylist()):
        if own == split and arrays["has_picture"][row] and np.isfinite(cosines[row]):
            yield row, arrays["clip_id"][row], float(cosines[row])


def refine(painter: Painter, audio: np.ndarray, cue: CueConfig, seed: int = 0, window: Window = "middle") -> Cue:
    """Tunes a sound's A* on the pictures that it retrieves. window: of a long sound.

    Raises UserError for features of another foundation or sample rate than the painter's, and for an empty split.
    """
    begin = time.perf_counter()
    features = str(cue.features)
    manifest = FeatureManifest.read(features)
    if not all(is_identity(painter.foundation, *recorded) for recorded in manifest.foundation.items()):
        rule = f"was made with {manifest.foundation}, the bundle stands on {identity(painter.foundation)}"
        raise UserError("cue.features", features, rule, "featurize with the bundle's foundation")
    remedy = "featurize clips of the bundle's rate"
    manifest.check_sample_rate("cue.features", features, painter.sample_rate_hz, remedy)
    samples = painter.aligner.config.clip_samples
    found = retrieve(features, painter.listen(audio, window)[0], cue.split, cue.pictures, samples)
    before = painter.hear(audio, window)
    after, first, last = _tuned(painter, before, examples_of(painter, found), cue, seed)
    return Cue(before, after, found, first, last, round(time.perf_counter() - begin, 2))


def examples_of(painter: Painter, found: Retrieved) -> Examples:
    """Retrieved pictures as they are tuned on: with the prompts and the A* that the adapter was trained with."""
    heads = AdaptLossConfig(head_pattern=painter.head_pattern, prompt=painter.prompt)
    tokens = torch.stack([painter.hear(sound) for sound in found.audio.numpy()])
    return Examples(found.latents, tokens, [prompt_of(caption, heads) for caption in found.captions])


def _tuned(
    painter: Painter, tokens: Tensor, examples: Examples, cue: CueConfig, seed: int
) -> tuple[Tensor, float, float]:
    """A* after `cue.steps` steps, and the loss on one fixed draw of noise before and after."""
    pipe, device = painter.pipe, painter.device
    latents = examples.latents.to(device, pipe.unet.dtype)
    heard = examples.tokens.detach().float()
    shift = torch.zeros_like(tokens, dtype=torch.float32).requires_grad_(True)
    optimizer = torch.optim.Adam([shift], lr=cue.learning_rate * painter.injector.median_norm)
    generator = torch.Generator("cpu").manual_seed(seed)
    levels = pipe.scheduler.config.num_train_timesteps

    def loss_of(drawn: torch.Generator) -> Tensor:
        states = painter.injector.encode(examples.prompts, heard + shift)[0].to(pipe.unet.dtype)
        noise = torch.randn(latents.shape, generator=drawn).to(latents)
        steps = torch.randint(int(NOISY * levels), levels, (len(latents),), generator=drawn)
        return denoising_loss(pipe.unet, pipe.scheduler, latents, states, steps.to(device), noise).mean()

    @torch.no_grad()
    def fixed() -> float:
        return float(torch.stack([loss_of(torch.Generator("cpu").manual_seed(seed + 1 + i)) for i in range(4)]).mean())

    first = fixed()
    for _ in range(cue.steps):
        optimizer.zero_grad()
        with torch.enable_grad():
            loss_of(generator).backward()
        optimizer.step()
    return tokens.detach().float() + shift.detach(), first, fixed()
