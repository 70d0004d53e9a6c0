"""Reads a FeatureTable: seeded batches for training on any number of ranks, and whole splits for evaluation."""

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import pydantic
import torch

from aai import storage
from aai.config import Config
from aai.errors import UserError
from aai.media.waveform import decode_flac, flac_rate_hz
from aai.version import UNKNOWN

log = logging.getLogger(__name__)

VERSION = 1
MANIFEST = "manifest.json"
METADATA_KEY = b"aai.features"
"""Where each Parquet file carries the digest of the settings that made it."""
SHAPES_KEY = b"aai.shapes"
"""Where each Parquet file carries what the manifest is made of, as JSON."""
ARRAYS = ("audio", "image_features", "text_features", "latents")


class FeatureManifest(Config):
    """What stands beside a FeatureTable: how it was made and the shapes of its flattened columns."""

    version: int = VERSION
    settings_digest: str
    """Of everything that determines the content; every file of the table carries it."""
    foundation: dict[str, str]
    """Ids and revisions (or hashes) of the frozen models."""
    processor: str
    """Class of the image processor."""
    dtype: str
    """Arithmetic of the frozen models."""
    sample_rate_hz: int
    """Of the sound, as the clips' own headers name it."""
    prompts: list[str]
    """Templates that captions were put into."""
    num_frames: int
    """K of image_features [K, D]."""
    image_dim: int
    num_texts: int
    """T of text_features [T, D]."""
    text_dim: int
    latent_shape: tuple[int, int, int]
    """[C, h, w] of latents, already multiplied by the VAE's scaling factor."""
    latent_frame: int
    """Which of the K pictures the latents are of."""
    rows: dict[str, int]
    """Rows by split."""
    input_fingerprint: str
    """Of the clips the table was made from."""
    fingerprint: str
    """Of the table: settings and clips."""
    seconds: float
    """How long it took."""
    written_by: str = UNKNOWN
    """The code that wrote it."""
    enlarged: dict[str, int] = pydantic.Field(default_factory=dict)
    """Clips whose pictures are smaller than the model takes them: `clip` for image_features, `latents`."""

    @classmethod
    def read(cls, uri: str) -> "FeatureManifest":
        """The manifest of a FeatureTable folder. Raises UserError if there is none, or of another version."""
        where = storage.join(uri, MANIFEST)
        if not storage.exists(where):
            raise UserError("features", uri, "holds no finished FeatureTable", "run `aai featurize` first")
        data = storage.read_json(where)
        if data.get("version") != VERSION:
            raise UserError(
                "features",
                uri,
                f"has version {data.get('version')}, this program reads version {VERSION}",
                "run `aai featurize` again into another folder",
            )
        return cls.parse(data, source=where)

    def check_sample_rate(self, setting: str, value: object, sample_rate_hz: int, remedy: str) -> None:
        """Raises UserError when an encoder, named by a setting and its value, hears another rate than the table's."""
        if sample_rate_hz != self.sample_rate_hz:
            rule = f"hears {sample_rate_hz} Hz, the features hold {self.sample_rate_hz} Hz"
            raise UserError(setting, value, rule, remedy)

    def shape_of(self, column: str) -> tuple[int, ...]:
        """The shape of one row of a flattened column."""
        shapes: dict[str, tuple[int, ...]] = {
            "image_features": (self.num_frames, self.image_dim),
            "text_features": (self.num_texts, self.text_dim),
            "latents": self.latent_shape,
        }
        return shapes[column]


def hash64(text: str) -> int:
    """A stable int64 of a text; 0 for the empty text only."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True) if text else 0


def _open(file: str, manifest: FeatureManifest) -> pq.ParquetFile:
    fs, path = storage.filesystem(file)
    table = pq.ParquetFile(path, filesystem=fs)
    found = (table.schema_arrow.metadata or {}).get(METADATA_KEY, b"").decode()
    if found != manifest.settings_digest:
        raise UserError(
            "features",
            file,
            f"was made with other settings ({found or 'unknown'}) than its manifest says",
            "run `aai featurize` into an empty folder",
        )
    return table


def _arrays(table: pa.Table, manifest: FeatureManifest, clip_samples: int, columns: Sequence[str]) -> dict[str, Any]:
    """Columns as arrays: audio int16 [N, S], features float16 [N, *shape]; hashes, captions and ids always."""
    captions = table["caption"].to_pylist()
    out: dict[str, Any] = {
        "caption": captions,
        "caption_id": np.array([hash64(caption) for caption in captions], np.int64),
        "clip_hash": np.array([hash64(text) for text in table["content_hash"].to_pylist()], np.int64),
    }
    for name in columns:
        if name == "audio":
            clips = [_fixed(_samples(data, manifest), clip_samples) for data in table["audio"].to_pylist()]
            out[name] = np.stack(clips) if clips else np.empty((0, clip_samples), np.int16)
        else:
            flat = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            out[name] = flat.reshape(table.num_rows, *manifest.shape_of(name))
    return out


def _samples(flac: bytes, manifest: FeatureManifest) -> np.ndarray:
    """A clip's waveform. Raises UserError when it is not of the rate that the manifest names."""
    if (rate_hz := flac_rate_hz(flac)) != manifest.sample_rate_hz:
        rule = f"its manifest says {manifest.sample_rate_hz} Hz"
        raise UserError("features", f"sound at {rate_hz} Hz", rule, "run `aai featurize` into an empty folder")
    return decode_flac(flac)


def _fixed(audio: np.ndarray, samples: int) -> np.ndarray:
    """Float samples as int16 [samples]: zeros after a short clip, the middle of a long one."""
    extra = max(0, len(audio) - samples)
    audio = audio[extra // 2 : extra // 2 + samples]
    scaled = np.clip(np.rint(audio * 32768.0), -32768, 32767).astype(np.int16)
    return np.pad(scaled, (0, samples - len(scaled)))


def _tensor(name: str, values: np.ndarray) -> torch.Tensor:
    """float32 of features, -1..1 of audio, int64 of hashes."""
    if name in ("caption_id", "clip_hash"):
        return torch.from_numpy(values)
    return torch.from_numpy(values.astype(np.float32)) / (32768.0 if name == "audio" else 1.0)


def load_split(
    uri: str,
    split: str,
    clip_samples: int,
    columns: Sequence[str] = ARRAYS,
    max_rows: int | None = None,
) -> dict[str, Any]:
    """All rows of a split in table order (the first `max_rows`), for evaluation.

    Tensors: audio float32 [N, S], image_features [N, K, D], text_features [N, T, D], latents [N, C, h, w] (as chosen
    by `columns`), caption_id and clip_hash int64 [N]. Lists: clip_id, content_hash, uri, caption, labels.
    """
    manifest = FeatureManifest.read(uri)
    plain = ["clip_id", "content_hash", "uri", "caption", "labels"]
    parts, found = [], 0
    for file in storage.list_files(uri, ".parquet"):
        if max_rows is not None and found >= max_rows:
            break
        table = _open(file, manifest).read(columns=["split", *plain, *columns])
        parts.append(table.filter(pa.compute.equal(table["split"], split)))
        found += parts[-1].num_rows
    whole = pa.concat_tables(parts).slice(0, max_rows)
    arrays = _arrays(whole, manifest, clip_samples, columns)
    out: dict[str, Any] = {name: whole[name].to_pylist() for name in plain}
    return out | {n: v if n == "caption" else _tensor(n, v) for n, v in arrays.items()}


class FeatureReader:
    """Endless seeded batches of one split for one rank.

    Each epoch the row groups are put in a random order, the rows are shuffled within windows of row groups that fit the
    cache, and the order is cut into equal, consecutive parts: one for each rank. So every rank takes the same number of
    steps by construction, and reads about its own share of the files. Decoded row groups are kept while they fit in
    `cache_bytes`. The batch of a step depends on (seed, step) alone: a resumed run sees the same clips.
    """

    def __init__(
        self,
        uri: str,
        split: str,
        batch_size: int,
        clip_samples: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        columns: Sequence[str] = ARRAYS,
        cache_bytes: int = 1 << 30,
    ) -> None:
        """batch_size: clips per step of this rank; clip_samples: length sounds are padded or cut to.

        Raises UserError when the table is not there, is mixed, or has fewer rows in the split than one step takes.
        """
        self.manifest = FeatureManifest.read(uri)
        self.batch_size, self.clip_samples, self.columns = batch_size, clip_samples, tuple(columns)
        self.rank, self.world_size, self.seed, self.cache_bytes = rank, world_size, seed, cache_bytes
        self.split = split
        self.groups = self._index(uri)
        self.num_rows = sum(len(rows) for _, _, rows in self.groups)
        self.steps_per_epoch = self.num_rows // (batch_size * world_size)
        if self.steps_per_epoch == 0:
            raise UserError(
                "fit.batch_size",
                batch_size * world_size,
                f"is more than the {self.num_rows} rows of split {split!r}",
                "lower it, or featurize more clips",
            )
        self._cache: OrderedDict[int, dict[str, Any]] = OrderedDict()
        self._cached_bytes = 0

    def _index(self, uri: str) -> list[tuple[str, int, np.ndarray]]:
        """(file, row group, its rows of the split) for every row group with such rows, in table order."""
        files = storage.list_files(uri, ".parquet")
        groups: list[tuple[str, int, np.ndarray]] = []
        with ThreadPoolExecutor(16) as pool:  # on S3 nearly all the time is waiting
            for found in pool.map(self._index_file, files):
                groups += found
        return groups

    def _index_file(self, file: str) -> list[tuple[str, int, np.ndarray]]:
        table = _open(file, self.manifest)
        groups = []
        for number in range(table.num_row_groups):
            splits = table.read_row_group(number, columns=["split"])["split"].to_pylist()
            rows = np.flatnonzero([name == self.split for name in splits])
            if len(rows):
                groups.append((file, number, rows))
        return groups

    def order(self, epoch: int) -> np.ndarray:
        """This rank's rows of an epoch: int64 [steps * batch_size, 2] of (group, position within it)."""
        rng = np.random.default_rng([self.seed, epoch])
        shuffled = rng.permutation(len(self.groups))
        window = self._window()
        parts = []
        for start in range(0, len(shuffled), window):
            rows = [
                np.stack([np.full(len(self.groups[g][2]), g), np.arange(len(self.groups[g][2]))], axis=1)
                for g in shuffled[start : start + window]
            ]
            parts.append(rng.permutation(np.concatenate(rows), axis=0))
        share = self.steps_per_epoch * self.batch_size
        return np.concatenate(parts)[self.rank * share : (self.rank + 1) * share]

    def _window(self) -> int:
        """Row groups that fit half the cache: the reach of the shuffle. Equal on all ranks."""
        m = self.manifest
        features = m.num_frames * m.image_dim + m.num_texts * m.text_dim + int(np.prod(m.latent_shape))
        largest = max(len(rows) for _, _, rows in self.groups) * 2 * (self.clip_samples + features)
        return max(1, self.cache_bytes // 2 // largest)

    def batches(self, first_step: int = 0) -> Iterator[dict[str, Any]]:
        """The batch of every step from `first_step` on (from 0), without end.

        Tensors audio float32 [B, S], image_features [B, K, D], text_features [B, T, D], latents [B, C, h, w] (as
        chosen by `columns`), caption_id and clip_hash int64 [B], and caption, a list of B texts.
        """
        epoch, step = divmod(first_step, self.steps_per_epoch)
        while True:
            order = self.order(epoch)
            for start in range(step * self.batch_size, len(order), self.batch_size):
                yield self._batch(order[start : start + self.batch_size])
            epoch, step = epoch + 1, 0

    def _batch(self, places: np.ndarray) -> dict[str, Any]:
        rows = [(self._group(int(group)), int(row)) for group, row in places]
        batch: dict[str, Any] = {"caption": [arrays["caption"][row] for arrays, row in rows]}
        for name in (*self.columns, "caption_id", "clip_hash"):
            batch[name] = _tensor(name, np.stack([arrays[name][row] for arrays, row in rows]))
        return batch

    def _group(self, number: int) -> dict[str, Any]:
        """A row group's arrays, decoded once while the cache holds it."""
        if number in self._cache:
            self._cache.move_to_end(number)
            return self._cache[number]
        file, group, rows = self.groups[number]
        names = ["caption", "content_hash", *self.columns]
        table = _open(file, self.manifest).read_row_group(group, columns=names).take(pa.array(rows))
        arrays = _arrays(table, self.manifest, self.clip_samples, self.columns)
        self._cache[number] = arrays
        self._cached_bytes += _nbytes(arrays)
        while self._cached_bytes > self.cache_bytes and len(self._cache) > 1:
            self._cached_bytes -= _nbytes(self._cache.popitem(last=False)[1])
        return arrays


def _nbytes(arrays: dict[str, Any]) -> int:
    return sum(values.nbytes for values in arrays.values() if isinstance(values, np.ndarray))
