"""Painters that come and go with what is asked, behind two gateways: no request fails meanwhile."""

import time
from collections import Counter
from pathlib import Path

import pytest

from pipelines.registry import versions
from pipelines.settings import Autoscaling, TrackingConfig
from tests.e2e.test_registry_away import until
from tests.e2e.test_rollover import Clients
from tests.pipelines.test_serve import QUICK, running, write_tiny_bundle


@pytest.mark.accept
@pytest.mark.timeout(600)
def test_painters_follow_the_queue(tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path)
    registry = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", model_name="tiny")
    versions.set_alias(registry, "champion", versions.register(registry, bundle, {}, {}))
    scaling = Autoscaling(max_painters=2, target_ongoing_requests=1, upscale_delay_s=1, downscale_delay_s=3)
    with running(tmp_path, bundle, registry, autoscaling=scaling, gateways=2) as service:
        assert service.health()["replicas"] == 1
        with Clients(service, 6) as clients:
            begin_s = time.monotonic()
            more_s = until(lambda: service.health()["replicas"] == 2, service, 120)
            until(lambda: service.health()["serving"] == {"tiny/1@champion": 2}, service)
            until(lambda: time.monotonic() - begin_s > more_s + 5, service)
        fewer_s = until(lambda: service.health()["replicas"] == 1, service, 120)
        assert service.post("generate", QUICK).status_code == 200
    counts = Counter(status for _, status, _ in clients.answers)
    print(f"{dict(counts)}: a second painter after {more_s:.0f} s, one again {fewer_s:.0f} s after the last request")
    assert set(counts) == {200}
