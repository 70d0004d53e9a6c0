"""The painters of the service: each holds the model and paints one request at a time."""

import asyncio
import logging
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import ray
import torch
from PIL import Image

from aai.addons import AddOns
from aai.bundle import read_bundle
from aai.config import Config
from aai.errors import UserError
from aai.foundation.identity import identity
from aai.painter import Painter
from aai.proof import ProofConfig, Prover
from aai.sampling import PaintRequest
from aai.signatures import TrustConfig, check
from pipelines.registry import versions
from pipelines.service.http import ServedModel, Verb
from pipelines.service.noticeboard import board_name
from pipelines.service.watching import Watcher, refuse_other
from pipelines.settings import StoreConfig

logger = logging.getLogger("ray.serve")  # the only one that Serve writes for its replicas
T = TypeVar("T")


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


class StoppedError(Exception):
    """Nobody waits for this picture any more."""


@dataclass(frozen=True)
class Serving:
    """A painter, what it is called, and the foundation that it was loaded with."""

    painter: Painter
    model: ServedModel
    foundation: dict[str, str]


class PainterReplica:
    """One model on one device. Paints in a thread of its own: health checks are answered meanwhile."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = c = PainterConfig.parse(config)
        # One thread: diffusers' schedulers hold state. A request cancelled while it waits here never starts.
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._started_s, self._broken = 0.0, ""
        self._prover = Prover(c.proof)
        self._stop = threading.Event()
        """Of the request that is painted: set when nobody waits for it."""
        self._serving = self._first()
        self._serving.painter.pipe.unet.register_forward_pre_hook(self._go_on)
        logger.info("painter: %s in %s on %s", self._serving.model.label(), self._serving.painter.dtype, c.device)
        self.watcher = Watcher(c.follow, c.registry, self._serving.model, self.take)
        if c.follow:
            self._board = board_name(c.board)
            self._tell()
            self.watcher.start(c.follow_s, self._tell)

    def _first(self) -> Serving:
        """What the alias names now; where that cannot be had, what it named when the service was started."""
        c = self._config
        if c.follow:
            try:
                pinned, _, version, _ = versions.pin_bundle(c.follow, c.registry)
                return self._loaded(pinned, c.model.model_copy(update={"version": version}))
            except Exception as error:
                logger.warning("painter: begins with %s, since %s cannot be had (%s)", c.model.label(), c.follow, error)
        found = self._loaded(c.bundle, c.model)
        if found.model.sha != c.model.sha:
            rule = f"holds {found.model.sha}, the service was started for {c.model.sha}"
            raise UserError("bundle", c.bundle, rule, "deploy again")
        return found

    def _loaded(self, uri: str, model: ServedModel, beside: Serving | None = None) -> Serving:
        """A bundle, checked and loaded. Raises UserError for one that cannot take the place of what is served."""
        c = self._config
        with tempfile.TemporaryDirectory(prefix="aai-") as scratch:
            bundle = read_bundle(versions.resolve_bundle(uri, c.registry, scratch))
            check(bundle.folder, c.trust, uri)
            foundation = identity(bundle.config.foundation)
            if beside:
                refuse_other("foundation", beside.foundation, foundation)
            painter = Painter.load(bundle, c.device, c.dtype, c.addons, beside.painter if beside else None)
        refuse_other("encoder.sample_rate_hz", c.model.sample_rate_hz, painter.sample_rate_hz)
        return Serving(painter, model.model_copy(update={"sha": bundle.sha}), foundation)

    def take(self, pinned: str, model: ServedModel) -> None:
        """Loads a version beside the one that is served, paints with it, and then serves it: from the next request on.

        Raises UserError, or what else it failed with, for one that cannot be served; the old one stays.
        """
        found = self._loaded(pinned, model, self._serving)
        self._thread.submit(self._on_device, try_out, found.painter).result()  # between two requests
        self._serving, self.watcher.served = found, found.model

    def _tell(self) -> None:
        """Tells the board what is served; it may be gone for a moment, with the gateway."""
        watcher = self.watcher
        row = {"model": watcher.served.model_dump(), "refused": watcher.refused, "trouble": watcher.trouble}
        with suppress(Exception):
            ray.get_actor(self._board).tell.remote(ray.get_runtime_context().get_actor_id(), row)

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
        loop, stop = asyncio.get_running_loop(), threading.Event()
        try:
            images, model = await loop.run_in_executor(self._thread, self._paint, verb, sounds, pixels, request, stop)
        except asyncio.CancelledError:  # the client left, or its time is over
            stop.set()
            raise
        made = {
            "verb": verb,
            "model": f"{model.name}/{model.version}",
            "bundle": model.sha,
            **given,
            **request.model_dump(),
        }
        return await asyncio.to_thread(self._encoded, images, made), model.model_dump()

    def _paint(
        self,
        verb: Verb,
        sounds: dict[str, np.ndarray],
        pixels: list[np.ndarray | None],
        request: PaintRequest,
        stop: threading.Event,
    ) -> tuple[list[Image.Image], ServedModel]:
        serving, self._stop = self._serving, stop
        if verb == "generate":
            return self._on_device(serving.painter.generate, sounds, request), serving.model
        (audio,), (image, mask) = sounds.values(), (None if x is None else Image.fromarray(x) for x in pixels)
        return self._on_device(getattr(serving.painter, verb), audio, image, request, mask), serving.model

    def _go_on(self, *_: object) -> None:
        """Before each denoising step, of whatever pipeline: raises StoppedError when nobody waits for the picture."""
        if self._stop.is_set():
            raise StoppedError

    def _on_device(self, work: Callable[..., T], *args: Any) -> T:
        """Runs work of the device; what becomes of it is seen by check_health."""
        self._started_s = time.monotonic()
        try:
            return work(*args)
        except torch.AcceleratorError as error:  # not OutOfMemoryError; such a process never paints again
            self._broken = str(error)
            raise
        finally:
            self._started_s, self._stop = 0.0, threading.Event()

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
    """Paints a tone, so that the first request does not wait. Raises UserError where all pictures are of one colour."""
    tone = np.sin(np.arange(painter.sample_rate_hz) * 0.2).astype(np.float32) / 2
    for seed in range(3):  # a safety checker may black one out
        pixels = np.asarray(painter.generate(tone, PaintRequest(steps=2, seed=seed))[0])
        if pixels.min() < pixels.max():
            return
    raise UserError("bundle", "its first pictures", "are of one colour", "look at `aai generate` with this version")
