"""The one training loop: AdamW with warm-up and cosine decay, on one process or under DistributedDataParallel.

What happens in a step depends only on the weights, the seed and the step's number (random numbers are seeded for each
step), so a run resumed from a checkpoint takes the steps that the uninterrupted run would have taken.
"""

import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pydantic
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from aai.config import Config
from aai.errors import UserError
from aai.finite import FiniteGuard
from aai.precision import native_bfloat16
from aai.selection import Best, Evaluate, Keeper, MovingAverage, copied, put

log = logging.getLogger(__name__)

Batch = dict[str, Any]


class FitConfig(Config):
    """How long and how fast a stage trains."""

    steps: int = pydantic.Field(400, ge=1)
    batch_size: int = pydantic.Field(128, ge=1)
    """Clips per step over all workers."""
    chunk_size: int = pydantic.Field(0, ge=0)
    """Clips of a worker that go through the model at once; 0 = all. Fewer need less memory and a third more time, with
    the gradient of the whole batch: set it when a GPU's memory does not hold batch_size / workers clips."""
    checkpoint_activations: bool = False
    """Keep only what goes in and out of the layers of the large network, and compute the rest again in the backward
    pass: less memory, a third more time. With chunks it gains little."""
    compile: bool = False
    """Compile the large network (torch.compile): minutes at the start, faster steps on a GPU."""
    learning_rate: float = pydantic.Field(1e-3, gt=0)
    weight_decay: float = pydantic.Field(0.05, ge=0)
    """Of matrices; vectors and scalars (norms, biases, temperatures) are not decayed."""
    warmup_steps: int = pydantic.Field(20, ge=0)
    grad_clip: float = pydantic.Field(1.0, gt=0)
    """Ceiling of the gradient's norm."""
    max_skipped_in_a_row: int = pydantic.Field(10, ge=0)
    """Steps in a row whose loss or gradient may be not finite: they are left out, counted, and their clips named; one
    more ends the run."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the forward pass; weights stay float32. auto: bfloat16 where every worker's device has it natively,
    float32 elsewhere; a run that is resumed, also on other machines, keeps what it began with."""
    log_every: int = pydantic.Field(10, ge=1)
    """Steps between two entries of the history."""
    eval_every: int = pydantic.Field(0, ge=0)
    """Steps between two validations; 0 = only at the end."""
    best_metric: str = ""
    """Figure of validation by which the best weights are kept, such as val_a2v_r1; empty = the last are kept."""
    best_is: Literal["auto", "highest", "lowest"] = "auto"
    """Which value of best_metric is the best; auto: the highest of a recall (a name that ends with _r1, _r5, ...), the
    lowest of anything else, which is a loss."""
    patience: int = pydantic.Field(0, ge=0)
    """Validations in a row without a better best_metric after which training ends; 0 = it runs to its last step."""
    ema_decay: float = pydantic.Field(0.0, ge=0, lt=1)
    """Decay of an exponential moving average of the weights, which is then what is validated and kept; 0 = none."""
    checkpoint_every: int = pydantic.Field(100, ge=1)
    """Steps between two checkpoints; the last step always makes one."""
    seed: int = pydantic.Field(0, ge=0)

    @pydantic.model_validator(mode="after")
    def _selection_can_act(self) -> "FitConfig":
        if self.patience and not self.best_metric:
            raise ValueError("patience needs best_metric: the figure that it waits for")
        if self.best_metric and not self.eval_every:
            raise ValueError("best_metric needs eval_every: one validation at the end chooses nothing")
        return self

    @property
    def highest_is_best(self) -> bool:
        """See `best_is`."""
        if self.best_is == "auto":
            return re.search(r"_r\d+$", self.best_metric) is not None
        return self.best_is == "highest"


@dataclass(frozen=True)
class State:
    """What a checkpoint holds: everything the next step depends on."""

    step: int
    """Steps done."""
    weights: dict[str, Tensor]
    """The trainable parameters by name."""
    moments: dict[str, Tensor]
    """AdamW's state, named `KIND/PARAMETER`."""
    precision: str | None = None
    """float32 or bfloat16; None in checkpoints of earlier versions."""
    average: dict[str, Tensor] = field(default_factory=dict)
    """The moving average of the weights; empty without one."""
    best: Best | None = None
    """The best weights so far, where they are looked for."""
    ended: bool = False
    """Whether no step follows."""

    @property
    def kept_step(self) -> int:
        """The step whose weights would be kept now."""
        return self.best.step if self.best and self.best.weights else self.step

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file."""
        tensors = {f"weights/{name}": value for name, value in self.weights.items()}
        tensors |= {f"moments/{name}": value for name, value in self.moments.items()}
        tensors |= {f"average/{name}": value for name, value in self.average.items()}
        about = {"step": json.dumps(self.step), "ended": json.dumps(self.ended)}
        if self.precision:
            about["precision"] = self.precision
        if self.best:
            tensors |= {f"best/{name}": value for name, value in self.best.weights.items()}
            about["best"] = json.dumps(self.best.described())
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path, about)

    @classmethod
    def load(cls, path: str | Path) -> "State":
        """Reads what `save` wrote."""
        with safe_open(path, framework="pt") as file:
            about = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}

        best = Best(**json.loads(about["best"]), weights=part("best/")) if "best" in about else None
        selection = part("average/"), best, json.loads(about.get("ended", "false"))
        return cls(int(about["step"]), part("weights/"), part("moments/"), about.get("precision"), *selection)


def trainable(task: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name; a DistributedDataParallel wrapper does not show."""
    return {name: p for name, p in _inner(task).named_parameters() if p.requires_grad}


def _inner(task: nn.Module) -> nn.Module:
    return task.module if isinstance(task, nn.parallel.DistributedDataParallel) else task


def fit(
    task: nn.Module,
    batches: Callable[[int], Iterator[Batch]],
    config: FitConfig,
    on_log: Callable[[int, dict[str, float]], None] = lambda step, figures: None,
    on_checkpoint: Callable[[State], None] = lambda state: None,
    evaluate: Evaluate | None = None,
    resume: State | None = None,
    on_skip: Callable[[int, list[str]], None] = lambda step, clips: None,
    leaving: Callable[[], bool] = lambda: False,
) -> State:
    """Trains `task` for `config.steps` steps and returns the final state.

    task: `task(batch) -> (loss, report)`, both of scalars; its `rate_scales`, if it has them, are shares of the rate by
    parameter. batches: given the first step's number (from 0), yields the batch of every step from there on.
    on_log gets the means since the last entry; evaluate's figures come as an entry of their own. A step with a
    non-finite loss or gradient is not taken: on_skip gets its number and this process's suspects. leaving is asked with
    every entry; true makes a checkpoint out of turn. Raises FloatingPointError for too many steps in a row that are not
    finite, and ValueError when the batches run out.
    """
    params = trainable(task)
    if not params:
        raise ValueError("nothing to train: no parameter requires a gradient")
    device = next(iter(params.values())).device
    precision = _precision(config, device, resume)
    optimizer = _optimizer(params, config, getattr(_inner(task), "rate_scales", {}))
    if resume is not None:
        _restore(params, optimizer, resume)
    start, keeper = resume.step if resume else 0, _keeper(params, config, resume)
    if resume is not None and (resume.ended or start >= config.steps):
        keeper.put_kept()
        return resume
    iterator, meter, guard = batches(start), Meter(), FiniteGuard(config.max_skipped_in_a_row, on_skip)
    for step in range(start + 1, config.steps + 1):
        task.train()
        batch = _next_batch(iterator, meter, step, config.steps)
        rate = _begin_step(optimizer, config, step)
        optimizer.zero_grad(set_to_none=True)
        figures = _gradients(task, _to(batch, device), precision)
        figures["grad_norm"] = nn.utils.clip_grad_norm_(params.values(), config.grad_clip)
        if guard.lets_pass(step, figures, batch):
            optimizer.step()
            keeper.update()
            meter.add(figures)
        last = step == config.steps
        if logs := last or step % config.log_every == 0:
            on_log(step, {**meter.flush(), "skipped_steps": guard.flush(), "learning_rate": rate})
        if last or (config.eval_every and step % config.eval_every == 0):
            last = keeper.validate(task, step, evaluate, on_log) or last
        if last or step % config.checkpoint_every == 0 or (logs and leaving()):
            state = _state(step, params, optimizer, precision, keeper, last)
            on_checkpoint(state)
        if last:
            return state
    raise AssertionError("a run that goes on has a step to take")


def learning_rate(step: int, config: FitConfig) -> float:
    """The rate of step 1..steps: linear warm-up, then a cosine to 1 % (arXiv 1608.03983)."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


class Meter:
    """Running means of scalar tensors, steps per second and waiting for data, since the last flush."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count, self._since, self._waited_s = 0, time.monotonic(), 0.0

    def add(self, figures: dict[str, Tensor]) -> None:
        """Takes one step's figures; nothing is copied off the device yet."""
        self._count += 1
        for name, value in figures.items():
            self._sums[name] = self._sums.get(name, torch.zeros((), device=value.device)) + value.detach().float()

    def waited(self, seconds: float) -> None:
        """Takes the time that a step's batch was waited for."""
        self._waited_s += seconds

    def flush(self) -> dict[str, float]:
        """The means, the speed, and the share of the time that data was waited for; starts over."""
        out = {name: float(total) / self._count for name, total in self._sums.items()}
        elapsed_s = max(1e-9, time.monotonic() - self._since)
        out |= {"steps_per_s": self._count / elapsed_s, "data_wait_share": self._waited_s / elapsed_s}
        self._reset()
        return out


def _precision(config: FitConfig, device: torch.device, resume: State | None) -> str:
    """What `auto` stands for in this run: decided once, and by all ranks together."""
    if config.precision != "auto":
        return config.precision
    if resume is not None and resume.precision:
        return resume.precision
    native = torch.tensor(int(native_bfloat16(device)), device=device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(native, dist.ReduceOp.MIN)
    return "bfloat16" if native else "float32"


def _next_batch(iterator: Iterator[Batch], meter: Meter, step: int, steps: int) -> Batch:
    asked_s = time.monotonic()
    batch = next(iterator, None)
    meter.waited(time.monotonic() - asked_s)
    if batch is None:
        raise ValueError(f"the data ended before step {step}: batches must go on for {steps} steps")
    return batch


def _to(batch: Batch, device: torch.device) -> Batch:
    """A batch with its tensors on a device; what is no tensor (captions) stays."""
    return {name: x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for name, x in batch.items()}


def _optimizer(params: dict[str, nn.Parameter], config: FitConfig, scales: Mapping[str, float]) -> torch.optim.AdamW:
    """scales: share of the learning rate of a parameter; 1 for one that is not named."""
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, param in params.items():
        groups.setdefault((param.ndim >= 2, scales.get(name, 1.0)), []).append(param)
    decay = config.weight_decay
    return torch.optim.AdamW(
        [
            {"params": found, "weight_decay": decay if matrices else 0.0, "scale": scale}
            for (matrices, scale), found in groups.items()
        ],
        lr=config.learning_rate,
        betas=(0.9, 0.98),
    )


def _begin_step(optimizer: torch.optim.Optimizer, config: FitConfig, step: int) -> float:
    """Sets the rate, and seeds torch for one step, differently on each rank (they augment different clips)."""
    rate = learning_rate(step, config)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    torch.manual_seed((config.seed * 1_000_003 + step) * 10_007 + rank)
    return rate


def _gradients(task: nn.Module, batch: Batch, precision: str) -> dict[str, Tensor]:
    """Leaves the gradient of one batch in the parameters; returns the loss and what the task reports."""
    device = next(task.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        loss, report = task(batch)
    loss.backward()
    return {"loss": loss.detach(), **report}


def _keeper(params: dict[str, nn.Parameter], config: FitConfig, resume: State | None) -> Keeper:
    """The first rank's keeper holds weights, the others' only agree with it."""
    average = best = None
    if not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0:
        if config.ema_decay:
            before = (resume.step, resume.average) if resume else (0, None)
            average = MovingAverage(params, config.ema_decay, *before)
        if config.best_metric:
            best = (resume and resume.best) or Best(config.best_metric, config.highest_is_best)
    return Keeper(params, average, best, config.patience)


def _state(
    step: int,
    params: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    precision: str,
    keeper: Keeper,
    ended: bool,
) -> State:
    """What a checkpoint holds; where training has ended, the weights that are kept take their place."""
    moments: dict[str, Tensor] = {}
    for name, param in params.items():
        for kind, value in optimizer.state[param].items():
            moments[f"{kind}/{name}"] = value.detach().clone()
    weights = copied(params)
    if ended:
        keeper.put_kept()
    average = {name: x.clone() for name, x in keeper.average.weights.items()} if keeper.average else {}
    best = replace(keeper.best) if keeper.best else None
    return State(step, weights, moments, precision, average, best, ended)


def _restore(params: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, state: State) -> None:
    put(params, state.weights)
    for key, value in state.moments.items():
        kind, name = key.split("/", 1)
        param = params[name]
        # AdamW keeps its step counter on the CPU.
        optimizer.state[param][kind] = value.clone() if kind == "step" else value.to(param.device)


def local_batch_size(config: FitConfig, world_size: int) -> int:
    """Clips per step of one worker. Raises UserError when the workers cannot share the batch evenly."""
    if config.batch_size % world_size:
        raise UserError(
            "fit.batch_size",
            config.batch_size,
            f"is not a multiple of the {world_size} workers",
            "choose a multiple of cluster.num_workers",
        )
    return config.batch_size // world_size
