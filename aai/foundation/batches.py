"""Batches of what fits: a batch that the device's memory cannot hold is halved, and stays so."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger(__name__)


class Batches:
    """Applies a function to `size` items at a time, or to fewer where they do not fit."""

    def __init__(self, size: int) -> None:
        self.size = size

    def map(self, work: Callable[[Any], Tensor], items: Sequence[Any] | np.ndarray) -> list[Tensor]:
        """What `work` makes of each batch, in order. Raises torch.OutOfMemoryError if a single item does not fit."""
        done, out = 0, []
        while done < len(items):
            try:
                out.append(work(items[done : done + self.size]))
            except torch.OutOfMemoryError:
                if self.size == 1:
                    raise
                self.size = max(1, min(self.size, len(items) - done) // 2)
                torch.cuda.empty_cache()
                log.warning("batches of %d from here on: more does not fit the device's memory", self.size)
                continue
            done += len(items[done : done + self.size])
        return out
