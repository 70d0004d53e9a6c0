"""N5: secrets of the environment stand in no file, log, dump, event or error of a run."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.surroundings import free_port

ROOT = Path(__file__).resolve().parents[2]
SECRETS = {
    "AWS_ACCESS_KEY_ID": "planted-access-key-01",
    "AWS_SECRET_ACCESS_KEY": "planted-secret-key-02",
    "MLFLOW_TRACKING_PASSWORD": "planted-password-03",
    "AAI_API_KEY": "planted-api-key-04",
    "AAI_WEBHOOK_SECRET": "planted-webhook-05",
    "OPENLINEAGE_API_KEY": "planted-lineage-06",
    "AAI_SIGNING_PASSWORD": "planted-signing-07",
    "HF_TOKEN": "planted-hub-08",
    "RAY_AUTH_TOKEN": "0123456789abcdefplanted-token-09",
}
CHAIN = """
run_dir: {folder}/run
stages:
  - {{verb: world, config: configs/demo/world.yaml, set: [clips=40]}}
  - {{verb: curate, config: configs/demo/curate.yaml}}
  - {{verb: featurize, config: configs/demo/featurize.yaml}}
  - {{verb: align, config: configs/demo/align.yaml, set: [fit.steps=4, fit.batch_size=8]}}
"""


def holders(folder: Path) -> list[str]:
    """Files in which a secret stands, and which one."""
    found = []
    for file in (path for path in folder.rglob("*") if path.is_file()):
        content = file.read_bytes()
        found += [f"{file.name}: {name}" for name, secret in SECRETS.items() if secret.encode() in content]
    return found


def aai(folder: Path, *words: str) -> str:
    """What a command says at its most talkative, kept in the folder."""
    environment = os.environ | SECRETS | {
        "AAI_LOG": "DEBUG", "AAI_OPENLINEAGE": str(folder / "events.jsonl"), "RAY_AUTH_MODE": "token",
        "MLFLOW_TRACKING_USERNAME": "me", "RAY_TMPDIR": str(folder / "ray"),
    }  # fmt: skip
    command = [sys.executable, "-m", "pipelines", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=900)
    text = done.stdout + done.stderr
    (folder / f"log-{'-'.join(words[:2])}-{len(list(folder.iterdir()))}".replace("/", "")).write_text(text)
    return text


def errors(folder: Path) -> None:
    """Commands that fail where secrets are used: S3 and MLflow that are not there, a wrong bundle, a wrong setting."""
    away = f"http://127.0.0.1:{free_port()}"
    aai(folder, "run", "--config", str(folder / "chain.yaml"), "--dry-run")
    aai(folder, "align", "--set", "fit.steps=many")
    aai(folder, "promote", "--bundle", str(folder), "--set", f"tracking.uri={away}", "--set", "tracking.wait_s=1")
    aai(folder, "jobs", "--cluster", str(folder / "cluster.yaml"))
    aai(folder, "submit", "curate", "--set", f"tracking.uri=http://me:{SECRETS['MLFLOW_TRACKING_PASSWORD']}@{away[7:]}")
    aai(folder, "doctor", "--json", "--timeout-s", "30")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder of a short name, for Ray's sockets, with a chain and a cluster file."""
    with tempfile.TemporaryDirectory(prefix="s-", dir="/tmp", ignore_cleanup_errors=True) as name:
        place = Path(name)
        (place / "chain.yaml").write_text(CHAIN.format(folder=place))
        (place / "cluster.yaml").write_text(f"address: http://127.0.0.1:{free_port()}\n")
        yield place


def test_a_planted_secret_would_be_found(folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "x.bin").write_bytes(b"\0" + SECRETS["HF_TOKEN"].encode())
    assert holders(folder) == ["x.bin: HF_TOKEN"]


@pytest.mark.accept
@pytest.mark.timeout(1800)
def test_n5_no_secret_stands_anywhere(folder: Path) -> None:
    text = aai(folder, "run", "--config", str(folder / "chain.yaml"))
    assert "done: world, curate, featurize, align" in text, text[-3000:]
    errors(folder)
    looked_at = [path for path in folder.rglob("*") if path.is_file()]
    print(f"{len(looked_at)} files, {sum(path.stat().st_size for path in looked_at) / 1e6:.0f} MB")
    assert {"events.jsonl", "mlflow.db", "align.json"} <= {path.name for path in looked_at}
    assert holders(folder) == []
