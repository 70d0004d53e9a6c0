"""A PostgreSQL of a test's own."""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BINARIES = os.pathsep.join(map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)))
INITDB = shutil.which("initdb") or shutil.which("initdb", path=BINARIES)
"""Where PostgreSQL is installed; Debian has it outside of PATH."""


@contextmanager
def postgres() -> Iterator[str]:
    """Yields the URI of an empty database, in a folder that any user can reach: the server refuses to run as root."""
    assert INITDB, "PostgreSQL is missing"
    owner = "nobody" if os.geteuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="aai-pg-"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    if owner:
        shutil.chown(folder, owner)
    binaries, data, options = Path(INITDB).resolve().parent, str(folder / "data"), {"user": owner, "cwd": "/"}
    try:
        made = [INITDB, "-D", data, "-U", "aai", "-A", "trust", "-E", "UTF8"]
        subprocess.run(made, check=True, capture_output=True, **options)  # type: ignore[call-overload]
        command = [str(binaries / "postgres"), "-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", str(folder)]
        server = subprocess.Popen(command, stderr=subprocess.DEVNULL, **options)  # type: ignore[call-overload]
        try:
            _wait([str(binaries / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)])
            yield f"postgresql+psycopg2://aai@127.0.0.1:{port}/postgres"
        finally:
            server.terminate()
            server.wait(timeout=30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait(ready: list[str]) -> None:
    end_s = time.monotonic() + 60
    while subprocess.run(ready).returncode:
        assert time.monotonic() < end_s, "PostgreSQL did not start"
        time.sleep(0.2)
