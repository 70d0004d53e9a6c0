"""Scoring: what only a model can tell of a clip. Do its pictures fit its caption, and its sound its pictures?"""

import io
import logging
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image

from aai import storage
from aai.bundle import read_bundle
from aai.encoders.aligner import embed_files, encoder_config, load_aligner
from aai.errors import UserError
from aai.foundation.clip import FrozenClip
from aai.foundation.identity import FoundationSpec, identity
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
        foundation, device, self.aligner = self.config.foundation, "cuda" if gpu else "cpu", None
        if self.config.bundle:
            bundle = read_bundle(self.config.bundle)
            _check_foundation(self.config, bundle.config.foundation)
            foundation, self.aligner = bundle.config.foundation, load_aligner(bundle).to(device)
        self.clip = FrozenClip(foundation, device, dtype_of(self.config.dtype, device), self.config.batch_size)

    def __call__(self, shard: ScoreShard) -> Result:
        """Scores the shard's good clips."""
        captions = {clip.key: clip.caption for clip in shard.clips}
        columns = ["key", "code", "frames"] + (["audio"] if self.aligner else [])
        measured = storage.read_table(shard_file(self.out, MEASURED, shard.name), columns)
        wanted = pc.is_in(measured["key"], pa.array(captions, pa.string()))
        good = measured.filter(pc.and_(wanted, measured["code"].is_null()))
        keys = good["key"].to_pylist()
        image = self._images(good["frames"].to_pylist())
        audio, av_similarity = np.zeros_like(image), [None] * len(keys)
        if self.aligner:
            audio = embed_files(self.aligner, good["audio"].to_pylist())
            av_similarity = (audio * image).sum(1).tolist()
        scores = {
            "key": keys,
            "caption_similarity": self._captions([captions[key] for key in keys], image),
            "av_similarity": av_similarity,
            "audio_embed": vectors(audio),
            "image_embed": vectors(image),
        }
        table = pa.table(scores, schema=similarity_table(image.shape[1]))
        table = table.replace_schema_metadata({DIGEST: shard.digest.encode()})
        storage.write_table(shard_file(self.out, SCORED, shard.name), table)
        return Result(rows=shard.rows)

    def _images(self, frames: list[list[bytes]]) -> np.ndarray:
        """Unit mean feature [N, D] of each clip's pictures."""
        pictures = [Image.open(io.BytesIO(data)) for data in chain.from_iterable(frames)]
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


def check_sound(config: ScoreConfig, sample_rate_hz: int) -> None:
    """Raises UserError when the bundle hears sound of another rate than the clips keep."""
    if config.bundle is None:
        return
    heard_hz = encoder_config(read_bundle(config.bundle)).sample_rate_hz
    if heard_hz != sample_rate_hz:
        rule = f"hears {heard_hz} Hz, but decode.sample_rate_hz={sample_rate_hz}"
        raise UserError("scores.bundle", config.bundle, rule, "give both the same rate")


def _check_foundation(config: ScoreConfig, of_bundle: FoundationSpec) -> None:
    if config.caption and identity(config.foundation)["clip_revision"] != identity(of_bundle)["clip_revision"]:
        raise UserError(
            "scores.foundation.clip",
            config.foundation.clip,
            f"the bundle was aligned with {of_bundle.clip}",
            "give both the same CLIP",
        )
