"""What needs no running cluster: the token, the link to the logs, the terminal, and who decides on a type."""

import os
import stat
import sys
from pathlib import Path

import pytest

from aai import precision
from aai.errors import UserError
from pipelines.engine import cluster
from pipelines.settings import ClusterConfig


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder, and no token given by the environment."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")
    return tmp_path


def test_where_home_cannot_be_written_the_token_is_a_private_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    cluster._ensure_token()
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert len(token.read_text()) == 64
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    cluster._ensure_token()
    assert os.environ["RAY_AUTH_TOKEN_PATH"] == str(token)


@pytest.mark.parametrize("kind", ["writable home", "token in home", "token given"])
def test_a_token_that_is_or_can_be_there_is_left_to_ray(kind: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind != "writable home":
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    if kind == "token in home":
        (home / ".ray").mkdir()
        (home / ".ray/auth_token").write_text("secret")
    if kind == "token given":
        monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    cluster._ensure_token()
    assert os.environ["RAY_AUTH_TOKEN_PATH"] == ""
    assert not list(home.glob("aai-ray-token-*"))


def test_the_link_follows_the_newest_session(tmp_path: Path) -> None:
    for session in ("old", "new"):
        (tmp_path / session / "logs").mkdir(parents=True)
        cluster._link_logs(str(tmp_path / "run"), str(tmp_path / session))
    assert (tmp_path / "run/ray-logs").resolve() == tmp_path / "new/logs"
    (tmp_path / "file").write_text("")
    cluster._link_logs(str(tmp_path / "file"), str(tmp_path / "new"))  # only the convenience is lost
    cluster._link_logs("s3://bucket/run", str(tmp_path / "new"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "new", "old", "run"]


def shout(error: Exception | None = None) -> None:
    """Writes past Python, as Ray's core does, and may fail."""
    os.write(2, b"core noise\n")
    if error:
        raise error


def test_noise_is_held_and_only_an_unknown_error_shows_it(capfd: pytest.CaptureFixture[str]) -> None:
    with cluster.native_stderr_held() as terminal:
        shout()
        terminal.write("progress\n")
    with pytest.raises(UserError), cluster.native_stderr_held():
        shout(UserError("a", 1, "is wrong", "mend it"))
    assert capfd.readouterr().err == "progress\n"
    with pytest.raises(RuntimeError), cluster.native_stderr_held():
        shout(RuntimeError())
    print("after", file=sys.stderr)
    assert capfd.readouterr().err == "core noise\nafter\n"


def test_a_named_type_stands_for_itself_and_auto_for_this_machines() -> None:
    here, there = ClusterConfig(), ClusterConfig(address="ray://nowhere:1")
    assert cluster.worker_dtype("float16", "cuda", there, "") == "float16"
    assert cluster.worker_dtype("auto", "cpu", here, "") == precision.resolve("auto", "cpu")
