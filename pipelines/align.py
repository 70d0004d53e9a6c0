"""Trains the audio encoder so that a sound lands where the frozen CLIP puts its pictures and captions.

Reads a FeatureTable, trains with Ray Train on `cluster.num_workers` workers, validates by retrieval on the val split,
and writes OUT/bundle, OUT/history.jsonl and, last, OUT/align.json. The same command goes on after a kill.
"""

import argparse
from typing import Any, ClassVar

import pydantic
import torch

from aai import storage
from aai.align import AlignLossConfig, AlignTask, validate
from aai.bundle import Bundle, BundleConfig, write_bundle
from aai.encoders.audio import AudioEncoder, AudioEncoderConfig, mel_statistics
from aai.errors import UserError
from aai.features import FeatureManifest, FeatureReader, load_split
from aai.fit import State, local_batch_size, restore_weights
from aai.foundation.identity import FoundationSpec
from pipelines.engine.lock import locked
from pipelines.settings import Plan
from pipelines.training import ray_train
from pipelines.training.stage import StageConfig, bundle_dir, check_foundation, run_stage, validates

COLUMNS = ("audio", "image_features", "text_features")
STATISTICS_CLIPS = 256
"""Training clips that the mean and deviation of the log-mel are taken over."""


class AlignConfig(StageConfig):
    """The align stage."""

    summary: ClassVar[str] = "train the audio encoder against the frozen CLIP -> bundle"

    foundation: FoundationSpec = FoundationSpec()
    """Must be what the features were made with."""
    encoder: AudioEncoderConfig = AudioEncoderConfig()
    """mel_mean, mel_std and embed_dim are taken from the data."""
    loss: AlignLossConfig = AlignLossConfig()
    max_val_clips: int = pydantic.Field(1000, ge=2)
    """Validation takes at most this many clips of the val split."""

    def plan(self) -> Plan:
        """See VerbConfig."""
        return self.plan_stage("align")


CONFIG = AlignConfig


def add_flags(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Short flags and the settings they stand for."""
    parser.add_argument("--features", help="FeatureTable folder")
    parser.add_argument("--out", help="folder for the bundle and figures")
    parser.add_argument("--workers", type=int, help="training workers")
    return {"features": "features", "out": "out", "workers": "cluster.num_workers"}


@locked
def run(config: AlignConfig) -> dict[str, Any]:
    """Trains and writes the bundle; returns what align.json holds."""
    places = {name: storage.absolute(getattr(config, name)) for name in ("features", "out")}
    config = config.model_copy(update=places)
    manifest = FeatureManifest.read(config.features)
    check_foundation(config.foundation, manifest)
    digest = config.content_digest({"foundation", "encoder", "loss", "fit"}, data=manifest.fingerprint)

    def settings_for() -> dict[str, Any]:
        return {"config": config.model_dump(mode="json"), "encoder": measured(config, manifest).model_dump(mode="json")}

    def write(state: State, settings: dict[str, Any], metrics: dict[str, float]) -> Bundle:
        return _write(config, AudioEncoderConfig.parse(settings["encoder"]), state, manifest, metrics)

    return run_stage("align", config, manifest, digest, align_worker, settings_for, write)


def align_worker(session: ray_train.Session, settings: dict[str, Any]) -> None:
    """Trains on one worker; rank 0 validates."""
    config = AlignConfig.parse(settings["config"])
    encoder = AudioEncoderConfig.parse(settings["encoder"])
    reader = FeatureReader(
        config.features,
        "train",
        local_batch_size(config.fit, session.world_size),
        encoder.clip_samples,
        session.rank,
        session.world_size,
        config.fit.seed,
        COLUMNS,
        config.cache_mb << 20,
    )
    torch.manual_seed(config.fit.seed)
    task = AlignTask(AudioEncoder(encoder), config.loss)
    evaluate = None
    if validates(config.fit, reader.manifest):
        held_out = _val(config, encoder) if session.rank == 0 else {}
        evaluate = lambda: {f"val_{k}": v for k, v in validate(task.encoder, held_out).items()}  # noqa: E731
    session.fit(task, reader.batches, config.fit, evaluate)


def _val(config: AlignConfig, encoder: AudioEncoderConfig) -> dict[str, Any]:
    return load_split(config.features, "val", encoder.clip_samples, COLUMNS, config.max_val_clips)


def measured(config: AlignConfig, manifest: FeatureManifest) -> AudioEncoderConfig:
    """The encoder's settings with what only the data knows: the log-mel's statistics and the CLIP's dimension."""
    encoder = config.encoder
    if encoder.sample_rate_hz != manifest.sample_rate_hz:
        raise UserError(
            "encoder.sample_rate_hz",
            encoder.sample_rate_hz,
            f"the features hold {manifest.sample_rate_hz} Hz",
            f"set it to {manifest.sample_rate_hz}",
        )
    clips = load_split(config.features, "train", encoder.clip_samples, ("audio",), STATISTICS_CLIPS)
    if not len(clips["audio"]):
        raise UserError("features", config.features, "has no rows in the split train", "curate clips of that split")
    mean, std = mel_statistics(encoder, clips["audio"])
    return encoder.model_copy(update={"mel_mean": mean, "mel_std": std, "embed_dim": manifest.image_dim})


def _write(
    config: AlignConfig,
    encoder: AudioEncoderConfig,
    state: State,
    manifest: FeatureManifest,
    metrics: dict[str, float],
) -> Bundle:
    """Puts the trained weights into a fresh encoder and writes the bundle."""
    task = AlignTask(AudioEncoder(encoder), config.loss)
    restore_weights(task, state.weights)
    return write_bundle(
        bundle_dir(config.out),
        BundleConfig(foundation=config.foundation, encoder=encoder.model_dump(mode="json")),
        aligner=task.encoder.state_dict(),
        adapter=None,
        meta={"data_fingerprint": manifest.fingerprint, "metrics": metrics, "parents": []},
    )
