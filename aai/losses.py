"""The contrastive loss, on one process or many."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.nn.functional import all_gather


def info_nce(a: Tensor, b: Tensor, logit_scale: Tensor | float, same: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE (van den Oord et al. 2018, arXiv 1807.03748; CLIP, arXiv 2103.00020): a scalar.

    a, b: unit-norm [B, D], row i of one belongs to row i of the other. logit_scale: inverse temperature.
    same: bool [B, B], true for pairs that are not negatives of one another (equal captions, copies of a clip).
    """
    logits = logit_scale * a @ b.T
    if same is not None:
        others = same & ~torch.eye(len(a), dtype=torch.bool, device=a.device)
        logits = logits.masked_fill(others, float("-inf"))
    target = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def gather_with_grad(x: Tensor) -> Tensor:
    """All ranks' rows [world * B, ...] in rank order; the gradient flows back to every rank. Identity on one process.

    When each rank computes the loss of all gathered rows, the backward pass sums the ranks' equal gradients; the mean
    that DistributedDataParallel takes over ranks undoes that, and the result is the gradient of one process with
    the whole batch. Every rank must hold equally many rows.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return x
    return torch.cat(all_gather(x))
