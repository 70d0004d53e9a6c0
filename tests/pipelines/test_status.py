"""`aai status` as a user asks it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.__main__ import main
from pipelines.engine.lock import output_lock
from tests.pipelines.overview.test_stage_states import finished_run, plan, write

LIGHT = """
import sys
from pipelines.__main__ import main
assert main(["status", sys.argv[1]]) == 0
heavy = {"torch", "ray", "mlflow", "diffusers", "transformers"} & set(sys.modules)
assert not heavy, heavy
"""


def test_a_run_in_words_and_for_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished_run(tmp_path)
    (tmp_path / "promote/promote.json").unlink()
    assert main(["status", f"{tmp_path}/"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == str(tmp_path)
    assert told[-2:] == ["promote     not begun", f"next: aai promote --config FILE --set run_dir={tmp_path}"]
    assert main(["status", str(tmp_path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [stage["state"] for stage in result["stages"]] == ["finished"] * 5 + ["not begun"]
    assert result["stages"][0]["rejects"] == {"SILENT": 2}


def test_nothing_is_there_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}: nothing is there yet\n")
    write(tmp_path, "letters/a.json")
    assert main(["status", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_it_takes_no_lock_and_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = f"{tmp_path}/curated"
    with output_lock(out):
        plan(out, 2)
        before = sorted(tmp_path.rglob("*"))
        assert main(["status", str(tmp_path)]) == 0
        assert "next: nothing: curate is running" in capsys.readouterr().out
        assert sorted(tmp_path.rglob("*")) == before
    with output_lock(out):  # nobody holds a share of it
        pass


def test_it_is_light(tmp_path: Path) -> None:
    plan(f"{tmp_path}/curated", 1)
    done = subprocess.run([sys.executable, "-c", LIGHT, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
