"""Two groups of processes that train the same take turns of a few steps, so that both meet the same machine.

A group waits between its turns, in the iterator of its batches: the training itself knows nothing of it. A turn lasts
from the first batch's being asked for to the step's end after the last one; the first turn of each group warms up.
"""

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from aai import storage
from aai.reader import Batch
from pipelines.training.ray_train import Work

GROUPS = ("ray", "bare")
LOOK_EVERY_S = 0.002
PATIENCE_S = 900.0
"""How long a group waits for its turn; the other one has then died without a word."""


@dataclass(frozen=True)
class Turn:
    """What one process did in one turn."""

    seconds: float
    waited_s: float
    """For batches."""
    cpu_s: float
    """Of this process, all its threads."""


@dataclass(frozen=True)
class Record:
    """What one process did."""

    ready_s: float
    """When it could have begun, on the clock that all processes of a machine share."""
    end_s: float
    """When its last turn had ended."""
    pid: int
    turns: list[Turn]
    """Without the one that warms up."""
    peak_gb: float | None
    """Of the GPU's memory; None without one."""


@dataclass(frozen=True)
class Turns:
    """Who may run: a file in `folder` for each turn that has begun."""

    folder: str
    steps: int
    """Of one turn."""
    pairs: int
    """Turns of each group that count."""

    @property
    def all_steps(self) -> int:
        """Steps of a training: one more, whose batch being asked for ends the last turn."""
        return self.steps * (self.pairs + 1) + 1

    def number(self, group: str, turn: int) -> int:
        """Which of all turns a group's is; every second pair goes backwards, so that a drift favours none."""
        return 2 * turn + (GROUPS.index(group) ^ turn % 2)

    def begin(self) -> None:
        """An empty folder in which the first turn has begun."""
        storage.remove(self.folder)
        Path(self.folder).mkdir(parents=True)
        self._open(0)

    def give_up(self, why: str) -> None:
        """Lets no group wait any longer; the first reason given is kept, later ones follow from it."""
        with contextlib.suppress(FileExistsError), Path(self.folder, "given-up").open("x", encoding="utf-8") as file:
            file.write(why)

    def ready(self, group: str, rank: int) -> bool:
        """Whether a process waits for its first turn, or has had it."""
        return self._file(group, rank, "ready").exists()

    def record(self, group: str, rank: int) -> Record:
        """What a process left when it had had its turns."""
        found = storage.read_json(str(self._file(group, rank, "json")))
        return Record(**{**found, "turns": [Turn(**turn) for turn in found["turns"]]})

    def taking(self, work: Work, group: str, rank: int) -> Work:
        """The same work in turns, without validation."""
        batches = lambda first_step: self._batches(work.batches, group, rank, first_step)  # noqa: E731
        return replace(work, batches=batches, evaluate=None)

    def _batches(
        self, batches: Callable[[int], Iterator[Batch]], group: str, rank: int, first_step: int
    ) -> Iterator[Batch]:
        if first_step:
            raise RuntimeError("bench: the training was interrupted")
        source, done, waited_s = batches(0), [], 0.0
        ready_s = time.monotonic()
        self._file(group, rank, "ready").touch()
        begin_s, begin_cpu_s = 0.0, 0.0
        for step in itertools.count():
            turn, within = divmod(step, self.steps)
            if within == 0:
                _wait_for_device()
                if step:
                    done.append(Turn(time.monotonic() - begin_s, waited_s, time.process_time() - begin_cpu_s))
                if step and rank == 0:
                    self._open(self.number(group, turn - 1) + 1)
                if turn > self.pairs:
                    found = Record(ready_s, time.monotonic(), os.getpid(), done[1:], _peak_gb())
                    storage.write_json(str(self._file(group, rank, "json")), asdict(found))
                else:
                    self._wait(self.number(group, turn))
                begin_s, begin_cpu_s, waited_s = time.monotonic(), time.process_time(), 0.0
            asked_s = time.monotonic()
            batch = next(source)
            waited_s += time.monotonic() - asked_s
            yield batch

    def _file(self, group: str, rank: int, end: str) -> Path:
        return Path(self.folder) / f"{group}-{rank}.{end}"

    def _open(self, number: int) -> None:
        Path(self.folder, f"turn-{number}").touch()

    def _wait(self, number: int) -> None:
        until_s = time.monotonic() + PATIENCE_S
        mine, given_up = Path(self.folder, f"turn-{number}"), Path(self.folder, "given-up")
        while not mine.exists():
            if given_up.exists():
                raise RuntimeError(f"bench: the other group ended: {given_up.read_text(encoding='utf-8')}")
            if time.monotonic() > until_s:
                raise RuntimeError("bench: the other group does not go on")
            time.sleep(LOOK_EVERY_S)


def make_work(rank: int, world_size: int, settings: tuple[Callable[..., Work], Any, Turns, str]) -> Work:
    """What a rank trains, in turns. settings: another maker of work, its settings, the turns, the group."""
    make, inner, turns, group = settings
    return turns.taking(make(rank, world_size, inner), group, rank)


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak_gb() -> float | None:
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None
