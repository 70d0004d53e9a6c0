"""M10: the MLflow server that a service follows is killed, and started again: pictures go on, promotions too."""

import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from pipelines.registry import versions
from tests.e2e.test_rollover import Clients, another
from tests.pipelines.registry.test_live import Server
from tests.pipelines.test_serve import QUICK, Service, running, write_tiny_bundle


def until(true: Callable[[], bool], service: Service, limit_s: float = 90) -> float:
    """Seconds until something is so."""
    begin_s = time.monotonic()
    while not true():
        assert time.monotonic() - begin_s < limit_s, service.health()
        time.sleep(0.2)
    return time.monotonic() - begin_s


@pytest.mark.accept
@pytest.mark.timeout(600)
def test_m10_a_server_that_is_killed_stops_no_picture_and_is_followed_again(tmp_path: Path) -> None:
    server = Server(tmp_path)
    server.start()
    try:
        server.wait()
        registry = server.config.model_copy(update={"model_name": "tiny"})
        bundle = write_tiny_bundle(tmp_path)
        versions.set_alias(registry, "champion", versions.register(registry, bundle, {}, {}))
        second = versions.register(registry, another(bundle, tmp_path / "second"), {}, {})
        with running(tmp_path, bundle, registry) as service, Clients(service, 2) as clients:
            clients.wait_for(1, 0)
            server.stop()
            kind = "UserError: tracking.uri"  # and no address, to whoever asks
            noticed_s = until(lambda: service.health()["registry"] == kind, service)
            away_s, before = time.monotonic(), len(clients.answers)
            until(lambda: len(clients.answers) > before + 20 and time.monotonic() - away_s > 12, service)
            until(lambda: service.health()["serving"] == {"tiny/1@champion": 1}, service)
            assert (service.health()["status"], service.health()["registry"]) == ("ready", kind)
            assert service.post("generate", QUICK).headers["x-aai-model"] == "tiny/1@champion"
            away = len(clients.answers) - before
            server.start()
            server.wait()
            back_s = until(lambda: not service.health()["registry"], service)
            moved_s = time.monotonic()
            versions.set_alias(registry, "champion", second)
            taken_s = clients.wait_for(second, moved_s)
            until(lambda: service.health()["serving"] == {f"tiny/{second}@champion": 1}, service)
    finally:
        with suppress(ProcessLookupError):  # it failed while the server was away
            server.stop()
    counts = Counter((status, model) for _, status, model in clients.answers)
    print(
        f"{dict(counts)}: {away} answers while the server was away, which /healthz told after {noticed_s:.1f} s; "
        f"back, it was followed after {back_s:.1f} s, and the next version served {taken_s:.1f} s after its promotion"
    )
    assert {status for status, _ in counts} == {200}
