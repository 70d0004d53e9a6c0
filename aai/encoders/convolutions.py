"""The convolutional backbone from scratch: it hears from few clips what a transformer needs many for.

A transformer has to learn from data alone that neighbouring cells of a spectrogram belong together and that a sound
may come at any time; convolutions know it.
"""

import torch
from torch import Tensor, nn

GROUPS = 8
IN_CACHE = 16
"""Clips that a CPU convolves at once: what a layer writes is still in its cache when the next one reads it, which takes
a fifth off the way there and back for 64 clips of 2 s. A clip's states do not depend on the others."""


class ConvBackbone(nn.Module):
    """Pairs of 3x3 convolutions, as in PANNs' CNN14 (arXiv 1912.10211); each pair halves time and frequency.

    Group norm stands in for its batch norm: an embedding must depend on its clip alone.
    """

    def __init__(self, hidden_size: int, num_layers: int) -> None:
        """hidden_size: channels of the last pair; each pair before has half as many, and GROUPS at least.
        num_layers: pairs."""
        super().__init__()
        self.hidden_size = hidden_size
        self.layers = nn.ModuleList()
        channels = 1
        for depth in reversed(range(num_layers)):
            wider = max(GROUPS, (hidden_size >> depth) // GROUPS * GROUPS)
            self.layers.append(
                nn.Sequential(
                    nn.Conv2d(channels, wider, 3, padding=1),
                    nn.GroupNorm(GROUPS, wider),
                    nn.GELU(),
                    nn.Conv2d(wider, wider, 3, stride=2, padding=1),
                    nn.GroupNorm(GROUPS, wider),
                    nn.GELU(),
                )
            )
            channels = wider

    def forward(self, features: Tensor) -> Tensor:
        """Log-mel [B, T, M] -> states [B, T / 2^num_layers, hidden_size], the mean over frequency."""
        at_once = IN_CACHE if features.device.type == "cpu" else max(1, len(features))
        return torch.cat([self._states(part) for part in features.split(at_once)])

    def _states(self, features: Tensor) -> Tensor:
        x = features.unsqueeze(1)
        for layer in self.layers:
            x = layer(x)
        return x.mean(dim=3).transpose(1, 2)
