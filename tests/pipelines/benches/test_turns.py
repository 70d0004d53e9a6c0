"""Two groups that take turns: who may run when, what is counted, and that none waits for a dead one."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from aai.config import Config
from pipelines.benches import turns as module
from pipelines.benches.turns import GROUPS, Turns, make_work
from pipelines.training.ray_train import Work


class Endless:
    """Batches that say who asks for them."""

    def __init__(self, seen: list[str], name: str, delay_s: float = 0.0) -> None:
        self.seen, self.name, self.delay_s = seen, name, delay_s

    def __call__(self, first_step: int) -> Iterator[dict[str, Any]]:
        while True:
            time.sleep(self.delay_s)
            self.seen.append(self.name)
            yield {}


def work_of(batches: Endless) -> Work:
    task = torch.nn.Linear(1, 1)
    return Work(task, batches, lambda: (task, Config()), evaluate=lambda: {"accuracy": 1.0})


def take(turns: Turns, work: Work, step_s: float = 0.0) -> None:
    """Takes all steps of a training; a step begins when its batch is there."""
    batches = work.batches(0)
    for _ in range(turns.all_steps):
        next(batches)
        time.sleep(step_s)


def both(turns: Turns, seen: list[str], step_s: dict[str, float], delay_s: float = 0.0) -> None:
    turns.begin()
    threads = []
    for group in GROUPS:
        work = make_work(0, 1, (lambda rank, size, s: work_of(s), Endless(seen, group, delay_s), turns, group))
        threads.append(threading.Thread(target=take, args=(turns, work, step_s[group])))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_groups_alternate_and_every_second_pair_goes_backwards(tmp_path: Path) -> None:
    seen: list[str] = []
    turns = Turns(str(tmp_path / "turns"), steps=2, pairs=2)
    both(turns, seen, {"ray": 0.0, "bare": 0.0})
    order = ["ray", "bare", "bare", "ray", "ray", "bare"]  # the first pair warms up
    in_turns = [group for group in order for _ in range(2)]
    seen.reverse()
    seen.remove("ray")  # the last step of each, which ends its last turn, waits for nobody
    seen.remove("bare")
    assert seen[::-1] == in_turns
    assert [turns.number("ray", turn) for turn in range(3)] == [0, 3, 4]
    assert [turns.number("bare", turn) for turn in range(3)] == [1, 2, 5]


def test_a_turn_counts_its_own_steps_and_not_the_others(tmp_path: Path) -> None:
    turns = Turns(str(tmp_path / "turns"), steps=2, pairs=3)
    begin_s = time.monotonic()
    both(turns, [], {"ray": 0.05, "bare": 0.15}, delay_s=0.02)
    all_s = time.monotonic() - begin_s
    ray, bare = (turns.record(group, 0) for group in GROUPS)
    assert len(ray.turns) == len(bare.turns) == 3  # without the one that warms up
    assert min(turn.seconds for turn in ray.turns) >= 2 * 0.07
    assert min(turn.seconds for turn in bare.turns) >= 2 * 0.17
    assert sum(turn.seconds for turn in [*ray.turns, *bare.turns]) < all_s  # no two turns at once
    assert all(0.04 <= turn.waited_s < turn.seconds for turn in [*ray.turns, *bare.turns])
    assert ray.ready_s < ray.end_s
    assert turns.ready("ray", 0)
    assert not turns.ready("ray", 1)


def test_nothing_is_validated_in_turns(tmp_path: Path) -> None:
    turns = Turns(str(tmp_path), steps=1, pairs=1)
    assert turns.taking(work_of(Endless([], "x")), "ray", 0).evaluate is None


def test_a_group_does_not_wait_for_one_that_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns(str(tmp_path / "turns"), steps=1, pairs=1)
    turns.begin()
    second = turns.taking(work_of(Endless([], "x")), "bare", 0)
    monkeypatch.setattr(module, "PATIENCE_S", 0.01)
    with pytest.raises(RuntimeError, match="does not go on"):
        next(second.batches(0))
    turns.give_up("ValueError: no")
    turns.give_up("what follows from it")
    with pytest.raises(RuntimeError, match="the other group ended: ValueError: no"):
        next(second.batches(0))


def test_a_training_that_was_interrupted_is_no_figure(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="interrupted"):
        next(Turns(str(tmp_path), 1, 1).taking(work_of(Endless([], "x")), "ray", 0).batches(3))
