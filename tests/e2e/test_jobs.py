"""`aai submit` and `aai jobs` on a real cluster with a token: logs, exit codes, stopping, and what they do not tell."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests

from tests.surroundings import free_port, ray_node

ROOT = Path(__file__).resolve().parents[2]
TOKEN, SECRET = "0123456789abcdef" * 2, "planted-secret-of-the-node"
Aai = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cluster file, and the cluster; its nodes have `aai` on their path, and a secret."""
    port, path = free_port(), os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "PATH": path, "AWS_SECRET_ACCESS_KEY": SECRET}
    options = ["--include-dashboard", "true", "--dashboard-port", str(port), "--num-cpus", "2"]
    options += ["--dashboard-agent-listen-port", str(free_port()), "--dashboard-agent-grpc-port", str(free_port())]
    file = tmp_path_factory.mktemp("jobs") / "cluster.yaml"
    file.write_text(f"address: http://127.0.0.1:{port}\ncode: package\n")
    with ray_node(None, environment, *options):
        yield file


@pytest.fixture
def aai(cluster: Path, tmp_path: Path) -> Aai:
    """Runs a command from a folder of its own, with the cluster's token and cluster file."""

    def command(*words: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"RAY_AUTH_TOKEN": token, "PYTHONPATH": str(ROOT)}
        environment.pop("RAY_AUTH_MODE", None)  # the token is enough
        line = [sys.executable, "-m", "pipelines", words[0], "--cluster", str(cluster), *words[1:]]
        return subprocess.run(line, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=240)

    return command


def test_a_command_runs_there_and_ends_here_as_it_did_there(aai: Aai, tmp_path: Path, cluster: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"run_dir: {tmp_path}/run\nclips: 3\n")
    done = aai("submit", "world", "--config", "mine.yaml")
    assert done.returncode == 0, done.stderr
    assert "world: 3 clips" in done.stdout  # its log
    assert "submit: job raysubmit_" in done.stderr
    assert done.stderr.rstrip().endswith("succeeded")
    assert (tmp_path / "run" / "world" / "manifest.csv").is_file()

    done = aai("submit", "promote", "--set", f"run_dir={tmp_path}/run")
    assert done.returncode == 2, done.stderr
    assert "aai promote: error: bundle=" in done.stdout
    assert "failed: Job entrypoint command failed with exit code 2" in done.stderr

    listed = aai("jobs").stdout
    assert [line.split()[1] for line in listed.splitlines()] == ["state", "succeeded", "failed"]
    assert "aai world --config mine.yaml" in listed
    told = requests.get(f"{address(cluster)}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=10)
    assert told.ok
    assert [secret for secret in (TOKEN, SECRET) if secret in told.text + listed + done.stdout + done.stderr] == []


def address(cluster: Path) -> str:
    """The jobs API."""
    return cluster.read_text().split()[1]


def test_a_job_is_stopped(aai: Aai, tmp_path: Path) -> None:
    command = ("submit", "--detach", "world", "--set", f"run_dir={tmp_path}/run", "--set", "clips=5000")
    done = aai(*command)
    assert done.returncode == 0, done.stderr
    name = done.stderr.split("submit: job ")[1].split()[0]
    end_s = time.monotonic() + 60
    while not list(tmp_path.glob("run/world/clips/*")):
        assert time.monotonic() < end_s, aai("jobs").stdout
        time.sleep(0.5)
    again = aai(*command)
    assert f"it runs already, since another `aai submit` of the same command\nsubmit: job {name} on" in again.stderr
    assert aai("jobs", "stop", name).returncode == 0
    followed = aai("jobs", "logs", name)
    assert (followed.returncode, f"job {name} stopped" in followed.stderr) == (130, True), followed.stderr
    assert "had ended" in aai("jobs", "stop", name).stderr
    assert "is no job of this cluster" in aai("jobs", "logs", "nobody").stderr


def test_a_log_that_ray_does_not_pass_on_is_told_of(aai: Aai, cluster: Path) -> None:
    headers, job = {"Authorization": f"Bearer {TOKEN}"}, {"entrypoint": r"printf 'caf\351\n'; exit 3"}
    sent = requests.post(f"{address(cluster)}/api/jobs/", json=job, headers=headers, timeout=60)
    assert sent.ok, sent.text[:200]
    name = sent.json()["submission_id"]
    followed = aai("jobs", "logs", name)
    assert followed.returncode == 3, followed.stderr
    assert f"its log could not be shown; on the head it is job-driver-{name}.log" in followed.stderr


def test_another_token_is_refused(aai: Aai, tmp_path: Path, cluster: Path) -> None:
    for words in (("jobs",), ("submit", "world", "--set", f"run_dir={tmp_path}/run")):
        done = aai(*words, token="f" * 32)
        assert done.returncode == 2
        assert "refuses the token of this machine; set RAY_AUTH_TOKEN" in done.stderr
        assert "f" * 32 not in done.stderr
    for path in ("/api/jobs/", "/api/v0/nodes", "/api/version"):
        answers = [requests.get(address(cluster) + path, headers=headers, timeout=10).status_code
                   for headers in ({}, {"Authorization": f"Bearer {'f' * 32}"})]  # fmt: skip
        assert set(answers) <= {401, 403}, (path, answers)
    refused = requests.post(f"{address(cluster)}/api/jobs/", json={"entrypoint": "id"}, timeout=10)
    assert refused.status_code == 401, json.dumps(refused.text[:200])
