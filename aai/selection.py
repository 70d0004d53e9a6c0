"""Which weights of a training are kept: the last, their moving average, or the best by a figure of validation."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from aai.errors import UserError

Params = dict[str, nn.Parameter]
Weights = dict[str, Tensor]
Evaluate = Callable[[int], dict[str, float]]
"""Figures of the weights as they are after this step."""
OnLog = Callable[[int, dict[str, float]], None]


def copied(params: Params) -> Weights:
    """The weights as they are now."""
    return {name: param.detach().clone() for name, param in params.items()}


def put(params: Params, weights: Weights) -> None:
    """Copies weights into parameters. Raises ValueError when they are not exactly these."""
    if params.keys() != weights.keys():
        raise ValueError(f"weights do not fit the model: {sorted(params.keys() ^ weights.keys())[:5]} are unmatched")
    with torch.no_grad():
        for name, param in params.items():
            param.copy_(weights[name])


class MovingAverage:
    """Exponential moving average of weights (Polyak and Juditsky 1992); its decay grows from 0 in the first steps."""

    def __init__(self, params: Params, decay: float, step: int = 0, weights: Weights | None = None) -> None:
        """step, weights: of a run that goes on."""
        self.params, self.decay, self.step = params, decay, step
        self.weights = {name: x.to(params[name].device) for name, x in weights.items()} if weights else copied(params)

    @torch.no_grad()
    def update(self) -> None:
        """Takes the weights after one more step."""
        self.step += 1
        share = 1 - min(self.decay, (1 + self.step) / (10 + self.step))
        for name, param in self.params.items():
            self.weights[name].lerp_(param, share)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """While the body runs, the parameters hold the average."""
        own = copied(self.params)
        put(self.params, self.weights)
        try:
            yield
        finally:
            put(self.params, own)


@dataclass
class Best:
    """The best weights so far."""

    metric: str
    highest: bool
    step: int = 0
    value: float = 0.0
    weights: Weights = field(default_factory=dict)
    worse_since: int = 0
    """Validations since then."""

    def described(self) -> dict[str, Any]:
        """All but the weights, as JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "weights"}

    def see(self, step: int, figures: dict[str, float], params: Params) -> None:
        """Takes one validation. Raises UserError when it has no such figure."""
        if self.metric not in figures:
            rule, known = "is no figure of validation", ", ".join(sorted(figures))
            raise UserError("fit.best_metric", self.metric, rule, f"choose one of {known}")
        value = figures[self.metric]
        better = not self.weights or (value > self.value if self.highest else value < self.value)
        if better and math.isfinite(value):
            self.step, self.value, self.weights, self.worse_since = step, value, copied(params), 0
        else:
            self.worse_since += 1


class Keeper:
    """Validates, and in the end puts the weights in place that are kept: on the first rank; all stop together."""

    def __init__(self, params: Params, average: MovingAverage | None, best: Best | None, patience: int) -> None:
        self.params, self.average, self.best, self.patience = params, average, best, patience

    def update(self) -> None:
        """After each step."""
        if self.average is not None:
            self.average.update()

    def validate(self, task: nn.Module, step: int, evaluate: Evaluate | None, on_log: OnLog) -> bool:
        """Figures of the weights as they would be kept now, for `on_log`; returns whether training should stop."""
        if evaluate is not None:
            task.eval()
            with self.average.in_use() if self.average else nullcontext(), torch.no_grad():
                figures = evaluate(step)
                if self.best is not None:
                    self.best.see(step, figures, self.params)
            on_log(step, figures)
        return self.stops()

    def stops(self) -> bool:
        """Whether the last `patience` validations were no better, as the first rank knows; all ranks ask together."""
        if not self.patience:
            return False
        stop = self.best is not None and self.best.worse_since >= self.patience
        if dist.is_available() and dist.is_initialized():
            device = next(iter(self.params.values())).device
            told = torch.tensor(int(stop), device=device)
            dist.broadcast(told, 0)
            stop = bool(told)
        return stop

    def put_kept(self) -> None:
        """Puts the best weights, or else the average, in place of the last."""
        if self.best is not None and self.best.weights:
            put(self.params, self.best.weights)
        elif self.average is not None:
            put(self.params, self.average.weights)
