"""Real surroundings with something wrong: ports that say nothing, stores behind a front, clocks that are off."""

import base64
import http.client
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}
CLOCK_SOURCE = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
static long off(void) { const char *s = getenv("CLOCK_OFF_S"); return s ? atol(s) : 0; }
int clock_gettime(clockid_t id, struct timespec *t) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(id, t);
    if (id == CLOCK_REALTIME) t->tv_sec += off();
    return code;
}
time_t time(time_t *to) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    if (to) *to = t.tv_sec;
    return t.tv_sec;
}
int gettimeofday(struct timeval *restrict t, void *restrict zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    t->tv_sec = now.tv_sec;
    t->tv_usec = now.tv_nsec / 1000;
    return 0;
}
"""
"""A library that moves a process's clock by CLOCK_OFF_S seconds."""


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def silent() -> Iterator[int]:
    """A port that takes connections and never says anything."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(32)
        yield int(listener.getsockname()[1])


class Front(BaseHTTPRequestHandler):
    """A request that is passed on to a real server, or is refused; what is set stands in `front`."""

    protocol_version = "HTTP/1.1"
    target: str
    conditional: bool
    off_s: float
    refuse: tuple[str, ...]
    wanted: str
    tags: dict[str, str]
    one_at_a_time: threading.Lock

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def any_method(self) -> None:
        """Answers."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.wanted and self.headers.get("Authorization") != self.wanted:
            return self._answer(401, {}, b"You are not authenticated.")
        if self.command in self.refuse:
            return self._answer(403, {}, b"<Error><Code>AccessDenied</Code></Error>")
        with self.one_at_a_time:
            return self._conditional(body, urlsplit(self.path).path)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = any_method

    def _conditional(self, body: bytes, path: str) -> None:
        new, over = self.headers.get("If-None-Match"), self.headers.get("If-Match")
        is_put = self.command == "PUT"  # a read has conditions of its own, which the server honours
        if is_put and self.conditional and ((new and path in self.tags) or (over and self.tags.get(path) != over)):
            return self._answer(412, {}, b"<Error><Code>PreconditionFailed</Code></Error>")
        upstream = http.client.HTTPConnection(self.target, timeout=30)
        upstream.request(self.command, self.path, body, dict(self.headers))  # the signature covers these headers
        answer = upstream.getresponse()
        status, headers, data = answer.status, dict(answer.getheaders()), answer.read()
        upstream.close()
        if self.command == "PUT" and status < 300:
            self.tags[path] = headers.get("Etag", "")
        elif self.command == "DELETE":
            self.tags.pop(path, None)
        length = headers.get("Content-Length") if self.command == "HEAD" else None
        return self._answer(status, headers, data, length)

    def _answer(self, status: int, headers: dict[str, str], data: bytes, length: str | None = None) -> None:
        self.send_response_only(status)
        self.send_header("Date", formatdate(time.time() + self.off_s, usegmt=True))
        for name, value in headers.items():
            if name.lower() not in HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def front(
    endpoint: str, conditional: bool = True, off_s: float = 0, refuse: tuple[str, ...] = (), account: str = ""
) -> Iterator[str]:
    """A server that passes requests on to a real one; yields its address.

    conditional: it honours If-None-Match and If-Match of a PUT, which the S3 server of the tests does not. off_s: its
    clock is so far ahead. refuse: methods that it answers with 403. account: USER:PASSWORD that it demands.
    """
    wanted = f"Basic {base64.b64encode(account.encode()).decode()}" if account else ""
    how = {"target": urlsplit(endpoint).netloc, "conditional": conditional, "off_s": off_s, "refuse": refuse}
    kind = type("ThisFront", (Front,), {**how, "wanted": wanted, "tags": {}, "one_at_a_time": threading.Lock()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def clock_library(folder: Path) -> Path:
    """Builds the library that LD_PRELOAD takes to move a process's clock."""
    source, library = folder / "clock.c", folder / "clock.so"
    source.write_text(CLOCK_SOURCE)
    compiler = shutil.which("cc") or "gcc"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    return library


@contextmanager
def ray_node(
    head: str | None = None,
    environment: dict[str, str] | None = None,
    *options: str,
    before: str = "",
    at: str = "",
    inside: str = "",
) -> Iterator[str]:
    """A node of a Ray cluster in processes of its own: the head, or one more of the cluster at `head`.

    environment: on top of this process's. before: a shell command that runs first, in mounts of the node's own.
    at: its address, where this machine has several. inside: a network namespace. Yields the cluster's address.
    """
    address = head or f"{at or socket.gethostbyname(socket.gethostname())}:{free_port()}"
    place = ["--address", address] if head else ["--head", "--port", address.rpartition(":")[2]]
    folder = tempfile.mkdtemp(prefix="r-", dir="/tmp")  # sockets lie there: a longer path would be too long
    place += [] if head else ["--include-dashboard", "false"]
    place += [] if head and not inside else ["--temp-dir", folder]
    place += ["--node-ip-address", at] if at else []
    command = [str(Path(sys.executable).parent / "ray"), "start", "--block", *place, "--disable-usage-stats"]
    command += ["--object-store-memory", str(100 * 2**20), *options]
    if before:
        command = ["unshare", "--mount", "sh", "-ec", f"{before}; exec {shlex.join(command)}"]
    if inside:
        command = ["ip", "netns", "exec", inside, *command]
    with (Path(folder) / "log").open("w") as log:
        process = subprocess.Popen(
            command, env=os.environ | (environment or {}), stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield _started(process, address, Path(folder) / "log")
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def _started(process: "subprocess.Popen[bytes]", address: str, log: Path) -> str:
    """The address, once `ray start` says that it runs."""
    end_s = time.monotonic() + 120  # a busy machine takes its time
    while "Ray runtime started" not in log.read_text():
        assert process.poll() is None, log.read_text()[-2000:]
        assert time.monotonic() < end_s, log.read_text()[-2000:]
        time.sleep(0.2)
    return address
