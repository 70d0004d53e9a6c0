from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from aai.losses import gather_with_grad, info_nce
from tests.ranks import on_two_ranks

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
    torch.testing.assert_close(info_nce(a, b, 7.0), torch.tensor(total / (2 * BATCH)))


def test_matching_pairs_cost_less_than_mismatched_ones() -> None:
    a = unit(0)
    assert info_nce(a, a, 20.0) < info_nce(a, a.roll(1, 0), 20.0)


def test_equal_pairs_are_not_negatives() -> None:
    """A clip that is there twice costs what it costs alone, for the rows that see it as a duplicate."""
    a, b = unit(0), unit(1)
    twice_a, twice_b = torch.cat([a, a[:1]]), torch.cat([b, b[:1]])
    key = torch.tensor([0, 1, 2, 3, 4, 5, 0])
    same = key[:, None] == key
    plain, masked = info_nce(twice_a, twice_b, 10.0), info_nce(twice_a, twice_b, 10.0, same)
    assert masked < plain
    logits = 10.0 * a @ b.T
    row = F.cross_entropy(logits[:1], torch.tensor([0]))  # the first row, were there no duplicate
    masked_row = F.cross_entropy(
        (10.0 * twice_a @ twice_b.T).masked_fill(same & ~torch.eye(7, dtype=torch.bool), -torch.inf)[:1],
        torch.tensor([0]),
    )
    torch.testing.assert_close(row, masked_row)
    only = info_nce(twice_a[[0, 6]], twice_b[[0, 6]], 10.0, torch.ones(2, 2, dtype=torch.bool))
    torch.testing.assert_close(only, torch.tensor(0.0))


def test_gather_is_the_identity_on_one_process() -> None:
    x = unit(0)
    assert gather_with_grad(x) is x


class Tower(nn.Module):
    """Shared weights and a learned scale, as the align task has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(DIM, DIM)
        self.log_scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, a: Tensor, b: Tensor, key: Tensor) -> Tensor:
        embedding = gather_with_grad(F.normalize(self.linear(a), dim=-1))
        target, keys = gather_with_grad(b), gather_with_grad(key)
        return info_nce(embedding, target, self.log_scale.exp(), keys[:, None] == keys)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}


KEYS = torch.tensor([0, 1, 2, 3, 1, 5])


def _rank(rank: int, folder: str) -> None:
    model = DistributedDataParallel(Tower())
    part = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    model(unit(0)[part], unit(1)[part], KEYS[part]).backward()
    torch.save(gradients(model), f"{folder}/{rank}.pt")


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one_with_the_whole_batch(tmp_path: Path) -> None:
    whole = Tower()
    whole(unit(0), unit(1), KEYS).backward()
    on_two_ranks(_rank, str(tmp_path))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, expected in gradients(whole).items():
            torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=1e-5)
