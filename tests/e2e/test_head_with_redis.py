"""The head of the service dies and comes again, with its state in Redis as the RayService has it, and without.

The head and its workers are network namespaces of this machine with an address each; wants root. Redis runs with the
StatefulSet's script, the nodes have what KubeRay puts into their environment, and the service is deployed as KubeRay
does: by the head's REST API.
"""

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from pipelines.registry import versions
from pipelines.service import proxy
from pipelines.service.keys import KEY_VARIABLE
from pipelines.settings import TrackingConfig
from tests.e2e.test_rollover import another
from tests.e2e.test_service_cut_off import Patient, summary
from tests.networks import network
from tests.pipelines.test_serve import KEY, write_tiny_bundle
from tests.surroundings import ray_node

KUBERNETES = Path(__file__).resolve().parents[2] / "infra" / "kubernetes" / "base" / "service"
PASSWORD, TOKEN = "a-password-for-tests", "0123456789abcdef" * 4
AWAY_S, BACK_S = 20.0, 300.0
HEAD, GCS, REST, HTTP = "aai-head", 6379, 8265, 8000
GCS_SERVER = "gcs/gcs_server"
KUBERAY = {
    "RAY_gcs_server_request_timeout_seconds": "5",
    "RAY_SERVE_KV_TIMEOUT_S": "5",
    "RAY_timeout_ms_task_wait_for_death_info": "0",
}
"""What KubeRay puts into the environment of every pod of a RayService."""

needs_redis = pytest.mark.skipif(shutil.which("redis-server") is None, reason="Redis is not installed (redis-server)")


def manifest(file: str, kind: str) -> Any:
    """A document of the service's manifests."""
    documents = yaml.safe_load_all((KUBERNETES / file).read_text())
    return next(each for each in documents if each["kind"] == kind)


@contextmanager
def redis(folder: Path, inside: str) -> Iterator[subprocess.Popen[bytes]]:
    """Redis as its container starts it, in a network namespace, with a folder for its volume."""
    (container,) = manifest("redis.yaml", "StatefulSet")["spec"]["template"]["spec"]["containers"]
    folder.mkdir(exist_ok=True)
    there, told = ["ip", "netns", "exec", inside], os.environ | {"REDIS_PASSWORD": PASSWORD}
    script = container["args"][0].replace("dir /data", f"dir {folder}")
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen([*there, *container["command"], script], env=told, stdout=log, stderr=log)
    try:
        end_s = time.monotonic() + 20
        while subprocess.run([*there, *container["readinessProbe"]["exec"]["command"]], env=told).returncode:
            assert time.monotonic() < end_s, (folder / "log").read_text()
            time.sleep(0.1)
        yield process
    finally:
        process.kill()
        process.wait()


class Cluster:
    """A head without CPUs and two nodes for painters, which know the head by its name, as a pod by its Service's."""

    def __init__(self, stack: ExitStack, store: Path | None) -> None:
        self.stack, self.network = stack, stack.enter_context(network())
        self.store: dict[str, str] = {}
        """Where the head keeps what it knows, as environment; empty = in its memory."""
        if store:
            self.folder, (self.kept, at) = store, self.network.add()
            self.start_redis()
            self.store = {"RAY_REDIS_ADDRESS": f"{at}:6379", "RAY_external_storage_namespace": "aai"}
        self.nodes: list[str] = []
        self.start_head()
        for _ in range(2):
            self._add_node()

    def start_redis(self) -> None:
        """Its pod, with the volume that there is."""
        self.redis = self.stack.enter_context(redis(self.folder, self.kept))

    def end_redis(self) -> None:
        """SIGKILL to Redis."""
        self.redis.kill()
        self.redis.wait()

    def start_head(self) -> None:
        """The head's pod, the first one or another, which has another address."""
        self.head, self.at = self.network.add()
        for node in self.nodes:
            self._tell_of_the_head(node)
        options = ["--num-cpus", "0", "--port", str(GCS), "--include-dashboard", "true", "--dashboard-host", "0.0.0.0"]
        options += ["--redis-password", PASSWORD] if self.store else []
        self.stack.enter_context(ray_node(None, KUBERAY | self.store, *options, at=self.at, inside=self.head))

    def _add_node(self) -> None:
        name, at = self.network.add()
        names = Path(f"/etc/netns/{name}")
        names.mkdir(parents=True)
        self.stack.callback(shutil.rmtree, names)
        (names / "resolv.conf").write_text("nameserver 127.0.0.1\n")  # nobody is there, which is told at once
        self._tell_of_the_head(name)
        told = KUBERAY | {"RAY_gcs_rpc_server_reconnect_timeout_s": "600"}
        node = ray_node(f"{HEAD}:{GCS}", told, "--num-cpus", "3", at=at, inside=name)
        self.stack.enter_context(node)
        self.nodes.append(name)

    def _tell_of_the_head(self, node: str) -> None:
        """What DNS does. `ip netns exec` mounts the file over /etc/hosts: it must stay the same one."""
        Path(f"/etc/netns/{node}/hosts").write_text(f"{Path('/etc/hosts').read_text()}\n{self.at} {HEAD}\n")

    def kill_head(self) -> None:
        """SIGKILL to all that runs in the head's pod."""
        for process in self.network.processes(self.head):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def url(self, node: str) -> str:
        """Where a node takes requests."""
        return f"http://{self.network.address_of(node)}:{HTTP}"

    def painters(self) -> set[tuple[str, int]]:
        """(node, process) of each painter."""
        found = set()
        for node in self.nodes:
            for process in self.network.processes(node):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if "ServeReplica:aai:Painter" in " ".join(process.cmdline()):
                        found.add((node, process.pid))
        return found

    def deploy(self, served: dict[str, Any]) -> None:
        """As KubeRay does when a RayService is new, or has changed."""
        answer = httpx.put(self._applications(), json=served, headers=self._headers(), timeout=60)
        assert answer.status_code == 200, answer.text

    def _applications(self) -> str:
        return f"http://{self.at}:{REST}/api/serve/applications/"

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {TOKEN}"}

    def status(self) -> tuple[str, str]:
        """(what KubeRay reads of the service: RUNNING, another word of Serve's, or "" where nobody tells; why)."""
        try:
            answer = httpx.get(self._applications(), headers=self._headers(), timeout=10)
            told = answer.json()["applications"]["aai"]
            return told["status"], told["message"]
        except (httpx.HTTPError, KeyError, json.JSONDecodeError) as error:
            return "", repr(error)

    def wait_for(self, painters: int) -> float:
        """Seconds until KubeRay would read that the service runs, and every gateway tells of so many painters."""
        begin_s = time.monotonic()
        while (told := self.status())[0] != "RUNNING" or {self.told(node) for node in self.nodes} != {painters}:
            late = time.monotonic() > begin_s + BACK_S or told[0] == "DEPLOY_FAILED"
            assert not late, (told, [self.told(node) for node in self.nodes])
            time.sleep(0.5)
        return time.monotonic() - begin_s

    def told(self, node: str) -> int:
        """How many painters there are, as a node's gateway tells; -1 = it tells nothing."""
        try:
            return int(httpx.get(f"{self.url(node)}/healthz", timeout=5).json()["replicas"])
        except (httpx.HTTPError, KeyError, json.JSONDecodeError):
            return -1


def served(registry: TrackingConfig, painters: int) -> dict[str, Any]:
    """The manifest's `serveConfigV2` with a tiny model on CPUs."""
    config: dict[str, Any] = yaml.safe_load(manifest("rayservice.yaml", "RayService")["spec"]["serveConfigV2"])
    (application,) = config["applications"]
    gateways = application["args"]["gateways"]
    tracking, cluster = {"uri": registry.uri}, {"num_workers": 2}
    args = {"bundle": "models:/tiny@champion", "tracking": tracking, "cluster": cluster, "gateways": gateways}
    application["args"] = {**args, "limits": {"request_timeout_s": 20}, "max_queued_requests": 100}
    # Serve starts all replicas anew where `args` change; not for this.
    application["deployments"].append({"name": "Painter", "num_replicas": painters})
    return config


@dataclass
class Registered:
    """A registry with two versions of a tiny model, of which the first is the champion."""

    registry: TrackingConfig
    second: int


@pytest.fixture
def registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registered:
    """The model, and what the nodes have in their environment."""
    for name, value in {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, KEY_VARIABLE: KEY}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "100")
    monkeypatch.setenv(proxy.VARIABLE, proxy.PLACE)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    registry = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", model_name="tiny")
    bundle = write_tiny_bundle(tmp_path)
    versions.set_alias(registry, "champion", versions.register(registry, bundle, {}, {}))
    second = versions.register(registry, another(bundle, tmp_path / "second"), {}, {})
    return Registered(registry, second)


@contextmanager
def asked(cluster: Cluster) -> Iterator[list[Patient]]:
    """Clients of each node's gateway that paint already."""
    with ExitStack() as stack:
        clients = [stack.enter_context(Patient(cluster.url(node), 1, 0.3)) for node in cluster.nodes]
        for each in clients:
            each.wait_for_pictures(5, time.monotonic(), 120)
        yield clients


def counted(clients: list[Patient], begin_s: float, end_s: float) -> Counter[str]:
    """Answers within a time."""
    return Counter(one.told for each in clients for one in each.tries() if begin_s < one.end_s < end_s)


def since(clients: list[Patient], moved_s: float, version: int) -> float:
    """Seconds from a promotion to the last picture of another version."""
    end_s = time.monotonic() + 120
    while True:
        assert time.monotonic() < end_s, [each.tries()[-2:] for each in clients]
        late = [[one.model for one in each.tries() if one.begin_s > moved_s and one.model][-4:] for each in clients]
        if all(len(each) == 4 and set(each) == {f"tiny/{version}@champion"} for each in late):
            break
        time.sleep(0.1)
    old = [one.end_s for each in clients for one in each.tries() if one.model and f"/{version}@" not in one.model]
    return max(old) - moved_s


@pytest.mark.accept
@pytest.mark.timeout(900)
@needs_redis
def test_the_service_goes_on_without_its_head_and_a_new_one_finds_it_again(
    registered: Registered, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        cluster = Cluster(stack, tmp_path / "redis")
        cluster.deploy(served(registered.registry, 2))
        print(f"\ndeployed after {cluster.wait_for(2):.1f} s")
        before = cluster.painters()
        with asked(cluster) as clients:
            gone_s = time.monotonic()
            cluster.kill_head()
            time.sleep(AWAY_S / 4)
            moved_s = time.monotonic()
            versions.set_alias(registered.registry, "champion", registered.second)
            time.sleep(3 * AWAY_S / 4)
            back_s = time.monotonic()
            print(f"the head was away for {back_s - gone_s:.1f} s:", counted(clients, gone_s, back_s))
            cluster.start_head()
            print(f"a new head started after {time.monotonic() - back_s:.1f} s", flush=True)
            cluster.wait_for(2)
            print(f"the service was RUNNING with two painters after {time.monotonic() - back_s:.1f} s")
            print(
                f"promoted without a head: the last picture of the old version {since(clients, moved_s, 2):.1f} s after"
            )
            moved_s = time.monotonic()
            versions.set_alias(registered.registry, "champion", 1)
            print(f"rolled back: last picture of the newer version {since(clients, moved_s, 1):.1f} s after")
            assert cluster.painters() == before
            cluster.deploy(served(registered.registry, 3))
            print(f"three painters instead of two: {cluster.wait_for(3):.1f} s")
            assert cluster.painters() > before
        for each in clients:
            print(summary(each, gone_s, back_s))
    tries = [one for each in clients for one in each.tries()]
    assert counted(clients, gone_s, back_s)["200"] > AWAY_S
    assert [one for one in tries if one.told != "200" and "again in None" in one.told] == []
    assert [asked for each in clients for asked in each.pictures if asked and asked[-1].told != "200"] == []


@pytest.mark.accept
@pytest.mark.timeout(900)
def test_without_redis_all_painters_go_when_a_new_head_comes(registered: Registered) -> None:
    """What the test above is held against."""
    with ExitStack() as stack:
        cluster = Cluster(stack, None)
        cluster.deploy(served(registered.registry, 2))
        cluster.wait_for(2)
        before = cluster.painters()
        with asked(cluster) as clients:
            gone_s = time.monotonic()
            cluster.kill_head()
            time.sleep(AWAY_S)
            back_s = time.monotonic()
            print("\nwhile there was no head:", counted(clients, gone_s, back_s))
            cluster.start_head()
            while before & cluster.painters() and time.monotonic() < back_s + BACK_S:
                time.sleep(0.5)
            print(f"without Redis all painters were gone {time.monotonic() - back_s:.1f} s after", flush=True)
            time.sleep(5)
            end_s = time.monotonic()
            for each in clients:
                each.stopped.set()
        late = counted(clients, end_s - 5, end_s)
        print("and then:", late, cluster.status())
        assert len(before) == 2
        assert before & cluster.painters() == set()
        assert late["200"] == 0


@pytest.mark.accept
@pytest.mark.timeout(900)
@needs_redis
def test_the_service_goes_on_without_redis_and_its_head(registered: Registered, tmp_path: Path) -> None:
    """Redis goes, the head ends for want of it, and both come again."""
    with ExitStack() as stack:
        cluster = Cluster(stack, tmp_path / "redis")
        cluster.deploy(served(registered.registry, 2))
        cluster.wait_for(2)
        before = cluster.painters()
        assert cluster.network.holders(GCS_SERVER) == [cluster.head]
        with asked(cluster) as clients:
            gone_s = time.monotonic()
            cluster.end_redis()
            while cluster.network.holders(GCS_SERVER) and time.monotonic() < gone_s + 2 * AWAY_S:
                time.sleep(0.2)
            print(f"\n{time.monotonic() - gone_s:.1f} s after Redis, head: {cluster.network.holders(GCS_SERVER)}")
            cluster.kill_head()
            time.sleep(max(0, gone_s + AWAY_S - time.monotonic()))
            cluster.start_redis()
            back_s = time.monotonic()
            print("while neither was there:", counted(clients, gone_s, back_s), flush=True)
            cluster.start_head()
            cluster.wait_for(2)
            print(f"the service was RUNNING with two painters {time.monotonic() - back_s:.1f} s after")
            assert cluster.painters() == before
        assert counted(clients, gone_s, back_s)["200"] > AWAY_S
