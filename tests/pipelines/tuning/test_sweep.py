"""What Tune hears and decides, without Ray; the sweep itself runs in test_tune.py."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from aai import storage
from pipelines.align import AlignConfig, AlignRecipe
from pipelines.tuning.sweep import STOPPED, Candidate, Halving, Progress, StoppingConfig, Sweep, Watch, reported

STEPS = 80


def sweep_of(folder: Path, count: int, mode: str = "max", **stopping: Any) -> Sweep:
    fit = {"steps": STEPS}
    configs = [AlignConfig.parse({"features": "f", "out": str(folder / f"{i}"), "fit": fit}) for i in range(count)]
    candidates = tuple(Candidate(number, {}, config) for number, config in enumerate(configs))
    parts = StoppingConfig(**{"grace_steps": 20, "min_trials": 1, **stopping}), 1, str(folder), dict[str, str]()
    return Sweep(AlignRecipe, candidates, "val_x", mode, *parts)


class Race:
    """Trials that report to the scheduler one after the other."""

    def __init__(self, sweep: Sweep) -> None:
        self.scheduler = Halving(sweep)
        self.trials = {c.number: SimpleNamespace(trial_id=f"t{c.number}") for c in sweep.candidates}
        for trial in self.trials.values():
            self.scheduler.on_trial_add(None, trial)

    def hears(self, number: int, step: int, value: float | None) -> bool:
        """Whether the trial goes on."""
        result = {"number": number, "step": step, "steps": STEPS} | ({} if value is None else {"value": value})
        decision = self.scheduler.on_trial_result(None, self.trials[number], result)
        return bool(decision == TrialScheduler.CONTINUE)


def test_what_falls_behind_is_stopped_and_marked(tmp_path: Path) -> None:
    race = Race(sweep_of(tmp_path, 4))
    for step, value in ((20, 0.5), (40, 0.6), (80, 0.7)):
        assert race.hears(0, step, value)
    assert race.hears(1, 10, 0.1)  # before grace_steps nobody is asked
    assert race.hears(1, 15, None)
    assert race.hears(1, 20, 0.6)
    assert race.hears(1, 40, 0.7)
    assert race.hears(2, 30, 0.6)
    assert not race.hears(2, 40, 0.5)
    assert storage.read_json(str(tmp_path / "2" / STOPPED)) == {"step": 40, "value": 0.5}
    assert not (tmp_path / "1" / STOPPED).exists()
    assert not race.hears(3, 20, 0.1)


def test_less_is_better_where_the_mode_says_so(tmp_path: Path) -> None:
    race = Race(sweep_of(tmp_path, 3, "min"))
    assert race.hears(0, 20, 0.5)
    assert race.hears(1, 20, 0.4)
    assert not race.hears(2, 20, 0.6)


def test_nothing_is_stopped_by_too_few_others(tmp_path: Path) -> None:
    race = Race(sweep_of(tmp_path, 6, min_trials=3))
    for number in range(3):
        assert race.hears(number, 20, 0.5 - number / 10)  # the third falls behind two
    assert not race.hears(3, 20, 0.2)
    assert race.hears(0, 40, 0.5)
    assert race.hears(1, 40, 0.4)
    assert race.hears(4, 20, 0.6)
    assert race.hears(4, 40, 0.1)  # two others have come as far
    assert race.hears(2, 40, 0.7)
    assert not race.hears(5, 40, 0.05)


def test_the_base_and_a_last_step_are_never_stopped(tmp_path: Path) -> None:
    race = Race(sweep_of(tmp_path, 3))
    assert race.hears(1, 20, 0.9)
    assert race.hears(0, 20, 0.1)
    assert race.hears(1, 80, 0.9)
    assert race.hears(2, 80, 0.0)  # it only has to write its bundle
    assert not list(tmp_path.rglob(STOPPED))


@pytest.mark.parametrize(
    ("grace", "factor", "every"), [(1, 2, 10), (20, 2, 10), (15, 3, 10), (16, 1.5, 4), (90, 2, 10)]
)
def test_a_plan_names_the_steps_at_which_trials_are_stopped(
    grace: int, factor: float, every: int, tmp_path: Path
) -> None:
    sweep = sweep_of(tmp_path, 41, grace_steps=grace, reduction_factor=factor)
    asked = []
    race, others = Race(sweep), iter(range(1, 41))
    for step in range(every, STEPS + 1, every):
        race.hears(0, step, 1.0)
    for step in range(every, STEPS, every):  # a trial that keeps up until here, and then falls behind
        number = next(others)
        for before in range(every, step, every):
            assert race.hears(number, before, 1.0)
        if not race.hears(number, step, 0.0):
            asked.append(step)
    assert asked == sweep.stopping.asked(STEPS, every)
    assert StoppingConfig(enabled=False).asked(STEPS, 10) == StoppingConfig().asked(STEPS, 0) == []


def test_what_a_trial_reports() -> None:
    told = {"number": 3, "step": 5, "steps": 9}
    assert reported(3, 5, 9, {"loss": 1.0}, "val_x") == told
    assert reported(3, 5, 9, {"val_x": 0.5, "val_y": 1.0}, "val_x") == {**told, "value": 0.5}
    assert reported(3, 5, 9, {"val_y": 1.0, "val_a": 1.0}, "val_x") == {**told, "known": ["val_a", "val_y"]}


def test_a_metric_that_no_validation_has_ends_everything() -> None:
    watch = Watch("val_x")
    assert not watch("t0", reported(0, 5, 9, {"loss": 1.0}, "val_x"))
    assert not watch("t0", reported(0, 5, 9, {"val_x": 1.0}, "val_x"))
    assert not watch.stop_all()
    assert watch("t0", reported(0, 5, 9, {"val_y": 1.0}, "val_x"))
    assert watch.stop_all()
    assert watch.known == ["val_y"]


class Bar:
    """What a progress line was told."""

    def __init__(self) -> None:
        self.n, self.told = 0, ""

    def update(self, steps: int) -> None:
        self.n += steps

    def set_postfix(self, words: dict[str, str], refresh: bool) -> None:
        self.told = " ".join(f"{name}={word}" for name, word in words.items())


@pytest.mark.parametrize(("mode", "best"), [("max", "0.6"), ("min", "0.2")])
def test_the_line_counts_steps_and_trials(mode: str, best: str, tmp_path: Path) -> None:
    bar: Any = Bar()
    progress = Progress(sweep_of(tmp_path, 3, mode), bar)
    trial: Any = SimpleNamespace(config={"number": 1})
    progress.on_trial_result(0, [], trial, {"number": 1, "step": 20, "steps": STEPS, "value": 0.2})
    progress.on_trial_result(0, [], trial, {"number": 0, "step": 30, "steps": STEPS, "value": 0.6})
    assert (bar.n, bar.told) == (50, f"trials=0/3 best={best}")
    progress.on_trial_complete(0, [], trial)  # stopped: its other steps are not waited for
    assert (bar.n, bar.told) == (STEPS + 30, f"trials=1/3 best={best}")
