"""What curate measures of a clip: values, never verdicts; those are `filters.py`'s."""

from itertools import pairwise
from typing import Any

import numpy as np

from aai.media.decode import DecodedClip, DecodedSound
from aai.media.showing import Picture
from aai.schema import SIGNALS

SILENT_WINDOW_DB = -60.0
"""A 50 ms window below this level (dB full scale) counts as silent."""
FLOOR_DB = -120.0
HASH_BYTES = 32
_HASH_BANDS, _HASH_STEPS = 17, 17  # 16 x 16 differences = 256 bits
_HASH_HZ = (100.0, 3500.0)  # what even an 8 kHz recording keeps


def level_db(audio: np.ndarray) -> float:
    """Root mean square of samples in dB full scale, floored at -120."""
    if not len(audio):
        return FLOOR_DB
    power = float(np.mean(np.square(audio, dtype=np.float64)))
    return max(FLOOR_DB, float(10 * np.log10(power + 1e-30)))


def silent_fraction(audio: np.ndarray, sample_rate_hz: int) -> float:
    """Share of 50 ms windows below SILENT_WINDOW_DB; a last, shorter window is left out."""
    size = max(1, sample_rate_hz // 20)
    windows = audio[: len(audio) // size * size].reshape(-1, size)
    if not len(windows):
        return float(level_db(audio) < SILENT_WINDOW_DB)
    power = np.mean(np.square(windows, dtype=np.float64), axis=1)
    return float(np.mean(power < 10 ** (SILENT_WINDOW_DB / 10)))


def motion(luma: np.ndarray) -> float:
    """Mean |difference| of successive pictures [N, h, w], 0..255; 0 for a single one."""
    if len(luma) < 2:
        return 0.0
    return float(np.mean(np.abs(np.diff(luma.astype(np.int16), axis=0))))


def picture_bits(pictures: np.ndarray) -> np.ndarray:
    """pHash of grey pictures [N, h, w]: bool [N, 64], which low frequencies of the DCT lie above their median."""
    rows, columns = (_waves(size) for size in pictures.shape[1:])
    waves = rows @ pictures @ columns.T
    waves = waves.reshape(len(pictures), -1)[:, 1:65]  # without the mean brightness
    bits: np.ndarray = waves > np.median(waves, axis=1, keepdims=True)
    return bits


def _waves(size: int) -> np.ndarray:
    basis = np.cos(np.pi / size * np.arange(9)[:, None] * (np.arange(size) + 0.5))  # of the DCT, up to its scale
    basis[0] *= np.sqrt(0.5)
    return basis


def video_hash(luma: np.ndarray) -> bytes:
    """256-bit perceptual hash of 4 small grey pictures [4, 32, 32], 64 bits each (`picture_bits`).

    It survives re-encoding, scaling and brightness changes.
    """
    return np.packbits(picture_bits(luma)).tobytes()


def audio_hash(audio: np.ndarray, sample_rate_hz: int) -> bytes:
    """256-bit fingerprint of a sound: signs of band-energy differences over time and frequency.

    After Haitsma and Kalker, "A Highly Robust Audio Fingerprinting System" (ISMIR 2002), on 17 steps over the
    whole clip and 17 logarithmic bands of 100 to 3500 Hz. Independent of gain.
    """
    size = sample_rate_hz // 20
    padded = np.pad(audio, (0, max(0, size * _HASH_STEPS - len(audio))))
    starts = np.linspace(0, len(padded) - size, 8 * _HASH_STEPS).astype(int)
    windows = padded[starts[:, None] + np.arange(size)] * np.hanning(size).astype(np.float32)
    power = np.abs(np.fft.rfft(windows, axis=1)) ** 2
    edges = np.geomspace(*_HASH_HZ, _HASH_BANDS + 1) / (sample_rate_hz / size)
    spans = [(int(low), max(int(low) + 1, int(high))) for low, high in pairwise(edges)]
    cells = np.stack([power[:, low:high].sum(axis=1) for low, high in spans])
    level = np.log(cells.reshape(_HASH_BANDS, _HASH_STEPS, 8).sum(2) + 1e-12)  # [bands, steps]
    return np.packbits(np.diff(np.diff(level, axis=0), axis=1) > 0).tobytes()


def measure(clip: DecodedClip, sample_rate_hz: int) -> dict[str, Any]:
    """All SIGNALS columns of `aai/schema.py` for one clip (units in the schema)."""
    signals = measure_sound(clip, sample_rate_hz) | {
        "width": clip.width,
        "height": clip.height,
        "fps": clip.fps,
        "av_gap_s": clip.av_gap_s,
        "luma_mean": float(clip.luma.mean()),
        "luma_std": float(clip.luma.std()),
        "motion": motion(clip.luma),
        "video_hash": video_hash(clip.hash_luma),
    }
    return {field.name: signals[field.name] for field in SIGNALS}


def measure_sound(clip: DecodedClip | DecodedSound, sample_rate_hz: int) -> dict[str, Any]:
    """Those of the SIGNALS that are heard."""
    return {
        "duration_s": clip.duration_s,
        "source_sample_rate_hz": clip.source_sample_rate_hz,
        "channels": clip.channels,
        "rms_db": level_db(clip.audio),
        "silent_fraction": silent_fraction(clip.audio, sample_rate_hz),
        "clipped_fraction": float(np.mean(np.abs(clip.audio) >= 0.999)),
        "audio_hash": audio_hash(clip.audio, sample_rate_hz),
    }


def measure_still(picture: Picture) -> dict[str, Any]:
    """Those of the SIGNALS that one picture has: nothing moves, and nothing is compared by it."""
    return {
        "width": picture.width,
        "height": picture.height,
        "luma_mean": float(picture.luma.mean()),
        "luma_std": float(picture.luma.std()),
    }
