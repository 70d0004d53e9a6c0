"""Curation under kills and storage faults: the long evidence (make accept), and a sample of it."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
import s3fs
from ray.cluster_utils import Cluster

from aai import storage
from aai.toy.writer import write_world
from pipelines import curate
from pipelines.engine import cluster
from tests.faults import faulty
from tests.pipelines.conftest import run_here

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "runs" / "accept-curation"
"""Where the long tests keep their worlds and results."""


def aai(*args: str, **settings: Any) -> "subprocess.Popen[bytes]":
    """Starts one command in a process group of its own; `settings` as for --set."""
    sets = [part for name, value in settings.items() for part in ("--set", f"{name.replace('__', '.')}={value}")]
    command = [sys.executable, "-m", "pipelines", *args, *sets]
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True)


def run(*args: str, **settings: Any) -> None:
    """Runs one command to its end, which must be good."""
    assert aai(*args, **settings).wait(timeout=1800) == 0


def tables(out: Path | str) -> dict[str, pa.Table]:
    """Both tables, in the order of their files."""
    return {name: storage.read_table(storage.join(str(out), name)) for name in ("accepted", "rejected")}


# ---------------------------------------------------------------- B4: kills


def below(process: psutil.Process, *words: str) -> list[psutil.Process]:
    """Processes started by this one, directly or not, whose command line holds one of the words."""
    found = []
    for child in process.children(recursive=True):
        try:
            if any(word in " ".join(child.cmdline()) for word in words):
                found.append(child)
        except psutil.Error:  # it ended while we looked
            continue
    return found


def decode_child(driver: psutil.Process) -> list[psutil.Process]:
    """The processes that decode."""
    return below(driver, "aai.media.child")


def ray_worker(driver: psutil.Process) -> list[psutil.Process]:
    """Ray's workers."""
    return below(driver, "ray::")


def driver_itself(driver: psutil.Process) -> list[psutil.Process]:
    """The command that the user started."""
    return [driver]


def kill_at(
    wait_s: float, driver: "subprocess.Popen[bytes]", pick: Callable[[psutil.Process], list[psutil.Process]]
) -> bool:
    """Kills one of the picked processes after a while; False when the command had ended before."""
    time.sleep(wait_s)
    if driver.poll() is not None:
        return False
    victims = pick(psutil.Process(driver.pid))
    if victims:
        random.choice(victims).kill()
    return bool(victims)


def finish(driver: "subprocess.Popen[bytes]", again: Callable[[], "subprocess.Popen[bytes]"]) -> int:
    """Waits for a command and, when it was not good, for up to three more of the same; returns how many ran."""
    for attempt in range(1, 5):
        if driver.wait(timeout=900) == 0:
            return attempt
        subprocess.run(["pkill", "-KILL", "-g", str(driver.pid)], check=False)  # what a dead driver left behind
        driver = again()
    raise AssertionError("four runs did not finish the job")


@pytest.fixture(scope="module")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(str(folder), 60, seed=11, progress=False)
    return folder


def test_b4_a_killed_driver_loses_and_doubles_nothing(
    small_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sample of the kill runs: the driver, in the middle of the work."""

    def start(out: Path) -> "subprocess.Popen[bytes]":
        return aai("curate", "--manifest", str(small_world / "manifest.csv"), "--out", str(out), rows_per_shard=6)

    run_here(monkeypatch)
    settings = {"manifest": str(small_world / "manifest.csv"), "out": str(tmp_path / "whole"), "rows_per_shard": 6}
    curate.run(curate.CONFIG.parse(settings))
    driver = start(tmp_path / "killed")
    while driver.poll() is None and not list((tmp_path / "killed").glob("_measured/*.parquet")):
        time.sleep(0.05)
    assert kill_at(0, driver, driver_itself)
    driver.wait()
    done = len(list((tmp_path / "killed").glob("_measured/*.parquet")))
    assert 0 < done < 10
    assert finish(start(tmp_path / "killed"), lambda: start(tmp_path / "killed")) == 1
    assert tables(tmp_path / "killed") == tables(tmp_path / "whole")
    assert storage.read_json(str(tmp_path / "killed" / "curate.json"))["measured"] <= 60 - 6 * done


@pytest.fixture
def two_nodes() -> Iterator[Cluster]:
    """Two nodes on this machine; the driver joins the first, the second may be killed."""
    cluster.shutdown()
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    yield nodes
    nodes.shutdown()


@pytest.mark.accept
@pytest.mark.timeout(3600)
def test_b4_twenty_four_kills(tmp_path: Path) -> None:
    """Decode child, Ray worker, driver and raylet, six times each, at random times: the tables stay the same."""
    world, rng = tmp_path / "world", random.Random(4)
    write_world(str(world), 240, seed=12, progress=False)

    def start(out: Path, address: str | None = None) -> "subprocess.Popen[bytes]":
        joined = ["--address", address] if address else []
        return aai("curate", "--manifest", str(world / "manifest.csv"), "--out", str(out), *joined, rows_per_shard=8)

    pick = {"decode child": decode_child, "ray worker": ray_worker, "driver": driver_itself}
    alive = _watch(start(tmp_path / "whole"), pick)
    alive["raylet"], rows = alive["driver"], []
    whole = tables(tmp_path / "whole")
    for number in range(24):
        kind = ("decode child", "ray worker", "driver", "raylet")[number % 4]
        out, wait_s = tmp_path / f"run{number}", rng.uniform(*alive[kind])
        if kind == "raylet":
            struck, runs = _kill_raylet(start, out, wait_s)
        else:
            driver = start(out)
            struck = kill_at(wait_s, driver, pick[kind])
            runs = finish(driver, lambda out=out: start(out))  # type: ignore[misc]
        same = tables(out) == whole
        rows.append({"kind": kind, "after_s": round(wait_s, 1), "struck": struck, "runs": runs, "same": same})
        RUNS.mkdir(parents=True, exist_ok=True)
        (RUNS / "kills.json").write_text(json.dumps({"alive_s": alive, "kills": rows}, indent=1))
    assert all(row["same"] for row in rows), rows
    assert sum(row["struck"] for row in rows) >= 20, rows


def _watch(
    driver: "subprocess.Popen[bytes]", picks: dict[str, Callable[[psutil.Process], list[psutil.Process]]]
) -> dict[str, tuple[float, float]]:
    """When victims of each kind were seen alive, in seconds since the start of a command that is left in peace."""
    begin, seen = time.monotonic(), {}
    while driver.poll() is None:
        now_s = time.monotonic() - begin
        for kind, pick in picks.items():
            if driver.poll() is None and pick(psutil.Process(driver.pid)):
                seen[kind] = (seen.get(kind, (now_s, now_s))[0], now_s)
        time.sleep(0.2)
    assert driver.returncode == 0
    return seen


def _kill_raylet(start: Callable[..., "subprocess.Popen[bytes]"], out: Path, wait_s: float) -> tuple[bool, int]:
    """Kills the second node's raylet under a running job; (whether it was running, runs)."""
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = nodes.add_node(num_cpus=1)
    try:
        driver = start(out, nodes.address)
        time.sleep(wait_s)
        struck = driver.poll() is None
        second.kill_raylet()
        return struck, finish(driver, lambda: start(out, nodes.address))
    finally:
        nodes.shutdown()


# ---------------------------------------------------------------- B6: storage that fails


def _curate(base: str) -> None:
    settings = {"manifest": f"{base}/world/manifest.csv", "out": f"{base}/curated", "rows_per_shard": 16}
    curate.run(curate.CONFIG.parse(settings))


def _faulty_chain(s3: str, endpoint: str, clips: int, local: Path, *tables: str) -> dict[str, int]:
    """curate on S3 behind a proxy that spoils 1 request in 20, and on local files.

    With "features" also featurize; both are then started as a user does.
    """
    for base in (str(local), s3):
        write_world(storage.join(base, "world"), clips, seed=6, num_workers=1, progress=False)
    with faulty(endpoint, 0.05) as (address, counts):
        os.environ["AWS_ENDPOINT_URL"] = address
        s3fs.S3FileSystem.clear_instance_cache()
        if "features" in tables:
            run("curate", run_dir=s3, rows_per_shard=16, tracking="null")
            run("featurize", run_dir=s3)
        else:
            _curate(s3)
        os.environ["AWS_ENDPOINT_URL"] = endpoint
        s3fs.S3FileSystem.clear_instance_cache()
    _curate(str(local))
    if "features" in tables:
        run("featurize", run_dir=local)
    for name in tables:
        ours, theirs = (storage.read_table(storage.join(base, name)) for base in (s3, str(local)))
        placeless = [c for c in ("uri", "message") if c in ours.column_names]  # a duplicate's message names a place
        ours, theirs = (t.drop_columns(placeless).replace_schema_metadata(None) for t in (ours, theirs))
        assert ours.num_rows > 0
        assert ours.equals(theirs), name
    return dict(counts)


@pytest.fixture
def endpoint(s3: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The S3 server's address; the environment is put back afterwards."""
    cluster.shutdown()
    address = os.environ["AWS_ENDPOINT_URL"]
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    return address


def test_b6_tables_from_a_failing_s3_server_are_whole(
    s3: str, endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process; Ray's workers on S3: test_s3 of tests/pipelines/test_curate.py."""
    run_here(monkeypatch)
    counts = _faulty_chain(s3, endpoint, 48, tmp_path, "curated/accepted")
    assert counts["none"] > 50


@pytest.mark.accept
@pytest.mark.timeout(3600)
def test_b6_at_length(s3: str, endpoint: str, tmp_path: Path) -> None:
    counts = _faulty_chain(s3, endpoint, 400, tmp_path, "curated/accepted", "curated/rejected", "features")
    RUNS.mkdir(parents=True, exist_ok=True)
    (RUNS / "s3_faults.json").write_text(json.dumps(counts))
    assert min(counts.get(kind, 0) for kind in ("500", "503", "slow")) >= 5, counts
