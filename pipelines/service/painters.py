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
from aai.proof import ProofConfig, Prover
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
        proof: dict[str, Any],
        label: str,
        stuck_s: float,
    ) -> None:
        found = read_bundle(versions.resolve_bundle(bundle, StoreConfig.parse(registry)))
        if found.sha != sha:
            raise UserError("bundle", bundle, f"holds {found.sha}, the service was started for {sha}", "deploy again")
        self._painter = Painter.load(found, device, dtype, AddOns.parse(addons))
        self._prover, self._made = Prover(ProofConfig.parse(proof)), {"model": label, "bundle": sha}
        logger.info("painter: %s on %s", self._painter.dtype, device)
        # One thread: diffusers' schedulers hold state. A request cancelled while it waits here never starts.
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._stuck_s, self._started_s, self._broken = stuck_s, 0.0, ""

    async def paint(
        self,
        verb: Verb,
        sounds: dict[str, np.ndarray],
        pixels: list[np.ndarray | None],
        request: PaintRequest,
        given: dict[str, Any],
    ) -> list[bytes]:
        """Sounds float32 [S] by name, maybe a picture and a mask (RGB, uint8 [H, W, 3]) -> PNG files.

        given: hashes of what was handed in, which the pictures tell.
        """
        loop = asyncio.get_running_loop()
        images = await loop.run_in_executor(self._thread, self._paint, verb, sounds, pixels, request)
        made = {"verb": verb, **self._made, **given, **request.model_dump()}
        return await asyncio.to_thread(self._encoded, images, made)

    def _paint(
        self, verb: Verb, sounds: dict[str, np.ndarray], pixels: list[np.ndarray | None], request: PaintRequest
    ) -> list[Image.Image]:
        self._started_s = time.monotonic()
        try:
            if verb == "generate":
                return self._painter.generate(sounds, request)
            (audio,), (image, mask) = sounds.values(), (None if x is None else Image.fromarray(x) for x in pixels)
            painted: list[Image.Image] = getattr(self._painter, verb)(audio, image, request, mask)
            return painted
        except torch.AcceleratorError as error:  # not OutOfMemoryError; such a process never paints again
            self._broken = str(error)
            raise
        finally:
            self._started_s = 0.0

    def _encoded(self, images: list[Image.Image], made: dict[str, Any]) -> list[bytes]:
        """PNG files; picture i has the request's seed + i."""
        return [self._prover.encode(image, {**made, "seed": made["seed"] + i}) for i, image in enumerate(images)]

    def check_health(self) -> None:
        """Serve replaces the replica when this raises: after a CUDA error, or when a painting never ends."""
        if self._broken:
            raise RuntimeError(f"the device failed: {self._broken}")
        if self._started_s and time.monotonic() - self._started_s > self._stuck_s:
            raise RuntimeError(f"one request has been painting for more than {self._stuck_s:g} s")
