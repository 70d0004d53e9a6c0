"""One clip's bytes in, one row out: signals, sound and pictures, or the reason why there are none."""

import hashlib
import io
import logging
from typing import Any

import av
import pyarrow as pa
from PIL import Image

from aai.media.decode import decode_clip
from aai.media.limits import ClipError, DecodeConfig
from aai.media.prints import picture_print, sound_print
from aai.media.ranged import Content, hash_of
from aai.media.signals import measure
from aai.media.waveform import encode_flac
from aai.schema import CLIP_TABLE, REJECT_TABLE, SIGNALS

log = logging.getLogger(__name__)

JPEG_QUALITY = 92
DECODER_VERSION = 2
"""Counts up when decoding makes another row of the same file (a test holds some). Rows of the first name none."""
DECODER = f"{DECODER_VERSION} with PyAV {av.__version__}"
"""What stands in every row that was decoded, or could not be."""
_FIELDS = [
    CLIP_TABLE.field("clip_id"),
    CLIP_TABLE.field("content_hash"),
    *SIGNALS,
    pa.field("picture_print", pa.binary()),  # `prints.py`; null in tables of earlier versions
    pa.field("sound_print", pa.binary()),
    CLIP_TABLE.field("audio"),
    CLIP_TABLE.field("frames"),
    CLIP_TABLE.field("frame_pts_s"),
    REJECT_TABLE.field("stage"),
    REJECT_TABLE.field("code"),
    REJECT_TABLE.field("message"),
    REJECT_TABLE.field("transient"),
    pa.field("decoder", pa.string()),
]
MEASURED_ROW = pa.schema([field.with_nullable(True) for field in _FIELDS])
"""What is measured of one clip, without its provenance. A failed clip has its ids, the decoder and the four columns of
a reject; a good one has none of these four."""
MeasuredRow = dict[str, Any]
"""One row of MEASURED_ROW, as Arrow takes and gives it."""


def clip_id(content_hash: str, start_s: float | None, end_s: float | None) -> str:
    """Names a clip by its content: 24 hex digits of the hash of (file hash, start, end)."""
    return hashlib.sha256(f"{content_hash}:{start_s}:{end_s}".encode()).hexdigest()[:24]


def failed_row(
    content_hash: str, start_s: float | None, end_s: float | None, failure: ClipError, stage: str = "decode"
) -> MeasuredRow:
    """The MEASURED_ROW of a clip that cannot be used."""
    return dict.fromkeys(MEASURED_ROW.names) | {
        "clip_id": clip_id(content_hash, start_s, end_s),
        "content_hash": content_hash,
        "stage": stage,
        "code": failure.code,
        "message": failure.message,
        "transient": failure.transient,
        "decoder": DECODER,
    }


def measure_bytes(
    data: Content, start_s: float | None, end_s: float | None, cfg: DecodeConfig, content_hash: str | None = None
) -> MeasuredRow:
    """The MEASURED_ROW of the part [start_s, end_s) of a media file. A bad clip becomes a row; nothing is raised.

    content_hash: of the whole file, which may have many clips; None: to be found.
    """
    content_hash = content_hash or hash_of(data)
    try:
        clip = decode_clip(data, start_s, end_s, cfg)
        row = dict.fromkeys(MEASURED_ROW.names) | measure(clip, cfg.sample_rate_hz)
        return row | {
            "clip_id": clip_id(content_hash, start_s, end_s),
            "content_hash": content_hash,
            "picture_print": picture_print(clip.hash_luma),
            "sound_print": sound_print(clip.audio, cfg.sample_rate_hz),
            "audio": encode_flac(clip.audio, cfg.sample_rate_hz),
            "frames": [_jpeg(frame) for frame in clip.frames],
            "frame_pts_s": clip.frame_pts_s,
            "decoder": DECODER,
        }
    except ClipError as error:
        failure = error
    except MemoryError:
        failure = ClipError("OUT_OF_MEMORY", f"the clip needs more than the limit of {cfg.max_memory_mb} MB")
    except Exception as error:  # one clip must not end the job; max_reject_ratio stops a systematic fault
        log.exception("unexpected error in the clip with hash %s", content_hash)
        failure = ClipError("UNEXPECTED", f"{type(error).__name__}: {error}"[:300])
    return failed_row(content_hash, start_s, end_s, failure)


def _jpeg(pixels: Any) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return sink.getvalue()
