"""What the service answers: pictures as files or JSON, and live events while they are painted."""

import asyncio
import base64
import json
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple

from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from aai.config import Config
from aai.errors import UserError
from pipelines.service.access import note
from pipelines.service.guard import ApiError, Limits, too_late

logger = logging.getLogger(__name__)

EVENTS = "text/event-stream"
INTERNAL = ApiError(500, "internal", "the painter failed; the reason is in the service's log")


class ServedModel(Config):
    """What the service paints with: shown by /healthz and in the headers of every picture."""

    name: str
    version: str
    alias: str = ""
    sha: str
    """Content identity of the bundle."""
    sample_rate_hz: int
    """Rate at which uploads are decoded."""

    def label(self) -> str:
        """`NAME/VERSION@ALIAS` for the X-AAI-Model header."""
        return f"{self.name}/{self.version}" + (f"@{self.alias}" if self.alias else "")


class Answer(NamedTuple):
    """PNG files (empty for those that the safety checker stopped), and the model that painted them: after a promotion
    another one than a moment before."""

    files: list[bytes]
    model: ServedModel


class PaintProgress(NamedTuple):
    """How far a request is: calls of the UNet made and to make (0: not begun), maybe with a preview."""

    step: int
    steps: int = 0
    preview: bytes | None = None


def unusable(error: UserError) -> ApiError:
    """What the painter found wrong with a request."""
    return ApiError(422, "invalid_request", f"{error.setting}: {error.rule}; {error.remedy}")


def _told(files: Sequence[bytes], seed: int, model: ServedModel) -> dict[str, Any]:
    """Pictures as base64 PNGs, null for what the safety checker stopped. Raises ApiError 422 where none is left."""
    blocked = [i for i, file in enumerate(files) if not file]
    if blocked:
        note(blocked=len(blocked))
    if len(blocked) == len(files):
        rule = "the safety checker stopped what was painted; try another seed, prompt or sound"
        raise ApiError(422, "unsafe_picture", rule)
    images = [base64.b64encode(file).decode() if file else None for file in files]
    return {"seed": seed, "model": model.label(), "bundle": model.sha, "images": images, "blocked": blocked}


def pictures(files: Sequence[bytes], seed: int, model: ServedModel) -> Response:
    """One picture as image/png, several as JSON. Raises ApiError 422 where none is left to show."""
    told = _told(files, seed, model)
    headers = {"X-AAI-Model": model.label(), "X-AAI-Bundle": model.sha, "X-AAI-Seed": str(seed)}
    headers["Cache-Control"] = "no-store"
    if len(files) == 1:
        return Response(files[0], media_type="image/png", headers=headers)
    return JSONResponse(told, headers=headers)


class _Live(StreamingResponse):
    """A stream whose events are closed with the answer, also where nobody reads it."""

    def __init__(self, body: AsyncGenerator[str, None], events: AsyncGenerator[Any, None]) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # proxies shall not collect it
        super().__init__(body, media_type=EVENTS, headers=headers)
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            await super().__call__(scope, receive, send)


async def live(
    events: AsyncGenerator[PaintProgress | Answer, None], seed: int, limits: Limits, deadline_s: float
) -> StreamingResponse:
    """Server-sent events: `progress` with step, steps and maybe a preview; then `done`, or `error` with its status.

    A request that is not admitted is refused before the stream begins. deadline_s: of the event loop's clock.
    """
    first = await anext(events)

    async def body() -> AsyncGenerator[str, None]:
        event: PaintProgress | Answer | None = first
        try:
            while event is not None:
                yield _event(event, seed)
                async with asyncio.timeout_at(deadline_s):
                    event = await anext(events, None)
        except TimeoutError:
            yield _failed(too_late(limits))
        except ApiError as error:
            yield _failed(error)
        except UserError as error:
            yield _failed(unusable(error))
        except Exception:
            logger.exception("the painter failed")
            yield _failed(INTERNAL)

    return _Live(body(), events)


def _event(event: PaintProgress | Answer, seed: int) -> str:
    if isinstance(event, Answer):
        return _sent("done", _told(event.files, seed, event.model))
    preview = event.preview and base64.b64encode(event.preview).decode()
    return _sent("progress", {"step": event.step, "steps": event.steps, "preview": preview})


def _failed(error: ApiError) -> str:
    return _sent("error", {"status": error.status_code, **error.body()})


def _sent(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"
