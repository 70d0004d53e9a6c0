"""A network of one product in the place of the UNet, and calls of it that several requests make at once."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import torch

from aai.batching import Together


class Twice(torch.nn.Module):
    """2 x sample + timestep + states + what is added, and what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.most = torch.nn.Parameter(torch.tensor(2.0)), 99
        self.rows: list[int] = []

    def forward(
        self,
        sample: torch.Tensor,
        timestep: Any,
        encoder_hidden_states: torch.Tensor,
        own: Any = None,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
        return_dict: bool = True,
    ) -> Any:
        if len(sample) > self.most:
            raise torch.OutOfMemoryError("no memory")
        self.rows.append(len(sample))
        more = sum((added_cond_kwargs or {}).values(), torch.zeros(1, 1))
        rest = torch.as_tensor(timestep).reshape(-1) + encoder_hidden_states.sum((1, 2)) + more.flatten(1).sum(1)
        out = self.weight * sample + rest.reshape(-1, 1, 1, 1).to(sample.dtype)
        return SimpleNamespace(sample=out) if return_dict else (out,)


def a_call(number: int, rows: int = 2, **changes: Any) -> dict[str, Any]:
    sample, states = torch.full((rows, 1, 2, 2), float(number)), torch.full((rows, 1, 3), number / 10)
    return {"sample": sample, "timestep": number, "encoder_hidden_states": states, "return_dict": False, **changes}


def in_one_round(unet: Twice, calls: Sequence[dict[str, Any]], told: Callable[[int], None] | None = None) -> list[Any]:
    """What comes of calls that different requests make at once; an error in the place of an answer."""
    together, turn, here = Together(unet, told), threading.Event(), threading.Event()

    def first() -> None:
        turn.set()
        here.wait(30)

    def one(arguments: dict[str, Any]) -> Any:
        try:
            return together.run(lambda: unet.forward(**arguments), threading.Event())[0]
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(calls) + 1) as pool:
        pool.submit(together.run, first, threading.Event())
        turn.wait(30)
        found = [pool.submit(one, arguments) for arguments in calls]
        while together._came.qsize() < len(calls):
            time.sleep(0.001)
        here.set()
        answers = [done.result(30) for done in found]
    together.close()
    return answers
