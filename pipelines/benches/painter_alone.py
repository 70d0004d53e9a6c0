"""The floor of `aai bench serve`: a painter without a service, and its UNet without a painter."""

import functools
import io
import os
import time
from typing import Any

import torch
from PIL import Image

from aai.addons import AddOns
from aai.media.decode import decode_audio
from aai.painter import Painter
from aai.sampling import PaintRequest
from pipelines.benches.asking import VERBS, Form, Reply

Which = tuple[str, str, str, AddOns]
"""Of a painter: folder of its bundle, device, dtype, add-ons."""
GUIDED_ROWS = 2
"""Rows of the UNet for a picture: with guidance also those of the negative prompt."""


@functools.cache
def loaded(folder: str, device: str, dtype: str, addons: AddOns) -> Painter:
    """The bundle's painter, once a process, with the threads that Ray gives its workers."""
    if device == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    return Painter.load(folder, device, dtype, addons)


def paint_alone(painter: Which, first: int, steps: int, seconds: float) -> list[Reply]:
    """Paints one request after the other, in whole turns of the verbs.

    Sounds and pictures are decoded beforehand, pictures are not encoded: what the service adds counts as the service's.
    """
    ready, answers = loaded(*painter), []
    end_s, number = time.monotonic() + seconds, first
    while time.monotonic() < end_s:
        for verb in VERBS:
            form = Form(number, verb, steps)
            sound = decode_audio(form.wav(), 30, 2**20, ready.sample_rate_hz)
            image, request = Image.open(io.BytesIO(form.png())).convert("RGB"), PaintRequest(seed=number, steps=steps)
            begin_s = time.monotonic()
            if verb == "generate":
                ready.generate(sound, request)
            else:
                getattr(ready, verb)(sound, image, request)
            answers.append(Reply(begin_s, time.monotonic(), "200"))
            number += 1
    return answers


@torch.no_grad()
def unet_alone(painter: Which, pictures: int, seconds: float) -> float:
    """Seconds of a step of the UNet for so many pictures with guidance: the median over `seconds` of steps."""
    pipe: Any = loaded(*painter).pipe
    unet, rows = pipe.unet, GUIDED_ROWS * pictures
    like: dict[str, Any] = {"device": unet.device, "dtype": unet.dtype}
    edge = unet.config.sample_size
    latents = torch.randn(rows, unet.config.in_channels, edge, edge, **like)
    words = torch.randn(rows, pipe.tokenizer.model_max_length, unet.config.cross_attention_dim, **like)
    taken: list[float] = []
    end_s = time.monotonic() + seconds
    while len(taken) < 3 or time.monotonic() < end_s:
        begin_s = time.monotonic()
        unet(latents, 500, words).sample.float().sum().item()  # waits for a GPU
        taken.append(time.monotonic() - begin_s)
    return sorted(taken)[len(taken) // 2]
