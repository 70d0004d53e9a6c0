"""The fake GPU itself: it refuses what a GPU refuses, allows what one allows, also in threads, and computes rightly."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.fake_cuda import CudaTensor, fake_cuda


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    with fake_cuda():
        yield


def x() -> Tensor:
    return torch.ones(3, 4, device="cuda")


MISTAKES: dict[str, Callable[[], Any]] = {
    "a product with a CPU matrix": lambda: x() @ torch.ones(4, 2),
    "arange without a device": lambda: x()[0] + torch.arange(4),
    "a CPU vector times a cuda scalar": lambda: torch.ones(3) * torch.ones((), device="cuda"),
    "a cuda index into a CPU tensor": lambda: torch.ones(3)[torch.arange(2, device="cuda")],
    "a CPU index to gather": lambda: x().gather(1, torch.zeros(3, 1, dtype=torch.int64)),
    "a cuda index to gather": lambda: torch.ones(3, 1).gather(1, torch.zeros(3, 1, dtype=torch.int64, device="cuda")),
    "a CPU index to embedding": lambda: nn.functional.embedding(torch.zeros(2, dtype=torch.int64), x()),
    "concatenation": lambda: torch.cat([x(), torch.ones(3, 4)]),
    "a stack of scalars": lambda: torch.stack([x().sum(), torch.ones(())]),
    "a CPU mask": lambda: x().masked_fill(torch.ones(3, 4, dtype=torch.bool), 0),
    "assignment of a CPU row by index": lambda: x().__setitem__([0, 1], torch.ones(2, 4)),
    "numpy without cpu": lambda: x().numpy(),
    "asarray without cpu": lambda: np.asarray(x()),
    "a CPU generator for cuda noise": lambda: torch.randn(3, device="cuda", generator=torch.Generator()),
    "a CPU generator for like": lambda: torch.empty(3, device="cuda").normal_(generator=torch.Generator()),
    "a module left on the CPU": lambda: nn.Linear(4, 2)(x()),
    "an input left on the CPU": lambda: nn.Linear(4, 2).to("cuda")(torch.ones(3, 4)),
    "a loss against CPU targets": lambda: nn.functional.cross_entropy(x(), torch.zeros(3, dtype=torch.int64)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_fake_gpu_refuses(mistake: str) -> None:
    with pytest.raises((RuntimeError, TypeError)):
        MISTAKES[mistake]()


def assigned() -> Tensor:
    """Ones, but for two zeros that were assigned by index."""
    ones = x()
    ones[0, [1, 2]] = torch.zeros(2, device="cuda")
    return ones


ALLOWED: dict[str, tuple[Callable[[], Any], float]] = {
    "a CPU scalar": (lambda: (x() * torch.tensor(2.0)).sum(), 24),
    "CPU indices": (lambda: x()[torch.tensor([0, 2])].sum(), 8),
    "a copy": (lambda: x().copy_(torch.full((3, 4), 3.0)).sum(), 36),
    "assignment": (lambda: assigned().sum(), 10),
    "what depends on data": (lambda: x()[x() > 0].sum().item() + sum(x().flatten().tolist()), 24),
}


@pytest.mark.parametrize("use", ALLOWED)
def test_the_fake_gpu_allows(use: str) -> None:
    work, expected = ALLOWED[use]
    assert float(work()) == expected


def test_numbers_and_gradients_are_those_of_the_cpu() -> None:
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        layer = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 1)).to(device)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
        for _ in range(2):
            loss = (layer(torch.linspace(-1, 1, 12).view(3, 4).to(device)) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        results.append([p.detach().cpu().numpy() for p in layer.parameters()])
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_a_thread_has_the_gpu_too() -> None:
    found: list[Any] = []

    def work() -> None:
        found.append(torch.tensor([0, 0, 0], device="cuda") + torch.arange(3, device="cuda"))
        with pytest.raises(RuntimeError, match="cpu"):
            found.append(found[0] + torch.arange(3))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert isinstance(found[0], CudaTensor)
    assert found[0].tolist() == [0, 1, 2]
    assert len(found) == 1
