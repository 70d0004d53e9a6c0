"""What is told of every request, whatever becomes of it."""

import asyncio
import json
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.types import Receive, Scope, Send

from pipelines.service import access as module
from pipelines.service.access import Access, Visit, note, stage_ends
from pipelines.service.guard import Guard, Limits, queue_full
from tests.pipelines.service.test_guard import LIMITS, Reader, Trickle, asked

LINE = {"time", "request_id", "verb", "status", "bytes_in", "duration_s", "stages_s", "queue_depth", "code"}


class Kept(logging.Handler):
    """The lines of the log, read back."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == "ray.serve" and record.exc_info is None:
            self.lines.append(json.loads(record.getMessage()))


@pytest.fixture
def log() -> Iterator[list[dict[str, Any]]]:
    logger, kept = logging.getLogger("ray.serve"), Kept()
    level = logger.level
    logger.addHandler(kept)
    logger.setLevel(logging.INFO)
    yield kept.lines
    logger.removeHandler(kept)
    logger.setLevel(level)


def access(app: Any, limits: Limits = LIMITS, full: bool = False) -> tuple[Access, list[Visit]]:
    """Access and Guard around an application, and the visits that were counted."""
    visits: list[Visit] = []
    return Access(Guard(app, limits, None, lambda: full), lambda: 3, visits.append), visits


async def painted(scope: Scope, receive: Receive, send: Send) -> None:
    while (await receive()).get("more_body"):
        pass
    stage_ends("decode")
    note(seed=7, steps=2, pictures=1)
    await asyncio.sleep(0.02)
    stage_ends("painters")
    note(model="toy/3@champion")
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"png"})


def test_a_picture_has_one_line_with_all_that_is_known(log: list[dict[str, Any]]) -> None:
    app, visits = access(painted)
    asked(app, [b"x" * 500])
    (line,) = log
    assert LINE | {"seed", "steps", "pictures", "model"} == set(line)
    wanted = {"verb": "generate", "status": 200, "code": "ok", "bytes_in": 500, "queue_depth": 3, "seed": 7}
    assert {**line, **wanted, "model": "toy/3@champion"} == line
    assert list(line["stages_s"]) == ["upload", "decode", "painters"]
    assert line["duration_s"] >= line["stages_s"]["painters"] >= 0.02
    assert [visit.request_id for visit in visits] == [line["request_id"]]


def test_a_refusal_before_the_body_has_its_line(log: list[dict[str, Any]]) -> None:
    reader = Reader()
    app, visits = access(reader, full=True)
    asked(app, [b"x" * 500])
    (line,) = log
    assert (line["status"], line["code"], line["bytes_in"], reader.started) == (429, "queue_full", 0, 0)
    assert (visits[0].status, visits[0].code) == (429, "queue_full")


def test_a_refusal_within_the_application_has_its_code(log: list[dict[str, Any]]) -> None:
    async def refusing(scope: Scope, receive: Receive, send: Send) -> None:
        await queue_full(2).response()(scope, receive, send)

    asked(access(refusing)[0], [b""], "/v1/stylize")
    assert [(line["verb"], line["status"], line["code"]) for line in log] == [("stylize", 429, "queue_full")]


def test_clients_that_leave_are_told_apart(log: list[dict[str, Any]]) -> None:
    async def leave() -> None:
        task = asyncio.create_task(Trickle(access(Reader())[0], 5000, 0.1, 50).run())
        await asyncio.sleep(0.25)
        task.cancel()  # as Serve does when the connection is gone
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    assert [(line["status"], line["code"]) for line in log] == [(499, "client_left")]
    assert log[0]["bytes_in"] >= 5000

    async def stops(scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["type"] == "http.disconnect"
        await send({"type": "http.response.start", "status": 400, "headers": []})  # to nobody

    class Gone(Trickle):
        async def receive(self) -> dict[str, Any]:
            return {"type": "http.disconnect"}

    asyncio.run(Gone(access(stops)[0], 0, 0, 0).run())
    assert [(line["status"], line["code"]) for line in log[1:]] == [(499, "client_left")]


def test_a_failure_is_a_500_without_its_words(log: list[dict[str, Any]]) -> None:
    async def failing(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("secret words")

    app, visits = access(failing)
    assert [response.status_code for response in asked(app, [b""])] == [500]
    assert [(line["status"], line["code"]) for line in log] == [(500, "internal")]
    assert "secret" not in json.dumps(log)
    assert len(visits) == 1


def test_what_a_client_writes_is_not_repeated(log: list[dict[str, Any]]) -> None:
    """Paths, keys and ids are anybody's words; an id that looks like one is kept."""

    async def run() -> None:
        transport = httpx.ASGITransport(access(painted)[0])
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            for given in ("b7-af_2.1", 'x", "status": 200', "y" * 65):
                headers = {"X-Request-ID": given, "X-API-Key": "hush-hush"}
                await client.post("/v1/../hush?prompt=hush", content=b"hush", headers=headers)

    asyncio.run(run())
    assert "hush" not in json.dumps(log)
    assert [line["verb"] for line in log] == ["other"] * 3
    assert log[0]["request_id"] == "b7-af_2.1"
    assert all(len(line["request_id"]) == 32 for line in log[1:])


def test_probes_write_no_line_while_all_is_well(log: list[dict[str, Any]]) -> None:
    app, visits = access(painted)
    asked(app, [b""], "/healthz")
    assert (log, [visit.verb for visit in visits]) == ([], ["health"])


def test_outside_of_a_request_nothing_is_noted() -> None:
    note(code="x")
    stage_ends("upload")


def direct(app: Any, path: str = "/v1/generate") -> tuple[list[Visit], Any]:
    """Access alone around an application, and what makes one request of it in this very context."""
    visits: list[Visit] = []
    own, bodies = Access(app, lambda: 0, visits.append), iter([b"a", b""])

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": next(bodies, b""), "more_body": False}

    async def send(message: Any) -> None:
        pass

    return visits, lambda: own({"type": "http", "path": path, "headers": [], "method": "POST"}, receive, send)


async def told(send: Send, status: int, *parts: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})
    for part in parts:
        await send({"type": "http.response.body", "body": part, "more_body": True})


def test_stages_follow_one_another_and_the_upload_ends_once() -> None:
    async def staged(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.02)
        for name in ("decode", "painters"):
            await receive()
            await asyncio.sleep(0.02)
            stage_ends(name)
        await told(send, 200)

    visits, ask = direct(staged)
    asyncio.run(ask())
    assert list(visits[0].stages_s) == ["upload", "decode", "painters"]
    assert sum(visits[0].stages_s.values()) <= visits[0].duration_s
    assert min(visits[0].stages_s.values()) >= 0.02


def test_a_client_that_leaves_within_a_stream_is_told(log: list[dict[str, Any]]) -> None:
    async def streaming(scope: Scope, receive: Receive, send: Send) -> None:
        await told(send, 200, b"first")
        raise asyncio.CancelledError

    visits, ask = direct(streaming)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(ask())
    assert [(visit.status, visit.code) for visit in visits] == [(499, "client_left")]


def test_what_never_answered_is_no_success_and_nothing_is_noted_of_it_later() -> None:
    async def silent(scope: Scope, receive: Receive, send: Send) -> None:
        return

    visits, ask = direct(silent)

    async def run() -> None:
        await ask()
        note(model="of another request")

    asyncio.run(run())
    assert [(visit.status, visit.code, visit.told) for visit in visits] == [(500, "internal", {})]
    assert Visit("generate", "id", 0).code == "internal", "not begun to answer"


def test_a_probe_that_finds_the_service_ill_has_its_line(log: list[dict[str, Any]]) -> None:
    asyncio.run(direct(lambda scope, receive, send: told(send, 503), "/healthz")[1]())
    assert [(line["verb"], line["status"]) for line in log] == [("health", 503)]


def test_spans_tell_when_stages_were_and_no_words_of_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    spans, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    monkeypatch.setattr(module, "TRACER", provider.get_tracer("test"))

    async def failing(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.02)
        stage_ends("decode")
        raise RuntimeError("secret words")

    visits, ask = direct(failing)
    with pytest.raises(RuntimeError):
        asyncio.run(ask())
    decode, whole = spans.get_finished_spans()
    assert (decode.name, whole.name) == ("decode", "aai generate")
    lasted_s = ((decode.end_time or 0) - (decode.start_time or 0)) / 1e9
    assert lasted_s >= 0.02
    assert lasted_s == pytest.approx(visits[0].stages_s["decode"], abs=0.02)
    assert not whole.events
    assert "secret" not in whole.to_json()
    assert not whole.status.is_ok
