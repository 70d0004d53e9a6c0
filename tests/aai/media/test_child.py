import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aai.media.child import GRACE_S, MediaChild
from aai.media.decode import decode_audio
from aai.media.limits import ClipError, DecodeConfig
from aai.media.measure import MEASURED_ROW, VIDEO, Shown, clip_id, measure_bytes
from aai.media.ranged import AskedRanges, Content, hash_of
from aai.media.shots import Probe, probe_bytes, probe_to_json
from aai.media.still import decode_still
from tests.clips import make_clip, make_moving
from tests.damage import damaged_files, long_silence
from tests.hostile import png, wav

SLOW = {"num_frames": 200, "fps": 25, "size": (640, 360), "options": {"preset": "ultrafast", "g": "250"}}


@pytest.fixture(scope="module")
def slow() -> bytes:
    """A clip that takes long enough to be interrupted."""
    return make_moving(**SLOW)


def pid_of(child: MediaChild) -> int:
    assert child.process is not None
    return child.process.pid


def cpu_ticks(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11])


def rss_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def while_busy(child: MediaChild, act: Callable[[int], None]) -> threading.Thread:
    """Acts on the child once it is at work on the next clip."""
    pid = pid_of(child)
    idle = cpu_ticks(pid)

    def watch() -> None:
        while cpu_ticks(pid) < idle + 4:
            time.sleep(0.002)
        act(pid)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_rows_are_those_of_a_call_in_place() -> None:
    good, cfg = make_clip(duration_s=4.0), DecodeConfig()
    with MediaChild(cfg) as child:
        for data, start_s, end_s in ((good, None, None), (good, 1.0, 3.0), (b"", None, None), (b"x" * 99, None, 2.0)):
            row = child.measure(data, start_s, end_s)
            assert row == measure_bytes(data, start_s, end_s, cfg)
            assert list(row) == MEASURED_ROW.names


@pytest.mark.slow
def test_a_crash_costs_one_clip_only(slow: bytes) -> None:
    good = make_clip()
    with MediaChild(DecodeConfig()) as child:
        expected = child.measure(good, None, None)
        assert expected["code"] is None
        thread = while_busy(child, lambda pid: os.kill(pid, signal.SIGSEGV))
        row = child.measure(slow, None, 7.0)
        thread.join()
        assert (row["stage"], row["code"], row["transient"]) == ("decode", "CRASHED", False)
        assert "SIGSEGV" in row["message"]
        assert row["clip_id"] == measure_bytes(slow, None, 7.0, DecodeConfig(max_bytes=1))["clip_id"]
        assert child.measure(good, None, None) == expected


@pytest.mark.slow
def test_a_kill_from_outside_costs_nothing_and_two_one_clip(slow: bytes) -> None:
    with MediaChild(DecodeConfig()) as child:
        expected = child.measure(slow, None, None)
        thread = while_busy(child, lambda pid: os.kill(pid, signal.SIGKILL))
        assert child.measure(slow, None, None) == expected
        thread.join()
        os.kill(pid_of(child), signal.SIGKILL)  # between two clips
        child.process.wait()  # type: ignore[union-attr]
        assert child.measure(slow, None, None) == expected

        def kill_thrice(first: int) -> None:
            os.kill(first, signal.SIGKILL)
            while child.process is None or child.process.pid == first:
                time.sleep(0.001)
            os.kill(pid_of(child), signal.SIGKILL)  # while it starts, which costs nothing either
            second = child.process.pid
            while child.process is None or child.process.pid == second or not child.files:
                time.sleep(0.001)
            os.kill(pid_of(child), signal.SIGKILL)

        thread = while_busy(child, kill_thrice)
        row = child.measure(slow, None, None)
        thread.join()
        assert (row["code"], row["transient"]) == ("CRASHED", True)
        assert "SIGKILL" in row["message"]


@pytest.mark.parametrize("ranged", [False, True], ids=["sent", "ranged"])
def test_sounds_alone_and_with_stills_are_measured_as_here(ranged: bool) -> None:
    data, cfg, picture = wav(2.0), DecodeConfig(), png(80, 60)
    content: Content = AskedRanges(len(data), lambda start, end: data[start:end]) if ranged else data
    alone = Shown(must_be_video=False)
    asked = [Shown(still=picture), alone, Shown(still=png(90, 60)), VIDEO, Shown(still=b"none"), alone]
    with MediaChild(cfg) as child:
        rows = [child.measure(content, 0.0, 1.0, shown=shown) for shown in asked]
        assert rows == [measure_bytes(data, 0.0, 1.0, cfg, shown=shown) for shown in asked]
        assert [row["code"] for row in rows] == [None, None, None, "NO_VIDEO", "UNREADABLE", None]
        assert [len(row["frames"] or []) for row in rows] == [1, 0, 1, 0, 0, 0]
    with MediaChild(DecodeConfig(timeout_s=1e-9)) as child:
        late = child.measure(content, 0.0, 1.0, shown=asked[0])
        assert (late["code"], late["clip_id"]) == ("TIMEOUT", rows[0]["clip_id"])


def bytes_read(pid: int) -> int:
    return int(Path(f"/proc/{pid}/io").read_text().split("rchar: ")[1].split()[0])


@pytest.mark.slow
@pytest.mark.parametrize("ranged", [False, True], ids=["sent", "ranged"])
def test_clips_of_one_file_cost_one_file(ranged: bool) -> None:
    clip = make_moving(num_frames=160, size=(320, 240), options={"g": "20", "preset": "ultrafast"})
    data = clip + bytes(20 * len(clip))  # which no clip needs
    content: Content = AskedRanges(len(data), lambda start, end: data[start:end]) if ranged else data
    cfg, content_hash = DecodeConfig(policy="keyframe"), hash_of(data)
    with MediaChild(cfg) as child:
        child.measure(make_clip(), None, None)  # it reads its libraries, too
        before, pid = bytes_read(pid_of(child)), pid_of(child)
        rows = [child.measure(content, start_s, start_s + 1, content_hash) for start_s in range(8)]
        cost = (bytes_read(pid) - before) / len(data)
        assert rows == [measure_bytes(data, start_s, start_s + 1, cfg) for start_s in range(8)]
        assert pid_of(child) == pid
        assert cost < (0.5 if ranged else 1.1), "eight clips"
        assert child.measure(make_clip(), None, None)["code"] is None
        assert child.measure(content, 3, 4, content_hash) == rows[3]
        assert child.probe(content, None, 60, 60) == Probe(8.0, True)
        os.kill(pid, signal.SIGKILL)
        child.process.wait()  # type: ignore[union-attr]
        assert child.measure(content, 2, 3, content_hash) == rows[2]


@pytest.mark.slow
@pytest.mark.parametrize("ranged", [False, True], ids=["sent", "ranged"])
def test_a_crash_in_the_middle_of_a_file_costs_one_clip_of_it(slow: bytes, ranged: bool) -> None:
    content: Content = AskedRanges(len(slow), lambda start, end: slow[start:end]) if ranged else slow
    with MediaChild(DecodeConfig()) as child:
        expected = [child.measure(content, start_s, start_s + 2) for start_s in (0, 2, 6)]
        assert [row["code"] for row in expected] == [None] * 3
        assert child.measure(content, 0, 2) == expected[0]
        thread = while_busy(child, lambda pid: os.kill(pid, signal.SIGSEGV))
        row = child.measure(content, None, None)
        thread.join()
        assert (row["stage"], row["code"], row["content_hash"]) == ("decode", "CRASHED", hash_of(slow))
        assert [child.measure(content, start_s, start_s + 2) for start_s in (2, 6)] == expected[1:]


@pytest.mark.slow
def test_ranges_that_cannot_be_read_cost_the_clips_that_need_them(slow: bytes) -> None:
    faults = {2: ClipError("IO_ERROR", "away", transient=True)}
    calls = []

    def read(start: int, end: int) -> bytes:
        calls.append(start)
        if fault := faults.get(len(calls)):
            raise fault
        return slow[start:end]

    content, content_hash = AskedRanges(len(slow), read), hash_of(slow)
    with MediaChild(DecodeConfig()) as child:
        row = child.measure(content, 1, 2, content_hash)
        assert (row["stage"], row["code"], row["message"], row["transient"]) == ("read", "IO_ERROR", "away", True)
        assert row["clip_id"] == clip_id(content_hash, 1, 2)
        assert child.measure(content, 1, 2, content_hash) == measure_bytes(slow, 1, 2, DecodeConfig())
        faults[len(calls) + 1] = faults[2]
        assert told(child.probe(content, None, 60, 60))["code"] == "IO_ERROR"
        assert child.probe(content, None, 60, 60) == Probe(8.0, True)


def told(found: Probe | ClipError) -> dict[str, Any]:
    """What was found of a file, in a form that can be compared."""
    return probe_to_json(found)


@pytest.mark.slow
def test_a_file_that_is_to_be_cut_is_looked_through_in_the_child(slow: bytes) -> None:
    cfg = DecodeConfig()
    with MediaChild(cfg) as child:
        for data in (slow, b"", b"x" * 99):
            assert told(child.probe(data, 3.0, 60, 60)) == told(probe_bytes(data, 3.0, 60, cfg, 60))
        assert child.probe(slow, None, 60, 60) == Probe(8.0, True)
        assert told(child.probe(slow, None, 5, 60))["code"] == "TOO_LONG"
        thread = while_busy(child, lambda pid: os.kill(pid, signal.SIGSEGV))
        found = told(child.probe(slow, 3.0, 60, 60))
        thread.join()
        assert (found["code"], found["transient"]) == ("CRASHED", False)
        assert told(child.probe(b"", 3.0, 60, 60))["code"] == "EMPTY_FILE"
        os.kill(pid_of(child), signal.SIGSTOP)
        assert told(child.probe(slow + bytes(2**20), 3.0, 60, 0.5))["code"] == "TIMEOUT"
        assert child.measure(make_clip(), None, None)["code"] is None


@pytest.mark.slow
def test_sounds_and_pictures_are_those_of_a_call_in_place() -> None:
    with MediaChild(DecodeConfig()) as child:
        child.warm()
        pid = pid_of(child)
        for data in (wav(0.5, 22_050), make_clip()):
            heard = child.sound(data, 60, 10**6, 16_000)
            assert heard.dtype == np.float32
            assert np.array_equal(heard, decode_audio(data, 60, 10**6, 16_000))
        seen = child.still(png(90, 70), 10**6, backdrop="black")
        assert np.array_equal(seen, np.asarray(decode_still(png(90, 70), 10**6)))
        for ask, code in (
            (lambda: child.sound(wav(2), 1, 10**6, 16_000), "TOO_LONG"),
            (lambda: child.sound(wav(), 1, 100, 16_000), "TOO_LARGE"),
            (lambda: child.still(png(), 100), "TOO_LARGE"),
            (lambda: child.still(b"", 100), "UNREADABLE"),
        ):
            with pytest.raises(ClipError, match=f"^{code}: "):
                ask()
        assert pid_of(child) == pid


@pytest.mark.slow
def test_a_picture_over_the_memory_is_refused_and_the_child_replaced() -> None:
    with MediaChild(DecodeConfig(max_memory_mb=1024)) as child:
        with pytest.raises(ClipError, match=r"^OUT_OF_MEMORY: the file needs more than the limit of 1024 MB"):
            child.still(png(14_000, 12_000), 10**9)
        assert child.process is None
        assert child.still(png(), 10**6).shape == (64, 64, 3)


@pytest.mark.slow
def test_a_child_that_is_abandoned_is_gone_for_good() -> None:
    with MediaChild(DecodeConfig()) as child:
        child.warm()
        pid = pid_of(child)
        os.kill(pid, signal.SIGSTOP)
        threading.Timer(0.3, child.abandon).start()
        with pytest.raises(ClipError, match=r"^CRASHED: "):
            child.sound(wav(), 60, 10**6, 16_000)
        assert not Path(f"/proc/{pid}").exists()
        with pytest.raises(RuntimeError, match="does not start"):  # no second try, and none that is left over
            child.sound(wav(), 60, 10**6, 16_000)
        assert child.process is None


@pytest.mark.slow
def test_the_kernel_ends_a_clip_that_does_not_end_itself(slow: bytes) -> None:
    with MediaChild(DecodeConfig(timeout_s=2)) as child:
        child.measure(make_clip(), None, None)
        process = child.process

        def freeze(pid: int) -> None:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(2 + GRACE_S)
            os.kill(pid, signal.SIGCONT)

        thread = while_busy(child, freeze)
        row = child.measure(slow, None, None)
        thread.join()
        assert process is not None
        assert process.returncode == -signal.SIGALRM
        assert (row["code"], row["transient"]) == ("TIMEOUT", True)
        assert child.measure(make_clip(), None, None)["code"] is None


@pytest.mark.slow
def test_the_parent_ends_a_child_that_is_stuck() -> None:
    with MediaChild(DecodeConfig(timeout_s=0.5)) as child:
        child.measure(make_clip(), None, None)
        process = child.process
        os.kill(pid_of(child), signal.SIGSTOP)  # it does not even read: the request fills the pipe
        row = child.measure(make_clip() + bytes(2**20), None, None)
        assert process is not None
        assert process.returncode == -signal.SIGKILL
        assert (row["code"], row["transient"]) == ("TIMEOUT", True)


@pytest.mark.slow
def test_memory_is_limited() -> None:
    cfg = DecodeConfig(max_memory_mb=1024, num_frames=64, frame_size_px=2000)
    with MediaChild(cfg) as child:
        row = child.measure(make_clip([0.0, 1.9], size=(3000, 2000)), None, None)
        assert (row["code"], row["transient"]) == ("OUT_OF_MEMORY", False)
        assert child.process is None  # a fresh one for the next clip
        assert child.measure(b"", None, None)["code"] == "EMPTY_FILE"


@pytest.mark.slow
def test_the_child_is_replaced_in_time_and_knows_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("HTTPS_PROXY", "secret")
    with MediaChild(DecodeConfig(recycle_after=2)) as child:
        pids = []
        for _ in range(5):
            assert child.measure(b"", None, None)["code"] == "EMPTY_FILE"
            pids.append(pid_of(child))
            assert b"secret" not in Path(f"/proc/{pids[-1]}/environ").read_bytes()
        assert [pids[i] == pids[i + 1] for i in range(4)] == [True, False, True, False]
    assert not Path(f"/proc/{pids[-1]}").exists()


@pytest.mark.slow
def test_it_ends_with_its_parent_and_starts_light() -> None:
    command = [sys.executable, "-m", "aai.media.child", DecodeConfig().model_dump_json()]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.communicate(timeout=60)
    assert child.returncode == 0
    heavy = "{'torch', 'transformers', 'ray', 'scipy', 'fsspec', 'pandas'} & set(sys.modules)"
    code = f"import sys, aai.media.child; sys.exit(bool({heavy}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_an_installation_that_is_broken_is_no_clips_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with MediaChild(DecodeConfig()) as child, pytest.raises(RuntimeError, match="does not start"):
        child.measure(make_clip(), None, None)


# ---------------------------------------------------------------- damaged files


def measure_damaged(count: int, seed: int) -> tuple[Counter[str], list[float], list[float]]:
    """Codes by kind; and memory in MB of the one child and of this process, after every 50th file."""
    cfg = DecodeConfig(timeout_s=5, recycle_after=10**6)
    codes: Counter[str] = Counter()
    child_mb, parent_mb, replaced = [], [], 0
    with MediaChild(cfg) as child:
        for number, (kind, data) in enumerate(damaged_files(count, seed)):
            before = child.process
            started = time.monotonic()
            row = child.measure(data, None, None)
            assert time.monotonic() - started < cfg.timeout_s + 2 * GRACE_S + 30, f"{kind} {number}"
            replaced += before is not None and child.process is not before
            assert (row["code"] is None) == (row["audio"] is not None), f"{kind} {number}"
            assert row["code"] not in ("CRASHED", "UNEXPECTED"), f"{kind} {number}: {row['message']}"
            codes[f"{kind}: {row['code'] or 'fine'}"] += 1
            if number % 50 == 49 and child.process:
                child_mb.append(rss_mb(pid_of(child)))
                parent_mb.append(rss_mb(os.getpid()))
    print(f"child replaced {replaced} times")
    return codes, child_mb, parent_mb


@pytest.mark.slow
def test_damaged_files_are_all_accounted_for() -> None:
    codes, _, _ = measure_damaged(40, seed=1)
    assert codes.total() == 40
    assert len({code.split(": ")[1] for code in codes}) >= 4
    assert measure_bytes(long_silence(), None, None, DecodeConfig())["code"] == "TOO_LONG"


@pytest.mark.accept
@pytest.mark.timeout(1800)
def test_b5_a_thousand_damaged_files_harm_nothing() -> None:
    codes, child_mb, parent_mb = measure_damaged(1000, seed=5)
    for what, count in sorted(codes.items()):
        print(f"{count:4d} {what}")
    print("child MB", [round(mb) for mb in child_mb])
    print("parent MB", [round(mb) for mb in parent_mb])
    assert codes.total() == 1000
    for series in (child_mb, parent_mb):
        quarter = len(series) // 4
        assert max(series[-quarter:]) <= 1.1 * max(series[:quarter]) + 16
