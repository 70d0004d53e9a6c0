"""The painters of the service: each holds the model and paints one request at a time."""

import asyncio
import logging
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from PIL import Image

from aai.addons import AddOns
from aai.bundle import read_bundle
from aai.config import Config
from aai.errors import UserError
from aai.painter import Painter
from aai.proof import ProofConfig, Prover
from aai.sampling import PaintRequest
from aai.signatures import TrustConfig, check
from pipelines.registry import versions
from pipelines.service.http import ServedModel, Verb
from pipelines.service.watching import Watcher, refuse_other
from pipelines.settings import StoreConfig

logger = logging.getLogger(__name__)


class PainterConfig(Config):
    """What a painter is told at its start."""

    bundle: str
    """URI that cannot move."""
    model: ServedModel
    registry: StoreConfig
    device: str
    dtype: str
    addons: AddOns
    proof: ProofConfig
    trust: TrustConfig
    stuck_s: float
    """Painting for longer than this is a fault."""
    follow: str = ""
    """Alias that is followed, as models:/NAME@ALIAS; empty = none."""
    follow_s: float = 5
    board: str = ""
    """Name of the actor that is told what is served."""


@dataclass(frozen=True)
class Serving:
    """A painter, and what it is called."""

    painter: Painter
    model: ServedModel


class PainterReplica:
    """One model on one device. Paints in a thread of its own: health checks are answered meanwhile."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = c = PainterConfig.parse(config)
        found = read_bundle(versions.resolve_bundle(c.bundle, c.registry))
        if found.sha != c.model.sha:
            rule = f"holds {found.sha}, the service was started for {c.model.sha}"
            raise UserError("bundle", c.bundle, rule, "deploy again")
        self._serving = Serving(Painter.load(found, c.device, c.dtype, c.addons), c.model)
        self._prover = Prover(c.proof)
        logger.info("painter: %s on %s", self._serving.painter.dtype, c.device)
        # One thread: diffusers' schedulers hold state. A request cancelled while it waits here never starts.
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._started_s, self._broken = 0.0, ""
        self.watcher = Watcher(c.follow, c.registry, c.model, self.take)
        if c.follow:
            self.watcher.look()  # one that is started late begins with what the alias names now
            self._tell()
            self.watcher.start(c.follow_s, self._tell)

    def take(self, pinned: str, model: ServedModel) -> None:
        """Loads a version beside the one that is served, paints with it, and then serves it: from the next request on.

        Raises UserError, or what else it failed with, for one that cannot be served; the old one stays.
        """
        c, now = self._config, self._serving
        with tempfile.TemporaryDirectory(prefix="aai-") as scratch:
            bundle = read_bundle(versions.resolve_bundle(pinned, c.registry, scratch))
            check(bundle.folder, c.trust, pinned)
            refuse_other("foundation", now.painter.foundation, bundle.config.foundation)
            painter = Painter.load(bundle, c.device, c.dtype, c.addons, now.painter)
        if painter.vocabulary is not None:
            painter.concepts  # noqa: B018 (loads the CLIP that edit and stylize need)
        refuse_other("encoder.sample_rate_hz", now.painter.sample_rate_hz, painter.sample_rate_hz)
        self._thread.submit(try_out, painter).result()  # between two requests
        self._serving = Serving(painter, model.model_copy(update={"sha": bundle.sha}))
        self.watcher.served = self._serving.model

    def _tell(self) -> None:
        """Tells the board what is served; it may be gone for a moment, with the gateway."""
        watcher = self.watcher
        row = {"model": watcher.served.model_dump(), "refused": watcher.refused, "trouble": watcher.trouble}
        with suppress(Exception):
            board = ray.get_actor(self._config.board)
            board.tell.remote(ray.get_runtime_context().get_actor_id(), row)

    async def paint(
        self,
        verb: Verb,
        sounds: dict[str, np.ndarray],
        pixels: list[np.ndarray | None],
        request: PaintRequest,
        given: dict[str, Any],
    ) -> tuple[list[bytes], dict[str, Any]]:
        """Sounds float32 [S] by name, maybe a picture and a mask (RGB, uint8 [H, W, 3]) -> PNG files, and the model.

        given: hashes of what was handed in, which the pictures tell.
        """
        loop = asyncio.get_running_loop()
        images, model = await loop.run_in_executor(self._thread, self._paint, verb, sounds, pixels, request)
        made = {
            "verb": verb,
            "model": f"{model.name}/{model.version}",
            "bundle": model.sha,
            **given,
            **request.model_dump(),
        }
        return await asyncio.to_thread(self._encoded, images, made), model.model_dump()

    def _paint(
        self, verb: Verb, sounds: dict[str, np.ndarray], pixels: list[np.ndarray | None], request: PaintRequest
    ) -> tuple[list[Image.Image], ServedModel]:
        self._started_s, serving = time.monotonic(), self._serving
        try:
            if verb == "generate":
                return serving.painter.generate(sounds, request), serving.model
            (audio,), (image, mask) = sounds.values(), (None if x is None else Image.fromarray(x) for x in pixels)
            painted: list[Image.Image] = getattr(serving.painter, verb)(audio, image, request, mask)
            return painted, serving.model
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
        if self._started_s and time.monotonic() - self._started_s > self._config.stuck_s:
            raise RuntimeError(f"one request has been painting for more than {self._config.stuck_s:g} s")


def try_out(painter: Painter) -> None:
    """Paints a tone, so that the first request does not wait. Raises UserError for a picture of one colour."""
    tone = np.sin(np.arange(painter.sample_rate_hz) * 0.2).astype(np.float32) / 2
    pixels = np.asarray(painter.generate(tone, PaintRequest(steps=2))[0])
    if pixels.min() == pixels.max():
        raise UserError("bundle", "its first picture", "is of one colour", "look at `aai generate` with this version")
