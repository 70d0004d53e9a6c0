"""N4: faults of real surroundings (Ray, S3, MLflow, mounts, clocks), planted one at a time; the doctor names each.

Every one is found by its name with its remedy, nothing else is, no secret is printed, and no call takes 20 s.
"""

import json
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import boto3
import pytest
import yaml

from aai.foundation.identity import FoundationSpec, identity
from tests.conftest import BUCKET
from tests.doctor_faults import FAULTS, Place
from tests.pipelines.conftest import empty_store  # noqa: F401
from tests.pipelines.registry.test_versions import serving
from tests.surroundings import front, ray_node

pytestmark = [pytest.mark.accept, pytest.mark.timeout(900)]
SECRETS = {
    "RAY_AUTH_TOKEN": secrets.token_hex(16),
    "MLFLOW_TRACKING_USERNAME": "looker",
    "MLFLOW_TRACKING_PASSWORD": f"pw-{secrets.token_hex(8)}",
    "AAI_API_KEY": f"key-{secrets.token_hex(8)}",
}
LIMIT_S = 20
Rows = list[dict[str, str]]


def look(place: Place) -> tuple[int, Rows]:
    """The doctor's exit code and rows; what it printed holds no secret, and it came in time."""
    words = ["--json", "--set", "min_free_gb=0", *place.words]
    for verb, settings in place.configs.items():
        file = place.folder / f"{verb}.yaml"
        file.write_text(yaml.safe_dump(settings))
        words.append(f"{verb}={file}")
    words += ["--address", place.address] if place.address else []
    command = [sys.executable, "-m", "pipelines", "doctor", *words]
    if place.before:
        inner = f"{place.before}; exec {shlex.join(command)}"
        command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec", inner]
    environment = {name: value for name, value in (os.environ | place.environment).items() if name not in place.unset}
    begin_s = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    seconds = time.monotonic() - begin_s
    said = done.stdout + done.stderr
    hidden = [value for name, value in environment.items() if name in SECRETS or name == "AWS_SECRET_ACCESS_KEY"]
    assert [value for value in hidden if value in said] == []
    assert done.stdout.startswith("{"), said[-3000:]
    rows: Rows = json.loads(done.stdout)["findings"]
    print(f"{seconds:.1f} s, {len(rows)} rows; {done.stderr.strip()}")
    assert seconds < LIMIT_S
    return done.returncode, rows


@pytest.fixture(scope="module")
def healthy(
    s3_server: dict[str, str],
    empty_store: Path,  # noqa: F811
    spec: FoundationSpec,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Place]:
    """Everything as it should be: Ray with a token, S3 with conditions, MLflow with an account, models, configs."""
    folder = tmp_path_factory.mktemp("doctor")
    for name in ("clip", "diffusion"):
        shutil.copytree(getattr(spec, name), folder / name)
    models = {name: str(folder / name) for name in ("clip", "diffusion")}
    client = boto3.client(
        "s3",
        endpoint_url=s3_server["AWS_ENDPOINT_URL"],
        aws_access_key_id=s3_server["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=s3_server["AWS_SECRET_ACCESS_KEY"],
        region_name="us-east-1",
    )
    made = json.dumps({"foundation": identity(FoundationSpec(**models))})
    client.put_object(Bucket=BUCKET, Key="run/features/manifest.json", Body=made.encode())
    client.put_object(Bucket=BUCKET, Key="data/m.csv", Body=b"uri\na.mp4\n")
    account = f"{SECRETS['MLFLOW_TRACKING_USERNAME']}:{SECRETS['MLFLOW_TRACKING_PASSWORD']}"
    shutil.copy(empty_store, folder / "mlflow.db")
    with (
        front(s3_server["AWS_ENDPOINT_URL"]) as bucket,
        serving(folder, f"sqlite:///{folder}/mlflow.db") as server,
        front(server, account=account) as tracker,
        ray_node(None, s3_server | SECRETS | {"RAY_AUTH_MODE": "token"}, "--num-cpus", "2") as address,
    ):
        environment = s3_server | SECRETS | {"RAY_AUTH_MODE": "token", "AWS_ENDPOINT_URL": bucket}
        base = {"run_dir": f"s3://{BUCKET}/run", "tracking": {"uri": tracker, "experiment": "looked-at"}}
        gates = [{"metric": "x", "min": 0}]
        promote = {"bundle": "${run_dir}/b", "evaluation": "${run_dir}/e.json", "out": "${run_dir}/p", "gates": gates}
        curate = {"manifest": f"s3://{BUCKET}/data/m.csv", "out": "${run_dir}/curated", "foundation": models}
        configs = {"curate": {**base, **curate, "cluster": {"num_workers": 2}}, "promote": {**base, **promote}}
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HF_HUB_OFFLINE", "1")
            yield Place(folder, environment, configs, server, s3_server["AWS_ENDPOINT_URL"], address)


@contextmanager
def planted(place: Place, plant: Callable[[Place], Place]) -> Iterator[Place]:
    """The surroundings with one fault."""
    with ExitStack() as stack:
        yield plant(replace(place, stack=stack))


def test_n4_nothing_is_found_where_nothing_is_wrong(healthy: Place) -> None:
    code, rows = look(healthy)
    assert [row for row in rows if row["state"] != "ok"] == []
    assert code == 0
    seen = {row["check"] for row in rows}
    assert seen >= {"ray.token", "ray.open", "node.version", "node.clock", "disk", "s3.write", "s3.conditional"}
    assert seen >= {"mlflow.write", "weights.hash", "config", "clock"}
    assert look(replace(healthy, address=None))[0] == 0


@pytest.mark.parametrize(("plant", "check", "word"), FAULTS, ids=[plant.__name__ for plant, _, _ in FAULTS])
def test_n4_each_planted_fault_is_found_and_no_other(
    plant: Callable[[Place], Place], check: str, word: str, healthy: Place
) -> None:
    with planted(healthy, plant) as place:
        code, rows = look(place)
    wrong = [row for row in rows if row["state"] != "ok"]
    assert {row["check"] for row in wrong} == {check}, wrong
    assert all(word in row["remedy"] for row in wrong), wrong
    assert code == (2 if any(row["state"] == "failure" for row in wrong) else 0)


def test_this_machine_has_an_address_that_others_reach() -> None:
    """Else an open cluster could not be told from one on loopback."""
    assert not socket.gethostbyname(socket.gethostname()).startswith("127.")
