import functools
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from aai.errors import UserError
from aai.fit import FitConfig, State, fit, learning_rate, local_batch_size, restore_weights, trainable
from tests.ranks import on_two_ranks


class Line(nn.Module):
    """Fits y = 3 x - 1 with some dropout, so that random numbers matter; one weight is frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(1, 1)
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
        self.dropout = nn.Dropout(0.05)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        error = self.dropout(self.linear(batch["x"]) - batch["y"])
        return error.square().mean(), {"bias": self.linear.bias[0]}


def batches(first: int, part: slice = slice(None)) -> Iterator[dict[str, Tensor]]:
    step = first
    while True:
        x = torch.randn(8, 1, generator=torch.Generator().manual_seed(step))[part]
        yield {"x": x, "y": 3 * x - 1, "caption": ["words pass through"] * 8}  # type: ignore[dict-item]
        step += 1


CONFIG = FitConfig(steps=60, learning_rate=0.2, warmup_steps=5, weight_decay=0.0, checkpoint_every=25, log_every=20)


def test_it_learns_and_logs_and_checkpoints() -> None:
    task, entries, states = Line(), [], []
    final = fit(task, batches, CONFIG, lambda s, f: entries.append((s, f)), states.append)
    assert abs(task.linear.weight.item() - 3) < 0.1
    assert abs(task.linear.bias.item() + 1) < 0.1
    assert [step for step, _ in entries] == [20, 40, 60]
    assert entries[-1][1]["loss"] < entries[0][1]["loss"]
    assert {"loss", "bias", "grad_norm", "steps_per_s", "learning_rate"} <= entries[0][1].keys()
    assert [state.step for state in states] == [25, 50, 60]
    assert final.step == 60
    assert final.weights.keys() == trainable(task).keys() == {"linear.weight", "linear.bias"}
    assert float(task.frozen) == 1


def test_a_resumed_run_ends_exactly_where_the_uninterrupted_one_does(tmp_path: Path) -> None:
    states: list[State] = []
    whole = fit(Line(), batches, CONFIG, on_checkpoint=states.append)
    states[0].save(tmp_path / "state.safetensors")
    again = fit(Line(), batches, CONFIG, resume=State.load(tmp_path / "state.safetensors"))
    for name, value in whole.weights.items():
        assert torch.equal(again.weights[name], value), name
    assert whole.moments.keys() == again.moments.keys()
    for name, value in whole.moments.items():
        assert torch.equal(again.moments[name], value), name


def test_a_finished_run_takes_no_more_steps() -> None:
    final = fit(Line(), batches, CONFIG)
    task = Line()
    assert fit(task, lambda step: iter(()), CONFIG, resume=final).step == 60
    assert torch.equal(task.linear.weight, final.weights["linear.weight"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_loss_stops_before_the_step(bad: float) -> None:
    task = Line()
    before = task.linear.weight.detach().clone()
    with pytest.raises(FloatingPointError, match=r"not finite at step 1 .*learning_rate"):
        fit(task, lambda step: iter([{"x": torch.ones(2, 1), "y": torch.tensor([[bad], [0.0]])}]), CONFIG)
    assert torch.equal(task.linear.weight, before)


def test_data_that_ends_is_an_error() -> None:
    with pytest.raises(ValueError, match="ended before step 1:"):
        fit(Line(), lambda step: iter(()), CONFIG)
    with pytest.raises(ValueError, match="nothing to train"):
        fit(Line().requires_grad_(False), batches, CONFIG)


def test_evaluation_runs_in_eval_mode_and_at_the_end() -> None:
    task, seen, entries = Line(), [], []

    def evaluate() -> dict[str, float]:
        seen.append((task.training, torch.is_grad_enabled()))
        return {"val": 1.0}

    fit(
        task,
        batches,
        CONFIG.model_copy(update={"eval_every": 40}),
        lambda s, f: entries.append((s, f)),
        evaluate=evaluate,
    )
    assert seen == [(False, False)] * 2
    assert [step for step, figures in entries if "val" in figures] == [40, 60]


def test_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"linear\.bias"):
        restore_weights(Line(), {"linear.weight": torch.ones(1, 1)})


def test_schedule() -> None:
    config = FitConfig(steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [learning_rate(step, config) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == 1.0
    assert all(a > b for a, b in itertools.pairwise(rates[9:]))
    assert rates[-1] == pytest.approx(0.01)


def test_workers_must_share_the_batch_evenly() -> None:
    assert local_batch_size(FitConfig(batch_size=12), 3) == 4
    with pytest.raises(UserError, match="multiple of the 5 workers"):
        local_batch_size(FitConfig(batch_size=12), 5)


class Plain(Line):
    """Without dropout: the two ranks' halves must add up to the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Identity()  # type: ignore[assignment]


def _rank(rank: int, folder: str) -> None:
    part = slice(rank * 4, rank * 4 + 4)
    final = fit(DistributedDataParallel(Plain()), functools.partial(batches, part=part), CONFIG)
    final.save(f"{folder}/{rank}.safetensors")


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    whole = fit(Plain(), batches, CONFIG)
    on_two_ranks(_rank, str(tmp_path))
    for rank in range(2):
        found = State.load(tmp_path / f"{rank}.safetensors")
        for name, value in whole.weights.items():
            torch.testing.assert_close(found.weights[name], value, atol=1e-4, rtol=1e-4)


def test_a_resumed_run_keeps_the_precision_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []

    class Seen(Line):
        def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            seen.append(self.linear(batch["x"]).dtype)
            return super().forward(batch)

    config = CONFIG.model_copy(update={"steps": 2})
    state = None
    for native, expected in ((True, torch.bfloat16), (False, torch.bfloat16)):
        monkeypatch.setattr("aai.fit.native_bfloat16", lambda device, native=native: native)
        first = fit(Seen(), batches, config, resume=state)
        assert (first.precision, seen[-1]) == ("bfloat16", expected)
        first.save(tmp_path / "state")
        loaded = State.load(tmp_path / "state")
        state = State(1, loaded.weights, loaded.moments, loaded.precision)
    assert fit(Seen(), batches, config).precision == "float32"
    assert seen[-1] == torch.float32
    assert fit(Seen(), batches, config.model_copy(update={"precision": "float32"}), resume=state).precision == "float32"
