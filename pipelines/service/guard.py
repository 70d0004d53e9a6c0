"""What stands in front of the HTTP application: key, host, sizes, rates and time of every request."""

import asyncio
import logging
import math
import random
import time
from collections.abc import Callable
from typing import Any

import pydantic
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.service.access import WEBHOOK, note, route_of
from pipelines.service.keys import ApiKey, Keys
from pipelines.settings import InputLimits

logger = logging.getLogger("ray.serve")  # the only one that Serve writes for its replicas
LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")
DEADLINE = "aai.deadline_s"
"""Of a request's scope: when its time is over."""
YOUNG_S = 0.5
"""An upload of this age may still be slow without making room for others."""
MAX_HELD_BACK = 512
"""Clients that were sent away and do not know it yet: half of what a gateway answers at once."""
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
    "object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Limits(InputLimits):
    """What one request may cost."""

    request_timeout_s: float = pydantic.Field(120, gt=0)
    """Longest time from the first byte to the answer: upload, queue and painting together."""
    max_uploads: int = pydantic.Field(64, ge=1)
    """Request bodies that are received at once. For one more the slowest makes room, if it is too slow; else the new
    one is refused with 429, and none of it is read."""
    upload_grace_s: float = pydantic.Field(5, gt=0)
    """How long a body may be slower than min_upload_bytes_per_s; then it is refused with 408."""
    min_upload_bytes_per_s: int = pydantic.Field(16_384, ge=1)
    """Slowest upload, on the average."""
    max_queued_steps: int = pydantic.Field(8000, ge=1)
    """Denoising steps of all pictures that are painted or wait, together; a request that would add more than that to
    others is refused with 429. Eight pictures of 100 steps are 800; inverted first, twice as many and 6 for a mask."""
    decode_timeout_s: float = pydantic.Field(10, gt=0)
    """Longest time for the decoding of one uploaded file; its process is ended then."""
    decode_memory_mb: int = pydantic.Field(2048, ge=1024)
    """Address space of a process that decodes uploads; there are two."""
    retry_after_s: int = pydantic.Field(2, ge=1)
    """What the Retry-After header of a 429 or 503 answer says."""


class ApiError(HTTPException):
    """An answer that is not a picture: status, stable code, and a sentence that says what to do."""

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(status, message, headers)
        self.code = code

    def response(self) -> JSONResponse:
        """Its body as JSON, with its headers."""
        return JSONResponse(self.body(), self.status_code, dict(self.headers or {}))

    def body(self) -> dict[str, Any]:
        """{"error": {"code", "message"}}."""
        note(code=self.code)
        return {"error": {"code": self.code, "message": self.detail}}


def busy(status: int, code: str, message: str, retry_after_s: int) -> ApiError:
    """An error that a later try may not meet."""
    return ApiError(status, code, message, {"Retry-After": str(retry_after_s)})


def queue_full(retry_after_s: int) -> ApiError:
    """The refusal of a request that no painter has room for."""
    return busy(429, "queue_full", "all painters are busy and the queue is full", retry_after_s)


def too_late(limits: Limits) -> ApiError:
    """The answer to a request whose time is over."""
    rule = f"no picture within {limits.request_timeout_s:g} s; try again"
    return busy(503, "timeout", rule, limits.retry_after_s)


def deadline_of(scope: Scope) -> float:
    """When the time of a request is over, by the event loop's clock, less what it takes to say so."""
    return float(scope[DEADLINE]) - 0.5


class Guard:
    """ASGI middleware around everything: key, Host, Origin, body size and rate, deadline, security headers.

    full: whether no more requests are taken now; then the body is not even read. keys: one of which `X-API-Key` or
    `Authorization: Bearer` must hold for /v1; None leaves /v1 open, but then only to requests that name this machine as
    loopback, so that no web page can reach it by DNS rebinding, and to /v1 only to those that no other page sends.
    The registry's webhook is let through to where its signature is looked at.
    """

    def __init__(
        self, app: ASGIApp, limits: Limits, keys: Keys | None, full: Callable[[], bool] = lambda: False
    ) -> None:
        self._app, self._limits, self._keys, self._full = app, limits, keys, full
        self._held_back = 0
        self._uploads: list[Upload] = []
        """Those whose bodies are being received."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers[name] = value
            await send(message)

        deadline = asyncio.timeout(self._limits.request_timeout_s)
        upload = Upload(self._limits, time.monotonic())
        try:
            self._admit(scope, upload)
            async with deadline:
                scope[DEADLINE] = deadline.when()
                await self._app(scope, self._counted(upload, receive), answer)
        except Exception as error:
            if status:
                raise
            refusal = self._refusal(error, deadline.expired())
            await refusal.response()(scope, receive, answer)
        finally:
            self._ended(upload)
            if self._keys and upload.key:
                self._keys.give_back(upload.key, uncounted=status == 429)

    def _refusal(self, error: Exception, late: bool) -> ApiError:
        """What is told of an error that nobody has answered yet."""
        if isinstance(error, ApiError):
            return error
        if late and isinstance(error, TimeoutError):
            return too_late(self._limits)
        logger.error("gateway: a request failed", exc_info=error)
        return ApiError(500, "internal", "the service failed; the reason is in its log")

    def _ended(self, upload: "Upload") -> None:
        if upload in self._uploads:
            self._uploads.remove(upload)

    def _admit(self, scope: Scope, upload: "Upload") -> None:
        headers = Headers(scope=scope)
        key = None
        paints = route_of(scope).startswith("/v1/") and route_of(scope) != WEBHOOK  # which has a signature for a key
        if self._keys is None:
            if not _is_loopback(headers.get("host", "")):
                raise ApiError(403, "forbidden_host", "without an API key only localhost is served")
            if paints and _is_of_another_page(headers):
                raise ApiError(403, "forbidden_origin", "without an API key no page but the service's own may ask")
        elif paints:
            scheme, _, token = headers.get("authorization", "").partition(" ")
            key = self._keys.find(headers.get("x-api-key") or (token if scheme.lower() == "bearer" else ""))
            if key is None:
                rule = "give a key of the service in the header X-API-Key or Authorization: Bearer"
                raise ApiError(401, "unauthorized", rule, {"WWW-Authenticate": "Bearer"})
            note(key=key.name)
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._limits.max_bytes:
            raise self._too_large()
        if paints:
            if self._full():
                raise queue_full(self._limits.retry_after_s)
            if self._keys and key:
                self._take(self._keys, key, upload)
            if len(self._uploads) >= self._limits.max_uploads:
                self._make_room()
            self._uploads.append(upload)

    def _take(self, keys: Keys, key: ApiKey, upload: "Upload") -> None:
        wait_s = keys.take(key)
        if wait_s:
            quota = f"{key.per_minute or 'any'} requests a minute, {key.at_once or 'any'} at once"
            raise busy(429, "over_quota", f"the key {key.name} may ask for {quota}", math.ceil(wait_s))
        upload.key = key

    def _make_room(self) -> None:
        """Sends the slowest upload away, if it is too slow. Raises ApiError 429 when none is."""
        slowest = min(self._uploads, key=lambda upload: upload.total / upload.age_s())
        if slowest.age_s() < YOUNG_S or slowest.total > self._limits.min_upload_bytes_per_s * slowest.age_s():
            rule = f"{self._limits.max_uploads} uploads are being received"
            raise busy(429, "too_many_uploads", rule, self._limits.retry_after_s)
        slowest.send_away()
        self._ended(slowest)

    async def _hold_back(self, upload: "Upload") -> None:
        """Returns when the grace is over, or up to as long after it: who was sent away would be back at once, and many
        of them together."""
        if self._held_back >= MAX_HELD_BACK:
            return
        self._held_back += 1
        try:
            await asyncio.sleep(max(0.0, random.uniform(1, 2) * self._limits.upload_grace_s - upload.age_s()))
        finally:
            self._held_back -= 1

    def _too_large(self) -> ApiError:
        rule = f"the request is over the limit of {self._limits.max_bytes} bytes"
        return ApiError(413, "upload_too_large", rule, {"Connection": "close"})

    def _counted(self, upload: "Upload", receive: Receive) -> Receive:
        """The body's size and rate are looked at while it comes in; what comes after it may take its time."""

        async def counted() -> Message:
            if upload.done:
                return await receive()
            try:
                message = await upload.received(receive)
            except ApiError:
                if upload.sent_away:
                    await self._hold_back(upload)
                raise
            if upload.total > self._limits.max_bytes:
                raise self._too_large()
            if upload.done:
                self._ended(upload)
            return message

        return counted


def _is_loopback(host: str) -> bool:
    """host: NAME or NAME:PORT."""
    return (host if host.endswith("]") else host.rsplit(":", 1)[0]) in LOOPBACK


def _is_of_another_page(headers: Headers) -> bool:
    """Whether a browser says that a page of another origin sends this; what is no browser says nothing."""
    site, origin = headers.get("sec-fetch-site", "none"), headers.get("origin")
    return site not in ("same-origin", "none") or (origin is not None and not _is_loopback(origin.partition("://")[2]))


class Upload:
    """A body that is being received."""

    def __init__(self, limits: Limits, begin_s: float) -> None:
        self._limits, self._begin_s = limits, begin_s
        self.total, self.done = 0, False
        self.key: ApiKey | None = None
        """Whose quota it counts for."""
        self.sent_away = False
        self._timer: asyncio.Timeout | None = None

    def age_s(self) -> float:
        """Since its first byte could come; never 0."""
        return max(1e-3, time.monotonic() - self._begin_s)

    def send_away(self) -> None:
        """Ends it where it waits."""
        self.sent_away = True
        if self._timer is not None:
            self._timer.reschedule(asyncio.get_running_loop().time())

    async def received(self, receive: Receive) -> Message:
        """The next piece. Raises ApiError 408 for one that does not come in time."""
        limits = self._limits
        allowed_s = limits.upload_grace_s + self.total / limits.min_upload_bytes_per_s
        self._timer = asyncio.timeout(0 if self.sent_away else max(0.0, allowed_s - self.age_s()))
        try:
            async with self._timer:
                message = await receive()
        except TimeoutError as error:
            rule = f"the upload is slower than {limits.min_upload_bytes_per_s} bytes a second"
            raise ApiError(408, "slow_upload", rule, {"Connection": "close"}) from error
        finally:
            self._timer = None
        self.total += len(message.get("body", b""))
        self.done = not message.get("more_body", False)
        return message
