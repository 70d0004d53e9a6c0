import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aai.losses import gather_with_grad, info_nce, mean_over_ranks, own_rows, rows_of_ranks, sigmoid_loss, world_size
from tests.ranks import on_ranks

BATCH, DIM = 6, 5


def unit(seed: int, rows: int = BATCH) -> Tensor:
    return F.normalize(torch.randn(rows, DIM, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_info_nce_equals_its_definition() -> None:
    a, b = unit(0), unit(1)
    total = 0.0
    for x, y in ((a, b), (b, a)):
        for i in range(BATCH):
            scores = torch.stack([7.0 * (x[i] @ y[j]) for j in range(BATCH)])
            total += float(torch.logsumexp(scores, 0) - scores[i])
    torch.testing.assert_close(info_nce(a, b, 7.0).mean(), torch.tensor(total / (2 * BATCH)))


def test_matching_pairs_cost_less_than_mismatched_ones() -> None:
    a = unit(0)
    assert (info_nce(a, a, 20.0) < info_nce(a, a.roll(1, 0), 20.0)).all()


def test_equal_pairs_are_not_negatives() -> None:
    """A clip that is there twice costs what it costs alone, for the rows that see it as a duplicate."""
    a, b = unit(0), unit(1)
    twice_a, twice_b = torch.cat([a, a[:1]]), torch.cat([b, b[:1]])
    key = torch.tensor([0, 1, 2, 3, 4, 5, 0])
    same = key[:, None] == key
    plain, masked = info_nce(twice_a, twice_b, 10.0).mean(), info_nce(twice_a, twice_b, 10.0, same).mean()
    assert masked < plain
    logits = 10.0 * a @ b.T
    row = F.cross_entropy(logits[:1], torch.tensor([0]))  # the first row, were there no duplicate
    masked_row = F.cross_entropy(
        (10.0 * twice_a @ twice_b.T).masked_fill(same & ~torch.eye(7, dtype=torch.bool), -torch.inf)[:1],
        torch.tensor([0]),
    )
    torch.testing.assert_close(row, masked_row)
    only = info_nce(twice_a[[0, 6]], twice_b[[0, 6]], 10.0, torch.ones(2, 2, dtype=torch.bool))
    torch.testing.assert_close(only, torch.zeros(2))


def open_clip_losses() -> Any:
    """open_clip's own loss.py (`make accept` installs it); its package would need torchvision."""
    found = importlib.util.find_spec("open_clip")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs open_clip_torch: pip install --no-deps open_clip_torch")
    path = Path(found.submodule_search_locations[0]) / "loss.py"
    spec = importlib.util.spec_from_file_location("open_clip_loss", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.accept
@pytest.mark.parametrize("rows", [2, 6, 64])
def test_k1_losses_and_gradients_equal_those_of_open_clip(rows: int) -> None:
    theirs = open_clip_losses()
    scale, bias = torch.tensor(12.0), torch.tensor(-10.0)
    pairs = {
        "clip": (theirs.ClipLoss(), lambda a, b: info_nce(a, b, scale).mean(), (scale,)),
        "siglip": (theirs.SigLipLoss(), lambda a, b: sigmoid_loss(a, b, scale, bias).mean(), (scale, bias)),
    }
    for name, (their_loss, our_loss, rest) in pairs.items():
        found = []
        for loss in (our_loss, lambda a, b, their_loss=their_loss, rest=rest: their_loss(a, b, *rest)):
            a, b = unit(0, rows).requires_grad_(), unit(1, rows).requires_grad_()
            value = loss(a, b)
            value.backward()
            found.append((value.detach(), a.grad, b.grad))
        for ours, other in zip(*found, strict=True):
            torch.testing.assert_close(ours, other, atol=1e-6, rtol=1e-6, msg=name)


def test_sigmoid_loss_equals_its_definition() -> None:
    a, b = unit(0), unit(1)
    for i, cost in enumerate(sigmoid_loss(a, b, 7.0, -3.0)):
        expected = 0.0
        for j in range(BATCH):
            score = 7.0 * float(a[i] @ b[j]) - 3.0
            expected -= float(F.logsigmoid(torch.tensor(score if i == j else -score)))
        assert float(cost) == pytest.approx(expected, rel=1e-5)
    same = torch.eye(BATCH, dtype=torch.bool)
    same[0, 1] = same[1, 0] = True
    fewer = sigmoid_loss(a, b, 7.0, -3.0, same)
    without = torch.tensor([0, 2, 3, 4, 5])
    torch.testing.assert_close(fewer[0], sigmoid_loss(a[without], b[without], 7.0, -3.0)[0])


@pytest.mark.parametrize(
    "loss", [lambda *x: info_nce(*x[:2], 5.0, *x[2:]), lambda *x: sigmoid_loss(*x[:2], 5.0, -1.0, *x[2:])]
)
def test_some_rows_cost_what_they_cost_among_all(loss: Any) -> None:
    same = torch.tensor([0, 1, 2, 3, 1, 5])[:, None] == torch.tensor([0, 1, 2, 3, 1, 5])
    whole = loss(unit(0), unit(1), same)
    torch.testing.assert_close(loss(unit(0), unit(1), same, slice(2, 5)), whole[2:5])


def test_alone_a_process_is_all_there_is() -> None:
    x = unit(0)
    counts = rows_of_ranks(6, x.device)
    assert counts == [6]
    assert gather_with_grad(x, counts) is x
    assert (world_size(), own_rows(counts)) == (1, slice(0, 6))
    assert float(mean_over_ranks(torch.tensor(3.0, requires_grad=True))) == 3.0


def _rank(rank: int, folder: str) -> None:
    x = torch.full((2, 3), float(rank), requires_grad=True)
    counts = rows_of_ranks(2, x.device)
    assert counts == [2, 2]
    gathered = gather_with_grad(x, counts)
    assert own_rows(counts) == slice(2 * rank, 2 * rank + 2)
    assert world_size() == 2
    assert gathered[:, 0].tolist() == [0.0, 0.0, 1.0, 1.0]
    (gathered * torch.arange(4.0)[:, None] * (rank + 1)).sum().backward()
    # Rank 0 says arange, rank 1 twice that: a row hears both.
    assert x.grad is not None
    assert x.grad[:, 0].tolist() == [6.0 * rank, 6.0 * rank + 3.0]
    figure = torch.tensor([float(rank), 5.0], requires_grad=True)
    assert mean_over_ranks(figure).tolist() == [0.5, 5.0]
    assert figure.tolist() == [float(rank), 5.0]

    counts = rows_of_ranks(3 - 2 * rank, x.device)  # unequal: three rows and one
    assert counts == [3, 1]
    assert own_rows(counts) == (slice(0, 3), slice(3, 4))[rank]
    rows = torch.full((3 - 2 * rank, 2), float(rank + 1), requires_grad=True)
    gathered = gather_with_grad(rows, counts)
    assert gathered[:, 0].tolist() == [1.0, 1.0, 1.0, 2.0]
    (gathered * torch.arange(4.0)[:, None]).sum().backward()
    assert rows.grad is not None
    assert rows.grad[:, 0].tolist() == ([0.0, 2.0, 4.0], [6.0])[rank]


@pytest.mark.slow
def test_rows_and_gradients_travel_between_ranks(tmp_path: Path) -> None:
    """`_rank` asserts, in each of two processes; what fails there is raised here."""
    on_ranks(2, _rank, str(tmp_path))
