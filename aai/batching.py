"""Several requests painted together: all that need the UNet next share one call of it.

Each request runs diffusers' own pipeline with its own scheduler, steps and guidance, in a thread of its own; of these
threads one runs at a time. One that comes to the UNet waits there for the others of its round, then the rows of all
make one batch. A request that comes meanwhile joins at the next step, one that ends leaves (continuous batching, as
Orca schedules iterations of a language model: Yu et al., OSDI 2022). Nobody waits for company that is not there.
"""

import copy
import inspect
import queue
import threading
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import torch
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
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

        self.out = UNet2DConditionOutput(sample=rows) if self.arguments.get("return_dict", True) else (rows,)


class Seat:
    """A request's place: `mine` lets it run, until it needs the UNet (`call`) or has ended."""

    def __init__(self, stop: threading.Event, seen: Seen | None, alone: bool) -> None:
        self.stop, self.seen, self.alone = stop, seen, alone
        self.mine = threading.Semaphore(0)
        self.call: Call | None = None
        self.ended = False


class Together:
    """The one UNet of several requests. told: hears the number of rows of each call.

    A thread of its own goes round: each request that was there at the begin of the round has one turn, in the order in
    which they came; then the calls that they have come to are made.
    """

    def __init__(self, unet: Any, told: Callable[[int], None] | None = None) -> None:
        self._unet, self._forward = unet, unet.forward
        self._signature = inspect.signature(unet.forward)
        self._told = told or (lambda rows: None)
        self._came: queue.SimpleQueue[Seat | None] = queue.SimpleQueue()
        self._given_back = threading.Semaphore(0)
        self._own = threading.local()
        self._only: Seat | None = None
        """The request of the round, where there is one alone."""
        unet.forward = self._called
        self._rounds = threading.Thread(target=self._go_round, name="together", daemon=True)
        self._rounds.start()

    def close(self) -> None:
        """Leaves the UNet as it was; no request may be under way."""
        self._came.put(None)
        self._rounds.join()
        self._unet.forward = self._forward

    def run(self, work: Callable[[], T], stop: threading.Event, seen: Seen | None = None, alone: bool = False) -> T:
        """Does the work of one request, whose calls of the UNet are made together with those of others.

        stop: when set, the work ends with StoppedError before its next call. seen: see Seen. alone: its calls are made
        at once, and no other request goes on before the work is done.
        """
        seat = Seat(stop, seen, alone)
        self._came.put(seat)
        seat.mine.acquire()
        self._own.seat = seat
        try:
            if stop.is_set():
                raise StoppedError
            return work()
        finally:
            self._own.seat = None
            seat.ended = True
            self._given_back.release()

    def _called(self, *args: Any, **kwargs: Any) -> Any:
        """In the place of the UNet's `forward`."""
        seat: Seat | None = getattr(self._own, "seat", None)
        if seat is None:
            return self._forward(*args, **kwargs)
        if seat.stop.is_set():
            raise StoppedError
        call = Call(self._signature.bind(*args, **kwargs).arguments)
        if seat.alone or (self._only is seat and self._came.empty()):  # nobody to wait for: no change of threads
            self._make([call])
        else:
            seat.call = call
            self._given_back.release()
            seat.mine.acquire()
        if seat.stop.is_set():
            raise StoppedError
        if call.error is not None:
            try:
                raise call.error
            finally:
                call.error = None  # else error and frame hold each other, and what the UNet had in memory
        if seat.seen is not None:
            seat.seen(call.arguments["sample"], call.arguments["timestep"], call.out[0])
        return call.out

    def _go_round(self) -> None:
        here: list[Seat] = []
        while True:
            while not here or not self._came.empty():
                if (new := self._came.get()) is None:
                    return
                here.append(new)
            calls: list[Call] = []
            self._only = here[0] if len(here) == 1 else None
            for seat in here:
                seat.call = None
                seat.mine.release()
                self._given_back.acquire()
                if not seat.ended and seat.call is not None:
                    calls.append(seat.call)
            here = [seat for seat in here if not seat.ended]
            try:
                self._make_all(calls)
            except BaseException as error:  # nobody shall be left waiting
                for call in calls:
                    call.error = error

    def _make_all(self, calls: Sequence[Call]) -> None:
        groups: dict[Any, list[Call]] = defaultdict(list)
        for call in calls:
            groups[call.fits()].append(call)
        for group in groups.values():
            self._make(group)

    def _make(self, calls: Sequence[Call]) -> None:
        """Makes calls that fit together as one; where memory does not hold it, one half after the other."""
        error = self._tried(calls)
        if isinstance(error, torch.OutOfMemoryError) and len(calls) > 1:
            half = len(calls) // 2
            self._make(calls[:half])
            self._make(calls[half:])
            return
        for call in calls:
            call.error = error  # one that is alone may have halves itself

    def _tried(self, calls: Sequence[Call]) -> BaseException | None:
        """What went wrong; of memory that was too small nothing is held any more."""
        try:
            self._at_once(calls)
            return None
        except torch.OutOfMemoryError as error:
            traceback.clear_frames(error.__traceback__)
            found: BaseException = error
        except BaseException as error:
            return error
        with suppress(torch.AcceleratorError):  # of a device that failed: its next call tells
            torch.cuda.empty_cache()
        return found

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
