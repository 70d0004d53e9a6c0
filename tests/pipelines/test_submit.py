"""Arguments of `aai submit`, and its plan. Jobs on a real cluster: tests/e2e/test_jobs.py."""

from pathlib import Path

import pytest

from pipelines.__main__ import load_config, main
from pipelines.submit import arranged, whoami


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["curate", "--config", "f", "--cluster", "c"], ["--cluster", "c", "curate", "--config", "f"]),
        (["--detach", "align", "--set", "a=b"], ["--detach", "align", "--set", "a=b"]),
        (["align", "--set", "a=b", "--dry-run"], ["--dry-run", "align", "--set", "a=b"]),
        (["run", "align", "--cluster=c"], ["--cluster=c", "run", "align"]),
        (["align", "--cluster"], ["--cluster", "align"]),
        ([], []),
    ],
)
def test_own_flags_come_first_wherever_they_stood(given: list[str], wanted: list[str]) -> None:
    assert arranged(given) == wanted


def test_the_rest_is_the_commands(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("address: http://head:8265\n")
    config, _ = load_config("submit", ["curate", "--config", "mine.yaml", "--cluster", str(file), "--set", "a=1"])
    assert config.address == "http://head:8265"  # type: ignore[attr-defined]
    assert config.split() == ("curate", ["--config", "mine.yaml", "--set", "a=1"])  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        ([], "nothing to submit"),
        (["frobnicate"], "is not a command that a job can be; one of: world, "),
        (["serve"], "is not a command that a job can be"),
        (["curate", "--config", "nowhere.yaml"], "no such file"),
        (["curate", "--set", "rows_per_shard=many"], "rows_per_shard=many"),
    ],
)
def test_mistakes_are_told_before_anything_is_sent(
    words: list[str], rule: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", *words]) == 2
    assert rule in capsys.readouterr().err


def test_the_plan_shows_the_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "run", "align", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "sent along     nothing" in told
    assert "&& aai run align --address auto" in told
    assert "http://127.0.0.1:8265" in told
    assert main(["submit", "--dry-run"]) == 0  # of no command, the cluster alone
    assert "http://127.0.0.1:8265" in capsys.readouterr().out


def test_a_user_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 1000")

    monkeypatch.setattr("getpass.getuser", nobody)
    assert whoami() == "unknown"
