"""Which weights are kept: alone, through checkpoints, and on several ranks."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aai.errors import UserError
from aai.fit import FitConfig, State, fit, trainable
from aai.selection import Best, Keeper, MovingAverage, copied, put
from tests.ranks import on_ranks


class Counter(nn.Module):
    """Its only weight falls by the rate in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.weight.sum(), {}


def batches(first: int) -> Iterator[dict[str, Any]]:
    return itertools.repeat({"x": torch.zeros(1)})


def config(**settings: Any) -> FitConfig:
    plain = {"steps": 12, "learning_rate": 0.1, "warmup_steps": 0, "weight_decay": 0.0, "log_every": 12}
    return FitConfig.parse({**plain, "precision": "float32", "checkpoint_every": 4, "eval_every": 2, **settings})


def run(values: list[float], resume: State | None = None, **settings: Any) -> tuple[Counter, list[State], list[float]]:
    """Validation finds `values` in turn; also returns what the weight was at each."""
    task, states, seen, left = Counter(), [], [], iter(values)

    def evaluate(step: int) -> dict[str, float]:
        assert not task.training
        seen.append(task.weight.item())
        return {"val_r1": next(left)}

    fit(task, batches, config(**settings), on_checkpoint=states.append, evaluate=evaluate, resume=resume)
    return task, states, seen


def test_without_a_metric_the_last_weights_are_kept() -> None:
    task, states, seen = run([5, 4, 3, 2, 1, 0])
    assert task.weight.item() == seen[-1] == states[-1].weights["weight"].item()
    assert [state.kept_step for state in states] == [4, 8, 12]
    assert [state.ended for state in states] == [False, False, True]


def test_recalls_are_to_be_high_and_losses_low() -> None:
    for metric, highest in (("val_a2v_r1", True), ("val_r10", True), ("val_loss", False), ("val_r1_gap", False)):
        assert FitConfig(best_metric=metric, eval_every=1).highest_is_best is highest
    assert FitConfig(best_metric="val_loss", best_is="highest", eval_every=1).highest_is_best
    assert not FitConfig(best_metric="val_r1", best_is="lowest", eval_every=1).highest_is_best


@pytest.mark.parametrize(("best_is", "step"), [("auto", 6), ("highest", 6), ("lowest", 10)])
def test_the_best_weights_are_kept(best_is: str, step: int) -> None:
    task, states, seen = run([1, 2, 5, 5, 0, 3], best_metric="val_r1", best_is=best_is)
    assert states[-1].kept_step == step
    assert task.weight.item() == seen[step // 2 - 1]
    assert states[-1].weights["weight"].item() == seen[-1]  # a run that goes on goes on from the last


def test_what_is_not_finite_is_never_the_best() -> None:
    nan, inf = float("nan"), float("inf")
    assert run([nan, 2, inf, 1, 0, 0], best_metric="val_r1")[1][-1].kept_step == 4
    assert run([nan] * 6, best_metric="val_r1")[1][-1].kept_step == 12


def test_a_metric_that_validation_does_not_have_is_an_error() -> None:
    with pytest.raises(UserError, match=r"fit\.best_metric=val_r5: is no figure of validation; choose one of val_r1"):
        run([1] * 6, best_metric="val_r5")


def test_training_stops_when_it_gets_no_better() -> None:
    task, states, seen = run([1, 3, 2, 3, 9, 9], best_metric="val_r1", patience=2)
    assert (states[-1].step, states[-1].kept_step, states[-1].ended) == (8, 4, True)
    assert task.weight.item() == seen[1]
    assert len(seen) == 4
    assert run([1, 3, 2, 4, 3, 5], best_metric="val_r1", patience=2)[1][-1].step == 12
    again, more, _ = run([], resume=states[-1], best_metric="val_r1", patience=2)  # it has ended
    assert more == []
    assert again.weight.item() == seen[1], "as when it ended"


def test_a_selection_goes_through_a_checkpoint(tmp_path: Path) -> None:
    values = [1, 4, 2, 3, 0, 2]
    for settings in ({"best_metric": "val_r1"}, {"best_metric": "val_r1", "ema_decay": 0.9}, {"ema_decay": 0.9}):
        whole, states, _ = run(values, **settings)
        states[0].save(tmp_path / "state.safetensors")
        loaded = State.load(tmp_path / "state.safetensors")
        again, later, _ = run(values[2:], loaded, **settings)
        assert torch.equal(again.weight, whole.weight), settings
        assert later[-1].kept_step == states[-1].kept_step
        assert later[-1].average.keys() == states[-1].average.keys()
    worse = run([3, 1, 1, 1, 1, 1], best_metric="val_r1", patience=5)[1]
    assert worse[0].best is not None
    worse[0].save(tmp_path / "state.safetensors")
    assert State.load(tmp_path / "state.safetensors").best.worse_since == 1
    assert run([1] * 4, State.load(tmp_path / "state.safetensors"), best_metric="val_r1", patience=5)[1][-1].step == 12
    assert run([1] * 4, State.load(tmp_path / "state.safetensors"), best_metric="val_r1", patience=3)[1][-1].step == 8


def test_the_average_is_validated_and_kept_and_training_goes_on_from_the_weights() -> None:
    _, _, raw = run([0] * 6)
    task, states, seen = run([0] * 6, ema_decay=0.9)
    assert states[-1].weights["weight"].item() == raw[-1]
    assert task.weight.item() == states[-1].average["weight"].item() == seen[-1]
    assert raw[-1] < seen[-1] < 0  # it lags behind
    task = Counter()
    average = MovingAverage(trainable(task), 0.5)
    for value in (1.0, 2.0):
        put(trainable(task), {"weight": torch.full((1,), value)})
        average.update()
    first = 1 - 2 / 11
    assert average.weights["weight"].item() == pytest.approx(first + (2 - first) * (1 - 3 / 12))
    late = MovingAverage(trainable(task), 0.5, 1000, {"weight": torch.zeros(1)})
    late.update()
    assert late.weights["weight"].item() == pytest.approx(1.0)
    with late.in_use():
        assert task.weight.item() == pytest.approx(1.0)
    assert task.weight.item() == 2.0


def test_settings_that_cannot_act_are_refused() -> None:
    with pytest.raises(UserError, match="patience needs best_metric"):
        FitConfig.parse({"patience": 2, "eval_every": 5})
    with pytest.raises(UserError, match="best_metric needs eval_every"):
        FitConfig.parse({"best_metric": "val_r1"})


def _rank(rank: int, folder: str) -> None:
    params = trainable(Counter())
    best = Best("val_r1", True, 3, 0.5, copied(params), worse_since=2) if rank == 0 else None
    assert Keeper(params, None, best, 2).stops()
    assert not Keeper(params, None, best, 3).stops()
    assert not Keeper(params, None, best, 0).stops()


@pytest.mark.slow
def test_all_ranks_stop_when_the_first_says_so(tmp_path: Path) -> None:
    on_ranks(2, _rank, str(tmp_path))
