"""N9: a node whose network is cut, or that is taken back with a notice, in the middle of each stage of a run.

The nodes are network namespaces of this machine with a cable each; wants root.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from pipelines.training.following import history
from tests.e2e.test_run_on_cluster import Run, chain, rows
from tests.networks import Network, network
from tests.surroundings import ray_node

MORE = {"align": ["fit.steps=150"], "adapt": ["fit.steps=60"]}
"""So many steps that a cut is in their middle."""
NODES, CUT_S = 3, 60.0
WORKERS = {"curate": "MapWorker(MapBatches(_Actor))", "align": "RayTrainWorker", "adapt": "RayTrainWorker"}
"""How the processes are called that do a stage's work."""

NODE_AT = """
import sys
from ray._raylet import GcsClient
nodes = GcsClient(address=sys.argv[1]).get_all_node_info().values()
print(next(node.node_id.hex() for node in nodes if node.node_manager_address == sys.argv[2]))
"""
"""Prints the id of a node by its address: in a process that has had the cluster's token from its start."""


class Fleet:
    """A head without CPUs, where the commands run, and nodes of one worker each, all on a network of their own."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack, self.network = stack, stack.enter_context(network())
        self.address = stack.enter_context(ray_node(None, None, "--num-cpus", "0", at=self.network.here))

    def add(self) -> None:
        """One more node."""
        name, address = self.network.add()
        self.stack.enter_context(ray_node(self.address, None, "--num-cpus", "1", at=address, inside=name))

    def cut(self, name: str, seconds: float) -> None:
        """A node hears nobody and is heard by nobody for so long; it works on."""
        self.network.cut(name)
        time.sleep(seconds)
        self.network.mend(name)

    def refill(self) -> bool:
        """Another node for one that is gone; whether there was one."""
        gone = len(self.network.holders("raylet/raylet")) < NODES
        if gone:
            self.add()
        return gone

    def take_back(self, name: str, notice_s: int) -> None:
        """As a cloud does with a spot node: it is announced, and after so many seconds the machine is gone."""
        asked = [sys.executable, "-c", NODE_AT, self.address, self.network.address_of(name)]
        node = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
        why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the spot node is taken back"]
        command = [str(Path(sys.executable).parent / "ray"), "drain-node", "--address", self.address, *why]
        command += ["--node-id", node, "--deadline-remaining-seconds", str(notice_s)]
        subprocess.run(command, check=True)
        time.sleep(notice_s)
        for process in self.network.processes(name):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    """A head and three nodes."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef" * 2)
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "100")
    with ExitStack() as stack:
        found = Fleet(stack)
        for _ in range(NODES):
            found.add()
        yield found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a world of clips, the folder of a run on this machine that nothing disturbed)."""
    from aai.toy.writer import write_world

    base = tmp_path_factory.mktemp("n9")
    write_world(str(base / "world"), 120, seed=3, progress=False)
    Run(chain(base / "whole", base / "world", **MORE), "--until", "adapt").ended()
    return base / "world", base / "whole"


def begun(fleet: Fleet, file: Path, until: str) -> Run:
    """A run on the cluster, of which nothing stays when that ends."""
    run = Run(file, "--address", fleet.address, "--until", until)

    def end() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.process.pid, signal.SIGKILL)

    fleet.stack.callback(end)
    return run


def at_work(network: Network, folder: Path, verb: str) -> str:
    """The first node with a process that works for a stage, once it is in the middle of its work."""
    end_s = time.monotonic() + 120
    while time.monotonic() < end_s:
        found = network.holders(WORKERS[verb])
        if found and (verb == "curate" or any(entry["step"] > 10 for entry in history(str(folder / "run" / verb)))):
            return found[0]
        time.sleep(0.1)
    raise AssertionError(f"nobody works for {verb}")


def trained(folder: Path, verb: str) -> tuple[list[int], bytes]:
    """What a training came to: the steps that its history has, and the weights.

    An entry after a restart is the mean of fewer steps than the undisturbed run's.
    """
    steps = [entry["step"] for entry in history(str(folder / "run" / verb)) if "loss" in entry]
    weights = {"align": "aligner", "adapt": "adapter"}[verb]
    return steps, (folder / "run" / verb / "bundle" / f"{weights}.safetensors").read_bytes()


def check(struck: Path, whole: Path, *trainings: str) -> None:
    """A run has come to what another came to, row for row and bit for bit."""
    for name in ("curated/accepted", "curated/rejected", "features"):
        assert rows(struck, name) == rows(whole, name), name
    for verb in trainings:
        assert trained(struck, verb) == trained(whole, verb), verb


def over(run: Run, verb: str, fleet: Fleet) -> str:
    """What came of a stage; meanwhile another node comes for one that is gone, as an autoscaler or a person sees to."""
    begin_s, gone = time.monotonic(), 0
    while run.stage() == verb:
        gone += fleet.refill()
        time.sleep(0.5)
    return f"the stage ended {time.monotonic() - begin_s:.0f} s after; nodes that ended themselves: {gone}"


@pytest.mark.accept
@pytest.mark.timeout(3600)
def test_n9_a_node_that_works_is_cut_off_in_every_stage(
    undisturbed: tuple[Path, Path], fleet: Fleet, tmp_path: Path
) -> None:
    world, whole = undisturbed
    cut = tmp_path / "cut"
    run = begun(fleet, chain(cut, world, **MORE), "adapt")
    for verb in WORKERS:
        assert run.wait_for(verb)
        name = at_work(fleet.network, cut, verb)
        fleet.cut(name, CUT_S)
        there = run.stage() == verb
        print(f"{verb}: {name} with a {WORKERS[verb]} cut off for {CUT_S:g} s, still at it: {there}", end="; ")
        print(over(run, verb, fleet))
    run.ended()
    check(cut, whole, "align", "adapt")


@pytest.mark.accept
@pytest.mark.timeout(3600)
def test_n9_a_node_that_works_for_curate_is_taken_back_with_a_notice(
    undisturbed: tuple[Path, Path], fleet: Fleet, tmp_path: Path
) -> None:
    world, whole = undisturbed
    taken = tmp_path / "taken"
    run = begun(fleet, chain(taken, world, **MORE), "featurize")
    assert run.wait_for("curate")
    name = at_work(fleet.network, taken, "curate")
    fleet.take_back(name, 10)
    print(f"curate: {name} at work taken back after 10 s, still at it: {run.stage() == 'curate'}", end="; ")
    print(over(run, "curate", fleet))
    run.ended()
    assert "broke off" not in run.log.read_text()
    check(taken, whole)
