"""The tables that stages hand to each other, versioned; a test freezes them.

Every table is plain Parquet: pyarrow, pandas, DuckDB and Polars read it without Ray.
"""

from collections.abc import Iterable

import pyarrow as pa

VERSION = 2

MANIFEST_REQUIRED = ("uri",)
MANIFEST_OPTIONAL = ("start_s", "end_s", "caption", "labels", "split", "image_uri")
"""A manifest (CSV or Parquet) names clips; `labels` is a list, or words joined by ";" in CSV; `image_uri` a still
picture that is shown beside the sound of `uri`."""
SPLITS = ("train", "val", "test")
"""What the stages use: training, validation during training, evaluation."""
VIDEO_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".qt", ".mkv", ".webm", ".ogv", ".avi", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".vob",
    ".flv", ".f4v", ".3gp", ".3g2", ".wmv", ".asf",
)  # fmt: skip
AUDIO_SUFFIXES = (
    ".wav", ".mp3", ".flac", ".ogg", ".oga", ".opus", ".m4a", ".aac", ".mka", ".weba", ".wma", ".aif", ".aiff", ".caf",
    ".amr",
)  # fmt: skip
STILL_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MEDIA_SUFFIXES = VIDEO_SUFFIXES + AUDIO_SUFFIXES
"""What counts as a clip in a folder or a tar, in lower case."""

_PROVENANCE = [
    pa.field("uri", pa.string(), nullable=False),
    pa.field("start_s", pa.float64()),  # of the clip within the file; null = from its beginning
    pa.field("end_s", pa.float64()),  # null = to its end
    pa.field("caption", pa.string(), nullable=False),
    pa.field("labels", pa.list_(pa.string()), nullable=False),
    pa.field("split", pa.string(), nullable=False),
]
SIGNALS = [
    pa.field("duration_s", pa.float64()),
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
    pa.field("fps", pa.float64()),
    pa.field("source_sample_rate_hz", pa.int32()),
    pa.field("channels", pa.int32()),
    pa.field("av_gap_s", pa.float64()),  # |audio length - video length|
    pa.field("rms_db", pa.float64()),  # of the whole clip, dB full scale
    pa.field("silent_fraction", pa.float64()),  # of 50 ms windows
    pa.field("clipped_fraction", pa.float64()),  # of samples at full scale
    pa.field("luma_mean", pa.float64()),  # 0..255 over the kept frames
    pa.field("luma_std", pa.float64()),
    pa.field("motion", pa.float64()),  # mean |luma difference| of successive kept frames, 0..255
    pa.field("video_hash", pa.binary()),  # perceptual, 32 bytes
    pa.field("audio_hash", pa.binary()),  # perceptual, 32 bytes
]
"""What curate measures of every clip: values, not verdicts."""
SIMILARITIES = [
    pa.field("caption_similarity", pa.float64()),  # cosine of caption and pictures in CLIP space
    pa.field("av_similarity", pa.float64()),  # cosine of sound and pictures in an aligned space
]
"""Signals that need a model: null where none was given (and caption_similarity where there is no caption)."""

CLIP_TABLE = pa.schema(
    [
        pa.field("clip_id", pa.string(), nullable=False),
        pa.field("content_hash", pa.string(), nullable=False),
        *_PROVENANCE,
        *SIGNALS,
        *SIMILARITIES,
        pa.field("flags", pa.list_(pa.string()), nullable=False),  # codes of filters it breaks, with --flag-only
        pa.field("audio", pa.binary(), nullable=False),  # FLAC, mono; its header names the rate
        pa.field("frames", pa.list_(pa.binary()), nullable=False),  # K JPEG pictures
        pa.field("frame_pts_s", pa.list_(pa.float64()), nullable=False),  # true time within the clip
    ]
)
REJECT_TABLE = pa.schema(
    [
        pa.field("clip_id", pa.string()),
        pa.field("content_hash", pa.string()),
        *_PROVENANCE,
        pa.field("stage", pa.string(), nullable=False),
        pa.field("code", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
        pa.field("transient", pa.bool_(), nullable=False),
        *SIGNALS,
        *SIMILARITIES,
        pa.field("thumbnail", pa.binary()),  # the first frame as JPEG, where one was decoded
    ]
)
"""Both tables may end with further columns, float64 or string: those of the manifest, and signals of the user's own."""


PICTURE = "picture"
VIDEO_PICTURES, STILL_PICTURE, NO_PICTURE = "frames", "still", "none"
"""What stands in the column `picture` of the tables: whether a clip shows pictures of a video, a picture of its own
(one in `frames`), or has sound and text alone. Tables of videos alone do not have the column."""


def further_columns(names: Iterable[str]) -> list[str]:
    """Those of a curated table's columns that are none of the contract's."""
    return [name for name in names if name not in CLIP_TABLE.names and name not in REJECT_TABLE.names]


def feature_table(
    num_frames: int, image_dim: int, num_texts: int, text_dim: int, latent_dim: int, kinds: bool = False
) -> pa.Schema:
    """The FeatureTable: CLIP features of K frames and of the captions, VAE latents of one frame, and the audio.

    Features are flattened `fixed_size_list<float16>`; their shapes stand in the manifest beside the table. kinds: with
    the column `picture`; where it is none, image_features and latents are 0 and mean nothing (Parquet's readers do not
    agree on fixed lists that are null).
    """

    def vector(size: int) -> pa.DataType:
        return pa.list_(pa.float16(), size)

    return pa.schema(
        [
            pa.field("clip_id", pa.string(), nullable=False),
            pa.field("content_hash", pa.string(), nullable=False),
            *_PROVENANCE,
            pa.field("duration_s", pa.float64(), nullable=False),
            pa.field("audio", pa.binary(), nullable=False),
            pa.field("image_features", vector(num_frames * image_dim), nullable=False),  # [K, D]
            pa.field("text_features", vector(num_texts * text_dim), nullable=False),  # [T, D]
            pa.field("latents", vector(latent_dim), nullable=False),  # [C, h, w]
            *([pa.field(PICTURE, pa.string(), nullable=False)] if kinds else []),
        ]
    )
