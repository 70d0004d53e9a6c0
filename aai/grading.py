"""Grades pictures: what a judge reads off them against what was asked for, and CLIP-based scores.

AIC, AIS and IIS follow the definitions of SonicDiffusion's evaluation (Biner et al. 2024, arXiv 2405.00878).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Reading = Mapping[str, Any]
"""What was read off one picture: object, ambience, medium (words) and size."""


def accuracy(read: Sequence[Reading], truth: Sequence[Reading], attribute: str) -> float:
    """Share of pictures whose attribute is read as the truth says; of two objects, either is right."""
    return float(np.mean(hits(read, truth, attribute)))


def hits(read: Sequence[Reading], truth: Sequence[Reading], attribute: str) -> list[bool]:
    """Whether each picture's attribute is read as the truth says; of two objects, either is right."""
    found = []
    for r, t in zip(read, truth, strict=True):
        found.append(r[attribute] == t[attribute] or (attribute == "object" and r[attribute] == t.get("second")))
    return found


def kept(read: Sequence[Reading], truth: Sequence[Reading], attributes: Sequence[str]) -> float:
    """Share of pictures in which every one of the attributes is as in the given picture."""
    return float(np.mean(all_hits(read, truth, attributes)))


def all_hits(read: Sequence[Reading], truth: Sequence[Reading], attributes: Sequence[str]) -> np.ndarray:
    """Whether every one of the attributes is read as the truth says (see `hits`), bool [N]."""
    return np.all([hits(read, truth, attribute) for attribute in attributes], axis=0)


def similarity_rank(query: Tensor, own: Tensor, others: Tensor) -> float:
    """Mean over rows of the share of `others` [M, D] less similar to the query [N, D] than its own partner [N, D].

    Chance is 0.5. With audio as others this is AIS, with ground-truth pictures IIS.
    """
    true = (query * own).sum(-1, keepdim=True)
    return float(((query @ others.T) < true).float().mean())


def zero_shot(images: Tensor, classes: Tensor, labels: Sequence[int]) -> float:
    """AIC: share of picture features [N, D] whose nearest class text feature [C, D] is the sound's label."""
    return float(zero_shot_hits(images, classes, labels).float().mean())


def zero_shot_hits(images: Tensor, classes: Tensor, labels: Sequence[int]) -> Tensor:
    """Whether each picture's nearest class is the sound's label, bool [N]; see `zero_shot`."""
    return (images @ classes.T).argmax(-1) == torch.tensor(labels)


def clip_mmd(a: Tensor, b: Tensor, sigma: float = 10.0) -> float:
    """CLIP-MMD (Jayasumana et al. 2024, arXiv 2401.09603) between unit features [N, D] and [M, D], x 1000."""
    gamma = 1 / (2 * sigma**2)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        # In parts: the distances of 30,000 pictures among themselves take 3.6 GB.
        sums = [torch.exp(-gamma * torch.cdist(part, y).square()).double().sum() for part in x.split(1024)]
        return torch.stack(sums).sum() / (len(x) * len(y))

    return float(1000 * (kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)))


def class_prompt(name: str) -> str:
    """The text that stands for a class: CLIP's own template (Radford et al. 2021), not the bundle's prompt."""
    return f"a photo of a {name}"
