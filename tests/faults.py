"""An S3 server that fails now and then: a proxy in front of a real one."""

import http.client
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}
SLOW_S = 1.5


@contextmanager
def faulty(
    endpoint: str, share: float, seed: int = 0, outage: threading.Event | None = None
) -> Iterator[tuple[str, Counter[str]]]:
    """A server on this machine that passes requests on to `endpoint` and spoils `share` of them.

    A spoilt request is answered with 500 or 503 (SlowDown), or passed on late. While `outage` is set, all are answered
    with 500 or 503. Yields the address and the counts.
    """
    target, rng, counts = urlsplit(endpoint), random.Random(seed), Counter[str]()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def any_method(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fault = rng.choice(["500", "503", "slow"]) if rng.random() < share else "none"
            if outage is not None and outage.is_set():
                fault = rng.choice(["500", "503"])
            counts[fault] += 1
            if fault in ("500", "503"):
                code = "InternalError" if fault == "500" else "SlowDown"
                self._answer(int(fault), {"Content-Type": "application/xml"}, f"<Error><Code>{code}</Code></Error>")
                return
            if fault == "slow":
                time.sleep(SLOW_S)
            upstream = http.client.HTTPConnection(target.netloc, timeout=60)
            upstream.request(self.command, self.path, body, dict(self.headers))  # the signature covers these headers
            answer = upstream.getresponse()
            self._answer(answer.status, dict(answer.getheaders()), answer.read(), answer.getheader("Content-Length"))
            upstream.close()

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = any_method

        def _answer(self, status: int, headers: dict[str, str], body: bytes | str, length: str | None = None) -> None:
            data = body.encode() if isinstance(body, str) else body
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in HOP:
                    self.send_header(name, value)
            self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", counts
    finally:
        server.shutdown()
        server.server_close()
