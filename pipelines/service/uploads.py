"""What was sent, as sound and pixels: decoded in child processes, so that a file can cost its request and no more."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import numpy as np
from fastapi import UploadFile
from PIL import Image

from aai.media.child import MediaChild
from aai.media.limits import ClipError, DecodeConfig
from aai.png import sha256
from pipelines.service.guard import ApiError, Limits, busy, queue_full

logger = logging.getLogger("ray.serve")  # the only one that Serve writes for its replicas

CHILDREN = 2
"""Files that are decoded at once: decoded pictures and sounds are large; waiting uploads are not."""
CODES = {"TIMEOUT": "decoding_timeout", "CRASHED": "decoder_crashed", "UNEXPECTED": "decoder_failed"}
"""What a child's death is called; other codes are the decoder's own, in small letters."""
Decode = Callable[..., Awaitable[tuple[Any, str]]]


def read_audio(child: MediaChild, data: bytes, limits: Limits, sample_rate_hz: int) -> np.ndarray:
    """An uploaded sound file -> mono float32 [S]. Raises ApiError 422 with the decoder's reason."""
    try:
        return child.sound(data, limits.max_audio_s, limits.max_bytes, sample_rate_hz)
    except ClipError as error:
        raise ApiError(422, _code(error), f"audio: {error.message}") from error


def read_image(child: MediaChild, data: bytes, limits: Limits, field: str = "image") -> Image.Image:
    """An uploaded PNG, JPEG or WebP -> upright RGB. Raises ApiError 422 with the decoder's reason."""
    try:
        pixels = child.still(data, limits.max_pixels, backdrop="black" if field == "mask" else None)
        return Image.fromarray(pixels)
    except ClipError as error:
        raise ApiError(422, f"image_{_code(error)}", f"{field}: {error.message}") from error


def _code(error: ClipError) -> str:
    return CODES.get(error.code, error.code.lower())


class Decoders:
    """Child processes that are kept warm, each for one request at a time. waiting: requests that may wait for one."""

    def __init__(self, limits: Limits, waiting: int = 64) -> None:
        self._limits, self._most, self._here = limits, CHILDREN + waiting, 0
        self._cfg = DecodeConfig(timeout_s=limits.decode_timeout_s, max_memory_mb=limits.decode_memory_mb)
        self._idle = [MediaChild(self._cfg) for _ in range(CHILDREN)]
        self._free = asyncio.Semaphore(CHILDREN)

    def warm(self) -> None:
        """Starts all of them. Raises RuntimeError where none can be started."""
        for child in self._idle:
            child.warm()

    @asynccontextmanager
    async def one(self) -> AsyncIterator[Decode]:
        """A child for all files of a request: else each of many waiting ones would hold most of its sounds.

        What is given decodes one: `await decode(read_audio, file, limits, rate_hz)` -> (sound, SHA-256 of the bytes).
        Raises ApiError 429 where too many wait.
        """
        if self._here >= self._most:
            raise queue_full(self._limits.retry_after_s)
        self._here += 1
        try:
            async with self._free:
                child = self._idle.pop()
                try:
                    yield partial(self._decode, child)
                finally:
                    self._idle.append(MediaChild(self._cfg) if child.abandoned else child)
        finally:
            self._here -= 1

    async def _decode(
        self, child: MediaChild, read: Callable[..., Any], file: UploadFile, *args: Any
    ) -> tuple[Any, str]:
        data = await file.read()
        try:
            return await asyncio.to_thread(lambda: (read(child, data, *args), sha256(data)))
        except asyncio.CancelledError:  # the client left, or its time is over
            child.abandon()
            raise
        except (RuntimeError, OSError) as error:  # no process can be started: the machine is short of something
            logger.exception("gateway: no decoder")
            rule = "the file cannot be decoded now; try again"
            raise busy(503, "no_decoder", rule, self._limits.retry_after_s) from error
