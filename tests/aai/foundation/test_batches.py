import numpy as np
import pytest
import torch

from aai.foundation.batches import Batches


def test_what_does_not_fit_is_halved_and_stays_so() -> None:
    seen: list[int] = []

    def work(items: np.ndarray) -> torch.Tensor:
        seen.append(len(items))
        if len(items) > 3:
            raise torch.OutOfMemoryError
        return torch.from_numpy(items)

    batches = Batches(16)
    assert torch.cat(batches.map(work, np.arange(10))).tolist() == list(range(10))
    assert seen == [10, 5, 2, 2, 2, 2, 2]
    assert torch.cat(batches.map(work, np.arange(4))).tolist() == [0, 1, 2, 3]
    assert seen[7:] == [2, 2]
    assert batches.map(work, np.arange(0)) == []


def test_a_single_item_that_does_not_fit_is_an_error() -> None:
    def work(items: np.ndarray) -> torch.Tensor:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        Batches(4).map(work, np.arange(3))
