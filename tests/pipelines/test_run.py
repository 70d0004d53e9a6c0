"""A chain of commands: what is done, what is left, what ends it. On a cluster: tests/e2e/test_run_on_cluster.py."""

import json
import socket
import time
from pathlib import Path

import pytest

from pipelines.__main__ import main
from pipelines.run import RunConfig, wait_for
from tests.surroundings import free_port

CHAIN = """
run_dir: {run_dir}
doctor: false
stages:
  - {{verb: world, config: configs/demo/world.yaml, set: [clips=4]}}
  - {{verb: promote, config: configs/demo/promote.yaml}}
"""


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """A run of two stages: a world of four clips, and a promotion that has no bundle."""
    file = tmp_path / "chain.yaml"
    file.write_text(CHAIN.format(run_dir=tmp_path / "run"))
    return file


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """(exit code, what was printed) of `aai run`."""
    code = main(["run", *words])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_what_is_finished_is_skipped_and_what_fails_ends_the_run(
    chain: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    code, text = said(capsys, "--config", str(chain))
    assert code == 2
    assert "stage=promote: failed; what it said stands above" in text
    assert "[1/2] world: not finished by `aai run` yet" in caplog.text
    record = json.loads((chain.parent / "run" / "_run" / "world.json").read_text())
    assert (record["verb"], record["settings"]["clips"], record["attempts"]) == ("world", "4", 1)
    assert sorted(path.name for path in (chain.parent / "run" / "_run").iterdir()) == ["world.json"]

    caplog.clear()
    assert said(capsys, "--config", str(chain), "--until", "world")[0] == 0
    assert "[1/1] world: unchanged since 20" in caplog.text
    assert "done: none; unchanged: world" in caplog.text

    _, text = said(capsys, "--config", str(chain), "--dry-run")
    assert "world          unchanged since" in text
    assert "promote        to do (not finished by `aai run` yet)" in text
    chain.write_text(chain.read_text().replace("clips=4", "clips=5"))
    _, text = said(capsys, "world", "--config", str(chain), "--dry-run")
    assert "world          to do (clips: 4 -> 5)" in text
    assert "promote" not in text


@pytest.mark.parametrize(("ends", "code"), [(1, 1), (-9, 137)])
def test_what_broke_off_ends_the_run_with_its_exit_code(
    chain: Path, ends: int, code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pipelines.run.launch", lambda *_, **__: (ends, 3))
    with pytest.raises(SystemExit) as ended:
        main(["run", "world", "--config", str(chain)])
    assert ended.value.code == code
    assert "run: stage world broke off 3 times" in caplog.text
    assert not (chain.parent / "run" / "_run" / "world.json").exists()


def test_who_stops_the_first_look_stops_the_run(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.run.launch", lambda *_, **__: (130, 1))
    assert main(["run", "world", "--config", str(chain), "--set", "doctor=true"]) == 130


def test_a_plan_tells_hours_and_costs(chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chain.write_text(
        f"run_dir: {tmp_path}/run\nnode_cost_per_h: 3\nestimate: {tmp_path}/plan.json\nstages:\n"
        "  - {verb: curate, config: configs/demo/curate.yaml}\n  - {verb: align, config: configs/demo/align.yaml}\n"
        "  - {verb: adapt, config: configs/demo/adapt.yaml}\n"
    )
    trainings = [{"stage": "align", "shape": "gpu", "hours": 0.25}]
    plan = {"nodes": 4, "shapes": {"gpu": {"curate_h": 1.5}}, "trainings": trainings}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    lines = said(capsys, "--config", str(chain), "--dry-run")[1].splitlines()
    by_stage = {line.split()[0]: line for line in lines if line.startswith("  ")}
    assert by_stage["curate"].endswith(", 1.5 h on 4 nodes, 18")
    assert by_stage["align"].endswith(", 0.25 h on 4 nodes, 3")
    assert by_stage["adapt"].endswith("after align)")


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["--from", "featurize"], "featurize is no stage of this run; it has world, promote"),
        (["tune"], "tune is no stage of this run"),
        (["--set", "attempts=0"], "attempts=0"),
        (["--set", "stages=[{verb: world, config: a}, {verb: world, config: b}]"], "can stand there once"),
        (["--set", "stages=[{verb: serve, config: a}]"], "stages.0.verb=serve"),
        (["--set", "stages=[{verb: world, config: nowhere.yaml}]"], "config=nowhere.yaml: no such file"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    chain: Path, words: list[str], rule: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = said(capsys, *words, "--config", str(chain))
    assert (code, rule in text) == (2, True), text
    assert not (chain.parent / "run" / "world").exists()


def test_a_part_of_the_chain() -> None:
    stages = [{"verb": verb, "config": "x"} for verb in ("curate", "featurize", "align", "adapt")]
    config = RunConfig.parse({"stages": stages, "first": "featurize", "last": "align"})
    assert [stage.verb for stage in config.chosen()] == ["featurize", "align"]
    config = RunConfig.parse({"stages": stages, "only": ["adapt", "curate"]})
    assert [stage.verb for stage in config.chosen()] == ["curate", "adapt"]


def test_a_cluster_that_is_away_is_waited_for() -> None:
    port = free_port()
    begin_s = time.monotonic()
    for address in (None, "auto", "local"):
        wait_for(address, 60)
    wait_for(f"127.0.0.1:{port}", 0)
    with socket.create_server(("127.0.0.1", port)):
        wait_for(f"127.0.0.1:{port}", 60)
        wait_for(f"ray://127.0.0.1:{port}", 60)
    assert time.monotonic() - begin_s < 30
