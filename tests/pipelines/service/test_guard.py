"""What stands in front of the application: slow, many and needless uploads are refused before they are read."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from pipelines.service import guard
from pipelines.service.guard import Guard, Limits, Upload, queue_full
from pipelines.service.keys import Keys, hashed

LIMITS = Limits(max_bytes=100_000, max_uploads=2, upload_grace_s=0.3, min_upload_bytes_per_s=10_000, retry_after_s=7)


class Reader:
    """An application that reads the whole body and answers with its size."""

    def __init__(self) -> None:
        self.started = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.started += 1
        size, more = 0, True
        while more:
            message = await receive()
            size, more = size + len(message.get("body", b"")), message.get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(size).encode()})


async def pieces(count: int, size: int, every_s: float) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield b"x" * size
        await asyncio.sleep(every_s)


def asked(
    app: Any, bodies: list[Any], path: str = "/v1/generate", wait_s: float = 0, headers: dict[str, str] | None = None
) -> list[httpx.Response]:
    """Requests at the same time, `wait_s` after each other."""

    async def one(client: httpx.AsyncClient, number: int, body: Any) -> httpx.Response:
        await asyncio.sleep(number * wait_s)
        return await client.post(path, content=body, headers=headers)

    async def run() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=30) as client:
            return list(await asyncio.gather(*[one(client, n, body) for n, body in enumerate(bodies)]))

    return asyncio.run(run())


class Trickle:
    """An ASGI connection whose body comes a byte at a time, which no client library's transport shows."""

    def __init__(self, app: Callable[..., Any], size: int, every_s: float, count: int) -> None:
        self.app, self.size, self.every_s, self.left = app, size, every_s, count
        self.sent: list[dict[str, Any]] = []

    async def receive(self) -> dict[str, Any]:
        await asyncio.sleep(self.every_s)
        self.left -= 1
        return {"type": "http.request", "body": b"x" * self.size, "more_body": self.left > 0}

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    async def run(self) -> tuple[int, float]:
        scope = {"type": "http", "path": "/v1/generate", "method": "POST", "headers": [(b"host", b"localhost")]}
        begin = time.monotonic()
        await self.app(scope, self.receive, self.send)
        return self.sent[0]["status"], time.monotonic() - begin


def test_an_upload_that_is_too_slow_is_refused_after_the_grace() -> None:
    app = Guard(Reader(), LIMITS, None)
    status, seconds = asyncio.run(Trickle(app, 1, 0.05, 1000).run())
    assert status == 408
    assert 0.2 < seconds < 5
    assert asyncio.run(Trickle(app, 1000, 0.05, 20).run())[0] == 200  # 20,000 bytes a second, for longer than the grace
    status, seconds = asyncio.run(Trickle(app, 0, 60, 2).run())  # nothing at all
    assert (status, seconds < 5) == (408, True)
    assert app._uploads == []


def test_what_comes_after_the_body_is_waited_for() -> None:
    """Starlette listens for a disconnect until the picture is painted: that is no slow upload."""

    async def late(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(receive(), 1)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    trickle = Trickle(Guard(late, LIMITS, None), 10, 0, 1)
    received = trickle.receive

    async def receive() -> dict[str, Any]:
        if trickle.left <= 0:
            await asyncio.sleep(60)
        return await received()

    trickle.receive = receive  # type: ignore[method-assign]
    assert asyncio.run(trickle.run())[0] == 200


def test_more_uploads_at_once_than_the_limit_are_told_to_come_back() -> None:
    reader = Reader()
    app = Guard(reader, LIMITS, None)

    async def run() -> list[tuple[int, float]]:
        slow = [Trickle(app, 5000, 0.1, 5) for _ in range(3)]
        return list(await asyncio.gather(*[each.run() for each in slow]))

    results = asyncio.run(run())
    assert sorted(status for status, _ in results) == [200, 200, 429]
    assert next(seconds for status, seconds in results if status == 429) < 0.3
    assert reader.started == 2  # nothing of the third was read
    assert app._uploads == []
    assert asyncio.run(Trickle(app, 5000, 0, 2).run())[0] == 200  # the places are free again


@pytest.mark.parametrize("held_back", [512, 0])
def test_the_slowest_makes_room_where_it_is_too_slow(held_back: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MAX_HELD_BACK", held_back)
    app = Guard(Reader(), LIMITS.model_copy(update={"upload_grace_s": 4.0}), None)

    async def run() -> list[tuple[int, float]]:
        slow = [
            asyncio.create_task(Trickle(app, 1, 0.05, 1000).run()),
            asyncio.create_task(Trickle(app, 0, 3600, 2).run()),
        ]
        await asyncio.sleep(0.8)
        quick = [await Trickle(app, 1000, 0, 3).run(), await Trickle(app, 1000, 0, 3).run()]
        third = asyncio.create_task(Trickle(app, 1000, 0.05, 5).run())
        found = [*quick, await third, *await asyncio.gather(*slow[1:])]
        slow[0].cancel()
        return found

    results = asyncio.run(asyncio.wait_for(run(), 20))
    assert [status for status, _ in results] == [200, 200, 200, 408]
    assert max(seconds for _, seconds in results[:2]) < 0.5
    told_s = results[3][1]
    assert told_s >= 4 if held_back else told_s < 2, "its place is free at once, but it hears of it after the grace"
    assert app._uploads == []


def test_a_full_queue_is_told_before_the_body_is_read() -> None:
    reader, full = Reader(), [True]
    app = Guard(reader, LIMITS, None, lambda: full[0])
    (response,) = asked(app, [b"x" * 1000])
    assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_full")
    assert response.headers["retry-after"] == "7"
    assert reader.started == 0
    (response,) = asked(app, [b""], "/healthz")
    assert response.status_code == 200  # health has a way of its own
    full[0] = False
    (response,) = asked(app, [b"x" * 1000])
    assert (response.status_code, response.text) == (200, "1000")


def test_a_body_over_the_limit_is_refused_while_it_comes() -> None:
    (response,) = asked(Guard(Reader(), LIMITS, None), [pieces(60, 5000, 0)])
    assert (response.status_code, response.json()["error"]["code"]) == (413, "upload_too_large")


def test_a_client_that_leaves_frees_its_place() -> None:
    app = Guard(Reader(), LIMITS, None)

    async def run() -> None:
        task = asyncio.create_task(Trickle(app, 5000, 0.1, 50).run())
        await asyncio.sleep(0.2)
        assert len(app._uploads) == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert app._uploads == []


def test_a_key_over_its_quota_is_told_before_the_body_is_read(tmp_path: Path) -> None:
    rows = [{"name": name, "sha256": hashed(name), "per_minute": 2, "at_once": 1} for name in ("ann", "bob")]
    (tmp_path / "keys").write_text(json.dumps(rows))
    reader = Reader()
    app = Guard(reader, LIMITS, Keys(str(tmp_path / "keys")))

    async def run() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=30) as client:

            async def ask(key: str, body: Any = b"") -> httpx.Response:
                return await client.post("/v1/edit", content=body, headers={"X-API-Key": key})

            slow = asyncio.create_task(ask("ann", pieces(3, 5000, 0.1)))
            await asyncio.sleep(0.1)
            found = [
                await ask("ann"),
                await ask("bob"),
                await slow,
                await ask("ann"),
                await ask("ann"),
                await ask("cid"),
            ]
            return [*found, await client.get("/healthz", headers={"X-API-Key": "ann"})]

    second, other, first, third, fourth, unknown, health = asyncio.run(run())
    answers = [second, other, first, third, fourth, unknown, health]
    assert [answer.status_code for answer in answers] == [429, 200, 200, 200, 429, 401, 200]
    assert second.json()["error"]["code"] == fourth.json()["error"]["code"] == "over_quota"
    assert fourth.json()["error"]["message"] == "the key ann may ask for 2 requests a minute, 1 at once"
    assert (second.headers["retry-after"], int(fourth.headers["retry-after"]) > 50) == ("1", True)
    assert reader.started == 4
    assert app._keys is not None
    assert app._keys._at_once.total() == 0


def test_what_nobody_foresaw_is_a_logged_500_of_our_form(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise KeyError("secret of the inside")

    (response,) = asked(Guard(broken, LIMITS, None), [b""])
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal")
    assert "secret" not in response.text
    assert "secret of the inside" in caplog.text


def test_an_application_below_a_prefix_asks_for_the_key_too() -> None:
    guard = Guard(Reader(), LIMITS, Keys(key="secret"))

    async def ask(root: str, path: str) -> int:
        transport = httpx.ASGITransport(guard, root_path=root)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return (await client.post(path)).status_code

    asked_at = [("", "/v1/edit"), ("/aai", "/aai/v1/edit"), ("/v1", "/v1/v1/edit"), ("/aai", "/aai/healthz")]
    asked_at += [("/v1/registry", "/v1/registry/v1/edit"), ("/aai", "/aai/v1/registry"), ("", "/v1/registry/")]
    assert [asyncio.run(ask(*where)) for where in asked_at] == [401, 401, 401, 200, 401, 200, 401]


@pytest.mark.parametrize("sent", [{}, {"sec-fetch-site": "none"}, {"sec-fetch-site": "same-origin", "origin": "here"}])
def test_without_a_key_the_page_of_the_service_and_programs_may_ask(sent: dict[str, str]) -> None:
    for host in ("localhost", "127.0.0.1:8000", "[::1]:8000"):
        headers = {"host": host} | {name: value.replace("here", f"http://{host}") for name, value in sent.items()}
        assert asked(Guard(Reader(), LIMITS, None), [b"x"], headers=headers)[0].status_code == 200


@pytest.mark.parametrize(
    "sent",
    [
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site", "origin": "http://localhost:3000"},
        *({"origin": origin} for origin in ("https://evil.example", "null", "", "http://localhost.evil.example:8000")),
    ],
)
def test_without_a_key_other_pages_may_not_ask(sent: dict[str, str]) -> None:
    """A browser sends a form to any address without asking it."""
    reader = Reader()
    (response,) = asked(Guard(reader, LIMITS, None), [b"x"], headers=sent)
    assert (response.status_code, response.json()["error"]["code"], reader.started) == (403, "forbidden_origin", 0)
    assert asked(Guard(reader, LIMITS, None), [b""], "/healthz", headers=sent)[0].status_code == 200
    with_key = Guard(reader, LIMITS, Keys(key="secret"))  # a page of others has none
    assert asked(with_key, [b"x"], headers={**sent, "x-api-key": "secret"})[0].status_code == 200


def test_what_there_is_no_room_for_is_not_counted(tmp_path: Path) -> None:
    """Neither where the uploads are too many, nor where the queue is full after the upload."""
    (tmp_path / "keys").write_text(json.dumps([{"name": "ann", "sha256": hashed("ann"), "per_minute": 1}]))

    async def full(scope: Scope, receive: Receive, send: Send) -> None:
        if room:
            await Reader()(scope, receive, send)
        else:
            await queue_full(2).response()(scope, receive, send)

    room, headers = False, {"x-api-key": "ann"}
    app = Guard(full, LIMITS, Keys(str(tmp_path / "keys")))
    app._uploads = [Upload(LIMITS, time.monotonic()) for _ in range(LIMITS.max_uploads)]
    (response,) = asked(app, [b"x"], headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (429, "too_many_uploads")
    app._uploads = []
    (response,) = asked(app, [b"x"], headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_full")
    room = True
    assert [asked(app, [b"x"], headers=headers)[0].status_code for _ in range(2)] == [200, 429]
