"""Children of a run in a real sqlite store."""

import shutil
from pathlib import Path

import pytest

from pipelines.registry import tracking
from pipelines.registry.nested import PARENT, TRIAL, end_children
from pipelines.settings import RunsConfig


@pytest.fixture
def config(empty_store: Path, tmp_path: Path) -> RunsConfig:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return RunsConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")


def test_children_that_still_run_are_ended_and_others_left(config: RunsConfig) -> None:
    with tracking.run(config, "tune") as parent, tracking.run(config, "other") as other:
        client, experiment = parent.client, parent.client.get_run(parent.run_id).info.experiment_id
        with tracking.run(config, "align", tags={PARENT: parent.run_id}) as done:
            pass
        killed = client.create_run(experiment, tags={PARENT: parent.run_id}).info.run_id
        elsewhere = client.create_run(experiment, tags={PARENT: other.run_id}).info.run_id
        assert end_children(parent) == 1
        assert end_children(parent) == 0
        states = {run: client.get_run(run).info.status for run in (done.run_id, killed, elsewhere, parent.run_id)}
    assert states == {
        done.run_id: "FINISHED",
        killed: "KILLED",
        elsewhere: "RUNNING",
        parent.run_id: "RUNNING",
    }


def test_a_stopped_trial_that_called_itself_failed_is_killed(config: RunsConfig) -> None:
    with tracking.run(config, "tune") as parent:
        client, experiment = parent.client, parent.client.get_run(parent.run_id).info.experiment_id
        runs = []
        for trial in ("001", "002"):
            tags = {PARENT: parent.run_id, TRIAL: trial}
            runs.append(client.create_run(experiment, tags=tags).info.run_id)
            client.set_terminated(runs[-1], "FAILED")
        assert end_children(parent, ["001"]) == 1
        assert [client.get_run(run).info.status for run in runs] == ["KILLED", "FAILED"]


def test_a_store_that_is_away_is_no_error(config: RunsConfig, caplog: pytest.LogCaptureFixture) -> None:
    with tracking.run(config, "tune") as parent:
        client = parent.client
        client.delete_run(parent.run_id)
        gone = tracking.OpenRun(client, config, "0" * 32)
        assert end_children(gone) == 0
    assert "was not told which trials were stopped" in caplog.text
