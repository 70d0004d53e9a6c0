import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from aai.align import AlignLossConfig, AlignTask
from aai.augment import AugmentConfig
from aai.encoders.audio import AudioEncoder, AudioEncoderConfig
from aai.errors import UserError
from aai.memory import PeakMemory, in_chunks, memory_explained, peak_memory_gb, step_cost


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
        torch.testing.assert_close(in_chunks(run, size, x, y), x * y)
    assert len(seen) == calls, "no more at once than while training"


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


def test_what_a_step_holds_is_told_without_taking_it() -> None:
    """The real step of the align task, with AdamW's moments, beside its forecast."""
    encoder = AudioEncoder(AudioEncoderConfig(num_layers=4, stride=4, clip_s=1.0, num_mel_bins=32, embed_dim=16))
    batch = {
        "audio": (16, 16_000),
        "image_features": (16, 1, 16),
        "text_features": (16, 1, 16),
        "caption_id": (16,),
        "clip_hash": (16,),
    }
    found = {}
    for chunk_size in (0, 4):
        task = AlignTask(encoder, AlignLossConfig(), AugmentConfig(), chunk_size).train()
        forecast = step_cost(lambda task=task: task, batch, bfloat16=False)
        assert all(type(p) is nn.Parameter for p in task.parameters()), "the task itself stays as it is"
        with PeakMemory() as memory:
            memory.count(*task.parameters(), *task.buffers())
            optimizer = torch.optim.AdamW(task.parameters())
            for _ in range(2):  # the moments are there from the second step on
                tensors = {name: torch.ones(shape) for name, shape in batch.items()}
                tensors |= {name: torch.arange(16) for name in ("caption_id", "clip_hash")}
                optimizer.zero_grad()
                task(tensors)[0].backward()
                optimizer.step()
        task.zero_grad()
        assert forecast.num_bytes == pytest.approx(memory.peak, rel=0.15), (forecast, memory.peak)
        assert forecast.flop == memory.flop / 2
        found[chunk_size] = forecast
    assert found[4].num_bytes < 0.7 * found[0].num_bytes
    assert 1.2 * found[0].flop < found[4].flop < 1.4 * found[0].flop, "each chunk goes forwards twice"
    half = step_cost(lambda: AlignTask(encoder, AlignLossConfig(), AugmentConfig()), batch, bfloat16=True)
    assert 0.4 * found[0].num_bytes < half.num_bytes < found[0].num_bytes


def test_the_memory_of_a_process() -> None:
    """A process of its own: in one that has already held more, holding more again moves nothing."""
    script = """
import torch
from aai.memory import peak_memory_gb
before = peak_memory_gb()
held = torch.ones(50_000_000, device="cuda" if torch.cuda.is_available() else "cpu")
print(before, peak_memory_gb())
"""
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    before, after = map(float, printed.split())
    assert 0 <= before < after - 0.15 < before + 1, printed


def test_the_memory_of_a_process_where_the_kernel_does_not_tell_its_peak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    told = peak_memory_gb()
    (tmp_path / "status").write_text("VmRSS:\t1 kB\n")
    for path in (tmp_path / "status", tmp_path / "none"):
        monkeypatch.setattr("aai.memory.Path", lambda name, path=path: path)
        assert 0.5 * told < peak_memory_gb() < 100


def test_the_work_of_a_step_by_hand() -> None:
    """x [5, 8] through 8 x 64 and 64 x 1: forwards, and backwards for the weights of both and between them."""
    net = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 1))
    with PeakMemory() as memory:
        net(torch.randn(5, 8)).sum().backward()
    assert memory.flop == 2 * 5 * (2 * 8 * 64 + 3 * 64)
    queries, keys = (torch.randn(2, 4, 32, 16, requires_grad=True) for _ in range(2))
    with PeakMemory() as memory:
        attended = nn.functional.scaled_dot_product_attention(queries, keys, keys)
    one = 2 * 2 * 4 * 32 * 32 * 16
    assert memory.flop == 2 * one
    with PeakMemory() as memory:
        attended.sum().backward()
    assert memory.flop == 5 * one  # the scores once more, and the products for queries, keys and values


def test_an_out_of_memory_error_names_the_setting() -> None:
    with (
        pytest.raises(UserError, match=r"fit\.chunk_size=128: .* not fit .*\(tried to allocate 9 GB\).*lower it"),
        memory_explained(128),
    ):
        raise torch.OutOfMemoryError("tried to allocate 9 GB\nmore")
    with pytest.raises(ZeroDivisionError), memory_explained(0):
        raise ZeroDivisionError
