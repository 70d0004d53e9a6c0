"""Reusing the deep layers of a UNet between denoising steps (DeepCache, Ma et al. 2023, arXiv 2312.00858).

From one step to the next the coarse features change little: every `interval` steps the whole UNet runs, in between only
its outermost blocks do, on the deep features of the last whole step. Weights, prompt and A* are as they are.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def reused(unet: nn.Module, interval: int) -> Iterator[None]:
    """While active, of every `interval` calls of the UNet only the first runs its deep blocks; 1 = all of them do.

    All calls must be of one batch at successive noise levels, as a pipeline makes them.
    """
    parts: Any = unet
    deep = [*parts.down_blocks[1:], parts.mid_block, *parts.up_blocks[:-1]]
    calls, kept = -1, {}

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    def shallow(number: int, whole: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if calls % interval == 0:
                kept[number] = whole(*args, **kwargs)
            return kept[number]

        return forward

    if interval == 1:
        yield
        return
    handle = unet.register_forward_pre_hook(count)
    for number, block in enumerate(deep):
        block.forward = shallow(number, block.forward)
    try:
        yield
    finally:
        handle.remove()
        for block in deep:
            del block.forward  # the class's own is there again
