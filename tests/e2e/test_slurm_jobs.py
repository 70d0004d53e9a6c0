"""Jobs of infra/slurm/aai.sbatch on two nodes, which a stand-in for Slurm starts on this machine (make accept).

pytest -m accept tests/e2e/test_slurm_jobs.py
"""

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest

from aai import storage
from aai.toy.writer import write_world
from tests.slurm_stand_in import JOB, ROOT, processes, sbatch

pytestmark = [pytest.mark.accept, pytest.mark.timeout(400)]

CLIPS = 60


def curate(folder: Path, nodes: int = 2, chain: bool = False, **environment: str) -> subprocess.Popen[bytes]:
    """A job that curates the toy world in `folder`, alone or as a stage of `aai run`."""
    sets = {"run_dir": folder / "run", "cluster.num_workers": 2, "rows_per_shard": 2, "tracking": "null"}
    words = [word for name, value in sets.items() for word in ("--set", f"{name}={value}")]
    script = ROOT / "infra" / "slurm" / "aai.sbatch"
    return sbatch(
        script, ["curate", "--config", f"{ROOT}/configs/demo/curate.yaml", *words], nodes, folder, environment
    )


def log(folder: Path) -> str:
    return (folder / f"aai-{JOB}.log").read_text()


def until(true: Callable[[], Any], job: subprocess.Popen[bytes]) -> None:
    """Waits for something that happens before the job ends."""
    while not true():
        assert job.poll() is None, "the job has ended"
        time.sleep(0.05)


def measured(folder: Path) -> int:
    return len(list((folder / "run" / "curated" / "_measured").glob("*.parquet")))


def tables(folder: Path) -> list[pa.Table]:
    """Both tables, without what names their place."""
    found = [storage.read_table(str(folder / "run" / "curated" / name)) for name in ("accepted", "rejected")]
    return [
        table.drop_columns([c for c in ("uri", "message") if c in table.column_names]).replace_schema_metadata(None)
        for table in found
    ]


def assert_nothing_is_left(folder: Path) -> None:
    """Ray's workers end a moment after their raylet."""
    _, alive = psutil.wait_procs(processes(folder), timeout=10)
    assert [process.cmdline() for process in alive] == []
    assert list(Path("/tmp").glob(f"aai-{JOB}-*")) == []


def world(folder: Path) -> Path:
    write_world(str(folder / "run" / "world"), CLIPS, seed=5, num_workers=1, progress=False)
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[pa.Table]:
    """The tables of a job that nothing happened to, whose token nobody could see."""
    folder = world(tmp_path_factory.mktemp("undisturbed"))
    job = curate(folder)
    until(lambda: measured(folder) > 0, job)
    running = processes(folder)
    (token,) = {process.environ()["RAY_AUTH_TOKEN"] for process in running if "raylet" in process.name()}
    assert len(token) == 64
    assert sum("raylet" in process.name() for process in running) == 2
    shown = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not any(token in word for words in shown for word in words)
    files = [path for folder in Path("/tmp").glob(f"aai-{JOB}-*") for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if token.encode() in path.read_bytes()] == []
    assert job.wait(200) == 0
    assert "2 of 2 nodes, 2 CPUs, 0 GPUs" in log(folder)
    assert token not in log(folder)
    assert_nothing_is_left(folder)
    return tables(folder)


def test_a_job_gives_its_tables_and_ends(undisturbed: list[pa.Table]) -> None:
    accepted, rejected = undisturbed
    assert len(accepted) + len(rejected) == CLIPS


def test_at_the_time_limit_the_job_is_queued_again_and_goes_on(undisturbed: list[pa.Table], tmp_path: Path) -> None:
    folder = world(tmp_path)
    job = curate(folder, chain=True)
    until(lambda: measured(folder) >= 3, job)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(100) != 0
    done = measured(folder)
    assert "run the same command again to go on" in log(folder)
    assert (folder / "requeued").read_text() == f"{JOB}\n"
    assert_nothing_is_left(folder)
    assert done < CLIPS / 2
    assert curate(folder, chain=True, SLURM_RESTART_COUNT="1").wait(200) == 0
    assert tables(folder) == undisturbed
    print(f"{done} of {CLIPS // 2} shards were measured when the time was over")


def test_a_job_that_is_cancelled_ends_and_is_not_queued_again(tmp_path: Path) -> None:
    folder = world(tmp_path)
    job = curate(folder)
    until(lambda: measured(folder) > 0, job)
    job.terminate()
    assert job.wait(100) != 0
    assert not (folder / "requeued").exists()
    assert_nothing_is_left(folder)


def test_a_job_survives_the_loss_of_a_node(undisturbed: list[pa.Table], tmp_path: Path) -> None:
    folder = world(tmp_path)
    job = curate(folder)
    until(lambda: measured(folder) >= 3, job)
    second = [process for process in processes(folder) if process.environ().get("SLURMD_NODENAME") == "node2"]
    for process in second:
        process.kill()
    assert job.wait(200) == 0
    assert tables(folder) == undisturbed
    assert psutil.wait_procs(processes(folder), timeout=10)[1] == []
    for left in Path("/tmp").glob(f"aai-{JOB}-*"):  # what a dead node leaves
        subprocess.run(["rm", "-r", left], check=True)


def test_jobs_share_a_machine_without_knowing_of_each_other(undisturbed: list[pa.Table], tmp_path: Path) -> None:
    folders = [world(tmp_path / name) for name in ("one", "two")]
    jobs = [curate(folder, nodes=1) for folder in folders]
    for folder, job in zip(folders, jobs, strict=True):
        assert job.wait(200) == 0
        assert tables(folder) == undisturbed
    for folder in folders:
        assert_nothing_is_left(folder)


def test_a_head_that_does_not_start_ends_the_job(tmp_path: Path) -> None:
    folder = world(tmp_path)
    assert curate(folder, SLURM_CPUS_ON_NODE="none").wait(60) == 1
    assert "Ray's head did not start" in log(folder)
    assert_nothing_is_left(folder)
