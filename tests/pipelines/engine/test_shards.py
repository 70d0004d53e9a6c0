import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aai.errors import UserError
from pipelines.engine.cluster import connect, shutdown
from pipelines.engine.shards import recorded, run_shards
from pipelines.settings import ClusterConfig

CLUSTER = ClusterConfig(num_workers=2)


class Sleeper:
    """A worker that processes of a plain pool can import; it writes a file and takes a known time."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self, shard: dict[str, Any]) -> dict[str, Any]:
        if shard.get("bad"):
            raise UserError("clips", 3, "is wrong", "mend it")
        time.sleep(0.02)
        (Path(self.folder) / shard["name"]).write_text("done")
        return {"rows": shard["rows"], "name": shard["name"]}


def make_worker() -> type:
    """A worker class that travels by value: Ray's processes cannot import test files."""

    class Writer:
        def __init__(self, folder: str) -> None:
            self.folder, self.calls = folder, 0

        def __call__(self, shard: dict[str, Any]) -> dict[str, Any]:
            import os

            if shard.get("mistake"):
                raise UserError("clips", 3, "is wrong", "mend it")
            if shard.get("bad"):
                raise ArithmeticError(f"shard {shard['name']} is bad")
            self.calls += 1
            with open(f"{self.folder}/{shard['name']}", "a") as file:
                file.write(f"{shard['value']}\n")
            return {"rows": shard["rows"], "rejected": 1, "name": shard["name"], "pid": os.getpid()}

    return Writer


@pytest.fixture(scope="module", autouse=True)
def ray_cluster() -> Iterator[None]:
    connect(CLUSTER)
    yield
    shutdown()


def shards(count: int) -> list[dict[str, Any]]:
    return [{"name": f"s{i}", "rows": 10, "value": None if i % 2 else "♪"} for i in range(count)]


@pytest.mark.parametrize("stateful", [True, False])
def test_each_shard_runs_once_and_finished_ones_never(tmp_path: Path, stateful: bool) -> None:
    (tmp_path / "s1").write_text("kept\n")

    def run() -> list[dict[str, Any]]:
        return run_shards(
            "test", shards(5), make_worker(), {"folder": str(tmp_path)}, CLUSTER,
            done=lambda shard: (tmp_path / shard["name"]).exists(), stateful=stateful,
        )  # fmt: skip

    results = run()
    assert sorted(result["name"] for result in results) == ["s0", "s2", "s3", "s4"]
    assert (tmp_path / "s1").read_text() == "kept\n"
    assert [(tmp_path / f"s{i}").read_text() for i in (0, 2, 3, 4)] == ["♪\n", "♪\n", "None\n", "♪\n"]
    assert run() == []


def test_the_workers_error_ends_the_job_and_a_second_run_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    todo = shards(4)
    todo[2]["bad"] = True

    def run() -> list[dict[str, Any]]:
        return run_shards(
            "test", todo, make_worker(), {"folder": str(tmp_path)}, CLUSTER,
            done=lambda shard: (tmp_path / shard["name"]).exists(),
        )  # fmt: skip

    with pytest.raises(RuntimeError, match="test: s2 failed: ArithmeticError: shard s2 is bad"):
        run()
    todo[2] |= {"bad": False, "mistake": True}
    with pytest.raises(UserError, match="clips=3: is wrong; mend it"):
        run()
    todo[2]["mistake"] = False
    capfd.readouterr()
    run()
    assert all((tmp_path / f"s{i}").read_text().count("\n") == 1 for i in range(4))
    shown = capfd.readouterr().err
    assert "test: 100%" in shown
    assert "rejected=" in shown
    assert "core_worker" not in shown
    assert "Actor" not in shown


def test_a_plain_pool_does_the_same_work_and_its_calls_are_recorded(tmp_path: Path) -> None:
    def run(todo: list[dict[str, Any]]) -> list[dict[str, Any]]:
        args = {"folder": str(tmp_path)}
        return run_shards("test", todo, Sleeper, args, CLUSTER, lambda shard: (tmp_path / shard["name"]).exists())

    with recorded(bare=True) as stages:
        results = run(shards(6))
        assert run(shards(6)) == []
        with pytest.raises(UserError, match="clips=3: is wrong; mend it"):
            run([{**shards(1)[0], "name": "other", "bad": True}])
    assert sorted(result["name"] for result in results) == [f"s{i}" for i in range(6)]
    assert all(set(result) == {"rows", "name"} for result in results)
    stage = stages[0]
    assert (stage.name, len(stages)) == ("test", 2)
    assert [rows for _, rows, _, _ in stage.calls] == [10] * 6
    assert os.getpid() not in {pid for pid, _, _, _ in stage.calls}
    assert all(stage.called_s < start <= end - 0.02 < stage.returned_s for _, _, start, end in stage.calls)


def test_ray_is_recorded_alike(tmp_path: Path) -> None:
    with recorded() as stages:
        args = {"folder": str(tmp_path)}
        results = run_shards("test", shards(3), make_worker(), args, CLUSTER, done=lambda shard: False)
    assert {pid for pid, _, _, _ in stages[0].calls} == {result["pid"] for result in results}
    assert "call" not in results[0]
