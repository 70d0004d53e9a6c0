"""The tables of aai.schema are a contract: a changed column needs a new VERSION and a new entry here."""

import pyarrow as pa

from aai import schema

PROVENANCE = [
    "uri: string not null",
    "start_s: double",
    "end_s: double",
    "caption: string not null",
    "labels: list<item: string> not null",
    "split: string not null",
]
SIGNALS = [
    "duration_s: double",
    "width: int32",
    "height: int32",
    "fps: double",
    "source_sample_rate_hz: int32",
    "channels: int32",
    "av_gap_s: double",
    "rms_db: double",
    "silent_fraction: double",
    "clipped_fraction: double",
    "luma_mean: double",
    "luma_std: double",
    "motion: double",
    "video_hash: binary",
    "audio_hash: binary",
]
SIMILARITIES = ["caption_similarity: double", "av_similarity: double"]
FROZEN = {
    1: {
        "clips": [
            "clip_id: string not null",
            "content_hash: string not null",
            *PROVENANCE,
            *SIGNALS,
            "audio: binary not null",
            "frames: list<item: binary> not null",
            "frame_pts_s: list<item: double> not null",
        ],
        "rejects": [
            "clip_id: string",
            "content_hash: string",
            *PROVENANCE,
            "stage: string not null",
            "code: string not null",
            "message: string not null",
            "transient: bool not null",
            *SIGNALS,
            "thumbnail: binary",
        ],
        "features": [
            "clip_id: string not null",
            "content_hash: string not null",
            *PROVENANCE,
            "duration_s: double not null",
            "audio: binary not null",
            "image_features: fixed_size_list<item: halffloat>[8] not null",
            "text_features: fixed_size_list<item: halffloat>[12] not null",
            "latents: fixed_size_list<item: halffloat>[256] not null",
        ],
    },
    2: {
        "clips": [
            "clip_id: string not null",
            "content_hash: string not null",
            *PROVENANCE,
            *SIGNALS,
            *SIMILARITIES,
            "flags: list<item: string> not null",
            "audio: binary not null",
            "frames: list<item: binary> not null",
            "frame_pts_s: list<item: double> not null",
        ],
        "rejects": [
            "clip_id: string",
            "content_hash: string",
            *PROVENANCE,
            "stage: string not null",
            "code: string not null",
            "message: string not null",
            "transient: bool not null",
            *SIGNALS,
            *SIMILARITIES,
            "thumbnail: binary",
        ],
        "features": [
            "clip_id: string not null",
            "content_hash: string not null",
            *PROVENANCE,
            "duration_s: double not null",
            "audio: binary not null",
            "image_features: fixed_size_list<item: halffloat>[8] not null",
            "text_features: fixed_size_list<item: halffloat>[12] not null",
            "latents: fixed_size_list<item: halffloat>[256] not null",
        ],
    },
}
"""Every released version stays here: tables on disk outlive the code that wrote them."""


def columns(table: pa.Schema) -> list[str]:
    """One line per column: name, type, nullability."""
    return [f"{field.name}: {field.type}{'' if field.nullable else ' not null'}" for field in table]


def test_tables_are_what_their_version_says() -> None:
    assert {
        "clips": columns(schema.CLIP_TABLE),
        "rejects": columns(schema.REJECT_TABLE),
        "features": columns(schema.feature_table(2, 4, 3, 4, 256)),
    } == FROZEN[schema.VERSION]


def test_signals_stand_in_both_curated_tables() -> None:
    names = {field.name for field in schema.SIGNALS}
    assert names <= set(schema.CLIP_TABLE.names)
    assert names <= set(schema.REJECT_TABLE.names)


def test_manifest_columns() -> None:
    assert schema.MANIFEST_REQUIRED == ("uri",)
    assert schema.MANIFEST_OPTIONAL == ("start_s", "end_s", "caption", "labels", "split", "image_uri")


def test_clips_of_several_kinds_have_one_column_more() -> None:
    plain, mixed = (columns(schema.feature_table(2, 4, 3, 4, 256, kinds)) for kinds in (False, True))
    assert mixed == [*plain, "picture: string not null"]
    assert (schema.VIDEO_PICTURES, schema.STILL_PICTURE, schema.NO_PICTURE) == ("frames", "still", "none")


def test_only_plain_parquet_types() -> None:
    """No extension types: every reader of Parquet opens these tables."""
    for table in (schema.CLIP_TABLE, schema.REJECT_TABLE, schema.feature_table(1, 2, 1, 2, 4)):
        assert not [field.name for field in table if isinstance(field.type, pa.BaseExtensionType)]
