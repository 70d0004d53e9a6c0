"""While Serve's controller answers nobody, the service tells its health and paints."""

import asyncio
import signal
from pathlib import Path

import httpx
import psutil
import pytest

from tests.hostile import wav
from tests.pipelines.test_serve import HEADERS, QUICK, Service, serving


def controller() -> psutil.Process:
    """Of the service that runs below this process."""
    below = psutil.Process().children(recursive=True)
    (found,) = [each for each in below if each.cmdline() and "ServeController" in each.cmdline()[0]]
    return found


async def many(running: Service, probes: int) -> list[httpx.Response]:
    """The answer to a picture, and then those to probes that came before it."""
    async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=None)) as client:
        asked = asyncio.gather(*(client.get(f"{running.url}/healthz") for _ in range(probes)))
        await asyncio.sleep(0.5)
        post = client.post(f"{running.url}/v1/generate", files={"audio": wav()}, data=QUICK, headers=HEADERS)
        painted = await post
        return [painted, *await asked]


@pytest.mark.accept
@pytest.mark.timeout(300)
def test_probes_take_nothing_from_pictures_while_the_controller_is_stopped(tmp_path: Path) -> None:
    with serving(tmp_path) as running:
        assert running.post("generate", QUICK).status_code == 200
        stopped = controller()
        stopped.send_signal(signal.SIGSTOP)
        try:
            painted, *told = asyncio.run(many(running, 60))
        finally:
            stopped.send_signal(signal.SIGCONT)
        assert painted.status_code == 200
        assert [(answer.status_code, answer.json()["replicas"]) for answer in told] == [(200, 1)] * 60
