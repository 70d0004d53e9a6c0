"""Training under kills, on nodes that come and go, with servers that are away: the long evidence (make accept)."""

import itertools
import json
import random
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster

from aai import storage
from aai.foundation.identity import FoundationSpec
from aai.reader import FeatureReader
from pipelines import featurize
from pipelines.engine import cluster as engine
from pipelines.featurize import FeaturizeConfig
from pipelines.registry import tracking
from pipelines.training import following, ray_train
from tests import tiny
from tests.e2e.test_curation import aai, below, driver_itself, finish
from tests.faults import faulty
from tests.pipelines.conftest import run_here
from tests.pipelines.registry.test_live import Server

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "runs" / "accept-training"
"""Where the long tests keep their results."""
ENCODER = "{hidden_size: 64, num_layers: 2, num_heads: 2, num_mel_bins: 32, head_size: 32}"
STEPS, BATCH = 120, 24


def keep(name: str, found: dict[str, Any]) -> None:
    RUNS.mkdir(parents=True, exist_ok=True)
    (RUNS / f"{name}.json").write_text(json.dumps(found, indent=1))
    print(name, found)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """features of 96 clips, and the foundation's folders."""
    root = tmp_path_factory.mktemp("training")
    clip = tiny.write_clip(root / "clip")
    spec = FoundationSpec(clip=str(clip), diffusion=str(tiny.write_diffusion(root / "diffusion", clip)))
    table = tiny.write_clip_table(root / "accepted", 8, 12)
    settings = {"input": str(table), "out": str(root / "features"), "foundation": spec.model_dump()}
    with pytest.MonkeyPatch.context() as patch:
        run_here(patch)
        featurize.run(FeaturizeConfig.parse(settings))
    return {"features": str(root / "features"), "clip": str(clip), "diffusion": str(spec.diffusion)}


def settings_of(world: dict[str, str], out: str, **more: Any) -> dict[str, Any]:
    """Settings of a training of seconds, with an entry for each step."""
    fit = {"steps": STEPS, "batch_size": BATCH, "log_every": 1, "checkpoint_every": 7, "warmup_steps": 5}
    values: dict[str, Any] = {f"fit__{name}": value for name, value in fit.items()}
    values |= {"fit__precision": "float32", "encoder": ENCODER, "cluster__max_failures": 3, "shuffle_clips": 16}
    values |= {"foundation__clip": world["clip"], "foundation__diffusion": world["diffusion"], "fit__eval_every": 0}
    return values | {"features": world["features"], "out": out, **more}


def start(world: dict[str, str], out: Path, **more: Any) -> "subprocess.Popen[bytes]":
    """Starts `aai align` in a process group of its own."""
    tracking_uri = f"sqlite:///{out.parent}/{out.name}.db"
    return aai("align", **{"tracking__uri": tracking_uri, **settings_of(world, str(out), **more)})


def last_step(out: str) -> int:
    entries = following.history(out)
    return int(entries[-1]["step"]) if entries else 0


def wait_for_step(out: Path, step: int, driver: "subprocess.Popen[bytes]") -> bool:
    """False when the driver ended before."""
    while driver.poll() is None:
        if last_step(str(out)) >= step:
            return True
        time.sleep(0.05)
    return False


def sha(out: Path) -> str:
    return str(storage.read_json(str(out / "align.json"))["sha"])


def training_worker(driver: psutil.Process) -> list[psutil.Process]:
    """The processes that train."""
    return below(driver, "RayTrainWorker")


def kill_runs(
    world: dict[str, str], folder: Path, runs: int, pick: Callable[[psutil.Process], list[psutil.Process]]
) -> dict[str, Any]:
    """Runs that are killed at a random step, beside one that is not."""
    assert start(world, folder / "whole").wait(timeout=600) == 0
    rng, at, attempts = random.Random(0), [], []
    while len(at) < runs:
        out, step = folder / f"killed-{len(at)}-{len(attempts)}", rng.randrange(3, STEPS - 20)
        driver = start(world, out)
        struck = wait_for_step(out, step, driver)
        victims = pick(psutil.Process(driver.pid)) if struck else []
        if victims:
            rng.choice(victims).kill()
            at.append(step)
        attempts.append(finish(driver, lambda out=out: start(world, out)))
        steps = [entry["step"] for entry in following.history(str(out)) if "loss" in entry]
        assert steps == list(range(1, STEPS + 1)), "an entry is missing"
        assert sha(out) == sha(folder / "whole"), f"killed at step {step}"
    return {"killed_at": at, "calls": attempts, "equal": runs, "sha": sha(folder / "whole")}


@pytest.mark.accept
@pytest.mark.timeout(3600)
def test_k4_ten_killed_workers(world: dict[str, str], tmp_path: Path) -> None:
    keep("workers", kill_runs(world, tmp_path, 10, training_worker))


@pytest.mark.accept
@pytest.mark.timeout(3600)
def test_k4_five_killed_drivers(world: dict[str, str], tmp_path: Path) -> None:
    found = kill_runs(world, tmp_path, 5, driver_itself)
    assert max(found["calls"]) > 1
    keep("drivers", found)


# ---------------------------------------------------------------- nodes come and go


@pytest.fixture
def nodes() -> Iterator[Cluster]:
    """A head without CPUs for training; tests add nodes."""
    engine.shutdown()
    patient = {"health_check_timeout_ms": 60_000}  # a busy machine is not a dead node
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": patient}
    found = Cluster(initialize_head=True, head_node_args=head)
    yield found
    engine.shutdown()
    found.shutdown()


def check_heard(world: dict[str, str], folder: Path, ranks: int) -> None:
    """Each process has heard a part of the clips of successive steps, and all together every step's clips."""
    reader = FeatureReader(
        world["features"], "train", BATCH // ranks, 0, 0, ranks, columns=("image_features",), shuffle_clips=16
    )
    each = [itertools.islice(reader.of_rank(rank).batches(), STEPS) for rank in range(ranks)]
    wanted = [set(itertools.chain(*(batch["clip_id"] for batch in parts))) for parts in zip(*each, strict=True)]
    heard: dict[int, set[str]] = defaultdict(set)
    for file in sorted(folder.glob("*.jsonl")):
        lines = [set(json.loads(line)) for line in file.read_text().splitlines()]
        first = [n for n in range(STEPS) if all(a <= b for a, b in zip(lines, wanted[n:], strict=False))]
        assert len(first) == 1, (file, first)
        for step, clips in enumerate(lines, first[0]):
            heard[step] |= clips
    assert [step for step in range(STEPS) if heard[step] != wanted[step]] == []


def final_loss(out: Path) -> float:
    losses = [entry["loss"] for entry in following.history(str(out)) if "loss" in entry]
    return sum(losses[-20:]) / 20


@pytest.mark.accept
@pytest.mark.timeout(1800)
def test_k4_from_four_workers_to_two_and_back(world: dict[str, str], nodes: Cluster, tmp_path: Path) -> None:
    nodes.add_node(num_cpus=2)
    second = nodes.add_node(num_cpus=2)
    common = {"cluster__cpus_per_worker": 1, "cluster__address": nodes.address, "cluster__resize_every_s": 5}
    out, heard = tmp_path / "elastic", tmp_path / "heard"
    heard.mkdir()
    values = settings_of(world, str(out), **common, cluster__num_workers="[2,4]", fit__checkpoint_every=5)
    sets = [f"{name.replace('__', '.')}={value}" for name, value in values.items()]
    sets.append(f"tracking.uri=sqlite:///{tmp_path}/elastic.db")
    command = [sys.executable, "-m", "tests.e2e.logged_stage", str(heard), *sets]
    driver = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    assert wait_for_step(out, 20, driver)
    nodes.remove_node(second, allow_graceful=False)
    at = last_step(str(out))
    assert wait_for_step(out, at + 30, driver)
    nodes.add_node(num_cpus=2)
    assert driver.wait(timeout=900) == 0
    workers = [entry["workers"] for entry in following.history(str(out)) if "loss" in entry]
    seen = [size for size, _ in itertools.groupby(workers)]
    assert len(workers) == STEPS
    check_heard(world, heard, 4)
    plain = []
    for seed in range(3):
        place = tmp_path / f"seed{seed}"
        assert start(world, place, cluster__num_workers=4, fit__seed=seed).wait(timeout=600) == 0
        plain.append(final_loss(place))
    spread, gap = max(plain) - min(plain), abs(final_loss(out) - plain[0])
    keep("elastic", {"workers": seen, "loss": final_loss(out), "undisturbed": plain, "gap": gap, "spread": spread})
    assert seen[:2] == [4, 2]
    assert seen[-1] == 4
    assert gap <= spread


@pytest.mark.accept
@pytest.mark.timeout(900)
def test_k4_a_notice_makes_a_checkpoint(world: dict[str, str], nodes: Cluster, tmp_path: Path) -> None:
    """A node is announced to be taken away: a checkpoint at once, and the training goes on with the others."""
    import ray

    gone = nodes.add_node(num_cpus=1)
    nodes.add_node(num_cpus=1)
    out = tmp_path / "out"
    more = {"cluster__address": nodes.address, "cluster__num_workers": "[1,2]", "cluster__resize_every_s": 300}
    driver = start(world, out, **more, fit__checkpoint_every=10_000, cluster__max_failures=0)
    assert wait_for_step(out, 20, driver)
    ray.init(address=nodes.address)
    deadline_ms = int((time.time() + 8) * 1000)
    gcs = ray._private.worker.global_worker.gcs_client
    accepted, reason = gcs.drain_node(gone.node_id, 2, "spot instance is taken back", deadline_ms)
    ray.shutdown()
    assert accepted, reason
    at = last_step(str(out))
    time.sleep(9)
    nodes.remove_node(gone, allow_graceful=False)
    assert driver.wait(timeout=600) == 0
    entries = [entry for entry in following.history(str(out)) if "loss" in entry]
    assert [entry["step"] for entry in entries] == list(range(1, STEPS + 1))
    workers = [size for size, _ in itertools.groupby(entry["workers"] for entry in entries)]
    keep("notice", {"noticed_at": at, "workers": workers, "alone_from": [e["workers"] for e in entries].index(1) + 1})
    assert workers == [2, 1], "without the checkpoint it would have begun anew, with one worker"


# ---------------------------------------------------------------- servers that are away


@pytest.mark.accept
@pytest.mark.timeout(1800)
def test_k4_mlflow_and_s3_away_for_a_minute(
    world: dict[str, str], s3: str, s3_server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.upload_folder(world["features"], f"{s3}/features")
    server, outage = Server(tmp_path), threading.Event()
    server.start()
    server.wait()
    with faulty(s3_server["AWS_ENDPOINT_URL"], 0.0, outage=outage) as (address, counts):
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        out = f"{s3}/align"
        values = settings_of(world, out, fit__steps=900, features=f"{s3}/features", tracking__uri=server.config.uri)
        driver = aai("align", **values, tracking__experiment="live")
        while last_step(out) < 50:
            assert driver.poll() is None
            time.sleep(0.5)
        server.stop()
        outage.set()
        time.sleep(60)
        assert driver.poll() is None
        outage.clear()
        server.start()
        assert driver.wait(timeout=900) == 0
        entries = [entry["step"] for entry in following.history(out) if "loss" in entry]
        assert entries == list(range(1, 901))
    with tracking.run(server.config, "probe") as run:
        experiment = run.client.get_experiment_by_name("live")
        found = run.client.search_runs([experiment.experiment_id])
        trained = [other for other in found if "align" in other.info.run_name]
        steps = [metric.step for metric in run.client.get_metric_history(trained[0].info.run_id, "loss")]
    server.stop()
    assert sorted(set(steps)) == list(range(1, 901))
    failed = counts["500"] + counts["503"]
    keep("servers", {"refused": failed, "passed": counts["none"], "entries": len(entries), "mlflow": len(steps)})
    assert failed > 10
    assert not storage.exists(ray_train.checkpoints(out))
