"""A third trained stage in one file: a picture's CLIP feature is mapped onto its caption's by a matrix."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from aai import storage
from aai.config import Config
from aai.digest import digest
from aai.features import FeatureManifest
from pipelines.training.recipe import StageConfig, Trained, TrainRecipe
from pipelines.training.stage import run_stage


class MapConfig(Config):
    """The map's shape."""

    width: int = 1
    """Dimension of the CLIP space; taken from the features."""
    bias: bool = True


class CaptionConfig(StageConfig):
    """The stage."""

    stage: ClassVar[str] = "caption"

    map: MapConfig = MapConfig()


CONFIG = CaptionConfig


def run(config: CaptionConfig) -> dict[str, Any]:
    """Trains and writes the map; returns what caption.json holds."""
    return run_stage(CaptionRecipe, config)


class CaptionMap(nn.Module):
    """[B, D] -> [B, D], beside a scale that is not trained."""

    def __init__(self, config: MapConfig) -> None:
        super().__init__()
        self.config = config
        self.linear = nn.Linear(config.width, config.width, bias=config.bias)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, feature: Tensor) -> Tensor:
        mapped: Tensor = self.scale * self.linear(feature)
        return mapped


class CaptionTask(nn.Module):
    """The map and its loss; training sees the features under noise."""

    def __init__(self, mapping: CaptionMap) -> None:
        super().__init__()
        self.mapping = mapping

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        image, text = batch["image_features"].mean(1), batch["text_features"].mean(1)
        if self.training:
            image = image + 0.1 * torch.randn_like(image)
        loss = F.mse_loss(self.mapping(image), text)
        return loss, {"error": loss.detach()}


class CaptionRecipe(TrainRecipe[CaptionConfig]):
    """The stage from settings to file."""

    config_class = CaptionConfig
    columns = ("image_features", "text_features")

    def prepare(self, manifest: FeatureManifest) -> CaptionConfig:
        """The width is the data's."""
        shape = self.config.map.model_copy(update={"width": manifest.image_dim})
        return self.config.model_copy(update={"map": shape})

    def build(self) -> CaptionTask:
        """See TrainRecipe."""
        return CaptionTask(CaptionMap(self.config.map))

    def validate(self, task: CaptionTask, held_out: dict[str, Any]) -> dict[str, float]:
        """The error on held-out clips."""
        return {"error": float(task(held_out)[0])}

    def export(self, task: CaptionTask) -> tuple[nn.Module, Config]:
        """See TrainRecipe."""
        return task.mapping, task.mapping.config

    def write(self, folder: str, trained: Trained, meta: dict[str, Any]) -> str:
        """Writes weights and settings."""
        storage.write_bytes(storage.join(folder, "map.safetensors"), save(trained.weights))
        storage.write_json(storage.join(folder, "map.json"), {"map": trained.settings, **meta})
        return digest([trained.settings, {name: x.tolist() for name, x in trained.weights.items()}])
