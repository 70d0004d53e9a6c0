"""The gateway of the service: Ray Serve's deployment around the HTTP application, in front of the painters."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from aai.errors import UserError
from aai.sampling import calls_of
from pipelines.service.access import Access, note, stage_ends
from pipelines.service.answers import Answer, PaintProgress, ServedModel
from pipelines.service.guard import Limits, busy, queue_full
from pipelines.service.http import Health, PaintJob, build_http
from pipelines.service.keys import KEY_VARIABLE, Keys, api_key
from pipelines.service.noticeboard import Noticeboard, board_name
from pipelines.service.telemetry import GatewayMetrics
from pipelines.service.uploads import Decoders
from pipelines.service.webhook import webhook_secret

logger = logging.getLogger(__name__)
ASK_S = 2.0
"""How long health waits for those who are asked."""


class Gateway:
    """The HTTP side. It takes no model and no GPU, and keeps answering while painters are busy or away.

    capacity: requests that may be painted or wait, in all; Serve's own bound is checked only later, in the router.
    together: how many of them one painter paints at once at most. Of several gateways each is given its share of both.
    board: name of the actor that painters which follow the registry tell what they serve; empty = they do not.
    keys_file: see keys.read_keys; empty = the key in AAI_API_KEY alone. gateways: as many as this one there are.
    """

    def __init__(
        self,
        painters: DeploymentHandle,
        model: dict[str, Any],
        limits: dict[str, Any],
        capacity: int,
        together: int,
        need_key: bool,
        board: str = "",
        keys_file: str = "",
        gateways: int = 1,
    ) -> None:
        self._painters, self._capacity, self._together = painters, capacity, together
        self.model, self._limits = ServedModel.parse(model), Limits.parse(limits)
        self._in_flight: dict[object, PaintJob] = {}
        """What is painted or waits, in the order in which it came."""
        self._replicas, self._wanted, self._asked_s = 0, 0, -1.0
        self._asking: asyncio.Task[None] | None = None
        self._asker = ThreadPoolExecutor(1)  # its own: while the cluster's head is away, what it asks may hang
        self._metrics = GatewayMetrics(self._limits.request_timeout_s, capacity)
        self._told: list[dict[str, Any]] = []
        self._board_name = board_name(board) if board else ""
        self._board: Any = self._new_board() if board else None  # it lives as long as somebody holds it
        self._keys = Keys(keys_file, api_key(), gateways) if keys_file or api_key() else None
        if need_key and not self._keys:
            remedy = "set it in the environment of the cluster's processes, e.g. from a secret, or give keys_file"
            raise UserError(KEY_VARIABLE, "(missing)", "the service needs an API key", remedy)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The HTTP application, built where it runs."""
        decoders = Decoders(self._limits, self._capacity)
        decoders.warm()
        secret = webhook_secret() if self._board_name else None  # where nothing is followed nothing moves
        app = build_http(self, self._limits, self._keys, decoders, secret)
        return Access(app, lambda: len(self._in_flight), self._metrics.visit)

    async def paint(self, wanted: PaintJob) -> Answer:
        """See Backend. A client that leaves, or a deadline, takes the request out of the queue."""
        with self._admitted(wanted):
            response = self._painters.paint.remote(wanted)
            try:
                files, model = await response
            except asyncio.CancelledError:
                response.cancel()
                raise
            return Answer(files, self._painted_by(model))

    async def paint_live(self, wanted: PaintJob) -> AsyncGenerator[PaintProgress | Answer, None]:
        """See Backend."""
        with self._admitted(wanted):
            yield PaintProgress(step=0)
            response = self._painters.options(stream=True).paint_live.remote(wanted)
            try:
                async for event in response:
                    if "files" not in event:
                        yield PaintProgress(**event)
                        continue
                    yield Answer(event["files"], self._painted_by(event["model"]))
            finally:
                response.cancel()

    def _painted_by(self, told: dict[str, Any]) -> ServedModel:
        """The model of an answer; one on trial is not what the service serves."""
        model = ServedModel.parse(told)
        if model.alias == self.model.alias:
            self.model = model
        stage_ends("painters")
        note(model=model.label())
        return model

    @contextmanager
    def _admitted(self, wanted: PaintJob) -> Iterator[None]:
        """Counts a request while it waits and is painted; what becomes of painters is said in the API's words."""
        stage_ends("decode")
        note(seed=wanted.request.seed, steps=wanted.request.steps, pictures=wanted.request.num_images)
        retry_s, ticket = self._limits.retry_after_s, object()
        steps = self._steps() + _steps_of(wanted)
        if self.full() or (self._in_flight and steps > self._limits.max_queued_steps):
            raise queue_full(retry_s)
        self._in_flight[ticket] = wanted
        self._measure()
        try:
            yield
        except BackPressureError as error:
            raise queue_full(retry_s) from error
        except (DeploymentUnavailableError, RayActorError) as error:
            logger.warning("painter lost: %s", error)
            raise busy(503, "no_painter", "the painter went away; try again", retry_s) from error
        except UserError as error:
            raise getattr(error, "cause", error) from None  # Ray wraps what another process raised
        finally:
            del self._in_flight[ticket]
            self._measure()

    def _measure(self) -> None:
        painting = self._painting()
        self._metrics.queue(len(self._in_flight) - painting, painting, self._steps())

    def _steps(self) -> int:
        return sum(map(_steps_of, self._in_flight.values()))

    def _painting(self) -> int:
        """Of the requests that are here, how many have their places with a painter."""
        places = self._replicas * self._together
        for count, job in enumerate(self._in_flight.values()):
            places -= min(job.request.num_images, self._together)
            if places < 0:
                return count
        return len(self._in_flight)

    async def check_health(self) -> None:
        """Called by Serve every few seconds: the figures of the painters are told then. The gateway itself is well."""
        await self.health()

    def _new_board(self) -> Any:
        options = {"name": self._board_name, "num_cpus": 0, "get_if_exists": True}
        return ray.remote(Noticeboard).options(**options).remote()

    async def _ask(self) -> None:
        """Figures of the painters, as the controller and they themselves tell them; else the last ones stay."""
        loop = asyncio.get_running_loop()
        try:
            self._replicas, self._wanted = await loop.run_in_executor(self._asker, _painters)
            self._told = await self._rows() if self._board_name else []
        except Exception as error:
            logger.warning("gateway: nobody tells how many painters there are (%s)", error or type(error).__name__)
        self._asked_s = time.monotonic()

    async def _rows(self) -> list[dict[str, Any]]:
        """What painters told; the board is made anew where it is gone, with another gateway or a node."""
        try:
            return list(await asyncio.wait_for(self._board.read.remote(), ASK_S))
        except (RayError, TimeoutError, ValueError) as error:  # health is told all the same
            logger.warning("gateway: nobody tells what painters serve (%s)", error or type(error).__name__)
            self._board = await asyncio.get_running_loop().run_in_executor(self._asker, self._new_board)
            return []

    async def moved(self) -> None:
        """See Backend. Painters look at a board that is made anew by themselves; MLflow comes again, too."""
        try:
            await asyncio.wait_for(self._board.move.remote(), ASK_S)
        except (RayError, TimeoutError, ValueError) as error:
            logger.warning("gateway: painters cannot be told to look (%s)", error or type(error).__name__)
            raise busy(503, "no_board", "painters cannot be told to look", self._limits.retry_after_s) from error

    def full(self) -> bool:
        """See Backend."""
        return len(self._in_flight) >= self._capacity

    async def health(self) -> Health:
        """See Backend. The controller is asked at most once a second, once for all who wait."""
        if self._keys:
            self._keys.look()
        if (self._asking is None or self._asking.done()) and time.monotonic() - self._asked_s > 1:
            self._asking = asyncio.create_task(self._ask())
        if self._asking:
            await asyncio.wait({self._asking}, timeout=ASK_S)
        painting = self._painting()
        refused: dict[str, str] = {}
        for row in self._told:
            refused |= row["refused"]
        models = [ServedModel.parse(row["model"]) for row in self._told]
        tried = [ServedModel.parse(row["canary"]) for row in self._told if row["canary"]]
        if len({model.sha for model in models}) == 1:  # while some change over, the last picture's
            self.model = models[0]
        health = Health(
            replicas=self._replicas,
            queue_depth=len(self._in_flight) - painting,
            painting=painting,
            queued_steps=self._steps(),
            serving=dict(Counter(model.label() for model in models)),
            canary=dict(Counter(model.label() for model in tried)),
            refused=refused,
            registry=next((row["trouble"] for row in self._told if row["trouble"]), ""),
            keys=self._keys.trouble if self._keys else "",
        )
        versions = dict(Counter(model.version for model in models)) or {self.model.version: self._replicas}
        canary = dict(Counter(model.version for model in tried))
        self._metrics.health(health, self._wanted, versions, canary)
        self._measure()
        return health


def _steps_of(job: PaintJob) -> int:
    """How often the UNet is asked for a request's pictures: an inversion takes two calls for a step, and its mask."""
    return job.request.num_images * calls_of(job.verb, job.request, job.mask is not None)[0]


def _painters() -> tuple[int, int]:
    """How many run, and how many there should be."""
    application = serve.status().applications.get(serve.get_replica_context().app_name)
    painters = application.deployments.get("Painter") if application else None
    states = painters.replica_states if painters else {}
    wanted = sum(count for state, count in states.items() if state not in ("STOPPING", "STOPPED"))
    return states.get("RUNNING", 0), wanted
