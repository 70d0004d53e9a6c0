"""The interface that processes of a training on CPUs talk over is the one with their node's address."""

import os

import psutil
import pytest
import ray

from pipelines.training.gloo import VARIABLE, GlooConfig, name_interface


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "to be put back")
    monkeypatch.delenv(VARIABLE)


def test_it_is_named_by_the_nodes_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, addresses in psutil.net_if_addrs().items():
        monkeypatch.setattr(ray.util, "get_node_ip_address", lambda found=addresses[0].address: found)
        os.environ.pop(VARIABLE, None)
        name_interface()
        assert os.environ[VARIABLE] == name


def test_what_the_environment_names_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setenv(VARIABLE, "chosen0")
    name_interface()
    assert os.environ[VARIABLE] == "chosen0"


def test_an_address_of_no_interface_names_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "203.0.113.9")
    name_interface()
    assert VARIABLE not in os.environ


def test_the_rest_is_ray_trains() -> None:
    config = GlooConfig(backend="gloo")
    assert (config.backend, config.backend_cls.__mro__[1].__name__) == ("gloo", "_TorchBackend")
