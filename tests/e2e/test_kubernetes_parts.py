"""What the manifests' containers run, run here: MLflow on PostgreSQL as deployed, its backup, and the way back.

The scripts, arguments and environment are those of the rendered overlay; folders, ports and the number of processes are
this machine's.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
import httpx
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from sqlalchemy import make_url

from aai import storage
from aai.foundation.identity import TOY_WEIGHTS
from pipelines.__main__ import CONFIGS, module_of
from pipelines.settings import TrackingConfig
from tests.dead_settings import Document, pods
from tests.kustomized import INFRA, needs_kustomize, rendered
from tests.pipelines.test_serve import free_port
from tests.postgres import INITDB, postgres

needs_postgres = pytest.mark.skipif(INITDB is None, reason="PostgreSQL is not installed (no initdb)")
ADMIN = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": "a-password-for-tests"}


def container(name: str) -> Document:
    """A container of the overlay gpu."""
    every = [each for pod in pods(rendered("gpu")) for each in pod["spec"]["containers"]]
    every += [each for pod in pods(rendered("gpu")) for each in pod["spec"].get("initContainers", [])]
    return next(each for each in every if each["name"] == name)


def environment(database: str, bucket: Path) -> dict[str, str]:
    """What the settings, the secret and the container say, for a PostgreSQL on this machine."""
    url = make_url(database)
    own = {each["name"]: each["value"] for each in container("mlflow")["env"] if "value" in each}
    here = {"PGHOST": str(url.host), "PGPORT": str(url.port), "PGUSER": str(url.username), "AAI_BUCKET": str(bucket)}
    secret = {"MLFLOW_AUTH_ADMIN_USERNAME": "admin", "MLFLOW_AUTH_ADMIN_PASSWORD": "a-password-for-tests"}
    image = {"MLFLOW_AUTH_CONFIG_PATH": str(INFRA / "docker" / "basic_auth.ini")}
    more = {"MLFLOW_FLASK_SERVER_SECRET_KEY": "a-secret-for-tests", "POD_IP": "127.0.0.1"}
    programs = {"PATH": f"{Path(str(INITDB)).resolve().parent}:{os.environ['PATH']}"}
    return {**os.environ, **own, **here, **secret, **image, **more, **programs}


@contextmanager
def server(told: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TrackingConfig]:
    """`mlflow server` with the Deployment's arguments; yields how an account of it is reached."""
    port = free_port()
    words = [word.replace("--port=5000", f"--port={port}") for word in container("mlflow")["args"]]
    words = [word.replace("$(AAI_BUCKET)", told["AAI_BUCKET"]).replace("$(POD_IP)", "127.0.0.1") for word in words]
    words = [word.replace("--workers=2", "--workers=1") for word in words]
    words = [word.replace(":5000", f":{port}") for word in words]
    with (folder / "mlflow.log").open("ab") as log:
        running = subprocess.Popen(
            [sys.executable, "-m", *words], env=told, cwd=folder, stdout=log, stderr=log, start_new_session=True
        )
        try:
            for name, value in ADMIN.items():
                monkeypatch.setenv(name, value)
            config = TrackingConfig(uri=f"http://127.0.0.1:{port}", experiment="kept", model_name="kept")
            healthy(f"{config.uri}{container('mlflow')['readinessProbe']['httpGet']['path']}", running)
            yield config
        finally:
            os.killpg(running.pid, signal.SIGKILL)
            running.wait(20)


def healthy(url: str, running: subprocess.Popen[bytes], status: int = 200) -> None:
    """Waits for an answer of this status."""
    end_s = time.monotonic() + 200
    while running.poll() is None and time.monotonic() < end_s:
        with suppress(httpx.HTTPError):
            if httpx.get(url, timeout=5).status_code == status:
                return
        time.sleep(0.5)
    pytest.fail(f"{url} does not answer with {status}")


def sql(told: dict[str, str], database: str, *words: str) -> str:
    """psql's answer."""
    done = subprocess.run(["psql", "-At", "-d", database, *words], env=told, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def make(told: dict[str, str]) -> None:
    """The two databases, as the image makes the first and the ConfigMap's script the second."""
    init = next(each for each in rendered("gpu") if each["metadata"]["name"] == "postgresql-init")
    for command in ("CREATE DATABASE mlflow;", *init["data"].values()):
        sql(told, "postgres", "-c", command)


def run(script: list[str], told: dict[str, str], folder: Path) -> None:
    """A container's command, with its folder on this machine."""
    words = [sys.executable if word == "python" else word.replace("/dump", str(folder)) for word in script]
    done = subprocess.run(words, env=told, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.accept
@pytest.mark.timeout(600)
@needs_postgres
@needs_kustomize
def test_n1_mlflow_as_deployed_is_dumped_and_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dump, upload = container("dump"), container("upload")
    server_of = container("postgresql")
    probes = [server_of[kind]["exec"]["command"] for kind in ("startupProbe", "readinessProbe", "livenessProbe")]
    bucket = tmp_path / "bucket"
    with postgres() as database:
        told = environment(database, bucket)
        make(told)
        for probe in probes:
            run(probe, told, tmp_path)
        with server(told, tmp_path, monkeypatch) as config:
            client: Any = MlflowClient(config.uri)
            client.create_registered_model("kept")
            client.set_registered_model_tag("kept", "why", "to be restored")
            monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a-wrong-one")
            with pytest.raises(MlflowException, match="401"):
                MlflowClient(config.uri).get_registered_model("kept")
        (tmp_path / "dump").mkdir()
        run([*dump["command"], *dump["args"]], told, tmp_path / "dump")
        run([*upload["command"], *upload["args"]], told, tmp_path / "dump")
    (night,) = (bucket / "backups" / "mlflow").iterdir()
    assert sorted(path.name for path in night.iterdir()) == ["mlflow.dump", "mlflow_accounts.dump"]
    assert storage.exists(str(night / "mlflow.dump"))
    with postgres() as another:  # the first one and its volume are gone
        told = environment(another, bucket)
        make(told)
        for name in ("mlflow", "mlflow_accounts"):
            back = ["pg_restore", "--clean", "--if-exists", "--no-owner", f"--dbname={name}"]
            words = [*back, str(night / f"{name}.dump")]
            run(words, told, tmp_path)
        with server(told, tmp_path, monkeypatch) as config:
            assert MlflowClient(config.uri).get_registered_model("kept").tags == {"why": "to be restored"}
        assert sql(told, "mlflow_accounts", "-c", "SELECT username FROM users") == "admin\n"


OFFLINE = """
import sys
from aai.foundation.loaders import load_clip, load_diffusion
from pipelines.featurize import CONFIG
spec = CONFIG.load(sys.argv[1], []).foundation
print(type(load_clip(spec)[0]).__name__, type(load_diffusion(spec)).__name__)
"""


@pytest.mark.accept
@needs_kustomize
def test_n1_models_named_by_hub_id_come_from_the_volume(tmp_path: Path) -> None:
    """Laid out as the job `weights` leaves it, with the toy's files; nothing is asked of the hub, nor written."""
    config = CONFIGS / "featurize" / "vggsound_vitl14_gpu8.yaml"
    spec = module_of("featurize").CONFIG.load(config, []).foundation
    for toy, model_id, commit in (
        ("clip", spec.clip, spec.clip_revision),
        ("diffusion", spec.diffusion, spec.diffusion_revision),
    ):
        shutil.copytree(TOY_WEIGHTS / toy, tmp_path / f"models--{model_id.replace('/', '--')}" / "snapshots" / commit)
    before = sorted(tmp_path.rglob("*"))
    worker = next(each for each in pods(rendered("gpu")) if "initContainers" in each["spec"] and "aai@" in str(each))
    own = {each["name"]: each["value"] for each in worker["spec"]["containers"][0]["env"] if "value" in each}
    assert own["HF_HUB_OFFLINE"] == "1"
    told = {**os.environ, **own, "HF_HUB_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(config)], env=told, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.split() == ["CLIPModel", "StableDiffusionPipeline"], done.stderr[-2000:]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.accept
@needs_kustomize
def test_n1_the_store_of_the_overlay_dev_is_an_s3_server_with_a_key(tmp_path: Path) -> None:
    every = [each for pod in pods(rendered("dev")) for each in pod["spec"]["containers"]]
    store, port = next(each for each in every if each["name"] == "store"), free_port()
    script = store["command"][-1].replace("0.0.0.0:8080", f"127.0.0.1:{port}").replace("/data", str(tmp_path))
    (value,) = [each["value"] for each in store["env"] if each["name"] == "RCLONE_AUTH_KEY"]
    pair = value.replace("$(AWS_ACCESS_KEY_ID)", "a-key").replace("$(AWS_SECRET_ACCESS_KEY)", "a-secret-for-tests")
    told = {"RCLONE_AUTH_KEY": pair, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    running = subprocess.Popen(["sh", "-c", script], env=told, cwd=tmp_path)
    options = {"endpoint_url": f"http://127.0.0.1:{port}", "key": "a-key"}
    try:
        healthy(options["endpoint_url"], running, 400)
        files = fsspec.filesystem("s3", secret="a-secret-for-tests", **options)
        files.pipe("aai/kept.txt", b"kept")
        assert (tmp_path / "aai" / "kept.txt").read_bytes() == b"kept"
        with pytest.raises(PermissionError):
            fsspec.filesystem("s3", secret="another", skip_instance_cache=True, **options).cat("aai/kept.txt")
    finally:
        running.terminate()
        running.wait(20)
