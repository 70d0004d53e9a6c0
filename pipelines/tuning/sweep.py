"""Ray Tune around a stage: each trial is an ordinary run of the stage, in a process of its own.

Ray Tune starts a trial's driver as an actor that takes no CPU; it starts Ray Train's workers, as `aai align` does.
It reports each entry of the history to Tune, whose scheduler stops what falls behind: with the driver's process go the
workers that it owns. Nothing depends on what Tune stores: a sweep that goes on reports the histories again.
"""

import contextlib
import logging
import math
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pydantic
from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from tqdm import tqdm

from aai import storage
from aai.config import Config
from aai.errors import UserError
from pipelines.engine.cluster import connect, native_stderr_held
from pipelines.engine.orphans import remove_last_orphans, remove_orphans
from pipelines.training import ray_train
from pipelines.training.following import history
from pipelines.training.recipe import StageConfig, TrainRecipe
from pipelines.training.stage import run_stage
from pipelines.tuning.space import Settings

log = logging.getLogger(__name__)

STOPPED = "stopped.json"
"""In the folder of a trial that was stopped early, with the step and value that decided: it does not go on."""
ORPHANS_S, ORPHANS_END_S = 1.0, 60.0
SCRATCH = "_tune"
"""Where Tune keeps its own state while it runs."""
DRIVER = {"memory": 2**20}
"""What Tune reserves for a trial's driver. It takes no CPU, which the workers would lack, and nothing is no request."""
_QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints a frame even when it is to be silent
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative places mean what they mean here
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # most entries of a history are no validations
}


class StoppingConfig(Config):
    """Early stopping by asynchronous successive halving (ASHA, arXiv 1810.05934)."""

    enabled: bool = True
    grace_steps: int = pydantic.Field(1, ge=1)
    """The first validation after so many steps is the first at which a trial may be stopped."""
    reduction_factor: float = pydantic.Field(2, gt=1)
    """A trial is stopped unless it is among the best 1 / reduction_factor of those that came as far; it is asked after
    grace_steps, and again each time its steps have grown by this factor."""
    min_trials: int = pydantic.Field(3, ge=1)
    """A trial is stopped only where at least so many others have come as far: by one alone it would be chance."""

    def asked(self, steps: int, every: int) -> list[int]:
        """The steps at which a trial of `steps` steps that validates every `every` may be stopped."""
        found: dict[int, int] = {}
        for step in range(every, steps, every) if self.enabled and every else ():
            if step >= self.grace_steps:  # a validation counts for the last rung before it, the first that does
                rung = int(math.log(step / self.grace_steps, self.reduction_factor) + 1e-9)
                found.setdefault(rung, step)
        return sorted(found.values())


@dataclass(frozen=True)
class Candidate:
    """One trial."""

    number: int
    settings: Settings
    """The swept settings, by dotted name."""
    config: StageConfig
    """All settings of the run; `out` is the trial's own folder."""


@dataclass(frozen=True)
class Sweep:
    """What Ray Tune runs."""

    recipe: type[TrainRecipe[Any]]
    candidates: tuple[Candidate, ...]
    """By number; the first is the stage as it is."""
    metric: str
    """A figure of the validation."""
    mode: str
    """max or min."""
    stopping: StoppingConfig
    concurrent: int
    out: str
    tags: dict[str, str]
    """Of the trials' runs in MLflow."""


def connect_for(sweep: Sweep) -> None:
    """Connects to Ray; one on this machine has room for all trials that run at a time."""
    base = sweep.candidates[0].config.cluster
    connect(base.model_copy(update={"num_workers": base.most_workers * sweep.concurrent}), sweep.out)


def run_sweep(sweep: Sweep) -> dict[int, str]:
    """Runs all trials; what failed, and why, by number. Raises UserError when validations have no such metric."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    connect_for(sweep)
    for name in ("ray.tune", "ray.train", "ray.air"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    watch = Watch(sweep.metric)
    steps = sum(candidate.config.fit.steps for candidate in sweep.candidates)
    with (
        native_stderr_held() as terminal,
        tqdm(total=steps, desc="tune", unit="step", mininterval=1.0, file=terminal) as bar,
    ):
        grid = _in_thread(_tuner(sweep, watch, Progress(sweep, bar)), watch)
    _clean(sweep)
    if watch.known is not None:
        known = ", ".join(watch.known) or "none"
        raise UserError("metric", sweep.metric, "no validation has this figure", f"take one of: {known}")
    failed = {int(result.config["number"]): result.error for result in grid if result.error is not None}
    return {number: _in_a_line(error) for number, error in failed.items()}


def _in_thread(tuner: tune.Tuner, watch: "Watch") -> tune.ResultGrid:
    """`tuner.fit()` in a thread: in the main one it would take over SIGINT, and SIGUSR1, which is our lock's."""
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(tuner.fit())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=work, name="ray-tune", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(ORPHANS_S)
            with _cluster_busy():
                remove_orphans()  # the next trial's workers wait for the CPUs of one that was stopped
        with _cluster_busy():
            remove_last_orphans(ORPHANS_END_S)  # the last trial's driver may die after Tune has returned
    finally:
        watch.ends = True  # nothing new is started where we were interrupted
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


@contextlib.contextmanager
def _cluster_busy() -> Iterator[None]:
    """What stopped trials left is a matter of room alone: where it cannot be looked at, the sweep goes on."""
    try:
        yield
    except Exception as error:
        log.debug("what stopped trials left behind cannot be looked at (%s)", error)


def _tuner(sweep: Sweep, watch: "Watch", progress: "Progress") -> tune.Tuner:
    numbered = {candidate.number: candidate for candidate in sweep.candidates}
    recipe, metric, tags = sweep.recipe, sweep.metric, sweep.tags

    def trial(params: dict[str, int]) -> None:
        run_trial(recipe, numbered[params["number"]], metric, tags)

    return tune.Tuner(
        tune.with_resources(trial, DRIVER),
        param_space={"number": tune.grid_search(sorted(numbered))},
        tune_config=tune.TuneConfig(
            scheduler=Halving(sweep) if sweep.stopping.enabled else None,
            max_concurrent_trials=sweep.concurrent,
            trial_dirname_creator=lambda trial: f"{trial.config['number']:03d}",
        ),
        run_config=tune.RunConfig(
            name=SCRATCH,
            stop=watch,
            callbacks=[progress],
            verbose=0,
            **ray_train.storage_of(sweep.out),
        ),
    )


def _clean(sweep: Sweep) -> None:
    """Removes Tune's own files, and the checkpoints of what was stopped."""
    storage.remove(storage.join(sweep.out, SCRATCH))
    for out in [candidate.config.out for candidate in sweep.candidates]:
        if storage.exists(storage.join(out, STOPPED)):
            with contextlib.suppress(OSError):  # its last worker may be writing yet; what is left only takes room
                storage.remove(ray_train.checkpoints(out))


def _in_a_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].strip().removeprefix("aai.errors.")[:500]


def run_trial(recipe: type[TrainRecipe[Any]], candidate: Candidate, metric: str, tags: Mapping[str, str]) -> None:
    """Trains one candidate within a trial of Ray Tune, or goes on with it; what it did before is reported again."""
    config, number = candidate.config, candidate.number

    def report(step: int, figures: Mapping[str, float]) -> None:
        tune.report(reported(number, step, config.fit.steps, figures, metric))

    for entry in history(config.out):
        report(int(entry["step"]), entry)
    if not storage.exists(storage.join(config.out, STOPPED)):
        run_stage(recipe, config, report, {**tags, "trial": f"{number:03d}"})


def reported(number: int, step: int, steps: int, figures: Mapping[str, float], metric: str) -> dict[str, Any]:
    """What Tune hears of an entry: `value` where it is a validation, `known` where that lacks the metric."""
    told: dict[str, Any] = {"number": number, "step": step, "steps": steps}
    known = sorted(name for name in figures if name.startswith("val_"))
    if metric in figures:
        told["value"] = float(figures[metric])
    elif known:
        told["known"] = known
    return told


class Watch(tune.Stopper):
    """Ends everything when a validation lacks the metric: each trial would train to its end for nothing."""

    def __init__(self, metric: str) -> None:
        self.metric, self.ends = metric, False
        self.known: list[str] | None = None

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        if "known" in result:
            self.known, self.ends = result["known"], True
        return self.ends

    def stop_all(self) -> bool:
        return self.ends


class Halving(ASHAScheduler):  # type: ignore[misc]
    """ASHA by the steps of the training. The base runs to its end, as what all others are compared with.

    ASHA itself compares the second trial with the first alone, whose figure may be luck: `min_trials`.
    """

    def __init__(self, sweep: Sweep) -> None:
        steps = max(candidate.config.fit.steps for candidate in sweep.candidates)
        grace = min(sweep.stopping.grace_steps, steps)
        super().__init__("step", "value", sweep.mode, steps, grace, sweep.stopping.reduction_factor, 1, False)
        self.min_trials = sweep.stopping.min_trials
        self.came_to: dict[int, int] = {}
        self.outs = {candidate.number: candidate.config.out for candidate in sweep.candidates}

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        decision = super().on_trial_result(tune_controller, trial, result)
        number, step = result["number"], result["step"]
        others = [other for other, came in self.came_to.items() if other != number and came >= step]
        if "value" in result:
            self.came_to[number] = step
        last = step >= result["steps"]  # it only has to write its bundle
        if decision != TrialScheduler.STOP or last or number == 0 or len(others) < self.min_trials:
            return str(TrialScheduler.CONTINUE)
        where = storage.join(self.outs[number], STOPPED)
        if not storage.exists(where):  # a sweep that goes on decides once more, by the histories
            storage.write_json(where, {"step": step, "value": result["value"]})
        return str(decision)


Trials = list[TuneTrial]


class Progress(tune.Callback):
    """One line: steps done of all, trials done, the best value."""

    def __init__(self, sweep: Sweep, bar: "tqdm[Any]") -> None:
        self.bar, self.trials = bar, len(sweep.candidates)
        self.steps = {candidate.number: candidate.config.fit.steps for candidate in sweep.candidates}
        self.better = max if sweep.mode == "max" else min
        self.done: dict[int, int] = {}
        self.values: list[float] = []
        self.ended = 0

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles it to restore a sweep, which ours does by the histories

    def on_trial_result(self, iteration: int, trials: Trials, trial: TuneTrial, result: dict[str, Any]) -> None:
        if "step" not in result:
            return
        self.done[result["number"]] = result["step"]
        self.values += [result["value"]] if "value" in result else []
        self._show()

    def on_trial_complete(self, iteration: int, trials: Trials, trial: TuneTrial) -> None:
        self._ends(trial)

    def on_trial_error(self, iteration: int, trials: Trials, trial: TuneTrial) -> None:
        self._ends(trial)

    def _ends(self, trial: TuneTrial) -> None:
        number = int(trial.config["number"])
        self.done[number] = self.steps[number]
        self.ended += 1
        self._show()

    def _show(self) -> None:
        told = {"trials": f"{self.ended}/{self.trials}"}
        if self.values:
            told["best"] = f"{self.better(self.values):.4g}"
        self.bar.set_postfix(told, refresh=False)
        self.bar.update(sum(self.done.values()) - self.bar.n)
