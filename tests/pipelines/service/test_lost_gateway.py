"""The middleware of Serve's proxy, around applications that answer and that do not."""

import asyncio

import httpx
import pytest
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from pipelines.service import lost_gateway
from pipelines.service.lost_gateway import CALLBACK, middlewares


async def silent(scope: Scope, receive: Receive, send: Send) -> None:
    """As Serve's proxy is when the gateway ended."""


async def broken(scope: Scope, receive: Receive, send: Send) -> None:
    """Ends after the begin of an answer."""
    await send({"type": "http.response.start", "status": 200, "headers": []})


def ask(app: ASGIApp) -> httpx.Response:
    (wrapped,) = middlewares()

    async def once() -> httpx.Response:
        transport = httpx.ASGITransport(wrapped.cls(app))  # type: ignore[arg-type, call-arg]
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.post("/v1/generate")

    return asyncio.run(once())


def test_a_request_without_an_answer_is_told_to_come_again() -> None:
    answer = ask(silent)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
    assert answer.json()["error"]["code"] == "no_gateway"


def test_answers_pass_as_they_are_and_begun_ones_are_not_answered_twice() -> None:
    answer = ask(PlainTextResponse("no", 418))
    assert (answer.status_code, answer.text) == (418, "no")
    with pytest.raises(AssertionError):  # httpx notices that the answer never ends
        ask(broken)


def test_serve_is_told_a_name_that_exists() -> None:
    module, name = CALLBACK.split(":")
    assert (module, getattr(lost_gateway, name)) == (lost_gateway.__name__, middlewares)
