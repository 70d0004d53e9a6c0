"""What Serve's proxy says becomes our JSON; what the application says stays as it is."""

import asyncio
import os
import subprocess
import sys
import time
from typing import Any

import httpx
import pytest
import uvicorn
from ray.serve._private.http_util import _apply_middlewares
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.service import proxy
from pipelines.service.access import Access, Visit


def asked(app: Any, headers: list[tuple[bytes, bytes]] | None = None) -> httpx.Response:
    """One request through the middlewares, as Serve applies them, its own for ids included."""
    app = _apply_middlewares(app, proxy.middlewares())  # type: ignore[arg-type]

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get("/", headers=headers)

    return asyncio.run(send())


@pytest.mark.parametrize(
    ("answer", "code", "said"),
    [
        (PlainTextResponse("Path '*' not found.", 404), "http_404", "Path '*' not found."),
        (PlainTextResponse("unavailable", 503), "http_503", "unavailable"),
        (PlainTextResponse("Traceback: secret", 500), "internal", "the reason is in its log"),
        (StreamingResponse(iter([b"timed ", b"out"]), 408, media_type="text/plain"), "no_gateway", "does not answer"),
    ],
)
def test_plain_errors_have_our_form(answer: ASGIApp, code: str, said: str) -> None:
    response = asked(answer)
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert error["code"] == code
    assert said in error["message"]
    assert "secret" not in response.text
    assert (response.headers.get("retry-after") == "2") == (response.status_code == 503)


def test_all_else_goes_through_as_it_is() -> None:
    assert asked(PlainTextResponse("fine")).text == "fine"
    response = asked(Response(b'{"error": 1}', 422, media_type="application/json"))
    assert (response.status_code, response.text) == (422, '{"error": 1}')
    assert asked(StreamingResponse(iter([b"a", b"b"]), media_type="image/png")).content == b"ab"


def test_a_header_that_serve_cannot_read_is_a_400() -> None:
    response = asked(PlainTextResponse("fine"), [(b"X-Request-ID", b"\xff")])
    assert (response.status_code, response.json()["error"]["code"]) == (400, "http_400")
    assert "x-request-id is not UTF-8" in response.json()["error"]["message"]
    assert asked(PlainTextResponse("fine"), [(b"X-Request-ID", "ü".encode())]).text == "fine"


@pytest.mark.parametrize("given", [None, b"a-good_1.id", b"x" * 65, b"two words", b'"', "ü".encode(), b""])
def test_the_id_that_comes_back_is_the_one_in_the_log(given: bytes | None) -> None:
    visits: list[Visit] = []
    app = Access(PlainTextResponse("fine"), lambda: 0, visits.append)
    response = asked(app, [] if given is None else [(b"X-Request-ID", given)])
    assert response.headers.get_list("x-request-id") == [visits[0].request_id]
    assert (visits[0].request_id == "a-good_1.id") == (given == b"a-good_1.id")


def test_what_breaks_is_a_logged_500(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise KeyError("secret of the inside")

    response = asked(broken)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal")
    assert "secret" not in response.text
    assert "secret of the inside" in caplog.text


def test_a_request_whose_gateway_ended_is_told_to_come_again() -> None:
    async def silent(scope: Scope, receive: Receive, send: Send) -> None:
        """As Serve's proxy is then."""

    response = asked(silent)
    assert (response.status_code, response.headers["retry-after"]) == (503, "2")
    assert response.json()["error"]["code"] == "no_gateway"


def test_serve_finds_it_by_the_variable() -> None:
    """As its proxies do when they start."""
    code = (
        "import sys\nfrom ray.serve._private.http_util import configure_http_middlewares\n"
        "from ray.serve.config import HTTPOptions\n"
        "found = configure_http_middlewares(HTTPOptions()).middlewares\n"
        "assert [each.cls.__name__ for each in found] == ['ProxyErrors', 'FewPieces'], found\n"
        "assert 'torch' not in sys.modules\n"
    )
    told = os.environ | {proxy.VARIABLE: proxy.PLACE}
    done = subprocess.run([sys.executable, "-c", code], env=told, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]


def test_every_error_in_plain_text_is_ours_and_only_those() -> None:
    assert asked(PlainTextResponse("no request", 400)).json()["error"]["code"] == "http_400"
    assert "retry-after" not in asked(PlainTextResponse("of no use to ask again", 502)).headers
    page = asked(Response("<p>gone</p>", 404, media_type="text/html"))
    assert (page.status_code, page.text) == (404, "<p>gone</p>")


def test_an_error_that_breaks_off_is_told_whole() -> None:
    async def half(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/plain")]
        await send({"type": "http.response.start", "status": 404, "headers": headers})
        await send({"type": "http.response.body", "body": b"the first", "more_body": True})
        raise KeyError("secret of the inside")

    response = asked(half)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal")


class Heard:
    """An application behind the middlewares on a socket: how often it was called, and the pieces that it received."""

    def __init__(self) -> None:
        self.calls, self.pieces = 0, list[bytes]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.calls += 1
        while (message := await receive())["type"] == "http.request":
            self.pieces.append(message["body"])
            if not message["more_body"]:
                break
        await PlainTextResponse("had it all")(scope, receive, send)

    async def ask(self, head: str, bodies: list[bytes], pause_s: float = 0) -> int:
        """The status that a client hears of which the body comes in pieces."""
        stack = _apply_middlewares(self, proxy.middlewares())  # type: ignore[arg-type]
        server = uvicorn.Server(uvicorn.Config(stack, port=0, lifespan="off", log_level="error"))
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        answer, link = await asyncio.open_connection(*server.servers[0].sockets[0].getsockname())
        link.write(f"POST / HTTP/1.1\r\nHost: a\r\n{head}\r\n\r\n".encode())
        for body in bodies:
            link.write(body)
            await link.drain()
            await asyncio.sleep(pause_s)
        status = int((await answer.readline()).split()[1])
        link.close()
        server.should_exit = True
        await serving
        return status


def pieces_of(bodies: list[bytes], pause_s: float) -> list[bytes]:
    """What the application receives of a body that a client sends in pieces."""
    heard = Heard()
    assert asyncio.run(heard.ask(f"Content-Length: {sum(map(len, bodies))}", bodies, pause_s)) == 200
    return heard.pieces


def test_a_body_that_drips_comes_in_few_pieces_and_whole() -> None:
    sent = [bytes([i]) for i in range(120)]
    found = pieces_of(sent, pause_s=0.02)
    assert b"".join(found) == b"".join(sent)
    assert len(found) < 60, "of 120: after half a second, what has come by the next look is one piece"


def test_a_form_that_comes_in_ten_pieces_is_passed_on_in_a_few() -> None:
    sent = [bytes([i]) * 100 for i in range(10)]
    found = pieces_of(sent, pause_s=0.0005)
    assert b"".join(found) == b"".join(sent)
    assert len(found) <= 5


def test_a_body_of_an_ordinary_rate_is_passed_on_as_it_comes() -> None:
    sent = [bytes([i]) * 20_000 for i in range(20)]
    found = pieces_of(sent, pause_s=0.05)
    assert b"".join(found) == b"".join(sent)
    assert len(found) >= 20


@pytest.mark.parametrize(
    ("head", "body", "status"),
    [
        ("Content-Length: 1000", b"", 408),
        ("Content-Length: 1000", b"x" * 63, 408),
        ("Content-Length: 2", b"ab", 200),
        ("Transfer-Encoding: chunked", b"2\r\nab\r\n0\r\n\r\n", 200),
        ("Content-Length: 0", b"", 200),
    ],
)
def test_a_body_that_does_not_begin_is_refused_and_nobody_else_hears_of_it(
    head: str, body: bytes, status: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(proxy, "GRACE_S", 0.3)
    heard = Heard()
    assert asyncio.run(heard.ask(head, [body])) == status
    assert heard.calls == (status == 200)
    assert ("1 requests refused whose bodies did not begin" in caplog.text) == (status == 408)
    assert b"".join(heard.pieces) == (b"ab" if body and status == 200 else b"")


def test_a_body_that_stalls_and_recovers_is_passed_on_before_the_gateway_loses_patience() -> None:
    """Its grace is five seconds: of what came at four the gateway must hear before."""
    seen: list[tuple[float, int]] = []

    async def client() -> Message:
        """A client that sends a hundred bytes, and after four seconds the rest."""
        age_s = asyncio.get_running_loop().time() - begin_s
        size = 100 if not seen else 0 if age_s < 4 else 1_000_000
        await asyncio.sleep(0.2)
        return {"type": "http.request", "body": b"x" * size, "more_body": size < 1_000_000}

    async def received() -> None:
        nonlocal begin_s
        begin_s = asyncio.get_running_loop().time()
        body = proxy.Body(client)
        await body.begin()
        while not seen or seen[-1][1] < 1_000_000:
            message = await body.receive()
            seen.append((asyncio.get_running_loop().time() - begin_s, len(message["body"])))

    begin_s = 0.0
    asyncio.run(received())
    assert 4 < seen[-1][0] < 5
    assert len(seen) < 10


def test_there_is_no_pause_after_a_large_piece() -> None:
    pieces = [b"x" * 100, b"x" * 20_000, b"x" * 100]

    async def client() -> Message:
        return {"type": "http.request", "body": pieces.pop(0), "more_body": True}

    async def pauses() -> list[float]:
        body = proxy.Body(client)
        await body.begin()
        found = []
        for _ in range(3):
            await body.receive()
            found.append(body._pause_s(0.1))
        return found

    assert asyncio.run(pauses()) == [proxy.PAUSE_S, 0, proxy.PAUSE_S]


def test_who_came_together_is_not_sent_away_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "GRACE_S", 0.3)
    monkeypatch.setattr(proxy.random, "uniform", lambda least, most: most)
    begin_s = time.monotonic()
    assert asyncio.run(Heard().ask("Content-Length: 1000", [b""])) == 408
    assert time.monotonic() - begin_s >= 0.6


def test_an_attack_is_one_line_of_the_log_at_a_time(caplog: pytest.LogCaptureFixture) -> None:
    app = proxy.FewPieces(Heard())
    for _ in range(3):
        app._tell()
    assert [record.message[:9] for record in caplog.records] == ["proxy: 1 "]
    app._told_s -= 2 * proxy.TELL_S
    app._tell()
    assert [record.message[:9] for record in caplog.records] == ["proxy: 1 ", "proxy: 3 "]
