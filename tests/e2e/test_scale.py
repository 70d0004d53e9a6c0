"""J4, N7: what a driver costs as the data grows. The long evidence prints its figures."""

import json
import os
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from aai import storage
from pipelines import curate
from pipelines.curation import near, outcome, table_slices
from pipelines.engine import cluster
from pipelines.engine.shards import recorded
from tests import scale
from tests.counting import counted
from tests.pipelines.conftest import run_shards_here

ROOT = Path(__file__).resolve().parents[2]
MAX_REQUESTS = 4
"""Of the driver, for a shard."""
ONCE = 80
"""Of the driver, however many shards there are: listings, the lock, the plan."""
MAX_ROW_BYTES = 500
"""Of the driver's memory."""
DELAY_S = 0.03


class Judged(Exception):
    """All rows are judged, and gathered for the card; carries the bytes that the driver then holds."""


def held_bytes(out: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """What the driver holds of Python's and Arrow's memory when it has judged all rows; nothing is written."""

    def rows(self: outcome.JudgedTables) -> None:
        raise Judged(tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes())

    def consume(name: str, shards: Iterable[Any], *args: Any, **settings: Any) -> list[Any]:
        return [None for _ in shards if False]

    before = pa.total_allocated_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(outcome.JudgedTables, "rows", rows)
        patch.setattr(curate, "run_shards", consume)
        tracemalloc.start()
        with pytest.raises(Judged) as judged:
            curate.run(scale.settings(out))
        tracemalloc.stop()
    return int(judged.value.args[0]) - before


def test_a_row_takes_little_memory_of_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_slices, "GROUP_ROWS", 500)
    sizes = (500, 1_500, 5_500)  # the first one imports what there is to import
    for rows in sizes:
        scale.write_measured(f"{tmp_path}/{rows}", rows, 250)
    held = {rows: held_bytes(f"{tmp_path}/{rows}", monkeypatch) for rows in sizes}
    a_row = (held[5_500] - held[1_500]) / 4_000
    assert 100 < a_row < MAX_ROW_BYTES


def requests_of_driver(out: str, monkeypatch: pytest.MonkeyPatch, delay_s: float = 0) -> dict[str, Any]:
    """Requests by step, and seconds, of a run that finds all its tables there and has no work for workers."""
    storage.remove(storage.join(out, "curate.json"))
    figures: dict[str, Any] = {}
    write_card: Callable[..., None] = curate._write_card
    with counted(monkeypatch, delay_s) as requests, monkeypatch.context() as patch, recorded(bare=True) as stages:

        def write_counted(*args: Any) -> None:
            figures["tables"] = Counter(requests)
            figures["tables_s"] = round(time.monotonic() - begin, 1)
            write_card(*args)

        patch.setattr(curate, "_write_card", write_counted)
        patch.setattr(near, "SPREAD_FROM", 10**9)  # workers' requests are not the driver's
        begin = time.monotonic()
        curate.run(scale.settings(out))
        figures["all_s"] = round(time.monotonic() - begin, 1)
        figures["card"] = requests - figures["tables"]
        requests.clear()
        curate.run(scale.settings(out))
        figures["nothing_to_do"] = Counter(requests)
    assert stages == []
    return figures


def test_the_driver_asks_little_of_an_s3_server(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curate, "run_shards", run_shards_here)
    shards = 30
    scale.write_measured(s3, 20 * shards, 20)
    curate.run(scale.settings(s3))
    figures = requests_of_driver(s3, monkeypatch)
    assert figures["tables"].total() <= MAX_REQUESTS * shards, figures
    assert figures["nothing_to_do"].total() < 30, figures


# ---------------------------------------------------------------- the long evidence


def measured_run(folder: Path, rows: int) -> dict[str, Any]:
    """`tests.scale` in a process of its own, on Ray."""
    scale.write_measured(f"{folder}/{rows}", rows, 20_000)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.scale", f"{folder}/{rows}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found))
    return found


@pytest.mark.accept
@pytest.mark.timeout(7200)
def test_j4_a_million_rows_take_two_gigabytes_and_time_in_proportion(tmp_path: Path) -> None:
    small, large = (measured_run(tmp_path, rows) for rows in (100_000, 1_000_000))
    assert large["peak_mb"] <= 2000
    assert (large["peak_mb"] - small["peak_mb"]) * 2**20 / 900_000 <= MAX_ROW_BYTES
    for step in ("first", "second"):
        growth = large[f"{step}_cpu_s"] / small[f"{step}_cpu_s"]
        print(f"{step}: 10 times the rows, {growth:.1f} times the driver's CPU time")
        assert growth <= 12


@pytest.mark.accept
@pytest.mark.timeout(7200)
def test_j4_a_distant_s3_server_is_asked_little_and_not_waited_for(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = 800
    scale.write_measured(s3, 125 * shards, 125)
    cluster.shutdown()
    with counted(monkeypatch, DELAY_S), recorded(bare=True) as stages:
        begin = time.monotonic()
        curate.run(scale.settings(s3))
        all_s = time.monotonic() - begin
    workers_s = sum(stage.returned_s - stage.called_s for stage in stages)
    print(f"all {all_s:.0f} s, of which the driver alone {all_s - workers_s:.0f} s, {1 - workers_s / all_s:.0%}")
    figures = requests_of_driver(s3, monkeypatch, DELAY_S)
    print({name: dict(found) if isinstance(found, Counter) else found for name, found in figures.items()})
    asked = figures["tables"].total()
    print(f"{asked / shards:.2f} requests a shard, and {figures['card'].total()} for the clips that the card shows")
    assert asked <= MAX_REQUESTS * shards + ONCE


@pytest.mark.accept
@pytest.mark.timeout(3600)
def test_n7_100_000_empty_shards_cost_little() -> None:
    command = [sys.executable, "-m", "tests.empty_shards", "100000"]
    found = json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)
    print(found)
    assert found["shards"] == 100_000
    assert found["ms_per_shard"] <= 2
    assert found["driver_peak_mb"] <= 2000
