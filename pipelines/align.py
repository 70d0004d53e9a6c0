"""Trains the audio encoder so that a sound lands where the frozen CLIP puts its pictures and captions.

Reads a FeatureTable, trains with Ray Train on `cluster.num_workers` workers, validates by retrieval on the val split,
and writes OUT/bundle, OUT/history.jsonl and, last, OUT/align.json. The same command goes on after a kill.
"""

import argparse
import hashlib
import logging
import time
from typing import Any, ClassVar

import pydantic
import torch

from aai import storage
from aai.align import AlignConfig, AlignTask, validate
from aai.bundle import BundleConfig, write_bundle
from aai.encoders.audio import AudioEncoder, AudioEncoderConfig, mel_statistics
from aai.errors import UserError
from aai.features import FeatureManifest, FeatureReader, load_split
from aai.fit import FitConfig, State, local_batch_size, restore_weights
from aai.foundation import FoundationSpec, identity
from pipelines import tracking, training
from pipelines.settings import Plan, TrackingConfig, VerbConfig

log = logging.getLogger(__name__)

RESULT = "align.json"
COLUMNS = ("audio", "image_features", "text_features")
STATISTICS_CLIPS = 256
"""Training clips that the mean and deviation of the log-mel are taken over."""


class AlignVerbConfig(VerbConfig):
    """The align stage."""

    summary: ClassVar[str] = "train the audio encoder against the frozen CLIP -> bundle"

    features: str
    """Folder or s3:// prefix of the FeatureTable."""
    out: str
    """Folder or s3:// prefix for the bundle, the history and align.json."""
    foundation: FoundationSpec = FoundationSpec()
    """Must be what the features were made with."""
    encoder: AudioEncoderConfig = AudioEncoderConfig()
    """mel_mean, mel_std and embed_dim are taken from the data."""
    loss: AlignConfig = AlignConfig()
    fit: FitConfig = FitConfig()
    tracking: TrackingConfig = TrackingConfig()
    max_val_clips: int = pydantic.Field(1000, ge=2)
    """Validation takes at most this many clips of the val split."""
    cache_mb: int = pydantic.Field(1024, ge=1)
    """Memory of each worker for decoded clips."""

    def plan(self) -> Plan:
        """See VerbConfig."""
        return Plan(
            inputs={"features": self.features},
            outputs={"bundle": storage.join(self.out, "bundle"), "figures": storage.join(self.out, RESULT)},
            resources=self.resources(),
        )

    def content_digest(self, fingerprint: str) -> str:
        """Of everything that determines the weights: settings, number of workers, and the data."""
        settings = {
            **self.model_dump(mode="json", include={"foundation", "encoder", "loss", "fit"}),
            "workers": self.cluster.num_workers,
            "data": fingerprint,
        }
        return hashlib.sha256(repr(settings).encode()).hexdigest()[:16]


CONFIG = AlignVerbConfig


def add_flags(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Short flags and the settings they stand for."""
    parser.add_argument("--features", help="FeatureTable folder")
    parser.add_argument("--out", help="folder for the bundle and figures")
    parser.add_argument("--workers", type=int, help="training workers")
    return {"features": "features", "out": "out", "workers": "cluster.num_workers"}


def run(config: AlignVerbConfig) -> dict[str, Any]:
    """Trains and writes the bundle; returns what align.json holds."""
    begin = time.monotonic()
    config = config.model_copy(
        update={"features": storage.absolute(config.features), "out": storage.absolute(config.out)}
    )
    manifest = FeatureManifest.read(config.features)
    check_foundation(config.foundation, manifest)
    local_batch_size(config.fit, config.cluster.num_workers)
    digest = config.content_digest(manifest.fingerprint)
    if (found := up_to_date(storage.join(config.out, RESULT), digest, "align")) is not None:
        return found
    encoder = measured(config, manifest)
    settings = {"config": config.model_dump(mode="json"), "encoder": encoder.model_dump(mode="json")}
    params = {"features": config.features, "fingerprint": manifest.fingerprint, **settings["config"]}
    with tracking.run(config.tracking, "align", params, {"digest": digest}) as run_:
        state = training.train("align", align_worker, settings, config.cluster, config.out, digest, config.fit.steps)
        entries = training.history(config.out)
        for entry in entries:
            run_.log_metrics({k: v for k, v in entry.items() if k != "step"}, step=int(entry["step"]))
        metrics = {k: v for k, v in entries[-1].items() if k != "step"}
        _write(config, encoder, state, manifest, metrics)
        result = {
            "digest": digest,
            "seconds": round(time.monotonic() - begin, 1),
            "steps": state.step,
            "workers": config.cluster.num_workers,
            "metrics": metrics,
            "data_fingerprint": manifest.fingerprint,
            "bundle": storage.join(config.out, "bundle"),
        }
        storage.write_json(storage.join(config.out, RESULT), result)
        storage.remove(training.checkpoints(config.out))
    shown = " ".join(f"{name} {value:.3f}" for name, value in metrics.items())
    log.info("align: %d steps in %.0f s, %s -> %s", state.step, result["seconds"], shown, result["bundle"])
    return result


def align_worker(session: training.Session, settings: dict[str, Any]) -> None:
    """Trains on one worker; rank 0 validates."""
    config = AlignVerbConfig.parse(settings["config"])
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
    if reader.manifest.rows.get("val", 0) > 1:
        held_out = _val(config, encoder) if session.rank == 0 else {}
        evaluate = lambda: {f"val_{k}": v for k, v in validate(task.encoder, held_out).items()}  # noqa: E731
    session.fit(task, reader.batches, config.fit, evaluate)


def _val(config: AlignVerbConfig, encoder: AudioEncoderConfig) -> dict[str, Any]:
    return load_split(config.features, "val", encoder.clip_samples, COLUMNS, config.max_val_clips)


def measured(config: AlignVerbConfig, manifest: FeatureManifest) -> AudioEncoderConfig:
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


def check_foundation(spec: FoundationSpec, manifest: FeatureManifest) -> None:
    """Raises UserError when the features were made with another foundation than the bundle would name."""
    found = identity(spec)
    for key in ("clip_revision", "diffusion_revision"):
        if found[key] != manifest.foundation[key]:
            raise UserError(
                f"foundation.{key.removesuffix('_revision')}",
                found[key],
                f"the features were made with {manifest.foundation[key]}",
                "set the foundation that `aai featurize` used, or featurize again",
            )


def up_to_date(result: str, digest: str, verb: str) -> dict[str, Any] | None:
    """The stored result when it was made with the same settings and data. Raises UserError when it was not."""
    if not storage.exists(result):
        return None
    found: dict[str, Any] = storage.read_json(result)
    if found.get("digest") != digest:
        raise UserError("out", result, "was made with other settings or data", "give another --out, or delete it")
    log.info("%s: up to date -> %s", verb, result)
    return found


def _write(
    config: AlignVerbConfig,
    encoder: AudioEncoderConfig,
    state: State,
    manifest: FeatureManifest,
    metrics: dict[str, float],
) -> None:
    """Puts the trained weights into a fresh encoder and writes the bundle."""
    task = AlignTask(AudioEncoder(encoder), config.loss)
    restore_weights(task, state.weights)
    write_bundle(
        storage.join(config.out, "bundle"),
        BundleConfig(foundation=config.foundation, encoder=encoder.model_dump(mode="json")),
        aligner=task.encoder.state_dict(),
        adapter=None,
        meta={"data_fingerprint": manifest.fingerprint, "metrics": metrics, "parents": []},
    )
