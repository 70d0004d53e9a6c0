"""What cached features save: a training step from them, and one that first computes them with the frozen models.

Both are steps of `aai.fit` in one process, in turns, on clips that lie in memory: JPEG pictures, captions, sounds. The
towers compute in bfloat16 where the device has it, as the training does.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from aai.align import AlignLossConfig, AlignTask
from aai.augment import AugmentConfig
from aai.encoders.audio import AudioEncoder
from aai.fit import FitConfig, fit
from aai.foundation.clip import FrozenClip
from aai.foundation.identity import FoundationSpec
from aai.precision import resolve
from aai.reader import Batch
from pipelines.benches.flops import Flops
from pipelines.benches.options import BenchConfig
from pipelines.benches.random_models import (
    SIZES,
    adapt_task,
    ast_encoder,
    build_pipeline,
    clip_folder,
    encoder_from_scratch,
)
from pipelines.benches.vitl14 import jpeg, matmul_tflops

CPU_CLIPS = {"align": 2, "adapt": 1}
"""Clips of a step at most, without a GPU."""
CAPTION = "a photo of a big dog in the rain"


@dataclass
class Loop:
    """Steps of a training from two sources of batches in turns, on the clock."""

    sources: Mapping[str, Callable[[], Batch]]
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """Of each step, by its source: making the batch, forward, backward, optimiser."""

    def run(self, task: nn.Module, turns: int) -> None:
        """`turns` steps from each source, after one of each to warm up."""
        names = []
        for turn in range(turns + 1):
            names += list(self.sources)[:: -1 if turn % 2 else 1]
        begun: list[float] = []

        def batches(first_step: int) -> Iterator[Batch]:
            for name in names[first_step:]:
                begun.append(time.monotonic())
                yield self.sources[name]()

        def ended(step: int, figures: dict[str, float]) -> None:  # has waited for the device: figures are numbers
            self.seconds.setdefault(names[step - 1], []).append(time.monotonic() - begun[step - 1])

        fit(task, batches, FitConfig(steps=len(names), log_every=1, learning_rate=1e-5), ended)
        self.seconds = {name: values[1:] for name, values in self.seconds.items()}

    def times_slower(self, name: str) -> float:
        """How many times as long a step from a source takes as one from the first: the median over the turns."""
        first = next(iter(self.sources))
        return statistics.median(a / b for a, b in zip(self.seconds[name], self.seconds[first], strict=True))


@dataclass(frozen=True)
class Clips:
    """Clips as a training without features would read them."""

    pictures: list[bytes]
    """JPEG, `frames` of each clip in order."""
    frames: int
    captions: list[str]
    sounds: Tensor
    """float32 [B, S] in -1..1."""

    @classmethod
    def of_noise(cls, count: int, frames: int, size: str) -> "Clips":
        """Clips of noise: what they show costs the same."""
        sizes = SIZES[size]
        pictures = [jpeg(seed, sizes.picture_px) for seed in range(count * frames)]
        generator = torch.Generator().manual_seed(0)
        sounds = torch.rand(count, round(sizes.clip_s * 16_000), generator=generator) - 0.5
        return cls(pictures, frames, [CAPTION] * count, sounds)

    def batch(self, **features: Tensor) -> Batch:
        """A batch as FeatureReader makes it."""
        ids = torch.arange(1, 1 + len(self.captions))
        return {"audio": self.sounds, "caption": self.captions, "caption_id": ids, "clip_hash": ids, **features}


class Towers:
    """The frozen models, on clips. Results are ordinary tensors: a training saves them for its backward pass."""

    def __init__(self, clip: FrozenClip, device: str, dtype: torch.dtype) -> None:
        self.clip, self.device, self.dtype = clip, device, dtype

    def for_align(self, clips: Clips, frames: int) -> Batch:
        """A batch of align: features of so many pictures of each clip, and of its caption."""
        chosen = [clips.pictures[i * clips.frames + k] for i in range(len(clips.captions)) for k in range(frames)]
        images = self.clip.images(chosen).clone().view(len(clips.captions), frames, -1)
        return clips.batch(image_features=images, text_features=self.clip.texts(clips.captions).clone()[:, None])

    def for_adapt(self, clips: Clips, vae: nn.Module, encoder: AudioEncoder) -> Batch:
        """A batch of adapt: features of all pictures, latents of one, and the sound's embedding."""
        images = self.clip.images(clips.pictures).clone().view(len(clips.captions), clips.frames, -1)
        middle = clips.pictures[clips.frames // 2 :: clips.frames]
        with torch.inference_mode(), torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            embedded = encoder(clips.sounds.to(self.device))
            raw = torch.from_numpy(np.stack([np.asarray(Image.open(BytesIO(data))) for data in middle]))
            pixels = raw.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
            latents = vae.encode(pixels.to(self.dtype)).latent_dist.mean * vae.config.scaling_factor
        return clips.batch(image_features=images, latents=latents.float().clone(), aligned=embedded.float().clone())


def measure_towers(config: BenchConfig) -> dict[str, Any]:
    """inputs, figures, ratios of `cached`, a step from features, and `towers`, one that computes them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    count = config.train.clips if device == "cuda" else min(config.train.clips, CPU_CLIPS[config.name])
    dtype = getattr(torch, resolve("auto", device))
    size, folder = config.model.size, str(clip_folder(config.out, config.model.size))
    frozen = FrozenClip(FoundationSpec(clip=folder, diffusion=folder), device, dtype, config.model.batch_size)
    clips, towers = Clips.of_noise(count, config.train.frames, size), Towers(frozen, device, dtype)
    figures: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    if config.name == "align":
        for name, encoder in (("ast_base", ast_encoder(size)), ("scratch", encoder_from_scratch(size))):
            sources = {
                f"{name}_cached": partial(towers.for_align, clips, config.train.frames),
                f"{name}_towers": partial(towers.for_align, clips, config.train.frames),
                f"{name}_towers_one_picture": partial(towers.for_align, clips, 1),
            }
            _measure(
                AlignTask(encoder, AlignLossConfig(), AugmentConfig()).to(device),
                sources,
                config,
                count,
                figures,
                ratios,
            )
    else:
        pipe = build_pipeline(size, clip_folder(config.out, size))
        vae, encoder = pipe.vae.to(device, dtype).eval(), ast_encoder(size).to(device).eval().requires_grad_(False)
        in_loop = partial(towers.for_adapt, clips, vae, encoder)
        task = adapt_task(size, pipe).to(device)
        _measure(task, {"cached": in_loop, "towers": in_loop}, config, count, figures, ratios)
    inputs = {
        "models": size,
        "weights": "random",
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "clips_per_step_with_towers": count,
        "frames": config.train.frames,
        "steps_with_towers": config.repeats,
    }
    return {"inputs": inputs, "figures": figures, "ratios": ratios}


def _measure(
    task: nn.Module,
    sources: Mapping[str, Callable[[], Batch]],
    config: BenchConfig,
    clips: int,
    figures: dict[str, Any],
    ratios: dict[str, float],
) -> None:
    """Adds what one task gives. The first source is asked once, and its batch kept: the cached features."""
    cached, *others = sources
    with Flops() as made:
        batch = sources[cached]()
    device = next(task.parameters()).device
    with Flops() as stepped:
        task.train()
        on_device = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in batch.items()}
        task(on_device)[0].backward()
    loop = Loop({**sources, cached: lambda: batch})
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    loop.run(task, config.repeats)
    for name, seconds in loop.seconds.items():
        figures[f"{name}_clips_per_s"] = _short(clips / statistics.median(seconds))
    for name in others:
        ratios[f"{cached}/{name}"] = _short(loop.times_slower(name))
    figures[f"{cached}_gflop_per_clip"] = _short(stepped.total / clips / 1e9)
    figures[f"{others[0]}_gflop_per_clip"] = _short((stepped.total + made.total) / clips / 1e9)
    ratios[f"{others[0]}_gflop/{cached}_gflop"] = _short(1 + made.total / stepped.total)
    if device.type == "cuda":
        rate = figures[f"{cached}_clips_per_s"] * figures[f"{cached}_gflop_per_clip"] / 1e3
        ratios[f"{cached}/matmul"] = _short(rate / matmul_tflops("cuda"))
        figures[f"{cached}_gpu_peak_gb"] = _short(torch.cuda.max_memory_allocated() / 1e9)


def _short(value: float) -> float:
    return float(f"{value:.4g}")
