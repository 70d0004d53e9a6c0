"""Two drivers on one output folder, as real processes: the second is refused, a killed first one is in nobody's way."""

import errno
import fcntl
import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from aai import fencing, storage
from aai.errors import UserError
from pipelines.engine import lock
from pipelines.engine.lock import LOCK, holding, is_empty, output_lock
from tests.pipelines.conftest import python

HOLD = """
    import sys, time
    from pipelines.engine import lock
    lock.BEAT_S, lock.SETTLE_S = 0.2, float(sys.argv[2])
    lock.LEASE_S = max(3.0, 10 * lock.SETTLE_S)  # on a busy machine a beat may be late
    with lock.output_lock(sys.argv[1]):
        print("held", flush=True)
        sys.stdin.readline()
"""


@pytest.fixture(params=["local", "s3"])
def out(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An output folder of either kind, with leases of 3 s."""
    for name, value in (("BEAT_S", 0.2), ("LEASE_S", 3.0), ("SETTLE_S", 0.2), ("LATE_S", 0.2)):
        monkeypatch.setattr(lock, name, value)
    return str(tmp_path / "out") if request.param == "local" else f"{request.getfixturevalue('s3')}/out"


@contextmanager
def holder(out: str) -> Iterator["subprocess.Popen[str]"]:
    """Another process that holds the lock until it reads a line, or is killed."""
    process = python(HOLD, out, "0.2", stdin=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n", process.communicate()[1]
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_second_driver_is_told_who_the_first_is(out: str) -> None:
    with holder(out) as first:
        time.sleep(3.5)  # longer than a lease: the first one refreshes it
        with pytest.raises(UserError) as caught, output_lock(out):
            pytest.fail("two drivers at once")
        assert f"out={out}: is being written by process {first.pid} on {os.uname().nodename} since 20" in str(
            caught.value
        )
        assert is_empty(out)
        assert storage.list_files(out) == [storage.join(out, LOCK)]
        first.communicate("go on\n", timeout=60)
        assert first.returncode == 0
    assert storage.list_files(out) == []
    with output_lock(out):
        storage.write_bytes(storage.join(out, "table"), b"1")
        assert not is_empty(out)
    assert storage.list_files(out) == [storage.join(out, "table")]


def test_a_killed_driver_blocks_nobody_for_longer_than_its_lease(out: str) -> None:
    with holder(out) as first:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        killed_s = time.monotonic()
        assert storage.exists(storage.join(out, LOCK))
        refusals = []
        while time.monotonic() < killed_s + 20:
            try:
                with output_lock(out):
                    break
            except UserError as error:
                refusals.append(str(error))
                time.sleep(0.1)
        waited_s = time.monotonic() - killed_s
        assert all(f"process {first.pid}" in line for line in refusals)
        if out.startswith("s3://"):
            assert 1 < waited_s < 12, "not before the lease is over"
        else:
            assert not refusals
    assert storage.list_files(out) == []


def test_workers_of_a_driver_that_is_gone_write_nothing(out: str) -> None:
    with output_lock(out):
        storage.write_bytes(storage.join(out, "mine"), b"1")
        workers = fencing.guards()
    for change in (lambda: storage.write_bytes(storage.join(out, "mine"), b"2"), lambda: storage.remove(out + "/mine")):
        with output_lock(out), fencing.guarded(*workers), pytest.raises(UserError, match="was taken over by process"):
            change()
        with fencing.guarded(*workers), pytest.raises(UserError, match="was taken over by another process"):
            change()
    with fencing.guarded(*workers):
        storage.write_bytes(f"{out}-beside", b"1")  # not theirs to ask about
    assert storage.read_bytes(storage.join(out, "mine")) == b"1"


def test_one_of_many_drivers_that_start_at_once_goes_on(out: str) -> None:
    drivers = [python(HOLD, out, "3", stdin=subprocess.PIPE) for _ in range(3)]
    try:
        lines = []
        for driver in drivers:
            assert driver.stdout is not None
            lines.append(driver.stdout.readline())
        assert sorted(lines) == ["", "", "held\n"]
        refused = [driver for driver, line in zip(drivers, lines, strict=True) if not line]
        # "by process N", or "by another process" in the moment before the first has written who it is
        assert all("is being written by" in driver.communicate()[1] for driver in refused)
    finally:
        for driver in drivers:
            driver.kill()
            driver.communicate()


def test_a_driver_that_lost_its_lease_is_stopped(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.1)
    monkeypatch.setattr(lock, "SETTLE_S", 0.1)
    taken = b'{"holder": "other", "pid": 1, "host": "elsewhere", "started": "now", "beat": 0}'

    def work() -> None:
        with output_lock(s3):
            storage.write_bytes(storage.join(s3, LOCK), taken)
            time.sleep(30)

    started_s = time.monotonic()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a script's `aai align ... &`
    try:
        with pytest.raises(KeyboardInterrupt):
            work()
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - started_s < 10
    assert signal.getsignal(lock.LOST) is signal.SIG_DFL
    assert storage.read_bytes(storage.join(s3, LOCK)) == taken, "the lock of another is not removed"


def test_a_server_that_empties_a_file_while_it_is_written_over_ends_no_driver(
    out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As rclone's: a worker that asks in that moment finds nothing, and has to ask again."""
    read, asked = storage.read_bytes, Counter[int]()

    def emptied(uri: str, *args: int) -> bytes:
        asked[threading.get_ident()] += 1  # the beats' own asking must not make every answer of another an empty one
        return b"" if uri.endswith(LOCK) and asked[threading.get_ident()] % 2 else read(uri, *args)

    with output_lock(out):
        monkeypatch.setattr(storage, "read_bytes", emptied)
        for number in range(3):
            storage.write_bytes(storage.join(out, "mine"), str(number).encode())
        time.sleep(5 * lock.BEAT_S)  # its own beats ask, too
        monkeypatch.undo()
        assert storage.read_bytes(storage.join(out, "mine")) == b"2"


def test_a_finished_result_can_be_read_where_nobody_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "open", refuse)
    with output_lock(str(tmp_path)):
        assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_gets_a_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with output_lock(str(tmp_path)):
        assert b'"beat"' in (tmp_path / LOCK).read_bytes()
        with pytest.raises(UserError, match=f"process {os.getpid()}"), output_lock(str(tmp_path)):
            pytest.fail("two drivers at once")
    assert list(tmp_path.iterdir()) == []


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("precious")
    with pytest.raises(UserError, match="of something else"), output_lock(str(tmp_path)):
        pytest.fail("locked")
    assert (tmp_path / LOCK).read_text() == "precious"
    with pytest.raises(UserError, match="is a file"), output_lock(str(tmp_path / LOCK)):
        pytest.fail("locked")
    with pytest.raises(ZeroDivisionError), output_lock(str(tmp_path / "never")):
        raise ZeroDivisionError
    assert not (tmp_path / "never").exists(), "a folder that a failed run left empty goes with its lock"


VERBS: dict[str, list[str]] = {
    "world": ["--clips", "2"],
    "curate": ["--manifest", "media"],
    "featurize": ["--input", "clips"],
    "align": ["--features", "features"],
    "adapt": ["--features", "features", "--bundle", "bundle"],
    "evaluate": [],
    "foundation": [],
    "data compact": ["--input", "clips"],
    "data export": ["--input", "clips"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_that_resumes_an_output_takes_its_lock(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipelines.__main__ import main

    monkeypatch.chdir(tmp_path)
    out = str(tmp_path / "out")
    with output_lock(out):
        setting = ["--set", f"out={out}"]
        assert main([*verb.split(), *VERBS[verb], *setting]) == 2
        assert f"is being written by process {os.getpid()}" in capsys.readouterr().err
        assert [path.name for path in (tmp_path / "out").iterdir()] == [LOCK]


def test_who_only_looks_is_told_the_holder_and_is_in_nobodys_way(out: str) -> None:
    assert holding(out) is None
    with holder(out) as first:
        found = holding(out)
        assert found is not None
        assert (found.is_held, found.pid, found.host) == (True, first.pid, os.uname().nodename)
        assert (found.beat_age_s is not None) == out.startswith("s3://")
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        end_s = time.monotonic() + 20
        while found is not None and found.is_held and time.monotonic() < end_s:
            found = holding(out)
    assert found is not None
    assert (found.is_held, found.pid) == (False, first.pid)
    with output_lock(out):
        assert (seen := holding(out)) is not None
        assert (seen.is_held, seen.pid) == (True, os.getpid())
    assert holding(out) is None


def test_a_driver_that_begins_while_somebody_looks_is_not_refused(tmp_path: Path) -> None:
    path = tmp_path / "out" / LOCK
    path.parent.mkdir()
    path.touch()
    with path.open() as looked_at:
        fcntl.flock(looked_at, fcntl.LOCK_SH)
        threading.Timer(lock.LOOK_S / 2, lambda: fcntl.flock(looked_at, fcntl.LOCK_UN)).start()
        with output_lock(str(path.parent)):
            pass


def test_a_file_system_without_locks_is_looked_at_by_its_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refuse)
        with output_lock(str(tmp_path / "out")):
            found = holding(str(tmp_path / "out"))
    assert found is not None
    assert found.is_held
    assert found.beat_age_s is not None
