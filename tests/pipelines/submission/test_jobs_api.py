"""The way into a cluster's jobs API. Jobs on a real cluster: tests/e2e/test_jobs.py."""

import os
from types import SimpleNamespace

import pytest

from aai.errors import UserError
from pipelines.submission.cluster_file import ClusterFile
from pipelines.submission.jobs_api import enter, exit_code
from tests.surroundings import free_port


def test_nobody_listens() -> None:
    with pytest.raises(UserError, match="nobody listens there; give the dashboard's address"):
        enter(ClusterFile(address=f"http://127.0.0.1:{free_port()}"))


def test_something_else_listens(s3: str) -> None:
    with pytest.raises(UserError, match="what listens there is no dashboard of Ray"):
        enter(ClusterFile(address=os.environ["AWS_ENDPOINT_URL"]))


@pytest.mark.parametrize(
    ("status", "code", "ends"),
    [("SUCCEEDED", 0, 0), ("FAILED", 2, 2), ("FAILED", None, 1), ("FAILED", 137, 137), ("STOPPED", -15, 130)],
)
def test_a_command_ends_as_its_job(status: str, code: int | None, ends: int) -> None:
    assert exit_code(SimpleNamespace(status=status, driver_exit_code=code)) == ends


def test_a_dashboard_that_wakes_up_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["silent", "silent", "guarded", "silent"])
    monkeypatch.setattr("pipelines.checkup.doors.ask", lambda door, token=None: next(answers))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a token")
    with pytest.raises(UserError, match="refuses the token of this machine"):  # it was knocked at until it answered
        enter(ClusterFile(address="http://127.0.0.1:8265"))
