"""What Serve's own HTTP proxy says, in our form, and what it would stumble over, refused.

Serve loads this in its proxies where VARIABLE stands in their environment as PLACE; `aai serve` sets it.
"""

import asyncio
import logging
import random
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.service.access import REQUEST_ID
from pipelines.service.guard import YOUNG_S, ApiError, Limits, busy

logger = logging.getLogger("ray.serve")  # the only one that Serve writes

VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
PLACE = "pipelines.service.proxy:middlewares"
RETRY_AFTER_S: int = Limits.model_fields["retry_after_s"].default
SLOW_BYTES_PER_S: int = Limits.model_fields["min_upload_bytes_per_s"].default
PAUSE_S = 0.004
"""Between pieces; the first is over before the gateway asks for them."""
LARGE_BYTES = 16_384
"""A piece after which there is no pause: the client sends faster than pieces are passed on."""
GRACE_S: float = Limits.model_fields["upload_grace_s"].default
LONGEST_PAUSE_S = 2.0
TELL_S = 10.0
FIRST_BYTES = 64
"""Of a body, that must come within the grace before the gateway hears of it."""


def middlewares() -> list[Middleware]:
    """What Serve's proxy puts around its application."""
    return [Middleware(ProxyErrors), Middleware(FewPieces)]


class FewPieces:
    """ASGI middleware: a body goes to the gateway in few pieces, and not before some of it has come.

    Each piece is a call between two processes, which takes longer than those between the pieces of a form; what comes
    within a few milliseconds is one. A body of which next to nothing comes within the grace is refused here with 408,
    and costs the gateway nothing. One that drips later is looked at again after as long as it has been slow.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._refused, self._told_s = 0, -TELL_S

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one ASGI connection."""
        headers = Headers(scope=scope) if scope["type"] == "http" else {}
        if headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers:
            await self._app(scope, receive, send)
            return
        body = Body(receive)
        try:
            async with asyncio.timeout(random.uniform(1, 2) * GRACE_S):  # who came together is not sent away together
                await body.begin()
        except TimeoutError:
            self._tell()
            rule = f"the body did not begin within {GRACE_S:g} s"
            await ApiError(408, "slow_upload", rule, {"Connection": "close"}).response()(scope, receive, send)
            return
        await self._app(scope, body.receive, send)

    def _tell(self) -> None:
        """Counts a refusal; the log hears of them together, since an attack is hundreds."""
        self._refused += 1
        if time.monotonic() - self._told_s > TELL_S:
            logger.warning("proxy: %d requests refused whose bodies did not begin", self._refused)
            self._refused, self._told_s = 0, time.monotonic()


class Body:
    """A request's body, as it comes from the client."""

    def __init__(self, receive: Receive) -> None:
        self._receive, self._begin_s = receive, time.monotonic()
        self._first: Message | None = None
        """What has come before anybody asked for it."""
        self._total, self._more, self._large = 0, True, False

    async def begin(self) -> None:
        """Returns when the body's begin is here, or the client has left."""
        content = b""
        while self._more and len(content) < FIRST_BYTES:
            message = await self._receive()
            if message["type"] != "http.request":
                self._first, self._more = message, False
                return
            content += message.get("body", b"")
            self._more = message.get("more_body", False)
        self._total = len(content)
        self._first = {"type": "http.request", "body": content, "more_body": self._more}

    async def receive(self) -> Message:
        """The next piece (ASGI)."""
        if self._first is not None:
            message, self._first = self._first, None
            return message
        if self._more:
            await asyncio.sleep(self._pause_s(time.monotonic() - self._begin_s))
        message = await self._receive()
        size = len(message.get("body", b""))
        self._total, self._more, self._large = self._total + size, message.get("more_body", False), size >= LARGE_BYTES
        return message

    def _pause_s(self, age_s: float) -> float:
        """Until the next look; what has come is passed on before the gateway would refuse the body as too slow."""
        if age_s < YOUNG_S or self._total >= SLOW_BYTES_PER_S * age_s:
            return 0 if self._large else PAUSE_S
        left_s = GRACE_S + self._total / SLOW_BYTES_PER_S - age_s
        pause_s = min(age_s, LONGEST_PAUSE_S)
        return pause_s if left_s < 0 else min(pause_s, max(PAUSE_S, left_s - YOUNG_S))


class ProxyErrors:
    """ASGI middleware: errors in plain text, which are never the application's, get the JSON body of all others."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, refused = False, 0
        text = b""

        async def answer(message: Message) -> None:
            nonlocal started, refused, text
            if message["type"] == "http.response.start":
                started = True
                kind = Headers(raw=message.get("headers", [])).get("content-type", "")
                refused = message["status"] if message["status"] >= 400 and kind.startswith("text/plain") else 0
            if not refused:
                await send(message)
            elif message["type"] == "http.response.body":
                text += message.get("body", b"")[:1000]
                if not message.get("more_body"):
                    await _told(refused, text).response()(scope, receive, send)

        wrong = next((name for name, value in scope["headers"] if not _is_utf8(value)), None)
        if wrong is not None:  # Serve decodes some of them without asking
            error = ApiError(400, "http_400", f"the header {wrong.decode('latin-1')} is not UTF-8")
            await error.response()(scope, receive, send)
            return
        headers = MutableHeaders(scope=scope)
        if not REQUEST_ID.fullmatch(headers.get("x-request-id", "")):
            del headers["x-request-id"]  # Serve makes one; else it would say another than the log
        try:
            await self._app(scope, receive, answer)
            if not started:  # Serve's proxy says nothing when the gateway's process ends
                await _lost("went away").response()(scope, receive, send)
        except Exception as error:
            if started and not refused:
                raise
            logger.error("proxy: a request failed", exc_info=error)
            await _told(500, b"").response()(scope, receive, send)


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _lost(how: str) -> ApiError:
    return busy(503, "no_gateway", f"the gateway {how}; try again", RETRY_AFTER_S)


def _told(status: int, text: bytes) -> ApiError:
    if status == 500:  # whatever it says is of the inside
        return ApiError(500, "internal", "the service failed; the reason is in its log")
    if status == 408:  # of Serve's own deadline, which is later than the gateway's: its node may be cut off
        return _lost("does not answer")
    retry = {"Retry-After": str(RETRY_AFTER_S)} if status == 503 else None
    return ApiError(status, f"http_{status}", text.decode(errors="replace"), retry)
