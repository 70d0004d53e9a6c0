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


LAUNCHES = """
import os, signal, sys
from pipelines.chain.launch import launch
os.setsid()  # away from the terminal of who runs the tests
os.chdir(sys.argv[1])
sys.path.insert(0, sys.argv[1])
# As at a terminal, or as a script's `command &`, however the tests themselves were started.
signal.signal(signal.SIGINT, signal.SIG_IGN if sys.argv[2] == "behind" else signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
print(launch("verb", [], 3, pause_s=0.1), flush=True)
"""
IN_GOOD_ORDER, AT_ONCE, ALL_THE_SAME = "sys.exit(130)", "os.kill(os.getpid(), signal.SIGKILL)", "sys.exit(0)"


@pytest.mark.parametrize(
    ("where", "sent", "ends"),
    [
        ("in front", signal.SIGTERM, IN_GOOD_ORDER),
        ("in front", signal.SIGTERM, AT_ONCE),  # still importing, or told by others, too
        ("in front", signal.SIGTERM, ALL_THE_SAME),  # nothing is begun after it
        ("in front", signal.SIGINT, IN_GOOD_ORDER),  # by `kill`, not by a terminal
        ("in front", signal.SIGHUP, IN_GOOD_ORDER),  # a connection that ended
        ("behind", signal.SIGTERM, IN_GOOD_ORDER),
    ],
)
def test_a_stage_is_told_to_stop_when_the_run_is(tmp_path: Path, where: str, sent: signal.Signals, ends: str) -> None:
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines" / "__init__.py").touch()
    (tmp_path / "pipelines" / "__main__.py").write_text(
        "import os, signal, sys, time\n"
        f"try:\n    print('begun', flush=True)\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    {ends}\n"
    )
    run = python(LAUNCHES, str(tmp_path), where)
    assert run.stdout is not None
    assert run.stdout.readline() == "begun\n"
    run.send_signal(sent)
    assert run.communicate(timeout=30)[0] == "(130, 1)\n"


def test_a_folder_of_the_same_name_is_not_taken_for_the_commands(
    counting: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoy = counting.parent / "elsewhere" / "pipelines"
    decoy.mkdir(parents=True)
    (decoy / "__main__.py").write_text("raise SystemExit(7)")
    (decoy / "__init__.py").touch()
    monkeypatch.chdir(decoy.parent)
    assert launch("verb", [str(counting), "1", "0"], 1) == (0, 1)


def test_a_pause_lies_between_attempts(counting: Path) -> None:
    begin_s = time.monotonic()
    launch("verb", [str(counting), "2", "0"], 2, pause_s=0.5)
    assert time.monotonic() - begin_s > 0.5
