"""Schedules of the protocol: drawn from a seed, or every single and double crash point one after the other.

python -m tests.schedules --protocol curate --seed 17              # one schedule again, and what is wrong after it
python -m tests.schedules --bug "batches named by count" --seed 3  # the same with a bug planted (tests/planted.py)
"""

import argparse
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import product as product_of
from typing import Any

import pytest

from aai.errors import UserError
from tests import simulation
from tests.planted import BUGS
from tests.protocol_registry import PromoteProtocol, registry_is_simulated
from tests.protocol_tables import (
    CompactProtocol,
    CurateProtocol,
    EvaluateProtocol,
    ExportProtocol,
    FeaturizeProtocol,
    clips_cost_nothing,
)
from tests.protocols import OUT, LedgerProtocol, LockProtocol, Protocol, engine, owner_of
from tests.simulation import Process, World

PROTOCOLS: dict[str, type[Protocol]] = {
    each.name: each
    for each in (
        LockProtocol, LedgerProtocol, CurateProtocol, FeaturizeProtocol, CompactProtocol, ExportProtocol,
        EvaluateProtocol, PromoteProtocol,
    )
}  # fmt: skip
ENDS_S = 700.0
"""After so long a lease has run out, also one of a host whose clock is ahead."""


@contextmanager
def product() -> Iterator[None]:
    """The product's modules in the simulation's hands."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    with engine() as patch:
        clips_cost_nothing(patch)
        registry_is_simulated(patch)
        yield
    logging.disable(before)


def drive(world: World, protocol: Protocol, variant: int, name: str, after_s: float = 0.0) -> Process:
    """Starts a driver; what it must not end with stands in `world.broken`."""
    process = world.process(name)

    def run() -> None:
        try:
            protocol.drive(variant)
        except UserError as error:
            process.error = error
            # A DELETE that arrives twice may free the lock of who came after: then nobody is named (docs/protocol.md).
            told = "was taken over by process" in str(error)
            if told and not any(each.has_slept for each in [process, *process.workers]):
                world.broken.append(f"{name} was alive, and lost its lock: {error}")
        except Exception as error:
            process.error = error
            if owner_of(world) == name:  # else it had lost its lock, and what it read was another's
                world.broken.append(f"{name} ended with {type(error).__name__}: {error}")

    world.spawn(process, run, after_s)
    return process


@contextmanager
def begun(protocol: Protocol, rng: random.Random, calm: bool, conditional: bool = True) -> Iterator[World]:
    """A fresh world with the protocol's inputs."""
    world = World(rng, calm, conditional)
    world.owner_of, world.out = owner_of if protocol.name != "ledger" else (lambda world: None), f"{OUT[5:]}/"
    with simulation.entered(world):
        protocol.prepare(world)
        yield world


@cache
def undisturbed(name: str) -> tuple[tuple[list[tuple[Any, Any]]], int]:
    """Marker and rows of each variant when nothing disturbs it, and the most requests of a driver that takes."""
    protocol, found, most = PROTOCOLS[name](), [], 0
    for variant in range(protocol.variants):
        with begun(protocol, random.Random(0), calm=True) as world:
            process = drive(world, protocol, variant, "alone")
            world.run()
            assert (world.broken, process.error) == ([], None)
            found.append((protocol.marker(), protocol.state()))
            most = max(most, process.ops)
    return (found,), most


def end(world: World, protocol: Protocol, variant: int) -> list[str]:
    """What is wrong now, and after one more driver that nothing disturbs."""
    (expected,), _ = undisturbed(protocol.name)
    if wrong := world.broken + wrong_now(protocol, expected):
        return wrong
    world.now_s += ENDS_S
    world.entered = None
    last = undisturb(world, protocol, variant)
    if last.error is not None:
        return [f"the last driver ended with {type(last.error).__name__}: {last.error}"]
    if protocol.marker() != expected[variant][0] and protocol.marker() != "always":
        return [f"the last driver left {protocol.marker()}"]
    return world.broken + wrong_now(protocol, expected)


def wrong_now(protocol: Protocol, expected: list[tuple[Any, Any]]) -> list[str]:
    """What is wrong with the store; what cannot even be read is."""
    try:
        return protocol.wrong(expected)
    except Exception as error:
        return [f"the output cannot be read: {type(error).__name__}: {error}"]


def undisturb(world: World, protocol: Protocol, variant: int) -> Process:
    """Lets one driver run to its end, with nothing to disturb it."""
    calm, world.calm = world.calm, True
    process = drive(world, protocol, variant, f"alone {len(world.processes)}")
    world.run()
    world.calm, world.entered = calm, None
    return process


def drawn(protocol: Protocol, seed: int) -> list[str]:
    """What is wrong after the schedule of a seed: up to three drivers, deaths, late and repeated writes."""
    rng = random.Random(seed)
    _, ops = undisturbed(protocol.name)
    last = rng.randrange(protocol.variants)
    conditional = rng.random() < 0.8 or protocol.name == "ledger"  # which has no lock to help it
    with begun(protocol, rng, calm=False, conditional=conditional) as world:
        if protocol.variants > 1 and rng.random() < 0.3:  # on a finished output
            undisturb(world, protocol, last)
        for number in range(rng.choice((1, 2, 2, 3))):
            after_s = rng.choice((0.0, 0.0, rng.random(), 150 * rng.random()))
            process = drive(world, protocol, rng.randrange(protocol.variants), f"driver {number}", after_s)
            if rng.random() < 0.5:
                process.dies_at = rng.randrange(1, ops + ops // 2)
        world.run()
        return end(world, protocol, last)


def crashes(protocol: Protocol, twice: bool) -> Iterator[tuple[str, list[str]]]:
    """(which, what is wrong): a driver dies before each of its requests; twice: so does the one after it.

    Once on an empty folder, and, where there are variants, on an output that another one has finished.
    """
    _, ops = undisturbed(protocol.name)
    for number, at in enumerate(product_of(range(2, ops + 1), repeat=2 if twice else 1)):
        pairs = list(product_of(range(protocol.variants), repeat=2))
        for before, after in [pairs[number % len(pairs)]] if twice else pairs:
            for finished in (False, True) if protocol.variants > 1 else (False,):
                with begun(protocol, random.Random(number), calm=True) as world:
                    if finished:
                        undisturb(world, protocol, after)
                    for variant, dies_at in zip((before, after), at, strict=False):
                        drive(world, protocol, variant, f"driver {len(world.processes)}").dies_at = dies_at
                        world.run()
                        world.now_s += ENDS_S
                        world.entered = None
                    yield f"{before}, {after} at {at}, {finished=}", end(world, protocol, after)


def main() -> None:
    """Replays a schedule."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--protocol", choices=PROTOCOLS)
    parser.add_argument("--bug", choices=BUGS)
    parser.add_argument("--seed", type=int)
    asked = parser.parse_args()
    with product(), pytest.MonkeyPatch.context() as patch:
        protocol = PROTOCOLS[BUGS[asked.bug].protocol if asked.bug else asked.protocol]()
        undisturbed(protocol.name)
        if asked.bug:
            BUGS[asked.bug].plant(patch)
        print(drawn(protocol, asked.seed) or "nothing is wrong")


if __name__ == "__main__":
    main()
