"""The protocol of output folders and aliases under schedules, crash points and planted bugs (docs/protocol.md)."""

import os
import random
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from tests.planted import BUGS
from tests.schedules import PROTOCOLS, begun, crashes, drawn, drive, end, product

SCHEDULES = {
    "lock": 50_000, "promote": 25_000, "ledger": 8_000, "evaluate": 4_500, "compact": 4_000, "featurize": 3_500,
    "export": 2_000, "curate": 3_000,
}  # fmt: skip
"""What `make accept` draws, by protocol: 100,000."""
MOST_SEEDS = 20_000
"""Schedules within which a planted bug must be found."""


def run_seeds(name: str, first: int, last: int) -> tuple[str, int, list[tuple[int, list[str]]]]:
    """The schedules of some seeds; those after which something is wrong."""
    wrong = []
    with product():
        protocol = PROTOCOLS[name]()
        for seed in range(first, last):
            if found := drawn(protocol, seed):
                wrong.append((seed, found))
    return name, last - first, wrong


def run_crashes(name: str, twice: bool) -> tuple[str, int, list[tuple[str, list[str]]]]:
    """All single or double crash points of a protocol."""
    with product():
        found = list(crashes(PROTOCOLS[name](), twice))
    return name, len(found), [(which, wrong) for which, wrong in found if wrong]


def seed_that_finds(name: str, most: int = MOST_SEEDS) -> tuple[str, int | None, list[str]]:
    """(bug, the first seed whose schedule shows it, what it shows)."""
    planted = BUGS[name]
    with product(), pytest.MonkeyPatch.context() as patch:
        protocol = PROTOCOLS[planted.protocol]()
        drawn(protocol, 0)  # what is right is learnt without the bug
        planted.plant(patch)
        for seed in range(most):
            if found := drawn(protocol, seed):
                return name, seed, found
    return name, None, []


class Drivers(RuleBasedStateMachine):
    """Hypothesis chooses who starts, who goes on, who dies and how much time passes."""

    protocol_name = "lock"

    @initialize(seed=st.integers(0, 2**32))
    def begin(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.protocol = PROTOCOLS[self.protocol_name]()
        self.context = begun(self.protocol, self.rng, calm=False)
        self.world = self.context.__enter__()
        self.drivers = []

    @precondition(lambda self: len(self.drivers) < 4)
    @rule(data=st.data())
    def start(self, data: st.DataObject) -> None:
        variant = data.draw(st.integers(0, self.protocol.variants - 1))
        self.drivers.append(drive(self.world, self.protocol, variant, f"driver {len(self.drivers)}"))

    @rule(count=st.integers(1, 40))
    def go_on(self, count: int) -> None:
        for _ in range(count):
            self.world.step()

    @precondition(lambda self: any(not driver.is_dead for driver in self.drivers))
    @rule(data=st.data())
    def kill(self, data: st.DataObject) -> None:
        self.world.kill(data.draw(st.sampled_from([driver for driver in self.drivers if not driver.is_dead])))

    @rule(seconds=st.sampled_from([1.0, 20.0, 100.0]))
    def wait(self, seconds: float) -> None:
        until_s = self.world.now_s + seconds
        while (self.world.tasks or self.world.writes) and self.world.now_s < until_s:
            self.world.step()

    def teardown(self) -> None:
        if hasattr(self, "context"):
            try:
                self.world.run()
                wrong = end(self.world, self.protocol, 0)
            finally:
                self.context.__exit__(None, None, None)
            assert not wrong, wrong


def choose_schedules(name: str, examples: int) -> None:
    """Hypothesis' schedules of one protocol."""
    machine = type(f"Drivers_{name}", (Drivers,), {"protocol_name": name})
    how = settings(max_examples=examples, stateful_step_count=20, deadline=None, database=None, derandomize=True,
                   suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink])  # fmt: skip
    with product():
        run_state_machine_as_test(machine, settings=how)


# ---------------------------------------------------------------- a sample


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_sample_of_schedules_loses_and_doubles_nothing(name: str) -> None:
    assert run_seeds(name, 0, 20)[2] == []


def test_a_sample_of_crash_points() -> None:
    assert [run_crashes(name, twice=False)[2] for name in ("lock", "ledger", "compact")] == [[]] * 3


def test_hypothesis_finds_no_schedule_for_the_lock() -> None:
    choose_schedules("lock", 20)


SAMPLE = ("batches named by count are overwritten", "two drivers race for the lock", "a shard is done by its name",
          "a move is not written down", "shards are numbered by another size")  # fmt: skip


@pytest.mark.parametrize("name", SAMPLE)
def test_a_planted_bug_is_found(name: str) -> None:
    _, seed, found = seed_that_finds(name, 2000)
    assert seed is not None, "not found"
    assert found


# ---------------------------------------------------------------- J6


@pytest.mark.accept
@pytest.mark.timeout(3600)
def test_100_000_schedules_lose_and_double_nothing() -> None:
    begin_s, count, wrong = time.monotonic(), Counter[str](), []
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        size = 500
        jobs = [(name, at, at + size) for name, all_of in SCHEDULES.items() for at in range(0, all_of, size)]
        for name, done, found in pool.map(run_seeds, *zip(*jobs, strict=True)):
            count[name] += done
            wrong += [(name, *each) for each in found]
    print(f"{sum(count.values())} schedules in {time.monotonic() - begin_s:.0f} s: {dict(count)}")
    assert sum(count.values()) >= 100_000
    assert wrong == []


@pytest.mark.accept
@pytest.mark.timeout(3600)
def test_no_crash_point_or_pair_of_them_loses_or_doubles_anything() -> None:
    begin_s, jobs = time.monotonic(), [(name, twice) for name in PROTOCOLS for twice in (False, True)]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        results = list(pool.map(run_crashes, *zip(*jobs, strict=True)))
    told = [f"{name} {count}" for name, count, _ in results]
    print(f"{sum(count for _, count, _ in results)} crash points in {time.monotonic() - begin_s:.0f} s: {told}")
    assert [(name, wrong) for name, _, wrong in results if wrong] == []


@pytest.mark.accept
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", PROTOCOLS)
def test_hypothesis_finds_no_schedule(name: str) -> None:
    choose_schedules(name, 300)


@pytest.mark.accept
@pytest.mark.timeout(3600)
def test_every_planted_bug_is_found() -> None:
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        results = list(pool.map(seed_that_finds, BUGS))
    for name, seed, found in results:
        print(f"{name}: --protocol {BUGS[name].protocol} --bug {name!r} --seed {seed}: {found[:1]}")
    assert len(results) >= 20
    assert [name for name, seed, _ in results if seed is None] == []
