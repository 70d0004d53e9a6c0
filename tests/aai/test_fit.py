import functools
import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from aai.errors import UserError
from aai.fit import (
    FitConfig,
    Meter,
    State,
    fit,
    learning_rate,
    local_batch_size,
    trainable,
)
from tests.ranks import on_ranks


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


CONFIG = FitConfig(
    steps=60,
    learning_rate=0.2,
    warmup_steps=5,
    weight_decay=0.0,
    checkpoint_every=25,
    log_every=20,
    precision="float32",  # "auto" would compare bfloat16 with float32 where the processor has it
)


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


def test_data_that_ends_is_an_error() -> None:
    with pytest.raises(ValueError, match="ended before step 1:"):
        fit(Line(), lambda step: iter(()), CONFIG)
    with pytest.raises(ValueError, match="nothing to train"):
        fit(Line().requires_grad_(False), batches, CONFIG)


def test_evaluation_runs_in_eval_mode_and_at_the_end() -> None:
    task, seen, entries = Line(), [], []

    def evaluate(step: int) -> dict[str, float]:
        seen.append((step, task.training, torch.is_grad_enabled()))
        return {"val": 1.0}

    fit(
        task,
        batches,
        CONFIG.model_copy(update={"eval_every": 40, "log_every": 60}),
        lambda s, f: entries.append((s, f)),
        evaluate=evaluate,
    )
    assert seen == [(40, False, False), (60, False, False)]
    assert [step for step, figures in entries if "val" in figures] == [40, 60]


def test_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"linear\.bias"):
        fit(Line(), batches, CONFIG, resume=State(1, {"linear.weight": torch.ones(1, 1)}, {}))


def test_a_node_that_leaves_makes_a_checkpoint_out_of_turn() -> None:
    asked, states = [], []

    def leaving() -> bool:
        asked.append(True)
        return len(asked) == 2

    fit(Line(), batches, CONFIG, on_checkpoint=states.append, leaving=leaving)
    assert [state.step for state in states] == [25, 40, 50, 60]
    assert len(asked) == 2  # with each entry, but for the last step, which makes one anyway


def test_schedule() -> None:
    config = FitConfig(steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [learning_rate(step, config) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == 1.0
    assert all(a > b for a, b in itertools.pairwise(rates[9:]))
    assert rates[-1] == pytest.approx(0.01)
    assert rates[4] == pytest.approx(0.5)
    assert rates[54] == pytest.approx(0.505)  # half way down the cosine
    assert learning_rate(1, FitConfig(steps=100, warmup_steps=0, learning_rate=1.0)) == pytest.approx(1, abs=1e-3)
    short = FitConfig(steps=10, warmup_steps=10, learning_rate=2.0)
    assert learning_rate(10, short) == 2.0
    assert learning_rate(11, short) == pytest.approx(0.02)


class Still(nn.Module):
    """A loss without slope: only weight decay moves its parameters. Notes the random number of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
        self.scalar = nn.Parameter(torch.tensor(1.0))
        self.drawn: list[float] = []

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        self.drawn.append(float(torch.rand(())))
        return 0 * (self.matrix.sum() + self.vector.sum() + self.scalar), {}


def test_only_matrices_are_decayed() -> None:
    config = FitConfig(steps=3, warmup_steps=1, learning_rate=0.1, weight_decay=0.5)
    task = Still()
    fit(task, batches, config)
    left = math.prod(1 - 0.5 * learning_rate(step, config) for step in (1, 2, 3))
    torch.testing.assert_close(task.matrix.detach(), torch.full((2, 2), left))
    assert left < 0.95
    assert torch.equal(task.vector.detach(), torch.ones(2))
    assert float(task.scalar) == 1


def test_parameters_learn_at_their_share_of_the_rate() -> None:
    """AdamW's first step is as long as the rate, whatever the gradient."""
    moved = {}
    for scales in ({}, {"linear.weight": 0.25}):
        task = Line()
        task.rate_scales = scales
        before = task.linear.weight.item(), task.linear.bias.item()
        fit(task, batches, CONFIG.model_copy(update={"steps": 1, "warmup_steps": 1}))
        moved[len(scales)] = abs(task.linear.weight.item() - before[0]), abs(task.linear.bias.item() - before[1])
    assert moved[0] == pytest.approx((0.2, 0.2), rel=1e-3)
    assert moved[1] == pytest.approx((0.05, 0.2), rel=1e-3)


def test_every_step_and_every_seed_has_random_numbers_of_its_own() -> None:
    first, again, other = Still(), Still(), Still()
    config = FitConfig(steps=5, warmup_steps=1)
    fit(first, batches, config)
    fit(again, batches, config)
    fit(other, batches, config.model_copy(update={"seed": 1}))
    assert first.drawn == again.drawn
    assert len({*first.drawn, *other.drawn}) == 10
    torch.manual_seed((1 * 1_000_003 + 2) * 10_007)
    assert other.drawn[1] == float(torch.rand(()))


def test_a_run_takes_the_steps_of_a_bare_loop() -> None:
    """AdamW with betas 0.9 and 0.98, the gradient cut to the ceiling, the rate of each step."""
    config = CONFIG.model_copy(update={"steps": 12, "grad_clip": 0.5, "weight_decay": 0.1, "log_every": 1})
    entries: list[dict[str, float]] = []
    found = fit(Plain(), batches, config, lambda step, figures: entries.append(figures))
    task, data = Plain(), batches(0)
    groups = [{"params": [task.linear.weight], "weight_decay": 0.1}, {"params": [task.linear.bias], "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    for step in range(1, 13):
        loss, _ = task(next(data))
        optimizer.zero_grad()
        loss.backward()
        slope = [p.grad for p in (task.linear.weight, task.linear.bias)]
        norm = float(torch.cat([g.flatten() for g in slope]).norm())
        for gradient in slope:
            gradient *= min(1, 0.5 / (norm + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        optimizer.step()
        assert entries[step - 1]["loss"] == pytest.approx(float(loss), rel=1e-5)
        assert entries[step - 1]["grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert entries[step - 1]["learning_rate"] == learning_rate(step, config)
    torch.testing.assert_close(found.weights["linear.weight"], task.linear.weight.detach())
    torch.testing.assert_close(found.weights["linear.bias"], task.linear.bias.detach())


def test_a_resumed_run_asks_for_the_batches_that_are_left() -> None:
    states: list[State] = []
    fit(Plain(), batches, CONFIG, on_checkpoint=states.append)
    asked, logged = [], []

    def watched(first: int) -> Iterator[dict[str, Tensor]]:
        asked.append(first)
        return itertools.islice(batches(first), 35)

    assert fit(Plain(), watched, CONFIG, lambda s, f: logged.append(s), resume=states[0]).step == 60
    assert asked == [25]
    assert logged == [40, 60]
    fit(Plain(), watched, CONFIG.model_copy(update={"steps": 3}))
    assert asked == [25, 0]
    with pytest.raises(ValueError, match="ended before step 36: batches must go on for 60 steps"):
        fit(Plain(), watched, CONFIG)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_precision_is_that_of_the_forward_pass(precision: str) -> None:
    seen = []

    class Watched(Plain):
        def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            seen.append((self.training, self.linear(batch["x"]).dtype))
            return super().forward(batch)

    task = Watched().eval()
    final = fit(task, batches, FitConfig.parse({"steps": 2, "precision": precision}))
    assert seen == [(True, getattr(torch, precision))] * 2
    assert all(value.dtype == torch.float32 for value in (*final.weights.values(), *final.moments.values()))


def test_a_state_is_a_copy() -> None:
    states: list[State] = []
    final = fit(Plain(), batches, CONFIG, on_checkpoint=states.append)
    assert not torch.equal(states[0].weights["linear.weight"], final.weights["linear.weight"])
    assert set(final.moments) == {
        f"{kind}/linear.{name}" for kind in ("step", "exp_avg", "exp_avg_sq") for name in ("weight", "bias")
    }
    assert float(states[0].moments["step/linear.bias"]) == 25
    assert not torch.equal(states[0].moments["exp_avg/linear.bias"], final.moments["exp_avg/linear.bias"])


def test_the_meter_gives_means_since_the_last_flush() -> None:
    meter = Meter()
    time.sleep(0.02)
    meter.add({"loss": torch.tensor(1.0), "part": torch.tensor(5.0)})
    meter.add({"loss": torch.tensor(4.0), "part": torch.tensor(6.0, dtype=torch.float16)})
    first = meter.flush()
    assert (first["loss"], first["part"]) == (2.5, 5.5)
    assert 0 < first["steps_per_s"] <= 2 / 0.02
    assert first["data_wait_share"] == 0
    meter.add({"loss": torch.tensor(7.0, requires_grad=True)})
    meter.waited(0.01)
    meter.waited(0.02)
    time.sleep(0.06)
    second = meter.flush()
    assert second["loss"] == 7.0
    assert 0.1 < second["data_wait_share"] <= 0.5
    assert second["data_wait_share"] == pytest.approx(0.03 * second["steps_per_s"])


def test_bounds_and_defaults_of_the_settings() -> None:
    assert FitConfig().model_dump() == {
        "steps": 400,
        "batch_size": 128,
        "chunk_size": 0,
        "checkpoint_activations": False,
        "compile": False,
        "learning_rate": 1e-3,
        "weight_decay": 0.05,
        "warmup_steps": 20,
        "grad_clip": 1.0,
        "max_skipped_in_a_row": 10,
        "precision": "auto",
        "log_every": 10,
        "eval_every": 0,
        "best_metric": "",
        "best_is": "auto",
        "patience": 0,
        "ema_decay": 0.0,
        "checkpoint_every": 100,
        "seed": 0,
    }
    lowest = {"steps": 1, "batch_size": 1, "log_every": 1, "checkpoint_every": 1}
    lowest |= {"weight_decay": 0, "warmup_steps": 0, "eval_every": 0}
    FitConfig.parse(lowest)
    for name, low in lowest.items():
        with pytest.raises(UserError, match=name):
            FitConfig.parse({name: low - 1})
    for name in ("learning_rate", "grad_clip"):
        FitConfig.parse({name: 0.1})
        with pytest.raises(UserError, match=name):
            FitConfig.parse({name: 0})


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
    task = Still()
    fit(task, batches, FitConfig(steps=3, warmup_steps=1))
    # One of the two processors has no bfloat16: both must compute alike.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aai.fit.native_bfloat16", lambda device: rank == 0)
        precision = fit(Still(), batches, FitConfig(steps=1)).precision
    Path(folder, f"{rank}.json").write_text(json.dumps([precision, task.drawn]))


@pytest.mark.slow
def test_two_processes_train_as_one_but_draw_numbers_of_their_own(tmp_path: Path) -> None:
    whole = fit(Plain(), batches, CONFIG)
    on_ranks(2, _rank, str(tmp_path))
    for rank in range(2):
        state = State.load(tmp_path / f"{rank}.safetensors")
        for name, value in whole.weights.items():
            torch.testing.assert_close(state.weights[name], value, atol=1e-4, rtol=1e-4)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [precision for precision, _ in found] == ["float32", "float32"]
    assert len({*found[0][1], *found[1][1]}) == 6


def test_a_resumed_run_keeps_the_precision_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []

    class Seen(Line):
        def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            seen.append(self.linear(batch["x"]).dtype)
            return super().forward(batch)

    config = CONFIG.model_copy(update={"steps": 2, "precision": "auto"})
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
