"""What is told while a picture is painted, as server-sent events."""

import asyncio
import base64
import json
import logging
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest
from starlette.requests import ClientDisconnect

from pipelines.service.access import Access, Visit
from pipelines.service.answers import EVENTS, Answer, PaintProgress, ServedModel, pictures
from pipelines.service.answers import live as stream
from pipelines.service.guard import Limits
from pipelines.service.http import build_http
from tests.hostile import png, wav
from tests.pipelines.service.test_http import DECODERS, LIMITS, Echo, ask

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


def test_a_picture_says_what_painted_it_and_is_not_kept() -> None:
    """Several keep their places where the safety checker stopped one; a model without an alias has none."""
    model = ServedModel(name="toy", version="3", sha="abc123", sample_rate_hz=16_000)
    assert (model.label(), model.model_copy(update={"alias": "champion"}).label()) == ("toy/3", "toy/3@champion")
    one, several = pictures([b"png"], 7, model), pictures([b"png", b"", b"png"], 8, model)
    for response, seed in ((one, "7"), (several, "8")):
        assert response.headers["cache-control"] == "no-store"
        assert (response.headers["x-aai-seed"], response.headers["x-aai-model"]) == (seed, "toy/3")
    told = json.loads(bytes(several.body))
    assert [image is not None for image in told["images"]] == [True, False, True]
    assert told["blocked"] == [1]


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


def test_a_stream_that_nobody_reads_ends_what_is_painted() -> None:
    """Its client is gone before the first byte of the answer."""
    ended = []

    async def painted() -> AsyncGenerator[PaintProgress | Answer, None]:
        try:
            for step in range(9):
                yield PaintProgress(step)
        finally:
            ended.append(True)

    async def gone(message: Any) -> None:
        raise OSError("the connection is closed")

    async def nothing() -> dict[str, Any]:
        return await asyncio.Event().wait() or {}

    async def answer() -> None:
        response = await stream(painted(), 0, LIMITS, asyncio.get_running_loop().time() + 60)
        with pytest.raises(ClientDisconnect):
            await response({"type": "http", "asgi": {"spec_version": "2.4"}}, nothing, gone)
        assert ended == [True]

    asyncio.run(answer())


def test_a_deadline_does_not_fall_on_a_client_that_reads_slowly() -> None:
    """Between two events it is nobody's; the next one is told that it is over."""
    read = []

    async def painted() -> AsyncGenerator[PaintProgress | Answer, None]:
        yield PaintProgress(0)
        await asyncio.sleep(60)

    async def answer() -> None:
        response = await stream(painted(), 0, LIMITS, asyncio.get_running_loop().time() + 0.2)
        async for event in response.body_iterator:
            read.append(str(event))
            await asyncio.sleep(0.4)

    asyncio.run(answer())
    assert [event.split("\n")[0] for event in read] == ["event: progress", "event: error"]
    assert '"code": "timeout"' in read[1]


def test_what_fails_within_a_stream_stands_in_the_log_and_the_figures() -> None:
    visits: list[Visit] = []

    async def ask(backend: Echo, prompt: str) -> None:
        app = Access(build_http(backend, LIMITS, None, DECODERS), lambda: 0, visits.append)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            form = {"prompt": prompt, "num_images": "3"}
            await client.post("/v1/generate", files={"audio": wav()}, data=form, headers=LIVE)

    some, all_of_them = Echo(), Echo()
    some.stopped, all_of_them.stopped = {1}, {0, 1, 2}
    for backend, prompt in ((Echo(), "<broken>"), (Echo(), "<nosuch>"), (some, "<sound>"), (all_of_them, "<sound>")):
        asyncio.run(ask(backend, prompt))
    assert [visit.status for visit in visits] == [200] * 4
    assert [visit.code for visit in visits] == ["internal", "invalid_request", "ok", "unsafe_picture"]
    assert [visit.told.get("blocked") for visit in visits] == [None, None, 1, 3]
