"""Scoring: what only a model can tell of a clip. Do caption, pictures and sound fit? What is heard and seen?"""

import io
import logging
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image
from scipy.special import softmax

from aai import storage
from aai.bundle import read_bundle
from aai.encoders.aligner import embed_files, encoder_config, load_aligner
from aai.errors import UserError
from aai.foundation.clip import FrozenClip
from aai.foundation.identity import FoundationSpec, identity
from aai.foundation.tagger import SoundTagger, check_tags
from aai.precision import dtype_of
from pipelines.curation.curate_config import ScoreConfig
from pipelines.curation.layout import MEASURED, SCORED, shard_file
from pipelines.curation.similarity import DIGEST, ScoreShard, similarity_table, vectors
from pipelines.engine.shards import Result

log = logging.getLogger(__name__)


class ScoreWorker:
    """Holds the models; scores the good clips of one shard -> _scored/SHARD.parquet."""

    def __init__(self, out: str, config: dict[str, Any], threads: int, gpu: bool) -> None:
        self.out, self.config = out, ScoreConfig.parse(config)
        if not gpu:
            torch.set_num_threads(threads)
        device, self.aligner, self.clip, self.tagger = "cuda" if gpu else "cpu", None, None, None
        cfg, foundation = self.config, self.config.foundation
        dtype = dtype_of(cfg.dtype, device)
        if cfg.bundle:
            bundle = read_bundle(cfg.bundle)
            _check_foundation(cfg, bundle.config.foundation)
            foundation, self.aligner = bundle.config.foundation, load_aligner(bundle).to(device)
        if cfg.bundle or cfg.caption or cfg.prompts:
            self.clip = FrozenClip(foundation, device, dtype, cfg.batch_size)
        if cfg.tagger:
            how = (cfg.tags, cfg.tag_window_s, device, dtype, cfg.batch_size)
            self.tagger = SoundTagger(cfg.tagger, cfg.tagger_revision, *how)

    def __call__(self, shard: ScoreShard) -> Result:
        """Scores the shard's good clips."""
        captions = {clip.key: clip.caption for clip in shard.clips}
        columns = ["key", "code", *(["frames"] if self.clip else [])]
        columns += ["audio"] if self.aligner or self.tagger else []
        measured = storage.read_table(shard_file(self.out, MEASURED, shard.name), columns)
        wanted = pc.is_in(measured["key"], pa.array(captions, pa.string()))
        good = measured.filter(pc.and_(wanted, measured["code"].is_null()))
        texts = [captions[key] for key in good["key"].to_pylist()]
        scores: dict[str, Any] = {"key": good["key"], **self._seen(good, texts), **self._heard(good)}
        schema = similarity_table(self.clip.dim if self.clip else 0, self.config.names)
        table = pa.table({name: scores[name] for name in schema.names}, schema=schema)
        table = table.replace_schema_metadata({DIGEST: shard.digest.encode()})
        storage.write_table(shard_file(self.out, SCORED, shard.name), table)
        return Result(rows=shard.rows)

    def _seen(self, good: pa.Table, captions: list[str]) -> dict[str, Any]:
        """What the CLIP tells of the pictures: similarities, embeddings, and a signal for each of the prompts."""
        nothing = pa.nulls(len(good), pa.float64())
        if self.clip is None:
            return {"caption_similarity": nothing, "av_similarity": nothing}
        frames = good["frames"].to_pylist()
        image, bare = self._images(self.clip, frames), np.array([not row for row in frames], bool)
        told: dict[str, Any] = {"caption_similarity": nothing, "av_similarity": nothing}
        if self.config.caption:
            found = _caption_similarities(self.clip, captions, image)
            told["caption_similarity"] = [None if is_bare else one for one, is_bare in zip(found, bare, strict=True)]
        audio = np.zeros_like(image)
        if self.aligner:
            audio = embed_files(self.aligner, good["audio"].to_pylist())
            told["av_similarity"] = pa.array((audio * image).sum(1).astype(np.float64), mask=bare)
        for name, prompts in self.config.prompts.items():
            logits = self.clip.logit_scale * (image @ self.clip.texts(prompts).numpy().T)
            told[name] = pa.array(softmax(logits.astype(np.float64), axis=1)[:, 0], mask=bare)
        return told | {"audio_embed": vectors(audio), "image_embed": vectors(image)}

    def _heard(self, good: pa.Table) -> dict[str, Any]:
        """What the tagger tells of the sounds: the share of each group of tags."""
        if self.tagger is None:
            return {}
        shares = self.tagger.shares(good["audio"].to_pylist()).astype(np.float64)
        return dict(zip(self.config.names, shares.T, strict=False))  # the prompts' names come after

    @staticmethod
    def _images(clip: FrozenClip, frames: list[list[bytes]]) -> np.ndarray:
        """Unit mean feature [N, D] of each clip's pictures; 0 where there is none."""
        out = np.zeros((len(frames), clip.dim), np.float32)
        seen = [row for row in frames if row]
        if seen:
            features = clip.images([Image.open(io.BytesIO(data)) for data in chain.from_iterable(seen)]).numpy()
            ends = np.cumsum([len(row) for row in seen])
            stacked = np.array([part.mean(0) for part in np.split(features, ends[:-1])], np.float32)
            out[[bool(row) for row in frames]] = stacked / np.linalg.norm(stacked, axis=1, keepdims=True)
        return out


def _caption_similarities(clip: FrozenClip, captions: list[str], image: np.ndarray) -> list[float | None]:
    texts = sorted(set(captions) - {""})
    features = dict(zip(texts, clip.texts(texts).numpy(), strict=True))
    return [float(features[text] @ vector) if text else None for text, vector in zip(captions, image, strict=True)]


def check_sound(config: ScoreConfig, sample_rate_hz: int) -> None:
    """Raises UserError when the bundle hears sound of another rate than the clips keep, or the tagger lacks a tag."""
    if config.tagger is not None:
        check_tags(config.tagger, config.tagger_revision, config.tags)
    if config.bundle is None:
        return
    heard_hz = encoder_config(read_bundle(config.bundle)).sample_rate_hz
    if heard_hz != sample_rate_hz:
        rule = f"hears {heard_hz} Hz, but decode.sample_rate_hz={sample_rate_hz}"
        raise UserError("scores.bundle", config.bundle, rule, "give both the same rate")


def _check_foundation(config: ScoreConfig, of_bundle: FoundationSpec) -> None:
    if not (config.caption or config.prompts):
        return
    if identity(config.foundation)["clip_revision"] != identity(of_bundle)["clip_revision"]:
        raise UserError(
            "scores.foundation.clip",
            config.foundation.clip,
            f"the bundle was aligned with {of_bundle.clip}",
            "give both the same CLIP",
        )
