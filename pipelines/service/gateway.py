"""The gateway of the service: Ray Serve's deployment around the HTTP application, in front of the painters."""

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import ray
from PIL import Image
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from aai.errors import UserError
from aai.sampling import PaintRequest
from pipelines.service.guard import Limits, busy, queue_full
from pipelines.service.http import Answer, Health, ServedModel, Verb, build_http
from pipelines.service.noticeboard import Noticeboard, board_name
from pipelines.service.uploads import Decoders

logger = logging.getLogger(__name__)

KEY_VARIABLE = "AAI_API_KEY"


def api_key() -> str | None:
    """The service's key from the environment; never a setting, so that no config or log can hold it."""
    return os.environ.get(KEY_VARIABLE) or None


class Gateway:
    """The HTTP side. It takes no model and no GPU, and keeps answering while painters are busy or away.

    capacity: requests that may be painted or wait, together. Serve's own bound is checked only later, in the router.
    board: name of the actor that painters which follow the registry tell what they serve; empty = they do not.
    """

    def __init__(
        self,
        painters: DeploymentHandle,
        model: dict[str, Any],
        limits: dict[str, Any],
        capacity: int,
        need_key: bool,
        board: str = "",
    ) -> None:
        self._painters, self._capacity = painters, capacity
        self.model, self._limits = ServedModel.parse(model), Limits.parse(limits)
        self._in_flight, self._replicas, self._asked_s = 0, 0, -1.0
        self._told: list[dict[str, Any]] = []
        self._board_name = board_name(board) if board else ""
        self._board: Any = self._new_board() if board else None  # it lives as long as somebody holds it
        if need_key and not api_key():
            remedy = "set it in the environment of the cluster's processes, e.g. from a secret"
            raise UserError(KEY_VARIABLE, "(missing)", "the service needs an API key", remedy)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The HTTP application, built where it runs."""
        decoders = Decoders(self._limits)
        decoders.warm()
        return build_http(self, self._limits, api_key(), decoders)

    async def paint(
        self,
        verb: Verb,
        sounds: dict[str, np.ndarray],
        image: Image.Image | None,
        request: PaintRequest,
        mask: Image.Image | None = None,
        given: Mapping[str, Any] | None = None,
    ) -> Answer:
        """See Backend. A client that leaves, or a deadline, takes the request out of the queue."""
        retry_s = self._limits.retry_after_s
        if self.full():
            raise queue_full(retry_s)
        pixels = [None if picture is None else np.asarray(picture) for picture in (image, mask)]
        response = self._painters.paint.remote(verb, sounds, pixels, request, dict(given or {}))
        self._in_flight += 1
        try:
            files, model = await response
            self.model = ServedModel.parse(model)
            return Answer(files, self.model)
        except asyncio.CancelledError:
            response.cancel()
            raise
        except BackPressureError as error:
            raise queue_full(retry_s) from error
        except (DeploymentUnavailableError, RayActorError) as error:
            logger.warning("painter lost: %s", error)
            raise busy(503, "no_painter", "the painter went away; try again", retry_s) from error
        except UserError as error:
            raise getattr(error, "cause", error) from None  # Ray wraps what another process raised
        finally:
            self._in_flight -= 1

    def _new_board(self) -> Any:
        options = {"name": self._board_name, "num_cpus": 0, "get_if_exists": True}
        return ray.remote(Noticeboard).options(**options).remote()

    async def _rows(self) -> list[dict[str, Any]]:
        """What painters told; the board is made anew where it is gone, with another gateway or a node."""
        try:
            return list(await asyncio.wait_for(self._board.read.remote(), 2))
        except (RayError, TimeoutError, ValueError) as error:  # health is told all the same
            logger.warning("gateway: nobody tells what painters serve (%s)", error or type(error).__name__)
            self._board = self._new_board()
            return []

    def full(self) -> bool:
        """See Backend."""
        return self._in_flight >= self._capacity

    async def health(self) -> Health:
        """See Backend. The controller is asked at most once a second."""
        if time.monotonic() - self._asked_s > 1:
            self._replicas = await asyncio.to_thread(_running_painters)
            self._told = await self._rows() if self._board_name else []
            self._asked_s = time.monotonic()
        painting = min(self._in_flight, self._replicas)
        refused: dict[str, str] = {}
        for row in self._told:
            refused |= row["refused"]
        models = [ServedModel.parse(row["model"]) for row in self._told]
        if len({model.sha for model in models}) == 1:  # while some change over, the last picture's
            self.model = models[0]
        return Health(
            replicas=self._replicas,
            queue_depth=self._in_flight - painting,
            painting=painting,
            serving=dict(Counter(model.label() for model in models)),
            refused=refused,
            registry=next((row["trouble"] for row in self._told if row["trouble"]), ""),
        )


def _running_painters() -> int:
    application = serve.status().applications.get(serve.get_replica_context().app_name)
    painters = application.deployments.get("Painter") if application else None
    return painters.replica_states.get("RUNNING", 0) if painters else 0
