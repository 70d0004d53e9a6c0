"""What is told of every request: one line of JSON in the log, and figures for whoever counts."""

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("ray.serve")  # the only one that Serve writes for its replicas

WEBHOOK = "/v1/registry"
"""Where the registry says that an alias moved."""
KINDS = {"/healthz": "health", "/": "page", "/docs": "page", "/openapi.json": "page", WEBHOOK: "registry"} | {
    f"/v1/{verb}": verb for verb in ("generate", "edit", "stylize")
}
"""What is asked for, by path; "other" is the rest. Paths are never told: anybody may write anything into them."""
REQUEST_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
"""Of a client; for another the proxy has one made, so that what is logged is what comes back."""
TRACER = trace.get_tracer("aai")  # it makes nothing unless Serve was told to trace
CLIENT_LEFT = 499
"""nginx's status of a request whose client did not wait for the answer."""


@dataclass
class Visit:
    """One request, as far as it is known; never its payload, prompt or key."""

    verb: str
    request_id: str
    queue_depth: int
    """Requests that were painted or waited when it came."""
    status: int = 0
    bytes_in: int = 0
    told: dict[str, Any] = field(default_factory=dict)
    """What those who work on it note: key (its name), code, model, seed, steps, pictures."""
    stages_s: dict[str, float] = field(default_factory=dict)
    """Seconds by stage, in the order in which they ended."""
    begin_s: float = field(default_factory=time.monotonic)
    ended_s: float = field(default_factory=time.monotonic)

    @property
    def duration_s(self) -> float:
        """Since its first byte."""
        return time.monotonic() - self.begin_s

    @property
    def code(self) -> str:
        """The stable code of a refusal; ok where there was none."""
        return str(self.told.get("code", "ok" if 0 < self.status < 400 else "internal"))

    def line(self) -> str:
        """The line of the log."""
        shown = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": self.request_id,
            "verb": self.verb,
            "status": self.status,
            "bytes_in": self.bytes_in,
            "duration_s": round(self.duration_s, 4),
            "stages_s": {name: round(seconds, 4) for name, seconds in self.stages_s.items()},
            "queue_depth": self.queue_depth,
        }
        return json.dumps({**shown, **self.told, "code": self.code})

    def attributes(self) -> dict[str, Any]:
        """What its span tells."""
        told = {"request_id": self.request_id, "status": self.status, **self.told, "code": self.code}
        return {f"aai.{name}": value for name, value in told.items()}


_VISIT: ContextVar[Visit | None] = ContextVar("visit", default=None)


def route_of(scope: Scope) -> str:
    """The path within the application: Serve leaves an application's route_prefix, as ASGI's root_path, in the path."""
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


def note(**told: Any) -> None:
    """Adds to what is told of the request that is being answered here; nothing where there is none."""
    if visit := _VISIT.get():
        visit.told |= told


def stage_ends(name: str) -> None:
    """A stage of the request that is being answered here is over: it took the time since the last one's end."""
    if visit := _VISIT.get():
        now_s = time.monotonic()
        seconds, visit.ended_s = now_s - visit.ended_s, now_s
        visit.stages_s[name] = seconds
        TRACER.start_span(name, start_time=time.time_ns() - int(seconds * 1e9)).end()


class Access:
    """ASGI middleware around everything, refusals and clients that leave included.

    depth: requests that are painted or wait now. count: is handed each visit when it is over.
    """

    def __init__(self, app: ASGIApp, depth: Callable[[], int], count: Callable[[Visit], None]) -> None:
        self._app, self._depth, self._count = app, depth, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        visit = Visit(KINDS.get(route_of(scope), "other"), request_id, self._depth())
        complete, token = False, _VISIT.set(visit)

        def left() -> None:
            if not complete:
                visit.status, visit.told["code"] = CLIENT_LEFT, "client_left"

        async def received() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect":
                left()
                return message
            visit.bytes_in += len(message.get("body", b""))
            if not message.get("more_body", False) and "upload" not in visit.stages_s:
                stage_ends("upload")
            return message

        async def answer(message: Message) -> None:
            nonlocal complete
            if message["type"] == "http.response.start" and visit.status != CLIENT_LEFT:
                visit.status = message["status"]
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        name = f"aai {visit.verb}"
        with TRACER.start_as_current_span(  # the words of an exception may be a user's
            name, _parent(scope), record_exception=False, set_status_on_exception=False
        ) as span:
            try:
                await self._app(scope, received, answer)
            except asyncio.CancelledError:
                left()
                raise
            finally:
                _VISIT.reset(token)
                visit.status = visit.status or 500
                span.set_attributes(visit.attributes())
                if visit.status >= 500:
                    span.set_status(trace.StatusCode.ERROR)
                self._count(visit)
                if visit.verb != "health" or visit.status != 200:  # probes ask every few seconds
                    logger.info(visit.line())


def _parent(scope: Scope) -> Context | None:
    """The trace that a client begins (W3C traceparent), else None: the one that Serve has begun."""
    given = {name: value for name, value in Headers(scope=scope).items() if name in ("traceparent", "tracestate")}
    return TraceContextTextMapPropagator().extract(given) if "traceparent" in given else None
