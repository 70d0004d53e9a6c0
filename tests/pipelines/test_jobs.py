"""The table of jobs. Jobs on a real cluster: tests/e2e/test_jobs.py."""

from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.__main__ import load_config
from pipelines.jobs import JobsConfig, table


def job(name: str, state: str, start_s: int | None, end_s: int | None, **told: str) -> Any:
    """A job as Ray's client tells of it."""
    times = {"start_time": start_s and 1000 * start_s, "end_time": end_s and 1000 * end_s}
    status = SimpleNamespace(value=state)
    return SimpleNamespace(submission_id=name, status=status, entrypoint="aai x", metadata=told, **times)


def test_a_line_for_each_job_the_latest_last() -> None:
    jobs = [
        job("b", "FAILED", 1_700_003_600, 1_700_003_601, by="ann", command="aai align"),
        job("a", "SUCCEEDED", 1_700_000_000, 1_700_003_725),
        job("c", "PENDING", None, None),
    ]
    rows = [line.split() for line in table(jobs).splitlines()[1:]]
    assert [row[0] for row in rows] == ["c", "a", "b"]
    assert rows[1] == ["a", "succeeded", "2023-11-14", "22:13", "1:02:05", "aai", "x"]
    assert rows[2] == ["b", "failed", "2023-11-14", "23:13", "0:00:01", "ann", "aai", "align"]
    assert table([]).endswith("(none yet)")


@pytest.mark.parametrize(
    ("words", "do", "name"), [([], "list", None), (["logs", "x"], "logs", "x"), (["stop", "x"], "stop", "x")]
)
def test_what_is_asked_for(words: list[str], do: str, name: str | None) -> None:
    config, _ = load_config("jobs", words)
    assert isinstance(config, JobsConfig)
    assert (config.do, config.job) == (do, name)
