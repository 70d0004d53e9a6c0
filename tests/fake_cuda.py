"""A GPU that is not there: tensors on "cuda" whose numbers lie on the CPU, for machines without a GPU.

Within `fake_cuda()` a tensor made on, or moved to, "cuda" becomes a `CudaTensor`: it says `device == cuda:0` and holds
its numbers in an ordinary CPU tensor. Every operator of PyTorch passes through `dispatch`, which refuses what a GPU
refuses and computes the rest on those numbers. So results are real, also where they depend on data (`.cpu()`,
`.item()`, a mask), which PyTorch's own FakeTensorMode cannot do; nor does its backward pass run without a GPU.

Refused, as on a GPU: an operator that mixes devices, `.numpy()` of a cuda tensor, a CPU generator that fills a cuda
tensor. Allowed, as on a GPU: copies between devices, CPU indices into a cuda tensor, and CPU scalars (0-dim) in
elementwise operators. Not shown: kernels, memory, streams, and autocast (PyTorch turns it off without a GPU).

PyTorch's C++ side must not hear of "cuda", or it looks for a driver. It is told "lazy", a device that nothing else here
uses and whose backward pass runs on the caller's thread: `Names` translates on the way in, `CudaTensor.device` out.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_iter, tree_map

CUDA = torch.device("cuda", 0)
INNER = torch.device("lazy", 0)
"""What C++ takes for CUDA."""
COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
"""Their indices may lie on the CPU when the tensor does not, and an assigned value may be a scalar of the CPU."""


class CudaTensor(Tensor):
    """Says it is on the GPU; `data_cpu` holds the numbers."""

    data_cpu: Tensor

    @staticmethod
    def __new__(cls: type, data_cpu: Tensor) -> "CudaTensor":
        out = Tensor._make_wrapper_subclass(
            cls, data_cpu.shape, data_cpu.stride(), data_cpu.storage_offset(), dtype=data_cpu.dtype, device=INNER
        )
        out.data_cpu = data_cpu
        return out

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self) -> Any:
        """A copy to the host; C++ refuses it for subclasses."""
        return self.data_cpu.tolist()

    def __repr__(self) -> str:
        return f"CudaTensor({self.data_cpu})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


class Names(TorchFunctionMode):
    """Translates the device of every call into PyTorch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.device:
            args, kwargs = tree_map(_inner_device, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _inner_device(x: Any) -> Any:
    if isinstance(x, torch.device):
        return INNER if x.type == "cuda" else x
    return INNER if isinstance(x, str) and x in ("cuda", "cuda:0") else x


class Operators(TorchDispatchMode):
    """Also sees the operators that make tensors out of nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), COMPOSITE):
            with self:  # made of other operators; inference mode does not take it apart
                return func._op_dk(COMPOSITE, *args, **(kwargs or {}))
        return dispatch(func, args, kwargs or {})


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Computes one operator on the CPU tensors inside. Raises RuntimeError for devices that do not go together."""
    on_gpu = any(isinstance(x, CudaTensor) for x in tree_iter((args, kwargs)))
    wanted = kwargs.get("device")
    if wanted is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    elif on_gpu and func not in COPIES:
        check_devices(func, args, kwargs)
    to_gpu = on_gpu if wanted is None else wanted == INNER
    check_generator(func, kwargs, to_gpu)
    if not on_gpu and not to_gpu:
        return func(*args, **kwargs)
    # A wrapper made in inference mode could not be a view of one made before.
    with torch.inference_mode(False):
        inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
        out = func(*inner_args, **inner_kwargs)
        if to_gpu:
            out = tree_map(_outer, out)
        # What was changed in place comes back as the tensor that was given, with the shape it now has.
        return return_and_correct_aliasing(func, args, kwargs, out) if on_gpu and to_gpu else out


def _inner(x: Any) -> Any:
    return x.data_cpu if isinstance(x, CudaTensor) else x


def _outer(x: Any) -> Any:
    return CudaTensor(x) if isinstance(x, Tensor) else x


def check_devices(func: Any, args: Any, kwargs: Any) -> None:
    """Raises RuntimeError when an operator that has a cuda tensor also has one of the CPU that it may not have."""
    tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
    if func in INDEXING:
        if not isinstance(args[0], CudaTensor):
            raise RuntimeError(f"{func}: indices on cuda:0 into a tensor on the cpu")
        tensors = [args[0], *(x for x in args[2:] if isinstance(x, Tensor))]
    scalars = torch.Tag.pointwise in func.tags or func in INDEXING or "foreach" in func.name()
    for x in tensors:
        if not isinstance(x, CudaTensor) and not (scalars and x.ndim == 0):
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found cuda:0 and cpu")


def check_generator(func: Any, kwargs: dict[str, Any], to_gpu: bool) -> None:
    """Raises RuntimeError when a generator of one device is to fill a tensor of another."""
    generator = kwargs.get("generator")
    if generator is not None and to_gpu and generator.device.type == "cpu":
        raise RuntimeError(f"{func}: expected a 'cuda' device type for generator but found 'cpu'")


@contextmanager
def fake_cuda() -> Iterator[None]:
    """While active, "cuda" is a device of this machine, also for threads that are started."""
    plain = threading.Thread.run

    def run(thread: threading.Thread) -> None:
        torch._C._set_only_lift_cpu_tensors(True)
        with Names(), Operators():
            plain(thread)

    # Modules get new parameters by `to`: a CPU parameter cannot become a CudaTensor in place.
    convert = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    lift = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(..., device="cuda")` goes by way of the CPU
    try:
        pinned = mock.patch.object(Tensor, "pin_memory", lambda x, *_: x)
        with pinned, mock.patch.object(threading.Thread, "run", run), Names(), Operators():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(lift)
        torch.__future__.set_overwrite_module_params_on_conversion(convert)
