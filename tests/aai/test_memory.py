import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from aai.memory import PeakMemory, in_chunks


def test_chunks_draw_the_same_numbers_when_they_are_computed_again() -> None:
    net = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 1))
    x = torch.randn(6, 4)
    torch.manual_seed(0)
    out = in_chunks(net, 2, x)
    out.sum().backward()
    found = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    torch.manual_seed(0)
    by_hand = torch.cat([net(part) for part in x.split(2)])
    by_hand.sum().backward()
    torch.testing.assert_close(out, by_hand)
    for gradient, p in zip(found, net.parameters(), strict=True):
        torch.testing.assert_close(gradient, p.grad)


@pytest.mark.parametrize(("size", "calls"), [(0, 1), (6, 1), (9, 1), (4, 2), (1, 6)])
def test_rows_go_through_together(size: int, calls: int) -> None:
    seen: list[int] = []

    def run(x: Tensor, y: Tensor) -> Tensor:
        seen.append(len(x))
        return x * y

    x, y = torch.randn(6, 2, requires_grad=True), torch.randn(6, 2)
    torch.testing.assert_close(in_chunks(run, size, x, y), x * y)
    assert len(seen) == calls
    with torch.no_grad():
        seen.clear()
        in_chunks(run, size, x, y)
    assert seen == [6], "nothing to keep, nothing to compute again"


def peak_of(net: nn.Module, rows: int, size: int) -> int:
    """Bytes that a training step holds at most, its input not among them."""
    x = torch.randn(rows, 8)
    with PeakMemory() as memory:
        in_chunks(net, size, x).sum().backward()
    net.zero_grad(set_to_none=True)
    return memory.peak


def test_sixteen_chunks_hold_the_memory_of_one() -> None:
    wide = [nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(16)]
    net = nn.Sequential(nn.Linear(8, 64), *wide, nn.Linear(64, 1))
    one, sixteen, whole = peak_of(net, 256, 0), peak_of(net, 16 * 256, 256), peak_of(net, 16 * 256, 0)
    assert sixteen <= 1.2 * one, (one, sixteen, whole)
    assert whole > 10 * one, (one, sixteen, whole)


def test_peak_memory_by_hand() -> None:
    with PeakMemory() as memory:
        a = torch.zeros(1000)  # 4,000 bytes
        b = a + 1
        view = b[:10]
        b = b.view(10, 100)
        assert (memory.now, memory.peak) == (8000, 8000)
        del a
        assert (memory.now, memory.peak) == (4000, 8000)
        c = torch.zeros(500)
        del b
        assert memory.now == 6000, "a view keeps what it looks at"
        del view, c
        assert (memory.now, memory.peak) == (0, 8000)
    before = torch.zeros(250)
    with PeakMemory() as memory:
        memory.count(before, before[:5])
        assert memory.now == 1000


def test_peak_memory_of_fake_tensors_is_that_of_real_ones() -> None:
    net = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 1))
    real = peak_of(net, 32, 0)
    with FakeTensorMode():
        fake = peak_of(nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 1)), 32, 0)
    assert real == fake
