"""Sound as bytes, mono, 16 bits: FLAC where it is kept, WAV where it is read again and again, and for people.

In memory a waveform is float32 in [-1, 1].
"""

import io
import wave
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


def _flac_samples(data: bytes) -> np.ndarray:
    with open_media(data, max_bytes=len(data), max_streams=1, formats="flac") as container:
        return np.concatenate([frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)])


def encode_wav(samples: np.ndarray, sample_rate_hz: int) -> bytes:
    """WAV of int16 samples [S]."""
    sink = io.BytesIO()
    with wave.open(sink, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate_hz)
        file.writeframes(samples.astype("<i2").tobytes())
    return sink.getvalue()


def read_samples(data: bytes) -> np.ndarray:
    """The samples int16 [S] of FLAC or WAV bytes as the tables hold them. Raises ValueError or ClipError for others."""
    if data[:4] == b"fLaC":
        return _flac_samples(data)
    with _wav(data) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        if len(samples) != file.getnframes():
            raise ValueError(f"WAV is cut off: {len(samples)} of {file.getnframes()} samples are there")
    return samples


def read_sound(data: bytes) -> np.ndarray:
    """The waveform float32 [S] of FLAC or WAV bytes as the tables hold them. Raises ValueError for others."""
    return read_samples(data).astype(np.float32) / _FULL_SCALE


def sound_rate_hz(data: bytes) -> int:
    """The sample rate that FLAC's (STREAMINFO, RFC 9639) or WAV's header names. Raises ValueError for others."""
    if data[:4] == b"fLaC" and len(data) >= 21:
        return int.from_bytes(data[18:21], "big") >> 4
    with _wav(data) as file:
        return file.getframerate()


def _wav(data: bytes) -> wave.Wave_read:
    try:
        file = wave.open(io.BytesIO(data), "rb")  # noqa: SIM115 (the caller closes it)
    except (wave.Error, EOFError, RuntimeError) as error:  # the last from a header that points outside
        raise ValueError("is neither FLAC nor WAV") from error
    if (file.getnchannels(), file.getsampwidth()) != (1, 2):
        raise ValueError("is no WAV of one channel and 16 bits")
    return file


def write_wav(path: str, audio: np.ndarray, sample_rate_hz: int) -> None:
    """Writes mono samples float32 [S] as a 16-bit PCM WAV file."""
    with open(path, "wb") as file:
        file.write(encode_wav(_to_int16(audio)[0], sample_rate_hz))
