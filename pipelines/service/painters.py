"""The painters of the service: each holds the model and paints several requests together."""

import asyncio
import io
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from PIL import Image

from aai.addons import blackened
from aai.batching import StoppedError, Together, view_of
from aai.errors import UserError
from aai.progress import DenoisingProgress, ProgressTracker
from aai.proof import Prover
from pipelines.service.answers import ServedModel
from pipelines.service.canary import Trial, distance
from pipelines.service.http import PaintJob
from pipelines.service.loading import PainterConfig, Serving, first, loaded, try_out
from pipelines.service.noticeboard import BoardClient, board_name
from pipelines.service.telemetry import PainterMetrics, Role
from pipelines.service.watching import Watcher

logger = logging.getLogger("ray.serve")  # the only one that Serve writes for its replicas
T = TypeVar("T")
Tell = Callable[[DenoisingProgress], None]


class PainterReplica:
    """One model on one device. Paints in threads, for each request one: health checks are answered meanwhile."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = c = PainterConfig.parse(config)
        versions = 1 + c.canary.is_on  # whose first pictures may be painted beside what is asked
        self._threads = ThreadPoolExecutor(max_workers=c.batch_pictures + versions)
        self._places, self._door = asyncio.Semaphore(c.batch_pictures), asyncio.Lock()
        self._started_s: dict[int, float] = {}
        """When each request that is painted began, by its thread."""
        self._broken = ""
        self._metrics = PainterMetrics()
        self._prover = Prover(c.proof)
        self._serving = first(c)
        self._canary: Serving | None = None
        self._unseen: dict[asyncio.Task[None], threading.Event] = {}
        """What the version on trial paints besides, and how it is ended."""
        self._together = Together(self._serving.painter.pipe.unet, self._metrics.batch)  # of all versions
        logger.info("painter: %s in %s on %s", self._serving.model.label(), self._serving.painter.dtype, c.device)
        self.watcher = Watcher(c.follow, c.registry, self._serving.model, self.take)
        self.trial = Trial(c.canary, c.registry, self._serving.model, self.take_canary, self.end_canary)
        if c.board:
            # Each asks the board in a thread of its own.
            self._board, tried = (BoardClient(board_name(c.board)) for _ in range(2))
            self._tell()
        if c.follow:
            self.watcher.start(c.follow_s, self._tell, self._board.moved)
        if c.canary.is_on:
            self.trial.start(c.follow_s, self._tell, tried.moved)

    def _fresh(self, pinned: str, model: ServedModel) -> Serving:
        """A version loaded beside the one that is served; it has painted. Raises UserError, or what it failed with."""
        found = loaded(self._config, pinned, model, self._serving)
        self._threads.submit(self._on_device, lambda: try_out(view_of(found.painter)), threading.Event()).result()
        return found

    def take(self, pinned: str, model: ServedModel) -> None:
        """Serves a version from the next request on. Raises as `_fresh`, and the old one stays."""
        found = self._fresh(pinned, model)
        self._serving, self.watcher.served = found, found.model

    def take_canary(self, pinned: str, model: ServedModel) -> None:
        """Tries a version with the requests that the canary's settings give it. Raises as `_fresh`."""
        found = self._fresh(pinned, model)
        self._canary, self.trial.served = found, found.model

    def end_canary(self) -> None:
        """No version is on trial any more."""
        self._canary = None

    def _tell(self) -> None:
        """Tells the board what is served."""
        watchers, canary = (self.watcher, self.trial), self._canary
        row = {
            "model": self._serving.model.model_dump(),
            "canary": canary and canary.model.model_dump(),
            "refused": self.watcher.refused | self.trial.refused,
            "trouble": next((watcher.trouble for watcher in watchers if watcher.trouble), ""),
        }
        self._board.tell(row)

    async def paint(self, job: PaintJob, tell: Tell | None = None) -> tuple[list[bytes], dict[str, Any]]:
        """PNG files, and the model. tell: hears how far it is, from another thread."""
        loop, stop = asyncio.get_running_loop(), threading.Event()
        taken = await self._taken(self._places_of(job))
        work = self._threads.submit(self._paint, job, stop, tell)
        # The places are free when the thread has ended, also that of a request for which nobody waits.
        work.add_done_callback(lambda _: loop.call_soon_threadsafe(self._free, taken))
        try:
            images, serving = await asyncio.wrap_future(work)
        except asyncio.CancelledError:  # the client left, or its time is over
            stop.set()
            raise
        self._begin_unseen(job, images, serving)
        model = serving.model
        made = {
            "verb": job.verb,
            "model": f"{model.name}/{model.version}",
            "bundle": model.sha,
            **job.given,
            **job.request.model_dump(),
        }
        return await asyncio.to_thread(self._encoded, serving, images, made), model.model_dump()

    def _places_of(self, job: PaintJob) -> int:
        """What keeps deep layers between steps cannot share them: it has all places."""
        most = self._config.batch_pictures
        return most if job.request.reuse_steps > 1 else min(job.request.num_images, most)

    async def _taken(self, places: int) -> int:
        """Takes places, in the order of asking: who needs many is not overtaken for ever."""
        async with self._door:
            taken = 0
            try:
                while taken < places:
                    for stop in self._unseen.values() if self._places.locked() else ():
                        stop.set()  # who waits for an answer goes first
                    await self._places.acquire()
                    taken += 1
            except asyncio.CancelledError:
                self._free(taken)
                raise
        return taken

    def _free(self, places: int) -> None:
        for _ in range(places):
            self._places.release()

    async def paint_live(self, job: PaintJob) -> AsyncIterator[dict[str, Any]]:
        """As `paint`, and meanwhile how far it is: {step, steps, preview}, with `preview` as PNG or None.

        The last one is {files, model}.
        """
        loop = asyncio.get_running_loop()
        told: asyncio.Queue[DenoisingProgress | None] = asyncio.Queue()

        def tell(stage: DenoisingProgress | None) -> None:
            loop.call_soon_threadsafe(told.put_nowait, stage)

        painting = asyncio.create_task(self.paint(job, tell))
        painting.add_done_callback(lambda _: told.put_nowait(None))
        try:
            while (stage := await told.get()) is not None:
                preview = stage.preview and _small_png(stage.preview)
                yield {"step": stage.step, "steps": stage.steps, "preview": preview}
            files, model = await painting
            yield {"files": files, "model": model}
        finally:
            painting.cancel()

    def _paint(self, job: PaintJob, stop: threading.Event, tell: Tell | None) -> tuple[list[Image.Image], Serving]:
        """By the version on trial when the request falls to it; where that fails, by the one that is served."""
        serving, canary = self._serving, self._canary
        mine = self.trial.may_answer and self._config.canary.answers(job)
        if canary and mine and canary.model.sha != serving.model.sha:
            try:
                return self._painted(canary, "canary", job, stop, tell), canary
            except (StoppedError, UserError):
                raise
            except Exception:
                if self._broken:
                    raise
                logger.exception("painter: %s failed, %s paints", canary.model.label(), serving.model.label())
        return self._painted(serving, "served", job, stop, tell), serving

    def _painted(
        self, serving: Serving, role: Role, job: PaintJob, stop: threading.Event, tell: Tell | None = None
    ) -> list[Image.Image]:
        request, pipe = job.request, serving.painter.pipe
        seen = None if tell is None else ProgressTracker(pipe, job.verb, request, job.mask is not None, tell)

        def work() -> list[Image.Image]:
            if job.verb == "generate":
                return view_of(serving.painter).generate(job.sounds, request)
            _ = serving.painter.concepts  # loaded once, and not for each view
            (audio,) = job.sounds.values()
            repaint = getattr(view_of(serving.painter), job.verb)
            return repaint(audio, job.image, request, job.mask)

        begin_s, outcome = time.monotonic(), "failed"
        try:
            images = self._on_device(work, stop, seen, request.reuse_steps > 1)
            outcome = "ok"
            return images
        except (StoppedError, UserError) as error:
            outcome = "stopped" if isinstance(error, StoppedError) else "refused"
            raise
        finally:
            told = role, serving.model.version, outcome, request.num_images
            self._metrics.version(*told, time.monotonic() - begin_s)

    def _begin_unseen(self, job: PaintJob, images: list[Image.Image], answered: Serving) -> None:
        """Has a request painted by the version on trial, too, when it is one of those, and not by it already."""
        canary = self._canary
        if canary and canary.model.sha != answered.model.sha and self._config.canary.shadows(job):
            stop = threading.Event()
            task = asyncio.create_task(self._paint_unseen(canary, job, images, stop))
            self._unseen[task] = stop
            task.add_done_callback(self._unseen.pop)

    async def _paint_unseen(
        self, canary: Serving, job: PaintJob, images: list[Image.Image], stop: threading.Event
    ) -> None:
        """Paints with places that nobody wants, and compares; ends at the next step when somebody does."""
        wanted, taken, version = self._places_of(job), 0, canary.model.version
        while taken < wanted and not self._places.locked():
            await self._places.acquire()  # one is free: this does not wait
            taken += 1
        try:
            if taken < wanted or job.request.reuse_steps > 1:  # which nobody could end at a step
                self._metrics.version("shadow", version, "skipped", job.request.num_images)
                return
            work = self._threads.submit(self._painted, canary, "shadow", job, stop)
            theirs = await asyncio.wrap_future(work)
            pipe, pairs = canary.painter.pipe, zip(images, theirs, strict=True)
            seen = [pair for pair in pairs if not any(blackened(pipe, picture) for picture in pair)]
            if seen:
                self._metrics.apart(version, distance(seen))
        except StoppedError:
            pass
        except Exception:
            logger.exception("painter: %s failed in the shadow", canary.model.label())
        finally:
            self._free(taken)

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

    def _encoded(self, serving: Serving, images: list[Image.Image], made: dict[str, Any]) -> list[bytes]:
        """PNG files, empty for what the safety checker stopped; picture i has the request's seed + i."""
        pipe, seed = serving.painter.pipe, made["seed"]
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


def _small_png(image: Image.Image) -> bytes:
    """A preview: at most 256 pixels wide, packed in little time."""
    image.thumbnail((256, 256))
    packed = io.BytesIO()
    image.save(packed, "PNG", compress_level=1)
    return packed.getvalue()
