"""Steps whose loss or gradient is not finite are left out, counted, and their clips are named."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class FiniteGuard:
    """Says of each step whether it may be taken; all ranks say the same."""

    def __init__(self, most_in_a_row: int, on_skip: Callable[[int, list[str]], None]) -> None:
        """on_skip gets the number of a step that is left out, and this process's suspects."""
        self.most_in_a_row, self.on_skip = most_in_a_row, on_skip
        self._in_a_row = self._count = 0

    def lets_pass(self, step: int, figures: dict[str, Tensor], batch: dict[str, Any]) -> bool:
        """figures: `loss`, `grad_norm` and others that are told. Raises FloatingPointError for too many in a row."""
        if all_finite(figures["loss"], figures["grad_norm"]):
            self._in_a_row = 0
            return True
        self._in_a_row += 1
        self._count += 1
        self.on_skip(step, suspects(batch))
        if self._in_a_row > self.most_in_a_row:
            told = ", ".join(f"{name} {float(x):.4g}" for name, x in figures.items())
            raise FloatingPointError(
                f"loss or gradient is not finite at step {step}, the {self._in_a_row}. in a row ({told}); lower "
                "fit.learning_rate, look at the clips that were named, or raise fit.max_skipped_in_a_row"
            )
        return False

    def flush(self) -> int:
        """Steps that were left out since the last call."""
        count, self._count = self._count, 0
        return count


def all_finite(loss: Tensor, norm: Tensor) -> bool:
    """Whether loss and gradient are finite on all ranks."""
    finite = (torch.isfinite(loss) & torch.isfinite(norm)).to(torch.int32)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(finite, dist.ReduceOp.MIN)
    return bool(finite)


def suspects(batch: dict[str, Any]) -> list[str]:
    """Ids of the clips of a batch that have a value that is not finite; all of them when none has."""
    clips = list(batch.get("clip_id", []))
    bad = torch.zeros(len(clips), dtype=torch.bool)
    for values in batch.values():
        if isinstance(values, Tensor) and values.is_floating_point() and len(values) == len(clips):
            bad |= ~torch.isfinite(values.flatten(1)).all(dim=1).cpu()
    return [clip for clip, wrong in zip(clips, bad.tolist(), strict=True) if wrong] or clips
