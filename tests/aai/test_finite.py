import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from aai.finite import FiniteGuard, all_finite, suspects
from aai.fit import fit
from tests.aai.test_fit import CONFIG, Line, Plain, batches


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_left_out_counted_and_named(bad: float) -> None:
    """Steps 3 and 4 hold a bad clip each: as if the run had been without them."""

    def poisoned(first: int) -> Iterator[dict[str, Any]]:
        for step, batch in enumerate(batches(first), start=first):
            ids = [f"s{step}c{row}" for row in range(len(batch["x"]))]
            x = batch["x"].clone()
            if step in (2, 3):
                x[1] = bad
            yield {**batch, "x": x, "clip_id": ids}

    def good_alone(first: int) -> Iterator[dict[str, Any]]:
        return (batch for step, batch in enumerate(batches(0)) if step not in (2, 3))

    config = CONFIG.model_copy(update={"steps": 8, "log_every": 4, "warmup_steps": 0, "learning_rate": 0.1})
    flat = config.model_copy(update={"steps": 6})
    entries: list[dict[str, float]] = []
    skipped: list[tuple[int, list[str]]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aai.fit.learning_rate", lambda step, config: 0.1)
        log = lambda step, figures: entries.append(figures)  # noqa: E731
        found = fit(Plain(), poisoned, config, log, on_skip=lambda step, clips: skipped.append((step, clips)))
        expected = fit(Plain(), good_alone, flat)
    assert skipped == [(3, ["s2c1"]), (4, ["s3c1"])]
    assert [entry["skipped_steps"] for entry in entries] == [2, 0]
    assert all(math.isfinite(value) for entry in entries for value in entry.values())
    for name, value in expected.weights.items():
        torch.testing.assert_close(found.weights[name], value)


def test_too_many_in_a_row_end_the_run() -> None:
    task = Line()
    before = task.linear.weight.detach().clone()
    bad = {"x": torch.ones(2, 1), "y": torch.tensor([[math.nan], [0.0]])}
    for limit in (0, 2):
        config = CONFIG.model_copy(update={"max_skipped_in_a_row": limit})
        rule = rf"not finite at step {limit + 1}, the {limit + 1}\. in a row .*learning_rate.*max_skipped_in_a_row"
        with pytest.raises(FloatingPointError, match=rule):
            fit(task, lambda step: itertools.repeat(bad), config)
    assert torch.equal(task.linear.weight, before)


def test_suspects_are_the_clips_with_values_that_are_not_finite() -> None:
    batch = {"clip_id": ["a", "b", "c"], "x": torch.ones(3, 2, 2), "id": torch.ones(3, dtype=torch.int64)}
    assert suspects(batch) == ["a", "b", "c"]
    batch["x"][2, 1, 0] = math.inf
    assert suspects(batch) == ["c"]
    assert suspects({"x": torch.ones(2)}) == []


@pytest.mark.parametrize(("loss", "slope"), [(1.0, math.inf), (math.nan, 1.0)])
def test_a_gradient_that_is_not_finite_stops_as_a_loss_does(loss: float, slope: float) -> None:
    class Broken(Plain):
        def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            value = self.linear.bias.sum()
            value.register_hook(lambda gradient: gradient * slope)
            return value - value.detach() + loss, {"part": torch.tensor(2.5)}

    config = CONFIG.model_copy(update={"max_skipped_in_a_row": 0})
    rule = r"at step 1, the 1\. in a row \(loss .*, part 2\.5, grad_norm .*\); lower fit\.learning_rate"
    with pytest.raises(FloatingPointError, match=rule):
        fit(Broken(), batches, config)


def test_the_guard_counts_in_a_row_and_since_the_last_flush() -> None:
    named: list[int] = []
    guard = FiniteGuard(2, lambda step, clips: named.append(step))
    good, bad = ({"loss": torch.tensor(1.0), "grad_norm": torch.tensor(x)} for x in (1.0, math.nan))
    assert [guard.lets_pass(step, figures, {}) for step, figures in enumerate([good, bad, bad, good, bad])] == [
        True, False, False, True, False,
    ]  # fmt: skip
    assert named == [1, 2, 4]
    assert (guard.flush(), guard.flush()) == (3, 0)
    assert not guard.lets_pass(5, bad, {})
    with pytest.raises(FloatingPointError, match=r"at step 6, the 3\. in a row \(loss 1, grad_norm nan\)"):
        guard.lets_pass(6, bad, {})
    assert all_finite(torch.tensor(1.0), torch.tensor(2.0))
    assert not all_finite(torch.tensor(math.inf), torch.tensor(2.0))
