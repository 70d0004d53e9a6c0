"""One clip's bytes in, one row out: signals, sound and pictures, or the reason why there are none."""

import hashlib
import io
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import av
import pyarrow as pa
from PIL import Image

from aai.media.container import shows_video
from aai.media.decode import DecodedClip, DecodedSound, decode_clip, decode_sound
from aai.media.limits import ClipError, DecodeConfig
from aai.media.prints import picture_print, sound_print
from aai.media.ranged import Content, hash_of
from aai.media.showing import Scaler
from aai.media.signals import measure, measure_sound, measure_still
from aai.media.still import decode_still
from aai.media.waveform import encode_flac
from aai.schema import CLIP_TABLE, NO_PICTURE, REJECT_TABLE, SIGNALS, STILL_PICTURE, VIDEO_PICTURES

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


def clip_id(content_hash: str, start_s: float | None, end_s: float | None, still_hash: str | None = None) -> str:
    """Names a clip by its content: 24 hex digits of the hash of (file hash, start, end), and of its still's hash."""
    still = f":{still_hash}" if still_hash else ""
    return hashlib.sha256(f"{content_hash}:{start_s}:{end_s}{still}".encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Shown:
    """What a clip shows, as far as its manifest tells."""

    must_be_video: bool = True
    """Whether a file without video is no clip; else it is one of sound alone."""
    still: bytes | None = None
    """A picture file (JPEG, PNG, WebP) that is shown instead of anything in the media file."""

    @property
    def still_hash(self) -> str | None:
        """SHA-256 of the still."""
        return None if self.still is None else hashlib.sha256(self.still).hexdigest()


VIDEO = Shown()


def failed_row(
    content_hash: str,
    start_s: float | None,
    end_s: float | None,
    failure: ClipError,
    stage: str = "decode",
    still_hash: str | None = None,
) -> MeasuredRow:
    """The MEASURED_ROW of a clip that cannot be used."""
    return dict.fromkeys(MEASURED_ROW.names) | {
        "clip_id": clip_id(content_hash, start_s, end_s, still_hash),
        "content_hash": content_hash,
        "stage": stage,
        "code": failure.code,
        "message": failure.message,
        "transient": failure.transient,
        "decoder": DECODER,
    }


def measure_bytes(
    data: Content,
    start_s: float | None,
    end_s: float | None,
    cfg: DecodeConfig,
    content_hash: str | None = None,
    shown: Shown = VIDEO,
) -> MeasuredRow:
    """The MEASURED_ROW of the part [start_s, end_s) of a media file. A bad clip becomes a row; nothing is raised.

    content_hash: of the whole file, which may have many clips; None: to be found. What only a video has is null in the
    row of a clip that has none.
    """
    content_hash = content_hash or hash_of(data)
    try:
        row = dict.fromkeys(MEASURED_ROW.names) | {
            "clip_id": clip_id(content_hash, start_s, end_s, shown.still_hash),
            "content_hash": content_hash,
            "decoder": DECODER,
        }
        if shown.still is None and (shown.must_be_video or shows_video(data, cfg)):
            return row | _of_video(decode_clip(data, start_s, end_s, cfg), cfg)
        sound = decode_sound(data, start_s, end_s, cfg)
        return row | _of_sound(sound, cfg) | _of_still(shown.still, cfg)
    except ClipError as error:
        failure = error
    except MemoryError:
        failure = ClipError("OUT_OF_MEMORY", f"the clip needs more than the limit of {cfg.max_memory_mb} MB")
    except Exception as error:  # one clip must not end the job; max_reject_ratio stops a systematic fault
        log.exception("unexpected error in the clip with hash %s", content_hash)
        failure = ClipError("UNEXPECTED", f"{type(error).__name__}: {error}"[:300])
    return failed_row(content_hash, start_s, end_s, failure, still_hash=shown.still_hash)


def _of_video(clip: DecodedClip, cfg: DecodeConfig) -> MeasuredRow:
    return measure(clip, cfg.sample_rate_hz) | {
        "picture_print": picture_print(clip.hash_luma),
        "sound_print": sound_print(clip.audio, cfg.sample_rate_hz),
        "audio": encode_flac(clip.audio, cfg.sample_rate_hz),
        "frames": [_jpeg(frame) for frame in clip.frames],
        "frame_pts_s": clip.frame_pts_s,
    }


def _of_sound(sound: DecodedSound, cfg: DecodeConfig) -> MeasuredRow:
    return measure_sound(sound, cfg.sample_rate_hz) | {
        "sound_print": sound_print(sound.audio, cfg.sample_rate_hz),
        "audio": encode_flac(sound.audio, cfg.sample_rate_hz),
    }


def _of_still(still: bytes | None, cfg: DecodeConfig) -> MeasuredRow:
    if still is None:
        return {"frames": [], "frame_pts_s": []}
    try:
        frame = av.VideoFrame.from_image(decode_still(still, cfg.max_pixels))
    except ClipError as error:
        raise ClipError(error.code, f"its picture {error.message}") from error
    picture = Scaler(cfg.frame_size_px).picture(frame, 0.0, keep=True)
    return measure_still(picture) | {"frames": [_jpeg(picture.pixels)], "frame_pts_s": [0.0]}


def kind_of(measured: Mapping[str, Any]) -> str | None:
    """What a measured clip shows, as the column `picture` of the tables says it; None for one that failed."""
    if measured.get("code"):
        return None
    if measured["motion"] is not None:
        return VIDEO_PICTURES
    return NO_PICTURE if measured["width"] is None else STILL_PICTURE


def _jpeg(pixels: Any) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return sink.getvalue()
