"""The align stage in this process, without Ray: for tries that the stage does not offer, and for counting seconds."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aai.align import AlignTask
from aai.encoders.audio import AudioEncoder
from aai.features import FeatureManifest
from aai.fit import fit
from pipelines.__main__ import load_config
from pipelines.align import AlignConfig, AlignRecipe
from pipelines.benches.options import as_flags
from pipelines.training import stage


def settings_of(run: Path, **settings: Any) -> AlignConfig:
    """The demo's settings of align, some of them changed: fit__steps=100."""
    changed = [f"{name.replace('__', '.')}={value}" for name, value in settings.items()]
    loaded: Any = load_config("align", as_flags([f"run_dir={run}", *changed]))[0]
    config: AlignConfig = loaded
    return config


@dataclass
class Clock:
    """CPU seconds of this process, all threads, without those of looking at the result."""

    look: Callable[[AudioEncoder], dict[str, float]]
    begin_s: float = field(default_factory=time.process_time)
    looking_s: float = 0.0
    seen: list[dict[str, float]] = field(default_factory=list)

    def __call__(self, encoder: AudioEncoder, step: int) -> dict[str, float]:
        """Looks, and notes at which step and second."""
        began_s = time.process_time()
        found = self.look(encoder)
        self.seen.append({"step": step, "cpu_s": began_s - self.begin_s - self.looking_s, **found})
        self.looking_s += time.process_time() - began_s
        return found


def trained(
    config: AlignConfig,
    clock: Clock | None = None,
    wrapped: Callable[[AlignTask], nn.Module] = lambda task: task,
    read_at_once: int = 0,
) -> AudioEncoder:
    """The encoder that these settings train in one process; clock: looks at it at every validation.

    wrapped: what is trained in the task's stead. read_at_once: clips a step gets, if other than fit.batch_size.
    """
    recipe = AlignRecipe(config)
    prepared = recipe.prepare(FeatureManifest.read(config.features))
    read = config.fit.model_copy(update={"batch_size": read_at_once or config.fit.batch_size})
    values = prepared.model_copy(update={"fit": read}).model_dump(mode="json")
    work = stage.make_work(0, 1, (AlignRecipe, values, 1))
    task: Any = work.task
    look = partial(clock, task.encoder) if clock else None
    fit(wrapped(task), work.batches, config.fit, evaluate=look)
    encoder: AudioEncoder = task.encoder
    return encoder.eval()


class Learnable(nn.Module):
    """Trains a task on the clips of a batch that can be learned from most (JEST, arXiv 2406.17711, section 3).

    Learnability of a pair: its loss under the learner less that under `reference`, an encoder trained before; pairs of
    sounds and pictures, with the sigmoid loss. Clips are drawn in `chunks`, each given those drawn before.
    """

    def __init__(self, task: AlignTask, reference: AudioEncoder, count: int, chunks: int = 8) -> None:
        super().__init__()
        self.task, self.count, self.chunks = task, count, chunks
        self.reference = [reference.eval().requires_grad_(False)]  # in a list: no part of what is trained

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """See `AlignTask`."""
        chosen = self._drawn(self._learnability(batch))
        kept = {
            name: value[chosen] if isinstance(value, Tensor) else [value[row] for row in chosen.tolist()]
            for name, value in batch.items()
        }
        loss: tuple[Tensor, dict[str, Tensor]] = self.task(kept)
        return loss

    @torch.no_grad()
    def _learnability(self, batch: dict[str, Any]) -> Tensor:
        """[N, N] of sounds and pictures."""
        pictures = F.normalize(batch["image_features"].float().mean(1), dim=-1)
        scale = self.task.log_scale["image"].exp()
        own = torch.eye(len(pictures), dtype=torch.bool)
        copies = (batch["clip_hash"][:, None] == batch["clip_hash"]) & ~own
        costs = []
        self.task.eval()
        for encoder in (self.task.encoder, self.reference[0]):
            scores = scale * (encoder(batch["audio"]).float() @ pictures.T)
            scores = scores - scores.logsumexp(1, keepdim=True)  # a pair's own share, as a bias per sound
            costs.append(F.softplus(torch.where(own, -scores, scores)).masked_fill(copies, 0.0))
        self.task.train()
        return costs[0] - costs[1]

    def _drawn(self, scores: Tensor) -> Tensor:
        """Rows that are trained on."""
        each = self.count // self.chunks
        taken = torch.zeros(len(scores))
        for _ in range(self.chunks):
            given_others = scores.diagonal() + scores @ taken + taken @ scores
            chance = given_others.softmax(0) + 1e-9
            taken[torch.multinomial(chance * (1 - taken), each)] = 1.0
        return taken.nonzero().squeeze(1)
