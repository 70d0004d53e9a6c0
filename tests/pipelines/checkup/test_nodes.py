"""Facts of nodes and what they mean; and a real cluster of two nodes, one of which is not like the other."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.checkup.doors import ask, check_token, doors_of
from pipelines.checkup.finding import Finding
from pipelines.checkup.nodes import Asked, Node, check_cluster, check_here, enough, few, judge, variables_set
from pipelines.checkup.running import Check, run_checks
from pipelines.settings import TrainClusterConfig
from tests.surroundings import ray_node

FACTS: dict[str, Any] = {
    "host": "a",
    "python": "3.11.7",
    "packages": {
        "ray": "2.60.0",
        "torch": "2.11.0",
        "mlflow": "3",
        "transformers": "5",
        "diffusers": "1",
        "aai": "0.1",
    },
    "shm_bytes": (8 * 10**9, 10**9),
    "disk": "/tmp",
    "disk_bytes": (10**12, 10**11),
    "variables": ["AWS_ACCESS_KEY_ID"],
    "paths": ["/run"],
    "models": {"m": "abc"},
    "gpus": [{"name": "H", "memory_gb": 80.0}],
    "driver": "580.1",
    "cuda": "13.0",
    "torch_cuda": "13.0",
    "gpu_error": None,
    "clock": 1000.0,
}
ASKED = Asked(variables=("AWS_ACCESS_KEY_ID",), paths=("/run",), models=(("m", "/models/m"),))
RESOURCES = {"CPU": 8.0, "GPU": 1.0, "object_store_memory": 2e9}


def node(name: str = "n1", resources: dict[str, float] = RESOURCES, **changed: Any) -> Node:
    """A node that is as it should be, but for what is changed."""
    return Node(name, resources, {**FACTS, **changed}, 999, 1001)


def wrong(rows: list[Finding]) -> dict[str, str]:
    """What is not ok: name, and remedy."""
    return {row.check: row.remedy for row in rows if row.state != "ok"}


def test_nodes_that_are_alike_are_fine() -> None:
    rows = judge([node("n1"), node("n2")], FACTS, ASKED)
    assert wrong(rows) == {}
    assert {"node.version", "node.gpu", "node.clock", "disk"} == {row.check for row in rows}


@pytest.mark.parametrize(
    ("bad", "check", "word"),
    [
        (node("bad", python="3.12.1"), "node.version", "image"),
        (node("bad", packages={**FACTS["packages"], "torch": "2.10"}), "node.version", "constraints.txt"),
        (node("bad", packages={**FACTS["packages"], "aai": None}), "node.version", "image"),
        (node("bad", shm_bytes=(64 * 2**20, 0)), "node.shm", "--shm-size"),
        (node("bad", shm_bytes=None), "node.shm", "emptyDir"),
        (node("bad", disk_bytes=(10**12, 10**9)), "disk", "free some space"),
        (node("bad", variables=[]), "node.environment", "environment"),
        (node("bad", paths=[]), "node.folder", "s3://"),
        (node("bad", models={"m": "abd"}), "weights.node", "copy the folder"),
        (node("bad", models={"m": "cannot be read (x)"}), "weights.node", "copy the folder"),
        (node("bad", clock=1030.0), "node.clock", "chrony"),
        (node("bad", clock=970.0), "node.clock", "chrony"),
        (node("bad", gpus=[], gpu_error="NVMLError: no driver"), "node.gpu", "driver"),
        (node("bad", {**RESOURCES, "GPU": 0}), "node.gpu", "CUDA_VISIBLE_DEVICES"),
        (node("bad", cuda="12.8"), "node.driver", "newer driver"),
        (node("bad", driver="550.2"), "node.driver", "one driver"),
        (Node("bad", RESOURCES, None), "node.silent", "raylet"),
    ],
)
def test_a_node_that_differs_is_named(bad: Node, check: str, word: str) -> None:
    rows = judge([node("good"), bad], FACTS, ASKED)
    assert list(wrong(rows)) == [check]
    (row,) = [row for row in rows if row.state != "ok"]
    assert word in row.remedy
    assert "bad" in f"{row.subject} {row.found}"


def test_an_answer_that_took_long_is_no_clock_that_is_off() -> None:
    late = Node("late", RESOURCES, {**FACTS, "clock": 1000.0}, 970, 1030)
    assert wrong(judge([late], FACTS, ASKED)) == {}


def test_many_nodes_take_one_row() -> None:
    rows = judge([node(f"n{i}", python="3.12.1") for i in range(100)], FACTS, ASKED)
    assert [row.subject for row in rows if row.state != "ok"] == ["100 nodes, n0 among them"]
    assert few(["a", "b"]) == "a, b"


def test_room_for_workers_is_counted() -> None:
    clusters = {"align": TrainClusterConfig(num_workers=(2, 8), gpus_per_worker=1), "curate": TrainClusterConfig()}
    assert enough({"CPU": 2, "GPU": 2}, clusters, "x") == []
    assert [row.found for row in enough({"CPU": 2, "GPU": 1}, clusters, "x")] == ["align wants 2 GPUs, 1 are there"]
    assert len(enough({"GPU": 2, "CPU": 1}, clusters, "x")) == 2


def test_this_machine_alone_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    rows = check_here(Asked(min_free_gb=0), {})
    assert [row for row in rows if row.state == "failure"] == []
    asked = Asked(variables=("PATH",), paths=("/tmp",), models=(("m", "/nowhere"),), min_free_gb=0)
    assert [row for row in check_here(asked, {}) if row.state == "failure"] == []
    wants = {"align": TrainClusterConfig(num_workers=64, gpus_per_worker=1)}
    assert "ray.room" in wrong(check_here(Asked(min_free_gb=0), wants))


def test_only_what_is_set_here_is_wanted_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    assert variables_set() == ("AWS_SECRET_ACCESS_KEY",)


@pytest.fixture
def odd(tmp_path: Path) -> Iterator[str]:
    """A node that says that it has a GPU, and in which another torch lies before the installed one."""
    planted = tmp_path / "packages" / "torch-0.0.1.dist-info"
    planted.mkdir(parents=True)
    (planted / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 0.0.1\n")
    path = os.pathsep.join([str(planted.parent), os.environ["PYTHONPATH"]])
    environment = {"RAY_AUTH_MODE": "token", "PYTHONPATH": path}
    with ray_node(None, environment, "--num-cpus", "1", "--num-gpus", "1") as address:
        yield address


def test_a_real_cluster_tells_what_differs_and_wants_its_token(odd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    rows = run_checks([Check("cluster", check_cluster, (odd, Asked(min_free_gb=0, timeout_s=40), {}))], 60)
    assert set(wrong(rows)) == {"node.version", "node.gpu"}, [row for row in rows if row.state != "ok"]
    assert {row.check for row in rows} >= {"ray.reachable", "ray.token", "ray.open"}
    told = {row.check: row.found for row in rows}
    assert told["node.version"].startswith("torch is 0.0.1, here ")
    assert told["node.gpu"].startswith("Ray counts 1 GPUs, the driver shows 0")
    gcs = doors_of(odd)[0]
    assert ask(gcs) == "guarded"
    for mode, token, words in (("token", "f" * 32, "refuses"), ("disabled", "f" * 32, "sends none")):
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
        (row,) = [row for row in check_token(gcs) if row.state == "failure"]
        assert (row.check, words in row.found) == ("ray.token", True)
