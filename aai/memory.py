"""Training within a GPU's memory."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint


def in_chunks(run: Callable[..., Tensor], size: int, *rows: Tensor) -> Tensor:
    """run(*rows), `size` rows at a time; 0 = all at once. Row i of the result must depend on the rows i alone.

    Gradient caching (arXiv 2101.06983): a chunk's activations are thrown away and computed again, with the same random
    numbers, when the backward pass comes to it. Memory is that of one chunk, gradients are those of the whole batch.
    """
    if not size or len(rows[0]) <= size or not torch.is_grad_enabled():
        return run(*rows)
    parts = zip(*(tensor.split(size) for tensor in rows), strict=True)
    return torch.cat([checkpoint(run, *part, use_reentrant=False) for part in parts])


class PeakMemory(TorchDispatchMode):
    """The most bytes of tensors that were alive at once while it was entered: `.peak`; `.now` at this moment.

    It counts storages that operators make, of real and of fake tensors alike; not what the allocator adds, nor
    workspaces inside of an operator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def count(self, *tensors: Tensor) -> None:
        """Counts tensors made before."""
        for tensor in tensors:
            self._count(tensor.untyped_storage())

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._alive:
            return

        def gone(_: object) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return out
