"""Placement groups on real Ray: of a dead actor, of one that lives, of the driver, and detached ones."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group

from pipelines.engine.cluster import connect, shutdown
from pipelines.engine.orphans import remove_last_orphans, remove_orphans
from pipelines.settings import ClusterConfig


@pytest.fixture(scope="module", autouse=True)
def ray_cluster() -> Iterator[None]:
    connect(ClusterConfig(num_workers=4))
    yield
    shutdown()


def make_maker() -> Any:
    """An actor that makes placement groups; it travels by value: Ray's processes cannot import test files."""

    class Maker:
        def make(self, lifetime: str | None = None) -> None:
            ray.get(placement_group([{"CPU": 1}], lifetime=lifetime).ready())

    return ray.remote(num_cpus=0)(Maker).remote()


def free_cpus(expected: float) -> float:
    """The CPUs that are free, once they are as expected or ten seconds have passed."""
    deadline_s = time.monotonic() + 10
    while (found := ray.available_resources().get("CPU", 0.0)) != expected and time.monotonic() < deadline_s:
        time.sleep(0.2)
    return found


def test_only_what_a_dead_actor_left_is_removed() -> None:
    makers = [make_maker() for _ in range(3)]
    ray.get(placement_group([{"CPU": 1}]).ready())
    ray.get([makers[0].make.remote(), makers[1].make.remote(), makers[2].make.remote("detached")])
    assert free_cpus(0) == 0
    assert remove_orphans() == 0
    ray.kill(makers[0])
    ray.kill(makers[2])
    deadline_s = time.monotonic() + 10
    while not (removed := remove_orphans()) and time.monotonic() < deadline_s:
        time.sleep(0.2)
    assert removed == 1
    assert free_cpus(1) == 1
    assert remove_orphans() == 0


def test_the_last_orphans_are_waited_for() -> None:
    assert remove_last_orphans(20) == 0  # those of the test above
    maker = make_maker()
    ray.get(maker.make.remote())
    assert remove_last_orphans(0.5) == 1  # its maker lives: nothing is taken from it
    threading.Timer(1, ray.kill, [maker]).start()  # it dies while it is waited for
    assert remove_last_orphans(20) == 0
