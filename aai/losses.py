"""The contrastive losses, on one process or many.

Each rank scores its own rows against the rows of all ranks, B x N scores of N x N. A rank's loss is scaled so that the
mean over ranks, which DistributedDataParallel takes of the gradients, is the loss of one process with the whole batch.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.nn.functional import all_gather


def info_nce(
    a: Tensor, b: Tensor, logit_scale: Tensor | float, same: Tensor | None = None, rows: slice = slice(None)
) -> Tensor:
    """Symmetric InfoNCE (van den Oord et al. 2018, arXiv 1807.03748; CLIP, arXiv 2103.00020) of each row: [rows].

    a, b: unit-norm [N, D], row i of one belongs to row i of the other. logit_scale: inverse temperature.
    same: bool [N, N], true for pairs that are not negatives of one another (equal captions, copies of a clip).
    rows: those that are scored, against all.
    """
    target = torch.arange(len(a), device=a.device)[rows]
    total = a.new_zeros(len(target))
    for mine, others in ((a, b), (b, a)):
        logits = _scores(logit_scale * mine[rows], others)
        if same is not None:
            logits = logits.masked_fill(_not_negative(same, rows), float("-inf"))
        total = total + F.cross_entropy(logits, target, reduction="none") / 2
    return total


def sigmoid_loss(
    a: Tensor,
    b: Tensor,
    logit_scale: Tensor | float,
    bias: Tensor | float,
    same: Tensor | None = None,
    rows: slice = slice(None),
) -> Tensor:
    """The pairwise sigmoid loss (SigLIP, arXiv 2303.15343, eq. 1) of each row: [rows]. See `info_nce`.

    bias: added to every score; learned, from -10, so that a batch's many negatives do not drown its positives.
    """
    logits = _scores(logit_scale * a[rows], b) + bias
    own = torch.eye(len(a), dtype=torch.bool, device=a.device)[rows]
    cost = -F.logsigmoid(torch.where(own, logits, -logits))
    if same is not None:
        cost = cost.masked_fill(_not_negative(same, rows), 0.0)
    return cost.sum(dim=1)


def _scores(a: Tensor, b: Tensor) -> Tensor:
    """[N, M] in float32, also under autocast: in bfloat16 a logit of 20 is told from others to an eighth only."""
    with torch.autocast(a.device.type, enabled=False):
        return a.float() @ b.float().T


def _not_negative(same: Tensor, rows: slice) -> Tensor:
    return (same & ~torch.eye(len(same), dtype=torch.bool, device=same.device))[rows]


def world_size() -> int:
    """Processes that share a batch; 1 outside of distributed training."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rows_of_ranks(count: int, device: torch.device) -> list[int]:
    """How many rows of the batch each rank holds, `count` this one."""
    if world_size() == 1:
        return [count]
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([count], device=device))
    return [int(other) for other in counts]


def gather_with_grad(x: Tensor, counts: list[int]) -> Tensor:
    """All ranks' rows [N, ...] in rank order; the gradient flows back to every rank. Identity on one process.

    counts: rows of each rank (`rows_of_ranks`), whose sum is N. The backward pass sums what all ranks' losses say of a
    row.
    """
    if len(counts) == 1:
        return x
    missing = max(counts) - len(x)  # tensors that are gathered must be of one size
    if missing:
        x = torch.cat([x, x.new_zeros(missing, *x.shape[1:])])
    return torch.cat([rows[:count] for rows, count in zip(all_gather(x), counts, strict=True)])


def own_rows(counts: list[int]) -> slice:
    """Where this rank's rows stand among those of `gather_with_grad`."""
    rank = dist.get_rank() if len(counts) > 1 else 0
    first = sum(counts[:rank])
    return slice(first, first + counts[rank])


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of the ranks' figures, without gradient."""
    x = x.detach() / world_size()
    if world_size() > 1:
        dist.all_reduce(x)
    return x
