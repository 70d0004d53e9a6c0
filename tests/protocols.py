"""Commands in a simulated world (`tests.simulation`): what all have in common, the lock and the ledger alone.

Everything that decides what is written when, and what counts as done, is the product's: the verbs' own `run`, the
engine's `run_shards`, the lock, the ledger, the moves of an alias, `aai.storage`. Replaced is what a clip costs:
decoding, models, cards.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest

from aai import storage
from pipelines.curation.clip_keys import ClipKeys
from pipelines.curation.ledger import Entry, Ledger
from pipelines.engine import lock, shards
from tests import simulation
from tests.simulation import SIGNAL, THREADING, TIME, World

OUT = "s3://sim/out"


class Protocol:
    """One command on one output folder."""

    name = ""
    variants = 1
    """How many settings or inputs it is run with, one after the other, on the same folder."""

    def prepare(self, world: World) -> None:
        """Writes the inputs."""

    def drive(self, variant: int) -> None:
        """The command."""
        raise NotImplementedError

    def marker(self) -> Any:
        """What says that the output is finished, and of which variant; None = it is not."""
        raise NotImplementedError

    def state(self) -> Any:
        """The rows of the output."""
        raise NotImplementedError

    def wrong(self, expected: list[tuple[Any, Any]]) -> list[str]:
        """What is wrong with the store when all is quiet."""
        marker = self.marker()
        if marker is None:
            return []
        for known, state in expected:
            if known == marker:
                return [] if self.state() == state else [f"finished as {marker}, but rows are lost or doubled"]
        return [f"finished as nothing that was asked for: {marker}"]


def rows_of(folder: str, *columns: str) -> list[tuple[Any, ...]]:
    """Of all Parquet files in a folder, sorted."""
    found = []
    for file in storage.list_files(f"{OUT}/{folder}" if folder else OUT, ".parquet"):
        table = storage.read_table(file, list(columns))
        found += list(zip(*(table[name].to_pylist() for name in columns), strict=True))
    return sorted(found, key=repr)


def json_of(name: str, *keys: str) -> Any:
    """Some values of OUT/NAME; None where there is no such file."""
    where = f"{OUT}/{name}"
    if not storage.exists(where):
        return None
    found = storage.read_json(where)
    return [found[key] for key in keys]


# ---------------------------------------------------------------- the lock alone, and the ledger alone


class LockProtocol(Protocol):
    """Read, add a row, write: what a second writer at the same time would spoil. Every row is a driver that ended."""

    name = "lock"

    def prepare(self, world: World) -> None:
        storage.write_json(f"{OUT}/rows.json", [])
        self.ended: list[str] = []

    def drive(self, variant: int) -> None:
        me = simulation.getcurrent().process.name
        with lock.output_lock(OUT):
            for part in range(2):
                rows = storage.read_json(f"{OUT}/rows.json")
                TIME.sleep(simulation.WORLD.rng.choice((0, 0.3, 80)))
                storage.write_json(f"{OUT}/rows.json", [*rows, f"{me}-{part}"])
                self.ended.append(f"{me}-{part}")

    def marker(self) -> Any:
        return "always"

    def state(self) -> Any:
        return sorted(storage.read_json(f"{OUT}/rows.json"))

    def wrong(self, expected: list[tuple[Any, Any]]) -> list[str]:
        rows = self.state()
        lost, doubled = set(self.ended) - set(rows), len(rows) - len(set(rows))
        return [f"lost {sorted(lost)}, doubled {doubled}"] if lost or doubled else []


class LedgerProtocol(Protocol):
    """Two ledgers of one folder without any lock: whatever one of them has planned stays planned."""

    name = "ledger"

    def prepare(self, world: World) -> None:
        self.planned: set[str] = set()
        self.count = 0

    def drive(self, variant: int) -> None:
        self.count += 1
        keys = [f"clip-{self.count}-{i}" for i in range(3)]
        for _ in range(2):
            ledger = Ledger(OUT)
            new = [Entry(keys[i], keys[i], None, None) for i in ledger.missing(ClipKeys(keys))]
            if new and ledger.add(new, 2):
                self.planned |= {entry.key for entry in new}

    def marker(self) -> Any:
        return "always"

    def state(self) -> Any:
        return None

    def wrong(self, expected: list[tuple[Any, Any]]) -> list[str]:
        ledger = Ledger(OUT)
        found = [entry.key for entries in ledger.shards.values() for entry in entries]
        lost = self.planned - set(found)
        large = [name for name, entries in ledger.shards.items() if len(entries) > 2]
        if lost or len(found) != len(set(found)) or large:
            return [f"planned and lost: {sorted(lost)}; shards of two plans: {large}"]
        return []


# ---------------------------------------------------------------- the product in such a world


def answers(job: Any) -> Iterator[str]:
    """Ray's part: two workers of another process, who may outlive the driver."""
    world, driver = simulation.WORLD, simulation.getcurrent().process
    pool = world.process(f"{driver.name}'s workers", driver.owner)
    driver.workers.append(pool)
    todo, done, news = list(job.shards), [], simulation.Event()

    def work() -> None:
        actor = shards._Actor(**job.actor)
        while todo:
            text = todo.pop(0)
            if not world.calm:
                world.pause(world.rng.choice((0.0, 1.0, 25.0)))
            done.append(actor.work(text))
            news.set()

    for _ in range(min(2, len(todo))):
        world.spawn(pool, work)
    for number in range(len(job.shards)):
        while number >= len(done):
            news.is_on = False
            news.wait()
        yield done[number]


class NoBar:
    """tqdm without a terminal."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> "NoBar":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, *_: Any) -> None:
        pass

    def set_postfix(self, **_: Any) -> None:
        pass


def _record_of_process() -> dict[str, Any]:
    world = simulation.WORLD
    world.version += 1
    who = simulation.getcurrent().process.name
    return {"holder": f"{who}-{world.version}", "host": "sim", "pid": who, "started": "now", "beat": TIME.time()}


def owner_of(world: World) -> str | None:
    """The driver whose record stands in the lock of OUT."""
    found = world.files.get(f"{OUT.removeprefix('s3://')}/{lock.LOCK}")
    return json.loads(found[0])["pid"] if found else None


@contextmanager
def engine() -> Iterator[pytest.MonkeyPatch]:
    """The lock and the engine with the simulation's clock, threads and workers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lock, "time", TIME)
        patch.setattr(lock, "threading", THREADING)
        patch.setattr(lock, "signal", SIGNAL)
        patch.setattr(lock, "_record", _record_of_process)
        patch.setattr(shards, "_ray_answers", answers)
        patch.setattr(shards, "connect", lambda *_: None)
        patch.setattr(shards, "is_connected", lambda: True)  # else the driver does little work by itself
        patch.setattr(shards, "native_stderr_held", nullcontext)
        patch.setattr(shards, "tqdm", NoBar)
        yield patch
