"""Keys of a real service that change while it runs, without AAI_API_KEY and for other machines."""

import time
from pathlib import Path

import httpx
import pytest

from tests.hostile import wav
from tests.pipelines.service.test_keys import ONE, TWO, row, write
from tests.pipelines.test_serve import QUICK, Service, serving


def ask(running: Service, key: str) -> tuple[int, str]:
    """Status, and code of a refusal."""
    url, files = running.url.replace("0.0.0.0", "127.0.0.1"), {"audio": wav()}
    answer = httpx.post(f"{url}/v1/generate", files=files, data=QUICK, headers={"X-API-Key": key}, timeout=60)
    return answer.status_code, "" if answer.status_code == 200 else answer.json()["error"]["code"]


def until(running: Service, key: str, status: int) -> None:
    """Waits until a key is answered so."""
    end_s = time.monotonic() + 20
    while ask(running, key)[0] != status:
        assert time.monotonic() < end_s
        time.sleep(0.3)


@pytest.mark.accept
@pytest.mark.timeout(300)
def test_keys_change_without_a_restart(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    write(file, row("ann", ONE, per_minute=2))
    with serving(tmp_path, key="", host="0.0.0.0", keys_file=str(file)) as running:
        assert [ask(running, ONE) for _ in range(3)] == [(200, ""), (200, ""), (429, "over_quota")]
        assert ask(running, TWO) == (401, "unauthorized")
        write(file, row("bob", TWO))
        until(running, TWO, 200)
        assert ask(running, ONE) == (401, "unauthorized")
        file.write_text("[{name: bob")
        url = running.url.replace("0.0.0.0", "127.0.0.1")
        end_s = time.monotonic() + 20
        while not (health := httpx.get(f"{url}/healthz").json())["keys"]:
            assert time.monotonic() < end_s
            ask(running, TWO)
        assert health["keys"] == "UserError: keys_file"
        assert ask(running, TWO) == (200, "")
