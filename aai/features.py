"""What a FeatureTable holds: its manifest, its columns as arrays, and whole splits for evaluation."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydantic
import torch

from aai import aligned, storage
from aai.aligned import AlignedCache
from aai.config import Config
from aai.errors import UserError
from aai.media.waveform import read_samples, sound_rate_hz
from aai.schema import NO_PICTURE, PICTURE
from aai.version import UNKNOWN

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
    input: str = ""
    """Folder or s3:// prefix of the clips the table was made from; older tables do not tell."""
    input_fingerprint: str
    """Of these clips."""
    fingerprint: str
    """Of the table: settings and clips."""
    seconds: float
    """How long it took."""
    written_by: str = UNKNOWN
    """The code that wrote it."""
    enlarged: dict[str, int] = pydantic.Field(default_factory=dict)
    """Clips whose pictures are smaller than the model takes them: `clip` for image_features, `latents`."""
    without_picture: dict[str, int] = pydantic.Field(default_factory=dict)
    """Of `rows`, those of sound and text alone, by split: their image_features and latents are 0 and mean nothing."""

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

    def clips(self, split: str, pictures_only: bool) -> int:
        """How many rows of a split there are, or have a picture."""
        return self.rows.get(split, 0) - (self.without_picture.get(split, 0) if pictures_only else 0)

    def shape_of(self, column: str) -> tuple[int, ...]:
        """The shape of one row of a flattened column."""
        shapes: dict[str, tuple[int, ...]] = {
            "image_features": (self.num_frames, self.image_dim),
            "text_features": (self.num_texts, self.text_dim),
            "latents": self.latent_shape,
            aligned.COLUMN: (self.image_dim,),
        }
        return shapes[column]


def hash64(text: str) -> int:
    """A stable int64 of a text; 0 for the empty text only."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True) if text else 0


def open_table(file: str, manifest: FeatureManifest) -> pq.ParquetFile:
    """One file of a table. Raises UserError when it was made with other settings than the manifest says."""
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


def rows_of(table: pq.ParquetFile, group: int, split: str, pictures_only: bool = False) -> np.ndarray:
    """bool [N]: which rows of a row group of an opened file are of a split."""
    names = [name for name in ("split", PICTURE) if name in table.schema_arrow.names]
    found = table.read_row_group(group, columns=names)
    wanted = np.array([name == split for name in found["split"].to_pylist()], bool)
    return wanted & have_picture(found) if pictures_only else wanted


def read_group(
    table: pq.ParquetFile, file: str, group: int, columns: Sequence[str], cache: AlignedCache | None = None
) -> pa.Table:
    """Columns of one row group of an opened file of features; the column `aligned` is taken from the cache.

    Where clips of several kinds are, `picture` is among them.
    """
    names = [name for name in columns if name != aligned.COLUMN]
    if PICTURE in table.schema_arrow.names:
        names.append(PICTURE)
    found = table.read_row_group(group, columns=names, use_threads=False)
    if aligned.COLUMN not in columns:
        return found
    if cache is None:
        raise ValueError("the column aligned needs a cache of embeddings")
    return found.append_column(aligned.COLUMN, cache.read_group(file, group, found["clip_id"]))


def have_picture(table: pa.Table) -> np.ndarray:
    """bool [N]: which rows of a table of clips or features show something."""
    if PICTURE not in table.column_names:
        return np.ones(table.num_rows, bool)
    return np.array([kind != NO_PICTURE for kind in table[PICTURE].to_pylist()], bool)


def arrays_of(table: pa.Table, manifest: FeatureManifest, clip_samples: int, columns: Sequence[str]) -> dict[str, Any]:
    """Columns as arrays: audio int16 [N, S], features float16 [N, *shape]; hashes, captions and ids always.

    has_picture bool [N]: False where a clip has none, and what is told of it, its image_features and latents, is 0.
    """
    captions = table["caption"].to_pylist()
    out: dict[str, Any] = {
        "clip_id": table["clip_id"].to_pylist(),
        "caption": captions,
        "caption_id": np.array([hash64(caption) for caption in captions], np.int64),
        "clip_hash": np.array([hash64(text) for text in table["content_hash"].to_pylist()], np.int64),
        "has_picture": have_picture(table),
    }
    for name in columns:
        if name == "audio":
            clips = [_fixed(_samples(data, manifest), clip_samples) for data in table["audio"].to_pylist()]
            out[name] = np.stack(clips) if clips else np.empty((0, clip_samples), np.int16)
        else:
            flat = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            shape = manifest.shape_of(name)
            if name == aligned.COLUMN and len(flat) > table.num_rows * manifest.image_dim:
                shape = (len(flat) // table.num_rows // manifest.image_dim, *shape)  # of parts too
            out[name] = flat.reshape(table.num_rows, *shape)
    return out


def _samples(sound: bytes, manifest: FeatureManifest) -> np.ndarray:
    """A clip's samples int16 [S]. Raises UserError when they are not of the rate that the manifest names."""
    if (rate_hz := sound_rate_hz(sound)) != manifest.sample_rate_hz:
        rule = f"its manifest says {manifest.sample_rate_hz} Hz"
        raise UserError("features", f"sound at {rate_hz} Hz", rule, "run `aai featurize` into an empty folder")
    return read_samples(sound)


def _fixed(samples: np.ndarray, count: int) -> np.ndarray:
    """int16 [count]: zeros after a short clip, the middle of a long one."""
    extra = max(0, len(samples) - count)
    samples = samples[extra // 2 : extra // 2 + count]
    return np.pad(samples, (0, count - len(samples)))


def tensor_of(name: str, values: np.ndarray) -> torch.Tensor:
    """float32 of features, -1..1 of audio, int64 of hashes, bool of has_picture."""
    if name in ("caption_id", "clip_hash", "has_picture"):
        return torch.from_numpy(values)
    scale = 1 / 32768.0 if name == "audio" else 1.0
    return torch.from_numpy(values.astype(np.float32)).mul_(scale)


def load_split(
    uri: str,
    split: str,
    clip_samples: int,
    columns: Sequence[str] = ARRAYS,
    max_rows: int | None = None,
    cache: AlignedCache | None = None,
    pictures_only: bool = False,
) -> dict[str, Any]:
    """All rows of a split in table order (the first `max_rows`), for evaluation.

    pictures_only: without clips that have no picture.

    Tensors: audio float32 [N, S], image_features [N, K, D], text_features [N, T, D], latents [N, C, h, w] (as chosen
    by `columns`; aligned [N, D], or [N, R, D] with parts, needs a cache), caption_id and clip_hash int64 [N],
    has_picture bool [N]. Lists: clip_id, content_hash, uri, caption, labels.
    """
    manifest = FeatureManifest.read(uri)
    plain = ["clip_id", "content_hash", "uri", "caption", "labels"]
    parts, found = [], 0
    for file in storage.list_files(uri, ".parquet"):
        if max_rows is not None and found >= max_rows:
            break
        opened = open_table(file, manifest)
        for group in range(opened.num_row_groups):
            wanted = rows_of(opened, group, split, pictures_only)
            count = int(wanted.sum())  # most row groups of a large table may have no such rows
            if count and (max_rows is None or found < max_rows):
                parts.append(read_group(opened, file, group, [*plain, *columns], cache).filter(pa.array(wanted)))
                found += count
    if not parts:
        parts.append(read_group(opened, file, 0, [*plain, *columns], cache).slice(0, 0))
    whole = pa.concat_tables(parts).slice(0, max_rows)
    arrays = arrays_of(whole, manifest, clip_samples, columns)
    out: dict[str, Any] = {name: whole[name].to_pylist() for name in plain}
    return out | {n: v if n in ("clip_id", "caption") else tensor_of(n, v) for n, v in arrays.items()}
