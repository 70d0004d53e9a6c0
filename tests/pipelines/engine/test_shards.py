import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from aai.errors import UserError
from pipelines.engine import shards
from pipelines.engine.cluster import connect, shutdown
from pipelines.engine.shards import Result, Shard, _Actor, recorded, run_shards
from pipelines.engine.waiting import WaitingTexts
from pipelines.settings import ClusterConfig

CLUSTER = ClusterConfig(num_workers=2)


@dataclass(frozen=True, kw_only=True)
class SleepShard(Shard):
    bad: bool = False


@dataclass(frozen=True, kw_only=True)
class SleepResult(Result):
    name: str


class Sleeper:
    """A worker that processes of a plain pool can import; it writes a file and takes a known time."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self, shard: SleepShard) -> SleepResult:
        if shard.bad:
            raise UserError("clips", 3, "is wrong", "mend it")
        time.sleep(0.02)
        (Path(self.folder) / shard.name).write_text("done")
        return SleepResult(rows=shard.rows, name=shard.name)


@dataclass(frozen=True)
class Note:
    text: str | None


@dataclass(frozen=True, kw_only=True)
class WriteShard(Shard):
    notes: list[Note]
    bad: bool = False
    mistake: bool = False


@dataclass(frozen=True, kw_only=True)
class WriteResult(Result):
    name: str
    pid: int


class Writer:
    """A worker that appends to a file of its shard's name."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self, shard: WriteShard) -> WriteResult:
        if shard.mistake:
            raise UserError("clips", 3, "is wrong", "mend it")
        if shard.bad:
            raise ArithmeticError(f"shard {shard.name} is bad")
        with open(f"{self.folder}/{shard.name}", "a") as file:
            file.write(f"{shard.notes[0].text}\n")
        return WriteResult(rows=shard.rows, rejected=1, name=shard.name, pid=os.getpid())


def make(number: int, **fields: bool) -> WriteShard:
    return WriteShard(name=f"s{number}", rows=10, notes=[Note(None if number % 2 else "♪")], **fields)


@pytest.fixture(scope="module", autouse=True)
def ray_cluster() -> Iterator[None]:
    connect(CLUSTER)
    yield
    shutdown()


@pytest.mark.parametrize("stateful", [True, False])
def test_each_shard_runs_once_and_finished_ones_never(tmp_path: Path, stateful: bool) -> None:
    (tmp_path / "s1").write_text("kept\n")

    def run() -> list[Any]:
        return run_shards(
            "test", [make(i) for i in range(5)], Writer, {"folder": str(tmp_path)}, CLUSTER,
            done=lambda shard: (tmp_path / shard.name).exists(), stateful=stateful,
        )  # fmt: skip

    results = run()
    assert sorted(result.name for result in results) == ["s0", "s2", "s3", "s4"]
    assert (tmp_path / "s1").read_text() == "kept\n"
    assert [(tmp_path / f"s{i}").read_text() for i in (0, 2, 3, 4)] == ["♪\n", "♪\n", "None\n", "♪\n"]
    assert run() == []


def test_very_many_shards_are_handled_several_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MOST_BLOCKS", 3)
    monkeypatch.setattr(shards, "BLOCKS_OF_WORKER", 1)
    todo, args = [make(i, mistake=i == 9) for i in range(20)], {"folder": str(tmp_path)}
    seen: list[Any] = []
    with recorded() as stages:
        results = run_shards("test", todo[:9], Writer, args, CLUSTER, on_result=seen.append)
    assert sorted(result.name for result in results) == sorted(result.name for result in seen)
    assert [(tmp_path / f"s{i}").read_text().count("\n") for i in range(9)] == [1] * 9
    assert len(stages[0].calls) == 9
    with pytest.raises(UserError, match="clips=3: is wrong; mend it"):
        run_shards("test", todo, Writer, args, CLUSTER, done=lambda shard: shard.name in {f"s{i}" for i in range(9)})


def test_the_workers_error_ends_the_job_and_a_second_run_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:

    def run(**fields: bool) -> list[Any]:
        todo = [make(i, **(fields if i == 2 else {})) for i in range(4)]
        done = lambda shard: (tmp_path / shard.name).exists()  # noqa: E731
        return run_shards("test", todo, Writer, {"folder": str(tmp_path)}, CLUSTER, done)

    with pytest.raises(RuntimeError, match="test: s2 failed: ArithmeticError: shard s2 is bad"):
        run(bad=True)
    with pytest.raises(UserError, match="clips=3: is wrong; mend it"):
        run(mistake=True)
    capfd.readouterr()
    run()
    assert all((tmp_path / f"s{i}").read_text().count("\n") == 1 for i in range(4))
    shown = capfd.readouterr().err
    assert "test: 100%" in shown
    assert "rejected=" in shown
    assert "core_worker" not in shown
    assert "Actor" not in shown


def test_a_plain_pool_does_the_same_work_and_its_calls_are_recorded(tmp_path: Path) -> None:
    def run(todo: list[SleepShard]) -> list[SleepResult]:
        args = {"folder": str(tmp_path)}
        return run_shards("test", todo, Sleeper, args, CLUSTER, lambda shard: (tmp_path / shard.name).exists())

    shards = [SleepShard(name=f"s{i}", rows=10) for i in range(6)]
    with recorded(bare=True) as stages:
        results = run(shards)
        assert run(shards) == []
        with pytest.raises(UserError, match="clips=3: is wrong; mend it"):
            run([SleepShard(name="other", rows=10, bad=True)])
    assert sorted(results, key=lambda result: result.name) == [SleepResult(rows=10, name=f"s{i}") for i in range(6)]
    stage = stages[0]
    assert (stage.name, len(stages)) == ("test", 2)
    assert [rows for _, rows, _, _ in stage.calls] == [10] * 6
    assert os.getpid() not in {pid for pid, _, _, _ in stage.calls}
    assert all(stage.called_s < start <= end - 0.02 < stage.returned_s for _, _, start, end in stage.calls)


def test_ray_is_recorded_alike(tmp_path: Path) -> None:
    with recorded() as stages:
        results = run_shards("test", [make(i) for i in range(3)], Writer, {"folder": str(tmp_path)}, CLUSTER)
    assert {pid for pid, _, _, _ in stages[0].calls} == {result.pid for result in results}


def test_records_that_wait_in_files_reach_their_workers(tmp_path: Path) -> None:
    waiting = tmp_path / "out/_waiting"
    shards = (make(i) for i in range(5))  # made as they are asked for
    results = run_shards(
        "test", shards, Writer, {"folder": str(tmp_path)}, CLUSTER, lambda shard: shard.name == "s1",
        waiting=str(waiting),
    )  # fmt: skip
    assert sorted(result.name for result in results) == ["s0", "s2", "s3", "s4"]
    assert [(tmp_path / f"s{i}").read_text() for i in (0, 2, 3, 4)] == ["♪\n", "♪\n", "None\n", "♪\n"]
    assert not list(waiting.parent.rglob("*.parquet"))
    with pytest.raises(UserError, match="clips=3: is wrong; mend it"):
        run_shards("test", [make(7, mistake=True)], Writer, {"folder": str(tmp_path)}, CLUSTER, waiting=str(waiting))
    assert not list(waiting.parent.rglob("*.parquet"))


def test_a_record_that_is_gone_is_an_answer_and_no_crash(tmp_path: Path) -> None:
    """As for workers that outlive a killed driver, when another one has taken its folder over."""
    texts = WaitingTexts(str(tmp_path / "_waiting"))
    texts.add("{}")
    (place,) = texts.places()
    texts.remove()
    answer = json.loads(_Actor(Writer, {"folder": str(tmp_path)}, ()).work(place))
    assert "FileNotFoundError" in answer["error"]
    assert answer["shard"] == place


def test_a_small_job_is_done_here_where_ray_would_have_to_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pids(count: int, cluster: ClusterConfig = CLUSTER) -> set[int]:
        shards = [make(i) for i in range(count)]
        return {r.pid for r in run_shards("test", shards, Writer, {"folder": str(tmp_path)}, cluster, alone_up_to=20)}

    assert os.getpid() not in pids(2)  # Ray is there anyway
    monkeypatch.setattr("pipelines.engine.shards.is_connected", lambda: False)
    assert pids(2) == {os.getpid()}
    assert os.getpid() not in pids(3)  # 30 units of work
    with pytest.raises(UserError, match="clips=3: is wrong; mend it"):
        run_shards("test", [make(0, mistake=True)], Writer, {"folder": str(tmp_path)}, CLUSTER, alone_up_to=20)
