"""A real MLflow server, and fronts before it that refuse, lie about the time, or are not there."""

import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.checkup.finding import Finding
from pipelines.checkup.trackers import check_tracker, is_everybodys
from pipelines.registry import store, tracking
from pipelines.settings import TrackingConfig
from tests.pipelines.registry.test_versions import serving
from tests.surroundings import free_port, front


def told(uri: str, **settings: str) -> list[Finding]:
    """What a check of a store finds."""
    store._server.cache_clear()
    return check_tracker(TrackingConfig(uri=uri, **settings), max_skew_s=10)  # type: ignore[arg-type]


def wrong(rows: list[Finding]) -> list[str]:
    """What is not ok, by name."""
    return [row.check for row in rows if row.state != "ok"]


@pytest.fixture(scope="module")
def server(empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A tracking server's address."""
    folder = tmp_path_factory.mktemp("tracker")
    shutil.copy(empty_store, folder / "mlflow.db")
    with serving(folder, f"sqlite:///{folder}/mlflow.db") as address:
        yield address


def test_a_server_that_is_fine_keeps_only_a_deleted_run(server: str) -> None:
    rows = told(server, experiment="looked-at")
    assert wrong(rows) == []
    assert {row.check for row in rows} == {"mlflow.reachable", "clock", "mlflow.write"}
    client = tracking.connect(TrackingConfig(uri=server))
    experiment = client.get_experiment_by_name("looked-at")
    assert experiment is not None
    assert client.search_runs([experiment.experiment_id]) == []


@pytest.mark.parametrize(
    ("how", "check", "word"),
    [
        ({"account": "me:right"}, "mlflow.account", "MLFLOW_TRACKING_USERNAME"),
        ({"refuse": ("POST",)}, "mlflow.write", "EDIT"),
        ({"refuse": ("PUT",)}, "mlflow.artifacts", "artifacts"),
        ({"off_s": -300}, "clock", "chrony"),
    ],
)
def test_a_server_that_is_wrong_is_seen(
    how: dict[str, object], check: str, word: str, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    if "account" in how:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong-password")
    with front(server, **how) as address:  # type: ignore[arg-type]
        rows = told(address, experiment="looked-at")
    assert wrong(rows) == [check]
    (row,) = [row for row in rows if row.state != "ok"]
    assert word in row.remedy
    assert "wrong-password" not in row.model_dump_json()


def test_artifacts_in_a_folder_of_whoever_writes_are_seen() -> None:
    assert is_everybodys("mlflow-artifacts:/1/a", "http://tracker:5000")
    assert is_everybodys("s3://bucket/a", "http://tracker:5000")
    assert is_everybodys("/srv/mlruns/a", "http://127.0.0.1:5000")
    for local in ("/srv/mlruns/a", "file:///srv/mlruns/a"):
        assert not is_everybodys(local, "http://tracker:5000")


def test_the_right_account_is_taken(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "right")
    with front(server, account="me:right") as address:
        assert wrong(told(address)) == []


def test_a_server_that_is_away_is_not_waited_for() -> None:
    (row,) = told(f"http://127.0.0.1:{free_port()}")
    assert row.check == "mlflow.reachable"
    assert "start it" in row.remedy


def test_a_password_in_the_address_is_not_shown() -> None:
    (row,) = told("http://me:pass-word-1@127.0.0.1:5000")
    assert row.check == "mlflow.reachable"
    assert "pass-word-1" not in row.model_dump_json()
    assert "MLFLOW_TRACKING_PASSWORD" in row.remedy


def test_a_file_is_looked_at_and_not_made(tmp_path: Path) -> None:
    file = tmp_path / "new" / "mlflow.db"
    assert wrong(told(f"sqlite:///{file}")) == []
    assert list(tmp_path.iterdir()) == []
    file.parent.mkdir()
    with sqlite3.connect(file) as database:
        database.execute("CREATE TABLE t (x)")
    assert wrong(told(f"sqlite:///{file}")) == []
    file.write_bytes(b"this is no database, whatever its name says" * 100)
    assert wrong(told(f"sqlite:///{file}")) == ["mlflow.write"]


def test_a_file_that_another_process_holds_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.checkup.trackers.TIMEOUT_S", 0.1)
    holder = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    (row,) = told(f"sqlite:///{tmp_path}/mlflow.db")
    holder.close()
    assert (row.check, row.state) == ("mlflow.write", "failure")
    assert "locked" in row.found
