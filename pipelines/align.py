"""Trains the audio encoder so that a sound lands where the frozen CLIP puts its pictures and captions.

Reads a FeatureTable, trains with Ray Train on `cluster.num_workers` workers, validates by retrieval on the val split,
and writes OUT/bundle, OUT/history.jsonl and, last, OUT/align.json. The same command goes on after a kill.
"""

import argparse
import logging
import os
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import pydantic
from torch import nn

from aai.align import AlignLossConfig, AlignTask, validate
from aai.augment import AugmentConfig
from aai.bundle import BundleConfig, write_bundle
from aai.config import Config
from aai.encoders.aligner import embed
from aai.encoders.audio import AudioEncoder, AudioEncoderConfig, described, mel_statistics
from aai.encoders.depth import freeze_lowest, num_layers, rate_scales
from aai.errors import UserError
from aai.features import FeatureManifest, load_split
from aai.foundation.identity import FoundationSpec
from aai.memory import StepCost, step_cost
from aai.parting import apart_below
from pipelines.settings import Choice, Plan
from pipelines.training.lengths import LONGEST_S, check_cut, clip_lengths_s, fitting_clip_s
from pipelines.training.recipe import StageConfig, Trained, TrainRecipe, check_foundation, prepare_network, refuse_given

log = logging.getLogger(__name__)

STATISTICS_CLIPS = 256
"""Training clips that the mean and deviation of the log-mel are taken over."""
HALVED_CLIPS = 64
"""Of val, by which it is known how unlike the halves of a sound are that tell of different things."""


class FittedEncoderConfig(AudioEncoderConfig):
    """An encoder that takes as much of a clip as the clips have."""

    clip_s: Annotated[float, pydantic.Field(gt=0)] | Literal["auto"] = "auto"  # type: ignore[assignment]
    """Length every clip is padded or cut to, in seconds. auto: what 95 % of the clips do not exceed, at most 10."""


class AlignConfig(StageConfig):
    """The align stage."""

    stage: ClassVar[str] = "align"

    foundation: FoundationSpec = FoundationSpec()
    """Must be what the features were made with."""
    encoder: FittedEncoderConfig = FittedEncoderConfig()
    """mel_mean, mel_std, embed_dim and apart_below are taken from the data, and refused here."""
    loss: AlignLossConfig = AlignLossConfig()
    frozen_layers: int = pydantic.Field(0, ge=0)
    """So many of the backbone's lowest layers, and what is below them, are not trained."""
    layer_decay: float = pydantic.Field(1.0, gt=0, le=1)
    """Each layer of the backbone learns at this share of the rate of the one above it; 1 = all alike."""
    augment: AugmentConfig = AugmentConfig()

    def plan(self) -> Plan:
        """See VerbConfig."""
        told = "auto: told when the features are there"
        if self.encoder.clip_s != "auto" or self.manifest() is not None:
            told = str(self.fitted()[1])
        return super().plan().model_copy(update={"chosen": {"encoder.clip_s": told}})

    @property
    def pictures_only(self) -> bool:
        """See StageConfig: without a text term, sound and text alone teach nothing."""
        return self.loss.w_text == 0

    def step_cost(self) -> StepCost | str:
        """See StageConfig."""
        clip_s = self.encoder.clip_s
        if clip_s == "auto":
            clip_s = LONGEST_S if self.manifest() is None else self.fitted()[1].value
        encoder: AudioEncoderConfig = self.encoder.model_copy(update={"clip_s": clip_s})
        try:
            encoder = described(encoder, local=True)
        except UserError as error:
            if os.path.isdir(str(encoder.pretrained)) and self.encoder.clip_s != "auto":
                raise
            away = error.setting == "encoder.pretrained" and not os.path.isdir(str(encoder.pretrained))
            return f"told when {encoder.pretrained} is on this machine" if away else f"not told: {error}"
        clips = self.clips_of_worker
        batch = {
            "audio": (clips, encoder.clip_samples),
            "image_features": (clips, 1, encoder.embed_dim),
            "text_features": (clips, 1, encoder.embed_dim),
            "caption_id": (clips,),
            "clip_hash": (clips,),
        }
        task = self.task(AudioEncoder(encoder))
        return step_cost(lambda: task, batch, self.half)

    def task(self, encoder: AudioEncoder) -> AlignTask:
        """The encoder with its losses, as it is trained."""
        task, tower = AlignTask(encoder, self.loss, self.augment, self.fit.chunk_size), encoder.backbone
        if self.frozen_layers > (layers := num_layers(tower)):
            rule = f"is more than the backbone's {layers} layers"
            raise UserError("frozen_layers", self.frozen_layers, rule, "lower it, or set encoder.freeze_backbone")
        freeze_lowest(tower, self.frozen_layers)
        task.rate_scales = {f"encoder.backbone.{n}": s for n, s in rate_scales(tower, self.layer_decay).items()}
        prepare_network(tower, self.fit)
        return task

    def fitted(self) -> tuple["AlignConfig", Choice]:
        """These settings with a number for `encoder.clip_s`, and why it is that one."""
        if self.encoder.clip_s != "auto":
            return self, Choice(value=self.encoder.clip_s, why="given")
        choice = fitting_clip_s(clip_lengths_s(self.features))
        return self.model_copy(update={"encoder": self.encoder.model_copy(update={"clip_s": choice.value})}), choice


CONFIG = AlignConfig


def add_flags(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Short flags and the settings they stand for."""
    parser.add_argument("--features", help="FeatureTable folder")
    parser.add_argument("--out", help="folder for the bundle and figures")
    parser.add_argument("--workers", type=int, help="training workers")
    return {"features": "features", "out": "out", "workers": "cluster.num_workers"}


def run(config: AlignConfig) -> dict[str, Any]:
    """Trains and writes the bundle; returns what align.json holds."""
    from pipelines.training.stage import run_stage  # with Ray Train: not for --help and --dry-run

    return run_stage(AlignRecipe, config)


class AlignRecipe(TrainRecipe[AlignConfig]):
    """The audio encoder under contrastive losses; the bundle holds the encoder."""

    config_class = AlignConfig
    columns = ("audio", "image_features", "text_features")

    def __init__(self, config: AlignConfig) -> None:
        fitted, self.clip_s = config.fitted()  # `auto` ends here, before anything is digested or sent
        super().__init__(fitted)
        self.clip_samples = fitted.encoder.clip_samples

    def prepare(self, manifest: FeatureManifest) -> AlignConfig:
        """Takes the CLIP's dimension, and the log-mel's statistics or what a pretrained backbone says of itself."""
        check_foundation(self.config.foundation, manifest)
        refuse_given("encoder", self.config.encoder, ("mel_mean", "mel_std", "embed_dim", "apart_below"))
        encoder = described(self.config.encoder)
        rate_hz = encoder.sample_rate_hz
        remedy = f"curate with decode.sample_rate_hz={rate_hz}"
        if not encoder.pretrained:
            remedy = f"set it to {manifest.sample_rate_hz}, or {remedy}"
        manifest.check_sample_rate("encoder.sample_rate_hz", rate_hz, rate_hz, remedy)
        log.info("align: encoder.clip_s = %s", self.clip_s)
        features = self.config.features
        check_cut("align", clip_lengths_s(features), self.clip_s.value, self.config.max_cut_share)
        self._check_rows(manifest)
        measured: dict[str, Any] = {"embed_dim": manifest.image_dim}
        if not encoder.pretrained:
            clips = load_split(features, "train", encoder.clip_samples, ("audio",), STATISTICS_CLIPS)
            measured["mel_mean"], measured["mel_std"] = mel_statistics(encoder, clips["audio"])
        return self.config.model_copy(update={"encoder": encoder.model_copy(update=measured)})

    def _check_rows(self, manifest: FeatureManifest) -> None:
        """Tells of clips without a picture; raises UserError when there is nothing to learn from."""
        features, without = self.config.features, manifest.without_picture.get("train", 0)
        if not manifest.rows.get("train"):
            raise UserError("features", features, "has no rows in the split train", "curate clips of that split")
        if not manifest.clips("train", pictures_only=True) and self.config.loss.w_image:
            rule = f"none of the {without} clips of train has a picture"
            remedy = "set it to 0, and w_text above it, or featurize clips with pictures, too"
            raise UserError("loss.w_image", self.config.loss.w_image, rule, remedy)
        if without:
            what = "are left out, since loss.w_text is 0" if self.config.pictures_only else "train the text term alone"
            log.info("align: %d of %d clips of train have no picture: they %s", without, manifest.rows["train"], what)

    def build(self) -> AlignTask:
        """See TrainRecipe."""
        return self.config.task(AudioEncoder(self.config.encoder, from_pretrained=True))

    def validate(self, task: AlignTask, held_out: dict[str, Any]) -> dict[str, float]:
        """Retrieval by sound."""
        return validate(task.encoder, held_out)

    def export(self, task: AlignTask) -> tuple[nn.Module, Config]:
        """See TrainRecipe; the temperatures stay behind."""
        encoder = task.encoder
        clips = load_split(self.config.features, "val", self.clip_samples, ("audio",), HALVED_CLIPS)
        below = apart_below(partial(embed, encoder, batch_size=8), clips["audio"])
        settings: AudioEncoderConfig = encoder.config.model_copy(update={"apart_below": below})
        log.info("align: halves of a sound tell of two things below a cosine of %s", settings.apart_below)
        return encoder, settings

    def write(self, folder: str, trained: Trained, meta: dict[str, Any]) -> str:
        """Writes a bundle without an adapter."""
        config = BundleConfig(foundation=self.config.foundation, encoder=trained.settings)
        return write_bundle(folder, config, trained.weights, None, meta).sha
