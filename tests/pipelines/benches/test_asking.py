"""The load of a bench, asked of a small HTTP server of this process."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from aai.media.decode import decode_audio
from pipelines.benches.asking import VERBS, Form, Load, arrivals, ask


class Patient(ThreadingHTTPServer):
    """More may knock at once than the five that Python lets wait."""

    request_queue_size = 64


@contextmanager
def server(paint_s: float, every_refused: int = 0) -> Iterator[tuple[str, list[str]]]:
    """A server that answers after a while, or refuses; and the paths that it was asked."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            seen.append(self.path)
            refused = every_refused and len(seen) % every_refused == 0
            body = json.dumps({"error": {"code": "queue_full"}}).encode() if refused else b"picture"
            time.sleep(0 if refused else paint_s)
            self.send_response(429 if refused else 200)
            self.send_header("content-type", "application/json" if refused else "image/png")
            self.send_header("content-length", str(len(body)))
            if refused:
                self.send_header("retry-after", "0")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    httpd = Patient(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}", seen
    finally:
        httpd.shutdown()
        httpd.server_close()


def test_clients_ask_again_when_they_are_answered_in_whole_turns_of_the_verbs() -> None:
    with server(0.05) as (url, seen):
        outcome = ask(url, Load(seconds=0.3, clients=2))
    assert {answer.code for answer in outcome.answers} == {"200"}
    assert all(answer.end_s - answer.begin_s >= 0.05 for answer in outcome.answers)
    assert len({seen.count(f"/v1/{verb}") for verb in VERBS}) == 1
    assert len(seen) >= 6
    assert 0 < outcome.cpu_share <= 2


def test_requests_of_an_open_loop_do_not_wait_for_answers() -> None:
    load = Load(seconds=0.5, per_s=40, first=7)
    due_s = list(arrivals(load))
    assert 5 < len(due_s) < 50
    with server(0.4) as (url, seen):
        begin_s = time.monotonic()
        outcome = ask(url, load)
        assert time.monotonic() - begin_s < 0.4 * len(due_s)
    assert len(seen) == len(outcome.answers) == len(due_s)
    assert sorted(answer.begin_s for answer in outcome.answers)[0] >= begin_s + due_s[0]


def test_refusals_are_told_by_code_and_broken_connections_by_kind() -> None:
    with server(0.0, every_refused=2) as (url, _):
        codes = [answer.code for answer in ask(url, Load(seconds=0.1, clients=1)).answers]
    assert set(codes) == {"200", "429 queue_full"}
    (answer, *_) = ask(url, Load(seconds=0.1, per_s=50)).answers
    assert answer.code == "ConnectError"


def test_every_request_has_a_sound_of_its_own() -> None:
    forms = [Form(number, verb, 20) for number, verb in enumerate(VERBS)]
    sounds = [decode_audio(form.wav(), 30, 2**20, 16_000) for form in forms]
    assert len({sound.tobytes() for sound in sounds}) == len(forms)
    assert {len(sound) for sound in sounds} == {16_000}
    assert forms[0].png()[:4] == b"\x89PNG"


@pytest.mark.parametrize("per_s", [5.0, 50.0])
def test_arrivals_are_as_many_as_asked_and_the_same_again(per_s: float) -> None:
    load = Load(seconds=100, per_s=per_s)
    due_s = list(arrivals(load))
    assert len(due_s) == pytest.approx(100 * per_s, rel=0.2)
    assert due_s == sorted(due_s) == list(arrivals(load))
