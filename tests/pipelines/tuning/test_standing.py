"""The table, the sentence and the plot, from histories as trials leave them."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aai import storage
from pipelines.align import AlignConfig, AlignRecipe
from pipelines.training.following import HISTORY
from pipelines.tuning.space import Settings
from pipelines.tuning.standing import Standing, plot, sentence, standings, table, winner
from pipelines.tuning.sweep import STOPPED, Candidate, StoppingConfig, Sweep

METRIC = "val_a2v_r1"


class Trials:
    """Trials in a folder: histories and what else their state is told by."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.candidates: list[Candidate] = []

    def add(self, values: list[float], state: str, settings: Settings | None = None, kept: float | None = None) -> None:
        out = self.folder / f"{len(self.candidates):03d}"
        entries = [{"step": 10 * i, "loss": 1.0} for i in range(1, len(values) + 1)]
        entries += [{"step": 10 * i, METRIC: value} for i, value in enumerate(values, 1)]
        storage.write_bytes(str(out / HISTORY), "".join(json.dumps(entry) + "\n" for entry in entries).encode())
        if state in ("align.json", STOPPED):
            storage.write_json(
                str(out / state), {"step": 10, "metrics": {METRIC: values[-1] if kept is None else kept}}
            )
        config = AlignConfig.parse({"features": "f", "out": str(out)})
        self.candidates.append(Candidate(len(self.candidates), settings or {"fit.learning_rate": 0.001}, config))

    def stand(self, failed: dict[int, str] | None = None, mode: str = "max") -> list[Standing]:
        parts = METRIC, mode, StoppingConfig(), 1, str(self.folder), dict[str, str]()
        return standings(Sweep(AlignRecipe, tuple(self.candidates), *parts), failed or {})


@pytest.fixture
def trials(tmp_path: Path) -> Trials:
    return Trials(tmp_path)


def test_the_best_that_finished_comes_first(trials: Trials) -> None:
    trials.add([0.1, 0.3], "align.json")
    trials.add([0.2, 0.5], "align.json", {"fit.learning_rate": 0.00212345})
    trials.add([0.9], STOPPED)  # a trial that did not end is no winner, whatever it had
    trials.add([], "", {"fit.learning_rate": 5.0})
    found = trials.stand({3: "loss or gradient is not finite at step 3"})
    assert [s.number for s in found] == [1, 0, 2, 3]
    assert [s.state for s in found] == ["finished", "finished", "stopped", "failed"]
    assert table(found, METRIC) == [
        "trial     val_a2v_r1  steps  state     fit.learning_rate",
        "1         0.5000      20     finished  0.002123",
        "0 (base)  0.3000      20     finished  0.001",
        "2         0.9000      10     stopped   0.001",
        "3         -           0      failed    5",
        "trial 3 failed: loss or gradient is not finite at step 3",
    ]
    assert sentence(found, METRIC) == (
        "val_a2v_r1 0.5000 instead of the base settings' 0.3000, by trial 1 (fit.learning_rate=0.002123)"
    )


def test_less_can_be_better(trials: Trials) -> None:
    trials.add([0.3], "align.json")
    trials.add([0.5], "align.json")
    found = trials.stand(mode="min")
    assert [s.number for s in found] == [0, 1]
    assert sentence(found, METRIC) == "nothing is better than the base settings' val_a2v_r1 0.3000"


def test_what_only_equals_the_base_is_no_improvement(trials: Trials) -> None:
    trials.add([0.3], "align.json")
    trials.add([0.3], "align.json")
    best = winner(trials.stand())
    assert best is not None
    assert best.number == 0
    assert sentence(trials.stand(), METRIC).startswith("nothing is better than the base")


def test_the_value_is_that_of_the_weights_that_were_kept(trials: Trials) -> None:
    trials.add([0.1, 0.5, 0.3], "align.json", kept=0.5)
    trials.add([0.1, 0.2, 0.4], "align.json")
    assert [(s.number, s.value) for s in trials.stand()] == [(0, 0.5), (1, 0.4)]


def test_the_base_may_have_failed_and_all_may_have(trials: Trials) -> None:
    trials.add([], "")
    assert winner(trials.stand()) is None
    assert sentence(trials.stand(), METRIC) == "no trial finished"
    assert trials.stand()[0].error == "it ended without a result"
    trials.add([0.2], "align.json")
    assert sentence(trials.stand(), METRIC) == "val_a2v_r1 0.2000 is the best (trial 1); the base settings gave none"


def test_a_value_that_is_not_finite_is_none_and_last(trials: Trials) -> None:
    trials.add([0.4, float("nan")], "align.json")
    trials.add([0.1, 0.2], "align.json")
    found = trials.stand()
    assert [(s.number, s.value) for s in found] == [(1, 0.2), (0, None)]


def test_the_plot_shows_base_best_and_what_was_stopped(trials: Trials) -> None:
    trials.add([0.1, 0.3, 0.4], "align.json")
    with_one = plot(trials.stand(), METRIC, "align")
    trials.add([0.2, 0.5, 0.6], "align.json")
    trials.add([0.1], STOPPED)
    trials.add([], "")  # nothing to draw
    pictures = [np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), float) for png in (with_one, plotted(trials))]
    assert pictures[0].shape == pictures[1].shape == (600, 960, 3)
    orange = [int(((p[..., 0] - p[..., 2]) > 120).sum()) for p in pictures]
    assert orange[0] == 0
    assert orange[1] > 500  # the best one's line


def plotted(trials: Trials) -> bytes:
    return plot(trials.stand(), METRIC, "align")
