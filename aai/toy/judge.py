"""The judge: a small image classifier that reads the attributes of the toy world off any picture.

A plain convolutional network trained on drawn scenes only: it shares no weights, data order or architecture with the
CLIP and the diffusion model whose pictures it grades; only the loop that trains them all.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from aai.fit import Batch, FitConfig
from aai.toy.grammar import AMBIENCES, COLOURS, COUNTS, MEDIA, OBJECTS, PLACES
from aai.toy.recipe_clip import to_unit, train_model

SIZE_PX = 64
HEADS = {
    "object": OBJECTS,
    "ambience": AMBIENCES,
    "medium": MEDIA,
    "colour": COLOURS,
    "count": COUNTS,
    "place": PLACES,
    "second": ("none", *OBJECTS),
}
"""What is read as a word; of two objects, `object` is the left one and `second` the right one."""
WEIGHTS = Path(__file__).parent / "weights" / "judge" / "model.safetensors"


class ToyJudge(nn.Module):
    """Four strided convolutions, whose last map [4, 4] is read by a head per attribute and one for size in [0, 1]."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        channels = [3, width, 2 * width, 3 * width, 4 * width]
        blocks: list[nn.Module] = []
        for a, b in pairwise(channels):
            blocks += [nn.Conv2d(a, b, 3, stride=2, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
            blocks += [nn.Conv2d(b, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
        self.trunk = nn.Sequential(*blocks, nn.Flatten())
        self.heads = nn.ModuleDict({k: nn.Linear(16 * channels[-1], len(v)) for k, v in HEADS.items()})
        self.size = nn.Linear(16 * channels[-1], 1)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """pixels float [B, 3, 64, 64] in [-1, 1] -> logits per head [B, n] and `size` [B]."""
        x = self.trunk(pixels)
        return {**{k: head(x) for k, head in self.heads.items()}, "size": self.size(x)[:, 0]}

    @classmethod
    def load(cls, path: Path = WEIGHTS) -> "ToyJudge":
        """The committed judge, in eval mode."""
        judge = cls()
        judge.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()})
        return judge.eval().requires_grad_(False)

    def save(self, path: Path) -> None:
        """Writes fp16 safetensors."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {k: v.half() if v.is_floating_point() else v for k, v in self.state_dict().items()}
        save_file({k: v.contiguous() for k, v in state.items()}, path)

    @torch.no_grad()
    def read(self, images: Sequence[Image.Image]) -> list[dict[str, str | float]]:
        """What the judge sees in each picture: a word for each of HEADS, and size (0 small .. 1 big)."""
        out: list[dict[str, str | float]] = []
        for at in range(0, len(images), 256):
            seen = self(to_tensor(images[at : at + 256]))
            picks = {k: seen[k].argmax(-1).tolist() for k in HEADS}
            for i, size in enumerate(seen["size"].tolist()):
                out.append({**{k: HEADS[k][picks[k][i]] for k in HEADS}, "size": size})
        return out


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """PIL pictures of any size -> float [B, 3, 64, 64] in [-1, 1]."""
    edge = (SIZE_PX, SIZE_PX)
    arrays = [np.asarray(i.convert("RGB").resize(edge, Image.Resampling.BICUBIC), np.float32) for i in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1


def _augment(x: Tensor) -> Tensor:
    """Noise, blur and gain, so that the judge does not lean on pixel-exact drawing."""
    if torch.rand(()) < 0.5:
        x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    gain = 1 + 0.15 * torch.randn(len(x), 3, 1, 1, device=x.device)
    return x * gain + 0.08 * torch.randn_like(x)


class JudgeTask(nn.Module):
    """The judge under the cross-entropy of each head and the squared error of the size."""

    def __init__(self, judge: ToyJudge) -> None:
        super().__init__()
        self.judge = judge

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """batch: pixels uint8 [B, 64, 64, 3], each of HEADS int [B], size float [B]."""
        seen = self.judge(_augment(to_unit(batch["pixels"])))
        loss = F.mse_loss(seen["size"].float(), batch["size"])
        for name in HEADS:
            loss = loss + F.cross_entropy(seen[name].float(), batch[name])
        return loss, {}


def train_judge(drawn: dict[str, Tensor], fit: FitConfig, out: Path) -> ToyJudge:
    """Trains on drawn scenes (see JudgeTask) and writes OUT/model.safetensors."""
    torch.manual_seed(fit.seed)
    judge = ToyJudge()
    train_model("judge", JudgeTask(judge), drawn, fit, out)
    judge.save(out / "model.safetensors")
    return judge.eval().requires_grad_(False)
