"""Scoring: what only a model can tell of a clip. Do its pictures fit its caption, and its sound its pictures?"""

import io
import logging
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from aai import storage
from aai.bundle import read_bundle
from aai.encoders.aligner import embed_files, load_aligner
from aai.errors import UserError
from aai.foundation.clip import FrozenClip
from aai.foundation.identity import FoundationSpec, identity
from aai.precision import dtype_of
from pipelines.curation.measuring import FOLDER as MEASURED
from pipelines.curation.measuring import shard_file
from pipelines.curation.similarity import DIGEST, FOLDER, ScoreConfig, ScoreShard, similarity_table, vectors
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
            {DIGEST: shard.digest.encode()}
        )
        storage.write_table(shard_file(self.out, FOLDER, shard.name), table)
        return Result(rows=shard.rows)

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
