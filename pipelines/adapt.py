"""Trains the audio adapter: an aligned sound becomes words A* for the frozen diffusion model.

Reads a FeatureTable and the bundle of `aai align`, trains with Ray Train through the frozen text encoder and UNet, and
writes OUT/bundle (aligner and adapter), OUT/history.jsonl and, last, OUT/adapt.json. The same command goes on after a
kill.
"""

import argparse
import logging
from typing import Any, ClassVar

import pydantic
import torch
from torch import nn

from aai import storage
from aai.adapt import AdapterConfig, AdaptLossConfig, AdaptTask, AudioAdapter
from aai.bundle import Bundle, read_bundle, write_bundle
from aai.concepts import Vocabulary
from aai.encoders.aligner import load_aligner
from aai.features import FeatureManifest, FeatureReader, load_split
from aai.fit import State, local_batch_size, restore_weights
from aai.foundation.loaders import load_clip, load_diffusion
from aai.inject import Injector
from pipelines.engine.lock import locked
from pipelines.settings import Plan
from pipelines.training import ray_train
from pipelines.training.stage import StageConfig, bundle_dir, check_foundation, run_stage, validates

log = logging.getLogger(__name__)

COLUMNS = ("audio", "image_features", "latents")


class AdaptConfig(StageConfig):
    """The adapt stage."""

    summary: ClassVar[str] = "train the audio adapter through the frozen diffusion model -> bundle"

    bundle: str
    """The bundle of `aai align`; it names the foundation."""
    adapter: AdapterConfig = AdapterConfig()
    """embed_dim and token_dim are taken from the bundle and the diffusion model."""
    loss: AdaptLossConfig = AdaptLossConfig()
    vocabulary: Vocabulary | None = None
    """Words for what pictures show; edit and stylize need it."""
    neutral_word: str = "thing"
    """The word that stands in a prompt where a sound has no say."""
    max_val_clips: int = pydantic.Field(128, ge=2)
    """Validation takes at most this many clips of the val split."""

    def plan(self) -> Plan:
        """See VerbConfig."""
        return self.plan_stage("adapt", bundle=self.bundle)


CONFIG = AdaptConfig


def add_flags(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Short flags and the settings they stand for."""
    parser.add_argument("--features", help="FeatureTable folder")
    parser.add_argument("--bundle", help="bundle of `aai align`")
    parser.add_argument("--out", help="folder for the bundle and figures")
    parser.add_argument("--workers", type=int, help="training workers")
    return {"features": "features", "bundle": "bundle", "out": "out", "workers": "cluster.num_workers"}


@locked
def run(config: AdaptConfig) -> dict[str, Any]:
    """Trains and writes the bundle; returns what adapt.json holds."""
    places = {name: storage.absolute(getattr(config, name)) for name in ("features", "bundle", "out")}
    config = config.model_copy(update=places)
    manifest = FeatureManifest.read(config.features)
    parent = read_bundle(config.bundle)
    check_foundation(parent.config.foundation, manifest)
    fields = {"adapter", "loss", "fit", "vocabulary", "neutral_word"}
    digest = config.content_digest(fields, data=manifest.fingerprint, parent=parent.sha)

    def settings_for() -> dict[str, Any]:
        return {"config": config.model_dump(mode="json")}

    def write(state: State, settings: dict[str, Any], metrics: dict[str, float]) -> Bundle:
        return _write(config, parent, state, manifest, metrics)

    return run_stage("adapt", config, manifest, digest, adapt_worker, settings_for, write)


def adapt_worker(session: ray_train.Session, settings: dict[str, Any]) -> None:
    """Trains on one worker; rank 0 validates."""
    config = AdaptConfig.parse(settings["config"])
    bundle = read_bundle(config.bundle)
    torch.manual_seed(config.fit.seed)
    task = build_task(config, bundle)
    samples = task.aligner.config.clip_samples
    reader = FeatureReader(
        config.features,
        "train",
        local_batch_size(config.fit, session.world_size),
        samples,
        session.rank,
        session.world_size,
        config.fit.seed,
        COLUMNS,
        config.cache_mb << 20,
    )
    evaluate = None
    if validates(config.fit, reader.manifest):
        held_out = (
            load_split(config.features, "val", samples, COLUMNS, config.max_val_clips) if session.rank == 0 else {}
        )
        evaluate = lambda: validate(task, held_out)  # noqa: E731
    session.fit(task, reader.batches, config.fit, evaluate)


@torch.no_grad()
def validate(task: AdaptTask, held_out: dict[str, Any]) -> dict[str, float]:
    """The loss and its terms on held-out clips, with the same noise every time."""
    device = next(task.adapter.parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in held_out.items()}
        loss, terms = task(batch)
    return {"val_loss": float(loss), **{f"val_{name}": float(value) for name, value in terms.items()}}


def build_task(config: AdaptConfig, bundle: Bundle) -> AdaptTask:
    """The adapter with everything frozen around it."""
    spec = bundle.config.foundation
    pipe = load_diffusion(spec)
    injector = Injector(pipe.text_encoder, pipe.tokenizer, config.neutral_word)
    aligner = load_aligner(bundle)
    adapter = AudioAdapter(adapter_config(config, bundle, injector.token_dim), injector.median_norm)
    return AdaptTask(
        adapter, aligner, pipe, _text_projection(bundle, pipe.text_encoder), config.loss, config.neutral_word
    )


def adapter_config(config: AdaptConfig, bundle: Bundle, token_dim: int) -> AdapterConfig:
    """The adapter's settings with the dimensions that only the foundation knows."""
    dims = {"embed_dim": int(bundle.config.encoder["embed_dim"]), "token_dim": token_dim}
    return config.adapter.model_copy(update=dims)


def _text_projection(bundle: Bundle, text_encoder: nn.Module) -> nn.Linear | None:
    """CLIP's projection of a pooled text state; None when the diffusion model's text encoder is not this CLIP's."""
    clip, _, _ = load_clip(bundle.config.foundation)
    ours = clip.text_model.get_input_embeddings().weight
    theirs = text_encoder.get_input_embeddings().weight
    same = ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-3)
    if not same:
        log.warning("adapt: the diffusion model's text encoder is not the CLIP's; the clip term is left out")
    return clip.text_projection if same else None


def _write(
    config: AdaptConfig, parent: Bundle, state: State, manifest: FeatureManifest, metrics: dict[str, float]
) -> Bundle:
    """Puts the trained weights into a fresh adapter and writes aligner and adapter as one bundle."""
    task = build_task(config, parent)
    restore_weights(task, state.weights)
    bundle = parent.config.model_copy(
        update={
            "adapter": task.adapter.cfg.model_dump(mode="json"),
            "vocabulary": config.vocabulary.model_dump(mode="json") if config.vocabulary else None,
            "neutral_word": config.neutral_word,
            "prompt": config.loss.prompt,
            "head_pattern": config.loss.head_pattern,
        }
    )
    meta = {"data_fingerprint": manifest.fingerprint, "metrics": metrics, "parents": [parent.sha]}
    return write_bundle(bundle_dir(config.out), bundle, parent.aligner(), task.adapter.state_dict(), meta)
