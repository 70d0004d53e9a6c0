"""How soon the service stops (make accept): as a container is stopped, with 10 s until it is killed."""

import signal
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.hostile import wav
from tests.pipelines.test_serve import HEADERS, SLOW, serving

pytestmark = [pytest.mark.accept, pytest.mark.timeout(300)]


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "painting"])
def test_m9_it_stops_within_five_seconds(busy: bool, tmp_path: Path) -> None:
    answers: list[int | str] = []
    with serving(tmp_path) as running:

        def ask() -> None:
            url, files = f"{running.url}/v1/generate", {"audio": wav()}
            try:
                answers.append(httpx.post(url, files=files, data=SLOW, headers=HEADERS, timeout=60).status_code)
            except httpx.HTTPError as error:
                answers.append(type(error).__name__)

        client = threading.Thread(target=ask)
        if busy:
            client.start()
            running.wait_until(painting=1)
        processes = psutil.Process(running.process.pid).children(recursive=True)
        begin_s = time.monotonic()
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(60) == 0
        seconds = time.monotonic() - begin_s
    if busy:
        client.join(30)
    print(f"{'painting' if busy else 'idle'}: stopped after {seconds:.1f} s; the client was told {answers}")
    assert seconds < 5
    assert psutil.wait_procs(processes, timeout=5)[1] == []
