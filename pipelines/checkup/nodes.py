"""Nodes: their versions, GPUs, memory, disks, clocks, environment: asked of each one, compared with this machine."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.checkup import facts as told
from pipelines.checkup.doors import check_doors, check_local_token, check_token, doors_of
from pipelines.checkup.finding import Finding, failure, ok, warning
from pipelines.checkup.places import CLOCK, disk_finding
from pipelines.engine.cluster import OBJECT_STORE_BYTES
from pipelines.settings import TrainClusterConfig

PACKAGES = ("ray", "torch", "mlflow", "transformers", "diffusers")
FEW = 8
"""Nodes that are named in one row; of more, their number."""
SAME = "give every node the same image, or `pip install -c constraints.txt` the same release on it"


@dataclass(frozen=True)
class Asked:
    """What the nodes are asked, and what counts as enough."""

    variables: tuple[str, ...] = ()
    """Set here, so that the nodes should have them too."""
    paths: tuple[str, ...] = ()
    """Local folders of the run."""
    models: tuple[tuple[str, str], ...] = ()
    """Folders of frozen models, by name."""
    max_skew_s: float = 5
    min_free_gb: float = 10
    timeout_s: float = 10
    """How long nodes are waited for."""


@dataclass(frozen=True)
class Node:
    """A node and what it said; `facts` is None for one that said nothing."""

    name: str
    resources: Mapping[str, float]
    facts: dict[str, Any] | None
    asked_s: float = 0
    answered_s: float = 0
    """This machine's clock around the answer."""


def check_here(asked: Asked, clusters: Mapping[str, TrainClusterConfig]) -> list[Finding]:
    """This machine alone: commands start a Ray of their own on it."""
    facts = told.facts(PACKAGES, asked.variables, asked.paths, dict(asked.models))
    resources = {"object_store_memory": OBJECT_STORE_BYTES, "GPU": len(facts["gpus"])}
    node, now = "this machine", time.time()
    found = check_local_token() + judge([Node(node, resources, facts, now, now)], facts, asked)
    return found + enough({"GPU": resources["GPU"]}, clusters, node)


def check_cluster(address: str, asked: Asked, clusters: Mapping[str, TrainClusterConfig]) -> list[Finding]:
    """A cluster: its doors, our token, then every node. A cluster that cannot be entered is not waited for."""
    try:
        doors = doors_of(_resolved(address))
    except (ConnectionError, ValueError) as error:
        rule = str(error).split("\n")[0]
        remedy = "start a cluster, or give its address as HOST:PORT or ray://HOST:PORT"
        return [failure("ray.reachable", address, rule, remedy)]
    named = doors[1] if address.startswith("ray://") else doors[0]
    found = check_token(named)
    if any(row.state == "failure" for row in found):
        return found + check_doors(doors)
    import ray

    info = ray.init(address=address, log_to_driver=False, logging_level="ERROR", namespace="aai-doctor")
    dashboard = str(getattr(info, "dashboard_url", "") or "").removeprefix("http://").rstrip("/")
    found += check_doors(doors_of(_resolved(address), dashboard))
    here = told.facts(PACKAGES, (), (), dict(asked.models))
    nodes = ask_nodes(asked)
    return (
        found + judge(nodes, here, asked) + enough({"CPU": 0, "GPU": 0, **ray.cluster_resources()}, clusters, address)
    )


def _resolved(address: str) -> str:
    """What `auto` stands for. Raises ConnectionError where no cluster runs."""
    if address.startswith("ray://"):
        return address
    from ray._private.services import canonicalize_bootstrap_address

    return str(canonicalize_bootstrap_address(address) or address)


def ask_nodes(asked: Asked) -> list[Node]:
    """Facts of every node that is alive; needs no free CPU of it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.cloudpickle.register_pickle_by_value(told)
    remote = ray.remote(num_cpus=0, max_retries=0)(told.facts)
    calls, nodes = {}, [node for node in ray.nodes() if node["Alive"]]
    begun_s = time.time()
    for node in nodes:
        here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        wanted = PACKAGES, asked.variables, asked.paths, dict(asked.models)
        calls[remote.options(scheduling_strategy=here).remote(*wanted)] = node
    left, end_s, found = list(calls), time.monotonic() + asked.timeout_s, []
    while left and (remaining_s := end_s - time.monotonic()) > 0:
        done, left = ray.wait(left, timeout=remaining_s)
        for call in done:
            node = calls[call]
            try:
                said = ray.get(call)
            except Exception:  # a worker that cannot start there
                said = None
            found.append(Node(_name(node), node["Resources"], said, begun_s, time.time()))
    return found + [Node(_name(calls[call]), calls[call]["Resources"], None) for call in left]


def _name(node: Mapping[str, Any]) -> str:
    """Two nodes of one machine, as on a test cluster, differ in their ids."""
    return f"{node['NodeManagerAddress']} ({node['NodeID'][:6]})"


# ---------------------------------------------------------------- what it means


def judge(nodes: Sequence[Node], here: Mapping[str, Any], asked: Asked) -> list[Finding]:
    """What the nodes' facts mean beside this machine's. A row of one kind names all the nodes that it holds for."""
    found = []
    if silent := [node.name for node in nodes if node.facts is None]:
        remedy = "look at the raylet's log there; it may be full, busy, or cut off: end the node and let another start"
        found.append(failure("node.silent", few(silent), "ran nothing that it was asked", remedy))
    heard = [node for node in nodes if node.facts is not None]
    found += _versions(heard, here)
    for node in heard:
        found += _memory_and_disk(node, asked) + _gpus(node)
    found += _together(heard, here, asked)
    bad = {row.check for row in found}
    fine = {"node.version": "one version", "node.gpu": "as Ray counts them", "node.clock": "agree"}
    names = few([node.name for node in heard])
    found += [ok(check, names, words) for check, words in fine.items() if heard and check not in bad]
    return found


def few(names: Sequence[str]) -> str:
    """Names, or how many there are."""
    return ", ".join(names) if len(names) <= FEW else f"{len(names)} nodes, {names[0]} among them"


def _versions(nodes: Sequence[Node], here: Mapping[str, Any]) -> list[Finding]:
    found = []
    for package in ("python", *PACKAGES, "aai"):
        ours = here["python"] if package == "python" else here["packages"][package]
        others: dict[str | None, list[str]] = {}
        for node in nodes:
            assert node.facts is not None
            theirs = node.facts["python"] if package == "python" else node.facts["packages"].get(package)
            if theirs != ours:
                others.setdefault(theirs, []).append(node.name)
        for theirs, names in others.items():
            rule = f"{package} is {theirs or 'not there'}, here {ours or 'not there'}"
            found.append(failure("node.version", few(names), rule, SAME))
    return found


def _memory_and_disk(node: Node, asked: Asked) -> list[Finding]:
    assert node.facts is not None
    found = [disk_finding(f"{node.name} {node.facts['disk']}", node.facts["disk_bytes"], asked.min_free_gb)]
    total_bytes, _ = node.facts["shm_bytes"] or (0, 0)
    wanted_bytes = node.resources.get("object_store_memory", 0)
    if total_bytes < wanted_bytes:
        rule = f"/dev/shm has {total_bytes / 1e9:.2f} GB, Ray's object store wants {wanted_bytes / 1e9:.2f} GB"
        remedy = "docker run --shm-size=..., on Kubernetes an emptyDir with medium Memory at /dev/shm"
        found.append(failure("node.shm", node.name, rule, remedy))
    return found


def _gpus(node: Node) -> list[Finding]:
    assert node.facts is not None
    said, counted = node.facts, node.resources.get("GPU", 0)
    there, cuda, built = len(said["gpus"]), said["cuda"], said["torch_cuda"]
    if counted > there:
        rule = f"Ray counts {counted:g} GPUs, the driver shows {there} ({said['gpu_error'] or said['driver']})"
        remedy = "install NVIDIA's driver and container toolkit there, or start Ray without --num-gpus"
        return [failure("node.gpu", node.name, rule, remedy)]
    if there > counted:
        remedy = "unset CUDA_VISIBLE_DEVICES, or start Ray with --num-gpus, if they are to be used"
        return [warning("node.gpu", node.name, f"Ray counts {counted:g} of its {there} GPUs", remedy)]
    if there and built and cuda and int(built.split(".")[0]) > int(cuda.split(".")[0]):
        rule = f"driver {said['driver']} takes CUDA up to {cuda}, torch is built for {built}"
        return [failure("node.driver", node.name, rule, "install a newer driver, or a torch built for this CUDA")]
    return []


def _together(nodes: Sequence[Node], here: Mapping[str, Any], asked: Asked) -> list[Finding]:
    """Clocks, environment, shared folders and models: what must be alike on all nodes."""
    found, clocks = [], []
    lacking: dict[tuple[str, str], list[str]] = {}
    drivers: dict[str, list[str]] = {}
    for node in nodes:
        assert node.facts is not None
        ahead_s = max(node.facts["clock"] - node.answered_s, 0) - max(node.asked_s - node.facts["clock"], 0)
        if abs(ahead_s) > asked.max_skew_s:
            clocks.append(f"{node.name} by {ahead_s:+.0f} s")
        if node.facts["driver"]:
            drivers.setdefault(node.facts["driver"], []).append(node.name)
        for name in set(asked.variables) - set(node.facts["variables"]):
            lacking.setdefault(("node.environment", name), []).append(node.name)
        for path in set(asked.paths) - set(node.facts["paths"]):
            lacking.setdefault(("node.folder", path), []).append(node.name)
        for name, pinned in node.facts["models"].items():
            if pinned != here["models"].get(name):
                lacking.setdefault(("weights.node", f"{name}: {pinned}"), []).append(node.name)
    if clocks:
        found.append(failure("node.clock", few(clocks), "the clock is off from ours", CLOCK))
    if len(drivers) > 1:
        rule = "; ".join(f"{driver} on {few(names)}" for driver, names in drivers.items())
        found.append(warning("node.driver", "GPU drivers", f"differ: {rule}", "install one driver on all GPU nodes"))
    words = {
        "node.environment": ("is set here and not there", "give every node the environment of docs/clusters.md"),
        "node.folder": ("is not there", "use a file system that all nodes share, or s3://"),
        "weights.node": ("is another model than here", "copy the folder anew to these nodes"),
    }
    for (check, what), names in sorted(lacking.items()):
        rule, remedy = words[check]
        found.append(failure(check, few(names), f"{what} {rule}", remedy))
    return found


def enough(there: Mapping[str, float], clusters: Mapping[str, TrainClusterConfig], where: str) -> list[Finding]:
    """Whether the workers of each command find room. `there`: by kind; a kind that is left out has room always."""
    found = []
    for verb, cluster in clusters.items():
        for kind, each in (("CPU", cluster.cpus_per_worker), ("GPU", cluster.gpus_per_worker)):
            wanted = cluster.fewest_workers * each
            if kind in there and wanted > there[kind]:
                rule = f"{verb} wants {wanted:g} {kind}s, {there[kind]:g} are there"
                remedy = f"add nodes (an autoscaler may), or lower what the config's cluster asks for {verb}"
                found.append(warning("ray.room", where, rule, remedy))
    return found


def variables_set() -> tuple[str, ...]:
    """Variables of docs/clusters.md that this machine has, and that workers read."""
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION")
    return tuple(name for name in names if os.environ.get(name))
