"""Stages as processes: how often they are begun, and what ends them."""

import signal
import time
from pathlib import Path

import pytest

from pipelines.chain.launch import launch, told
from tests.pipelines.conftest import python

COUNTS = """
import pathlib, sys, os, signal
file = pathlib.Path(sys.argv[2])
count = int(file.read_text()) + 1 if file.exists() else 1
file.write_text(str(count))
if count >= int(sys.argv[3]):
    sys.exit(int(sys.argv[4]))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`python -m pipelines` is a command that is killed (second argument - 1) times, then ends with the third."""
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines" / "__init__.py").touch()
    (tmp_path / "pipelines" / "__main__.py").write_text(COUNTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "count"


@pytest.mark.parametrize(
    ("dies", "code", "attempts", "ended"),
    [(1, 0, 3, (0, 1)), (3, 0, 3, (0, 3)), (9, 0, 3, (-signal.SIGKILL, 3)), (1, 2, 3, (2, 1)), (2, 130, 3, (130, 2)),
     (1, 1, 2, (1, 2))],
)  # fmt: skip
def test_what_breaks_off_is_begun_again(
    counting: Path, dies: int, code: int, attempts: int, ended: tuple[int, int]
) -> None:
    assert launch("verb", [str(counting), str(dies), str(code)], attempts, pause_s=0.01) == ended
    assert counting.read_text() == str(ended[1])


def test_an_exit_code_in_words() -> None:
    assert (told(3), told(-9)) == ("exit code 3", "killed by SIGKILL")


def test_a_stage_is_told_to_stop_when_the_run_is(tmp_path: Path) -> None:
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines" / "__init__.py").touch()
    (tmp_path / "pipelines" / "__main__.py").write_text(
        "import sys, time\n"
        "try:\n    print('begun', flush=True)\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    sys.exit(130)\n"
    )
    run = python(
        """
        import os, sys
        from pipelines.chain.launch import launch
        os.chdir(sys.argv[1])
        sys.path.insert(0, sys.argv[1])
        print(launch("verb", [], 3), flush=True)
        """,
        str(tmp_path),
    )
    assert run.stdout is not None
    assert run.stdout.readline() == "begun\n"
    run.send_signal(signal.SIGTERM)
    assert run.communicate(timeout=60)[0] == "(130, 1)\n"


def test_a_pause_lies_between_attempts(counting: Path) -> None:
    begin_s = time.monotonic()
    launch("verb", [str(counting), "2", "0"], 2, pause_s=0.5)
    assert time.monotonic() - begin_s > 0.5
