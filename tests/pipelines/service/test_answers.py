"""What is told while a picture is painted, as server-sent events."""

import asyncio
import base64
import json
import logging
from typing import Any

import httpx
import pytest

from pipelines.service.answers import EVENTS
from pipelines.service.guard import Limits
from pipelines.service.http import build_http
from tests.hostile import png, wav
from tests.pipelines.service.test_http import LIMITS, Echo, ask

LIVE = {"accept": EVENTS}


def events(response: httpx.Response) -> list[tuple[str, dict[str, Any]]]:
    """(name, data) of each."""
    assert (response.status_code, response.headers["content-type"]) == (200, f"{EVENTS}; charset=utf-8")
    found = []
    for block in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def live(backend: Echo, limits: Limits = LIMITS, **form: str) -> list[tuple[str, dict[str, Any]]]:
    response = ask("POST", "/v1/generate", backend, limits=limits, files={"audio": wav()}, data=form, headers=LIVE)
    return events(response)


def test_stages_come_before_the_pictures() -> None:
    *stages, (name, done) = live(Echo(), seed="5", num_images="2")
    assert stages == [
        ("progress", {"step": 0, "steps": 0, "preview": None}),
        ("progress", {"step": 1, "steps": 2, "preview": base64.b64encode(b"a preview").decode()}),
    ]
    assert (name, done["seed"], done["model"], done["bundle"]) == ("done", 5, "toy/3@champion", "abc123")
    assert [base64.b64decode(image) for image in done["images"]] == [png(), png()]


def test_who_does_not_ask_for_events_gets_the_picture() -> None:
    response = ask("POST", "/v1/generate", Echo(), files={"audio": wav()}, headers={"accept": "*/*"})
    assert response.headers["content-type"] == "image/png"


def test_a_refusal_comes_before_the_stream_and_a_mistake_within_it(caplog: pytest.LogCaptureFixture) -> None:
    full = Echo()
    full.is_full = True
    response = ask("POST", "/v1/generate", full, files={"audio": wav()}, headers=LIVE)
    assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_full")
    name, told = live(Echo(), prompt="<nosuch>")[-1]
    assert (name, told["status"], told["error"]["code"]) == ("error", 422, "invalid_request")
    with caplog.at_level(logging.ERROR):
        name, told = live(Echo(), prompt="<broken>")[-1]
    assert (name, told["status"], told["error"]["code"]) == ("error", 500, "internal")
    assert "a secret" not in str(told)
    assert "a secret" in caplog.text


def test_a_deadline_is_told_within_the_stream() -> None:
    slow = Echo(wait_s=60)
    name, told = live(slow, LIMITS.model_copy(update={"request_timeout_s": 1.5}))[-1]
    assert (name, told["status"], told["error"]["code"]) == ("error", 503, "timeout")
    assert slow.cancelled == 1


def test_a_client_that_leaves_ends_the_painting() -> None:
    slow = Echo(wait_s=60)

    async def leave() -> None:
        app = build_http(slow, LIMITS, None)
        body = httpx.Request("POST", "http://localhost/v1/generate", files={"audio": wav()}, headers=LIVE)
        sent = iter([{"type": "http.request", "body": body.read(), "more_body": False}])
        here = asyncio.Event()

        async def receive() -> dict[str, Any]:
            for message in sent:
                return message
            await here.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            pass

        headers = [(name.lower(), value) for name, value in body.headers.raw]
        scope = {"type": "http", "method": "POST", "path": "/v1/generate", "raw_path": b"/v1/generate"}
        scope |= {"query_string": b"", "headers": headers, "http_version": "1.1", "scheme": "http"}
        scope |= {"asgi": {"version": "3.0", "spec_version": "2.3"}, "server": ("localhost", 80), "root_path": ""}
        task = asyncio.create_task(app(scope, receive, send))  # type: ignore[arg-type]
        while not slow.calls:
            await asyncio.sleep(0.01)
        here.set()
        await asyncio.wait_for(task, 10)

    asyncio.run(asyncio.wait_for(leave(), 20))
    assert slow.cancelled == 1
