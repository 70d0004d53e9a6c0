"""Several requests painted together: all that need the UNet next share one call of it.

Each request runs diffusers' own pipeline with its own scheduler, steps and guidance, in a thread of its own; of these
threads one runs at a time. One that comes to the UNet waits there for the others, then the rows of all make one batch.
A request that comes meanwhile joins at the next step, one that ends leaves (continuous batching, as Orca schedules
iterations of a language model: Yu et al., OSDI 2022). Nobody waits for company that is not there.
"""

import copy
import inspect
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor

from aai.painter import Painter

T = TypeVar("T")
Seen = Callable[[Tensor, Tensor, Tensor], None]
"""Told of each call of the UNet: latents [R, C, h, w], timestep, and what it predicted [R, C, h, w]."""
SHARED = ("sample", "timestep", "encoder_hidden_states", "added_cond_kwargs", "return_dict")
"""What calls may differ in and still be one batch."""


class StoppedError(Exception):
    """Nobody waits for this picture any more."""


def view_of(painter: Painter) -> Painter:
    """The same painter with pipelines of its own, which hold the state of one request; all weights are shared."""
    view = copy.copy(painter)
    view.pipe, view.image_pipe = copy.copy(painter.pipe), copy.copy(painter.image_pipe)
    return view


class Call:
    """One request's call of the UNet: its arguments by name, and, when it has been made, what came of it."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        self.out: Any = None
        self.error: BaseException | None = None
        self.made = False

    @property
    def rows(self) -> int:
        """R, rows of its batch: with guidance two for each picture."""
        return len(self.arguments["sample"])

    def fits(self) -> Any:
        """Calls with equal values may share a batch; one that carries what only concerns itself fits no other."""
        a = self.arguments
        if any(value is not None and name not in SHARED for name, value in a.items()):
            return id(self)
        more = a.get("added_cond_kwargs") or {}
        tensors = {"sample": a["sample"], "states": a["encoder_hidden_states"], **more}
        return tuple((name, tensor.shape[1:], tensor.dtype) for name, tensor in sorted(tensors.items()))

    def give(self, rows: Tensor) -> None:
        """What the UNet predicted for its rows, in the form it asked for."""
        self.out = UNet2DConditionOutput(sample=rows) if self.arguments.get("return_dict", True) else (rows,)


class Together:
    """The one UNet of several requests. told: hears the number of rows of each call."""

    def __init__(self, unet: Any, told: Callable[[int], None] | None = None) -> None:
        self._forward = unet.forward
        self._signature = inspect.signature(unet.forward)
        unet.forward = self._called
        self._turn = threading.Condition()
        """Held by the one thread that runs."""
        self._counting = threading.Lock()
        self._present = 0
        """Requests that will come to the UNet, or end; also those that wait for their first turn."""
        self._waiting: list[Call] = []
        self._own = threading.local()
        self._told = told or (lambda rows: None)

    def run(self, work: Callable[[], T], stop: threading.Event, seen: Seen | None = None, alone: bool = False) -> T:
        """Does the work of one request, whose calls of the UNet are made together with those of others.

        stop: when set, the work ends with StoppedError at its next call. seen: see Seen. alone: its calls are made at
        once, and no other request goes on before the work is done.
        """
        with self._counting:
            self._present += 1
        with self._turn:
            self._own.stop, self._own.seen, self._own.alone = stop, seen, alone
            try:
                return work()
            finally:
                self._own.stop = None
                with self._counting:
                    self._present -= 1
                self._step_when_all_wait()

    def _called(self, *args: Any, **kwargs: Any) -> Any:
        """In the place of the UNet's `forward`."""
        own = self._own
        if getattr(own, "stop", None) is None:
            return self._forward(*args, **kwargs)
        call = Call(self._signature.bind(*args, **kwargs).arguments)
        if own.stop.is_set():
            raise StoppedError
        if own.alone:
            self._make([call])
        else:
            self._waiting.append(call)
            self._step_when_all_wait()
            self._turn.wait_for(lambda: call.made)
        if own.stop.is_set():
            raise StoppedError
        if call.error is not None:
            raise call.error
        if own.seen is not None:
            predicted = call.out[0]
            own.seen(call.arguments["sample"], call.arguments["timestep"], predicted)
        return call.out

    def _step_when_all_wait(self) -> None:
        """Makes all calls once nobody is left who could bring another one."""
        with self._counting:
            if not self._waiting or len(self._waiting) < self._present:
                return
        calls, self._waiting = self._waiting, []
        groups: dict[Any, list[Call]] = defaultdict(list)
        for call in calls:
            groups[call.fits()].append(call)
        for group in groups.values():
            self._make(group)
        self._turn.notify_all()

    def _make(self, calls: Sequence[Call]) -> None:
        """Makes calls that fit together as one; where memory does not hold it, one half after the other."""
        try:
            self._at_once(calls)
        except torch.OutOfMemoryError as error:
            if len(calls) > 1:
                torch.cuda.empty_cache()
                half = len(calls) // 2
                self._make(calls[:half])
                self._make(calls[half:])
                return
            calls[0].error = error  # the request itself may have halves
        except BaseException as error:
            for call in calls:
                call.error = error
        for call in calls:
            call.made = True

    @torch.no_grad()
    def _at_once(self, calls: Sequence[Call]) -> None:
        self._told(sum(call.rows for call in calls))
        first = calls[0].arguments
        if len(calls) == 1:
            calls[0].out = self._forward(**first)
            return
        device, given = first["sample"].device, [call.arguments for call in calls]
        times = [torch.as_tensor(a["timestep"], device=device).reshape(-1).expand(len(a["sample"])) for a in given]
        more = None
        if first.get("added_cond_kwargs"):
            names = first["added_cond_kwargs"]
            more = {name: torch.cat([a["added_cond_kwargs"][name] for a in given]) for name in names}
        (rows,) = self._forward(
            torch.cat([a["sample"] for a in given]),
            torch.cat(times),
            torch.cat([a["encoder_hidden_states"] for a in given]),
            added_cond_kwargs=more,
            return_dict=False,
        )
        for call, part in zip(calls, rows.split([call.rows for call in calls]), strict=True):
            call.give(part)
