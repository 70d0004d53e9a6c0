"""What every test needs: one thread per library, a Ray token of its own, and on request a real S3 server."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from aai.foundation.identity import FoundationSpec

# Before torch, numpy or Ray are imported anywhere: they read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")  # eight more processes of each server, unused
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray would make its workers wait for everything else here
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # the end of a training is seen at the next one

# Processes that tests start, Ray's among them, import this very checkout and its test files.
ROOT = str(Path(__file__).resolve().parent.parent)
os.environ["PYTHONPATH"] = os.pathsep.join([ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])

BUCKET = "aai-test"
SHARING = (
    "tests/e2e/test_page.py",
    "tests/e2e/test_rollover.py",
    "tests/pipelines/test_serve.py",
)
"""Files that ask one running service, one after the other: each leaves version 1 the champion."""
LONG = (
    "tests/e2e/test_demo.py",
    "tests/pipelines/test_tune.py",
    "tests/pipelines/training/test_ray_train.py",
    "tests/pipelines/training/test_recipe.py",
    "tests/pipelines/test_align.py",
    "tests/pipelines/test_adapt.py",
    *SHARING,
    "tests/e2e/test_evaluation.py",
    "tests/e2e/test_cluster_s3.py",
    "tests/pipelines/benches/test_serving.py",
    "tests/pipelines/benches/test_training.py",
    "tests/pipelines/benches/test_curation.py",
    "tests/e2e/test_curation.py",
    "tests/pipelines/registry/test_live.py",
    "tests/pipelines/service/test_telemetry.py",
    "tests/e2e/test_kills_of_the_service.py",
    "tests/e2e/test_promotions.py",
)
"""Files of half a minute and more, which go first: at the end no process works on one while the other has nothing."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """As `--dist loadfile`, whole files to a process; and those that share a service to one."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Sharing(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return SHARING[0] if file in SHARING else file

    assert [name for name in LONG if not Path(ROOT, name).is_file()] == []
    config.option.loadscopereorder = False  # the order is that of pytest_collection_modifyitems
    return Sharing(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where processes share the work, the files of LONG come first."""
    if hasattr(config, "workerinput"):
        places = {name: place for place, name in enumerate(LONG)}
        items.sort(key=lambda item: places.get(item.nodeid.split("::")[0], len(LONG)))


@pytest.fixture(scope="session")
def shared() -> Iterator[SimpleNamespace]:
    """The `service` of the files of SHARING (tests/pipelines/test_serve.py), and what stops it."""
    with ExitStack() as stack:
        yield SimpleNamespace(service=None, stack=stack)


@pytest.fixture(scope="session", autouse=True)
def ray_token() -> Iterator[None]:
    """Ray takes its token from a temporary file; without one it would write into the home folder."""
    with tempfile.TemporaryDirectory(prefix="aai-token-") as folder:
        token = Path(folder) / "token"
        token.write_text(secrets.token_hex(32))
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
        yield
        del os.environ["RAY_AUTH_TOKEN_PATH"]


@pytest.fixture(autouse=True)
def ordinary_priority() -> Iterator[None]:
    """No test leaves the process a real-time one (some encoders do): it would starve the rest of the machine."""
    yield
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


@pytest.fixture(scope="session")
def spec(tmp_path_factory: pytest.TempPathFactory) -> "FoundationSpec":
    """Folders of a random CLIP and of a random diffusion pipeline around its text tower."""
    from aai.foundation.identity import FoundationSpec
    from tests import tiny

    # The mutation run keeps the folder for its hundreds of short sessions.
    folder = Path(os.environ.get("AAI_TINY_MODELS") or tmp_path_factory.mktemp("tiny"))
    if not (folder / "diffusion").exists():
        tiny.write_diffusion(folder / "diffusion", tiny.write_clip(folder / "clip"))
    return FoundationSpec(clip=str(folder / "clip"), diffusion=str(folder / "diffusion"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for_port(port: int, server: subprocess.Popen[bytes], log: Path, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise RuntimeError(f"the S3 server did not start: {log.read_text()[-500:]}")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A real S3 server (rclone) on this machine; yields the environment that reaches it."""
    rclone = shutil.which("rclone", path=str(Path(sys.executable).parent)) or shutil.which("rclone")
    assert rclone, "rclone is missing: make setup"
    root = tmp_path_factory.mktemp("s3")
    (root / "data" / BUCKET).mkdir(parents=True)
    key, secret, port = secrets.token_hex(8), secrets.token_hex(16), _free_port()
    log = root / "rclone.log"
    command = [rclone, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", f"{key},{secret}"]
    with log.open("wb") as sink:
        # An empty --config keeps the user's own rclone settings out.
        server = subprocess.Popen([*command, "--config", "", str(root / "data")], stdout=sink, stderr=sink)
        try:
            _wait_for_port(port, server, log)
            yield {
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
                "AWS_ACCESS_KEY_ID": key,
                "AWS_SECRET_ACCESS_KEY": secret,
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
                "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
            }
        finally:
            server.terminate()
            server.wait(timeout=10)


@pytest.fixture
def s3(s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """An empty s3:// prefix of this test's own, with the environment set to reach it."""
    import s3fs

    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # instances remember the endpoint they were made with
    yield f"s3://{BUCKET}/{request.node.name.replace('[', '-').replace(']', '')}-{secrets.token_hex(4)}"
    s3fs.S3FileSystem.clear_instance_cache()
