"""Within a GPU's memory."""

import copy
import resource
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from aai.errors import UserError

T = TypeVar("T")
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def in_chunks(run: Callable[..., Tensor], size: int, *rows: Tensor) -> Tensor:
    """run(*rows), `size` rows at a time; 0 = all at once. Row i of the result must depend on the rows i alone.

    Gradient caching (arXiv 2101.06983): a chunk's activations are thrown away and computed again, with the same random
    numbers, when the backward pass comes to it. Memory is that of one chunk, gradients are those of the whole batch.
    """
    if not size or len(rows[0]) <= size:
        return run(*rows)
    parts = zip(*(tensor.split(size) for tensor in rows), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([run(*part) for part in parts])
    return torch.cat([checkpoint(run, *part, use_reentrant=False) for part in parts])


def in_halves(work: Callable[[slice], list[T]], count: int, first: int = 0) -> list[T]:
    """The work on all rows at once, or, where the device's memory does not hold them, one half after the other."""
    try:
        return work(slice(first, first + count))
    except torch.OutOfMemoryError:
        if count == 1:
            raise
    torch.cuda.empty_cache()
    half = count // 2
    return [*in_halves(work, half, first), *in_halves(work, count - half, first + half)]


@contextmanager
def memory_explained(chunk_size: int) -> Iterator[None]:
    """Turns a device's out-of-memory error into a UserError that names what to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        rule = f"a step does not fit into the device's memory ({str(error).splitlines()[0][:200]})"
        remedy = "lower it (0 = all of a worker's clips at once): the gradient stays the same"
        raise UserError("fit.chunk_size", chunk_size, rule, remedy) from error


def peak_memory_gb() -> float:
    """The most that this process has held so far: of tensors on its GPU, or without one of the machine's memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    if status.exists() and "VmHWM:" in (told := status.read_text()):
        return int(told.split("VmHWM:")[1].split()[0]) * 1024 / 1e9  # in kB
    # Not everywhere: its peak begins with that of the parent process. macOS counts in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


class PeakMemory(TorchDispatchMode):
    """The most bytes of tensors that were alive at once while it was entered: `.peak`; `.now` at this moment. `.flop`:
    multiplications and additions of matrix products, attention and convolutions, by PyTorch's own formulas.

    It counts storages that operators make, of real and of fake tensors alike; not what the allocator adds, nor
    workspaces inside of an operator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.flop = 0
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
        if func is FLASH.default:  # on the CPU, where fake steps are, it has no formula
            self.flop += sdpa_flop_count(*(x.shape for x in args[:3]))
        elif func is FLASH_BACKWARD.default:
            self.flop += sdpa_backward_flop_count(*(x.shape for x in args[:4]))
        elif (formula := flop_registry.get(func.overloadpacket)) is not None:
            self.flop += formula(*args, **(kwargs or {}), out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return out


@dataclass(frozen=True)
class StepCost:
    """What one training step of one process takes."""

    num_bytes: int
    """Held at most: weights, gradients, moments, activations, the batch."""
    flop: int
    """See `PeakMemory`; forwards and backwards."""


def step_cost(
    make: Callable[[], nn.Module],
    batch: Mapping[str, tuple[int, ...] | list[str]],
    bfloat16: bool,
) -> StepCost:
    """The cost of a step with AdamW, over PyTorch's fake tensors: they have shapes and no numbers, so that it needs no
    GPU and next to no time.

    make: builds the task; a network of real tensors that it holds is copied without its numbers. batch: shapes of
    tensors by name, of float32 but for names that end with `_id` or `_hash`; and lists of texts. Not in it: what the
    allocator leaves unused, and workspaces of kernels.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        task = make()
    with FakeCopyMode(fake):
        shadow = copy.deepcopy(task).train()
    with fake, PeakMemory() as memory:
        memory.count(*shadow.parameters(), *shadow.buffers())
        values: dict[str, Any] = {}
        for name, shape in batch.items():
            kind = torch.int64 if name.endswith(("_id", "_hash")) else torch.float32
            values[name] = torch.ones(shape, dtype=kind) if isinstance(shape, tuple) else shape
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss, _ = shadow(values)
        loss.backward()
        moments = 2 * sum(p.numel() * p.element_size() for p in shadow.parameters() if p.requires_grad)
        return StepCost(memory.peak + moments, memory.flop)
