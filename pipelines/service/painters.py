"""The painters of the service: each holds the model and paints one request at a time."""

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image

from aai.addons import AddOns
from aai.bundle import read_bundle
from aai.errors import UserError
from aai.painter import Painter
from aai.png import encode_png
from aai.sampling import PaintRequest
from pipelines.registry import versions
from pipelines.service.http import Verb
from pipelines.settings import StoreConfig

logger = logging.getLogger(__name__)


class PainterReplica:
    """One model on one device. Paints in a thread of its own: health checks are answered meanwhile."""

    def __init__(
        self,
        bundle: str,
        registry: dict[str, Any],
        sha: str,
        device: str,
        dtype: str,
        addons: dict[str, Any],
        stuck_s: float,
    ) -> None:
        found = read_bundle(versions.resolve_bundle(bundle, StoreConfig.parse(registry)))
        if found.sha != sha:
            raise UserError("bundle", bundle, f"holds {found.sha}, the service was started for {sha}", "deploy again")
        self._painter = Painter.load(found, device, dtype, AddOns.parse(addons))
        logger.info("painter: %s on %s", self._painter.dtype, device)
        # One thread: diffusers' schedulers hold state. A request cancelled while it waits here never starts.
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._stuck_s, self._started_s, self._broken = stuck_s, 0.0, ""

    async def paint(
        self, verb: Verb, sounds: dict[str, np.ndarray], pixels: list[np.ndarray | None], request: PaintRequest
    ) -> list[bytes]:
        """Sounds float32 [S] by name, maybe a picture and a mask (RGB, uint8 [H, W, 3]) -> PNG files."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._paint, verb, sounds, pixels, request)

    def _paint(
        self, verb: Verb, sounds: dict[str, np.ndarray], pixels: list[np.ndarray | None], request: PaintRequest
    ) -> list[bytes]:
        self._started_s = time.monotonic()
        try:
            if verb == "generate":
                images = self._painter.generate(sounds, request)
            else:
                (audio,), (given, mask) = sounds.values(), (None if x is None else Image.fromarray(x) for x in pixels)
                images = getattr(self._painter, verb)(audio, given, request, mask)
        except torch.AcceleratorError as error:  # not OutOfMemoryError; such a process never paints again
            self._broken = str(error)
            raise
        finally:
            self._started_s = 0.0
        return [encode_png(image) for image in images]

    def check_health(self) -> None:
        """Serve replaces the replica when this raises: after a CUDA error, or when a painting never ends."""
        if self._broken:
            raise RuntimeError(f"the device failed: {self._broken}")
        if self._started_s and time.monotonic() - self._started_s > self._stuck_s:
            raise RuntimeError(f"one request has been painting for more than {self._stuck_s:g} s")
