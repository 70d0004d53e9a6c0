"""Sound as bytes: 16-bit FLAC for the tables, WAV for people. Mono, float32 in [-1, 1] in memory."""

import io
from typing import Any

import av
import numpy as np

from aai.media.container import open_media

_FULL_SCALE = 32768.0


def _to_int16(audio: np.ndarray) -> np.ndarray:
    """Float samples [S] as int16 [1, S]; values outside [-1, 1) are clipped."""
    scaled = np.rint(np.asarray(audio, np.float32) * _FULL_SCALE)
    return np.clip(scaled, -_FULL_SCALE, _FULL_SCALE - 1).astype(np.int16)[None]


def _encode(
    audio: np.ndarray, sample_rate_hz: int, container: str, codec: str, options: dict[str, str] | None = None
) -> bytes:
    sink = io.BytesIO()
    with av.open(sink, "w", format=container) as out:
        stream: Any = out.add_stream(codec, rate=sample_rate_hz, options=options, layout="mono", format="s16")
        frame = av.AudioFrame.from_ndarray(_to_int16(audio), format="s16", layout="mono")
        frame.sample_rate = sample_rate_hz
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            out.mux(packet)
    return sink.getvalue()


def encode_flac(audio: np.ndarray, sample_rate_hz: int) -> bytes:
    """Lossless FLAC of mono samples float32 [S]; exact to 16 bits. Raises ValueError on an empty signal."""
    if np.asarray(audio).ndim != 1 or not len(audio):
        raise ValueError(f"expected samples [S] with S > 0, got shape {np.shape(audio)}")
    # The lowest level with blocks of 1152 samples: 2 % more bytes than the default, quick to write and to read.
    return _encode(audio, sample_rate_hz, "flac", "flac", {"compression_level": "3"})


def decode_flac(data: bytes) -> np.ndarray:
    """The samples of `encode_flac`, float32 [S]; their rate tells `flac_rate_hz`."""
    with open_media(data, max_bytes=len(data), max_streams=1, formats="flac") as container:
        parts = [frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)]
    return np.concatenate(parts).astype(np.float32) / _FULL_SCALE


def flac_rate_hz(data: bytes) -> int:
    """The sample rate that a FLAC file's header names (STREAMINFO, RFC 9639). Raises ValueError for another file."""
    if data[:4] != b"fLaC" or len(data) < 21:
        raise ValueError("is no FLAC file")
    return int.from_bytes(data[18:21], "big") >> 4


def write_wav(path: str, audio: np.ndarray, sample_rate_hz: int) -> None:
    """Writes mono samples float32 [S] as a 16-bit PCM WAV file."""
    with open(path, "wb") as file:
        file.write(_encode(audio, sample_rate_hz, "wav", "pcm_s16le"))
