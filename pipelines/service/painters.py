"""The painters of the service: each holds the model and paints several requests together."""

import asyncio
import io
import logging
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from aai.addons import AddOns, blackened
from aai.batching import Together, view_of
from aai.bundle import read_bundle
from aai.config import Config
from aai.errors import UserError
from aai.foundation.identity import identity
from aai.painter import Painter
from aai.progress import DenoisingProgress, ProgressTracker
from aai.proof import ProofConfig, Prover
from aai.sampling import PaintRequest
from aai.signatures import TrustConfig, check
from pipelines.registry import versions
from pipelines.service.answers import ServedModel
from pipelines.service.http import Verb
from pipelines.service.noticeboard import BoardClient, board_name
from pipelines.service.telemetry import PainterMetrics
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
    batch_pictures: int = 8
    """Most pictures that are painted together."""
    follow: str = ""
    """Alias that is followed, as models:/NAME@ALIAS; empty = none."""
    follow_s: float = 5
    board: str = ""
    """Name of the actor that is told what is served."""


@dataclass(frozen=True)
class Serving:
    """A painter, what it is called, and the foundation that it was loaded with."""

    painter: Painter
    model: ServedModel
    foundation: dict[str, str]


class PainterReplica:
    """One model on one device. Paints in threads, for each request one: health checks are answered meanwhile."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = c = PainterConfig.parse(config)
        self._threads = ThreadPoolExecutor(max_workers=c.batch_pictures + 1)  # one for a new version's first picture
        self._places, self._door = asyncio.Semaphore(c.batch_pictures), asyncio.Lock()
        self._started_s: dict[int, float] = {}
        """When each request that is painted began, by its thread."""
        self._broken = ""
        self._metrics = PainterMetrics()
        self._prover = Prover(c.proof)
        self._serving = self._first()
        self._together = Together(self._serving.painter.pipe.unet, self._metrics.batch)  # of all versions
        logger.info("painter: %s in %s on %s", self._serving.model.label(), self._serving.painter.dtype, c.device)
        self.watcher = Watcher(c.follow, c.registry, self._serving.model, self.take)
        if c.follow:
            self._board = BoardClient(board_name(c.board))
            self._tell()
            self.watcher.start(c.follow_s, self._tell, self._board.moved)

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
        self._threads.submit(self._on_device, lambda: try_out(view_of(found.painter)), threading.Event()).result()
        self._serving, self.watcher.served = found, found.model

    def _tell(self) -> None:
        """Tells the board what is served."""
        watcher = self.watcher
        row = {"model": watcher.served.model_dump(), "refused": watcher.refused, "trouble": watcher.trouble}
        self._board.tell(row)

    async def paint(
        self,
        verb: Verb,
        sounds: dict[str, np.ndarray],
        pixels: list[np.ndarray | None],
        request: PaintRequest,
        given: dict[str, Any],
        tell: Callable[[DenoisingProgress], None] | None = None,
    ) -> tuple[list[bytes], dict[str, Any]]:
        """Sounds float32 [S] by name, maybe a picture and a mask (RGB, uint8 [H, W, 3]) -> PNG files, and the model.

        given: hashes of what was handed in, which the pictures tell. tell: hears how far it is, from another thread.
        """
        loop, stop = asyncio.get_running_loop(), threading.Event()
        # What keeps deep layers between steps cannot share them: it has all places.
        places = self._config.batch_pictures if request.reuse_steps > 1 else request.num_images
        taken = await self._taken(min(places, self._config.batch_pictures))
        work = self._threads.submit(self._paint, verb, sounds, pixels, request, stop, tell)
        # The places are free when the thread has ended, also that of a request for which nobody waits.
        work.add_done_callback(lambda _: loop.call_soon_threadsafe(self._free, taken))
        try:
            images, model = await asyncio.wrap_future(work)
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

    async def _taken(self, places: int) -> int:
        """Takes places, in the order of asking: who needs many is not overtaken for ever."""
        async with self._door:
            taken = 0
            try:
                while taken < places:
                    await self._places.acquire()
                    taken += 1
            except asyncio.CancelledError:
                self._free(taken)
                raise
        return taken

    def _free(self, places: int) -> None:
        for _ in range(places):
            self._places.release()

    async def paint_live(
        self,
        verb: Verb,
        sounds: dict[str, np.ndarray],
        pixels: list[np.ndarray | None],
        request: PaintRequest,
        given: dict[str, Any],
    ) -> AsyncIterator[dict[str, Any]]:
        """As `paint`, and meanwhile how far it is: {step, steps, preview}, with `preview` as PNG or None.

        The last one is {files, model}.
        """
        loop = asyncio.get_running_loop()
        told: asyncio.Queue[DenoisingProgress | None] = asyncio.Queue()

        def tell(stage: DenoisingProgress | None) -> None:
            loop.call_soon_threadsafe(told.put_nowait, stage)

        painting = asyncio.create_task(self.paint(verb, sounds, pixels, request, given, tell))
        painting.add_done_callback(lambda _: told.put_nowait(None))
        try:
            while (stage := await told.get()) is not None:
                preview = stage.preview and _small_png(stage.preview)
                yield {"step": stage.step, "steps": stage.steps, "preview": preview}
            files, model = await painting
            yield {"files": files, "model": model}
        finally:
            painting.cancel()

    def _paint(
        self,
        verb: Verb,
        sounds: dict[str, np.ndarray],
        pixels: list[np.ndarray | None],
        request: PaintRequest,
        stop: threading.Event,
        tell: Callable[[DenoisingProgress], None] | None,
    ) -> tuple[list[Image.Image], ServedModel]:
        serving = self._serving
        image, mask = (None if x is None else Image.fromarray(x) for x in pixels)
        pipe = serving.painter.pipe
        seen = None if tell is None else ProgressTracker(pipe, verb, request, mask is not None, tell)

        def work() -> list[Image.Image]:
            if verb == "generate":
                return view_of(serving.painter).generate(sounds, request)
            _ = serving.painter.concepts  # loaded once, and not for each view
            (audio,) = sounds.values()
            repaint = getattr(view_of(serving.painter), verb)
            return repaint(audio, image, request, mask)

        return self._on_device(work, stop, seen, request.reuse_steps > 1), serving.model

    def _on_device(self, work: Callable[[], T], stop: threading.Event, *args: Any) -> T:
        """Runs work of the device beside that of others; what becomes of it is seen by check_health."""
        thread = threading.get_ident()
        self._started_s[thread] = time.monotonic()
        try:
            with self._metrics.stage("paint"):
                return self._together.run(work, stop, *args)
        except torch.AcceleratorError as error:  # not OutOfMemoryError; such a process never paints again
            self._broken = str(error)
            raise
        finally:
            del self._started_s[thread]

    def _encoded(self, images: list[Image.Image], made: dict[str, Any]) -> list[bytes]:
        """PNG files, empty for what the safety checker stopped; picture i has the request's seed + i."""
        pipe, seed = self._serving.painter.pipe, made["seed"]
        with self._metrics.stage("encode"):
            return [
                b"" if blackened(pipe, image) else self._prover.encode(image, {**made, "seed": seed + i})
                for i, image in enumerate(images)
            ]

    def check_health(self) -> None:
        """Serve replaces the replica when this raises: after a CUDA error, or when a painting never ends."""
        if self._broken:
            raise RuntimeError(f"the device failed: {self._broken}")
        if time.monotonic() - min(self._started_s.values(), default=time.monotonic()) > self._config.stuck_s:
            raise RuntimeError(f"one request has been painting for more than {self._config.stuck_s:g} s")


def try_out(painter: Painter) -> None:
    """Paints a tone, so that the first request does not wait. Raises UserError where all pictures are of one colour."""
    tone = np.sin(np.arange(painter.sample_rate_hz) * 0.2).astype(np.float32) / 2
    for seed in range(3):  # a safety checker may black one out
        pixels = np.asarray(painter.generate(tone, PaintRequest(steps=2, seed=seed))[0])
        if pixels.min() < pixels.max():
            return
    raise UserError("bundle", "its first pictures", "are of one colour", "look at `aai generate` with this version")


def _small_png(image: Image.Image) -> bytes:
    """A preview: at most 256 pixels wide, packed in little time."""
    image.thumbnail((256, 256))
    packed = io.BytesIO()
    image.save(packed, "PNG", compress_level=1)
    return packed.getvalue()
