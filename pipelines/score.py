"""Scoring: what only a model can tell of a clip. Do its pictures fit its caption, and its sound its pictures?"""

import hashlib
import io
import json
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pydantic
import torch
from PIL import Image

from aai import storage
from aai.align import embed_files, load_aligner
from aai.bundle import read_bundle
from aai.config import Config
from aai.encoders.clip import FrozenClip
from aai.errors import UserError
from aai.foundation import FoundationSpec, identity
from pipelines.measure import FOLDER as MEASURED
from pipelines.measure import shard_file
from pipelines.settings import DType
from pipelines.shards import Result, Shard
from pipelines.similarity import DIGEST, FOLDER, similarity_table, vectors

log = logging.getLogger(__name__)


class ScoreConfig(Config):
    """Models that look at the clips; none by default."""

    caption: bool = False
    """Compare captions and pictures by the CLIP of `foundation` (signal caption_similarity)."""
    foundation: FoundationSpec = FoundationSpec()
    bundle: str | None = None
    """Aligned bundle (of `aai align`) that compares each clip's sound with its pictures (signal av_similarity)."""
    false_accept_rate: float = pydantic.Field(0.05, gt=0, lt=1)
    """Clips are WRONG_AUDIO below the similarity that this share of shuffled pairs of sound and pictures reaches."""
    dtype: DType = "float32"
    """Arithmetic of the CLIP."""
    batch_size: int = pydantic.Field(64, ge=1)
    """Pictures per forward pass."""

    @property
    def enabled(self) -> bool:
        """Whether any model is to look."""
        return self.caption or self.bundle is not None

    def content_digest(self) -> str:
        """Of everything that determines the scores, the weights themselves among it."""
        models: dict[str, Any] = {"dtype": self.dtype}
        if self.caption:
            models["foundation"] = identity(self.foundation)
        if self.bundle is not None:
            models["bundle"] = read_bundle(self.bundle).sha
        return hashlib.sha256(json.dumps([models, self.caption], sort_keys=True).encode()).hexdigest()[:16]


def shard_digest(config_digest: str, clips: Sequence[dict[str, str]]) -> str:
    """Of a shard's scores: the models, and its clips with their captions."""
    return hashlib.sha256(json.dumps([config_digest, clips]).encode()).hexdigest()[:16]


class ScoreWorker:
    """Holds the models; scores the good clips of one shard -> _scored/SHARD.parquet."""

    def __init__(self, out: str, config: dict[str, Any], threads: int, gpu: bool) -> None:
        self.out, self.config = out, ScoreConfig.parse(config)
        if not gpu:
            torch.set_num_threads(threads)
        foundation, device, self.aligner = self.config.foundation, "cuda" if gpu else "cpu", None
        if self.config.bundle:
            bundle = read_bundle(self.config.bundle)
            _check_foundation(self.config, bundle.config.foundation)
            foundation, self.aligner = bundle.config.foundation, load_aligner(bundle)
        self.clip = FrozenClip(foundation, device, getattr(torch, self.config.dtype), self.config.batch_size)

    def __call__(self, shard: Shard) -> Result:
        """Shard: name, rows, digest, clips [{key, caption}]."""
        captions = {clip["key"]: clip["caption"] for clip in shard["clips"]}
        columns = ["key", "code", "frames"] + (["audio"] if self.aligner else [])
        measured = storage.read_table(shard_file(self.out, MEASURED, shard["name"]), columns)
        rows = [row for row in measured.to_pylist() if row["key"] in captions and row["code"] is None]
        image = self._images([row["frames"] for row in rows])
        out: dict[str, Any] = {"key": [row["key"] for row in rows]}
        out["caption_similarity"] = self._captions([captions[row["key"]] for row in rows], image)
        out["av_similarity"] = [None] * len(rows)
        audio = np.zeros_like(image)
        if self.aligner:
            audio = embed_files(self.aligner, [row["audio"] for row in rows])
            out["av_similarity"] = (audio * image).sum(1).tolist()
        out |= {"audio_embed": vectors(audio), "image_embed": vectors(image)}
        table = pa.table(out, schema=similarity_table(image.shape[1])).replace_schema_metadata(
            {DIGEST: shard["digest"].encode()}
        )
        storage.write_table(shard_file(self.out, FOLDER, shard["name"]), table)
        return {"rows": shard["rows"]}

    def _images(self, frames: list[list[bytes]]) -> np.ndarray:
        """Unit mean feature [N, D] of each clip's pictures."""
        pictures = [Image.open(io.BytesIO(data)) for row in frames for data in row]
        features = self.clip.images(pictures).numpy()
        ends = np.cumsum([len(row) for row in frames])
        means = [part.mean(0) for part in np.split(features, ends[:-1])] if frames else []
        stacked = np.array(means, np.float32).reshape(len(frames), self.clip.dim)
        return np.asarray(stacked / np.linalg.norm(stacked, axis=1, keepdims=True))

    def _captions(self, captions: list[str], image: np.ndarray) -> list[float | None]:
        if not self.config.caption:
            return [None] * len(captions)
        texts = sorted(set(captions) - {""})
        features = dict(zip(texts, self.clip.texts(texts).numpy(), strict=True))
        return [float(features[text] @ vector) if text else None for text, vector in zip(captions, image, strict=True)]


def _check_foundation(config: ScoreConfig, of_bundle: FoundationSpec) -> None:
    if config.caption and identity(config.foundation)["clip_revision"] != identity(of_bundle)["clip_revision"]:
        raise UserError(
            "scores.foundation.clip",
            config.foundation.clip,
            f"the bundle was aligned with {of_bundle.clip}",
            "give both the same CLIP",
        )
