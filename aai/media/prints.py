"""Fingerprints by which an edited copy of a clip is known: its sound step by step, its pictures in several views."""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from aai.media.signals import picture_bits

STEP_S = 0.064
"""From one word of a sound's print to the next."""
VIEWS = 6
"""Of each picture in a print."""
_WINDOW_S, _LAG = 0.512, 4
_BANDS, _BANDS_HZ = 33, (150.0, 3400.0)  # what even an 8 kHz recording keeps
_FLOOR_DB = -70.0  # below it a window has no print: what codecs make of silence is chance
_MAX_WORDS = 2048
_MAX_BLACK = 14
_MIDDLE, _CUT = 0.06, 0.1  # left out of each side, of one of two sides
_MIN_PX = 16


def sound_print(audio: np.ndarray, sample_rate_hz: int) -> bytes:
    """A sound, float32 [S], as uint32 words STEP_S apart, of its first two minutes; 0 stands for silence.

    After Haitsma and Kalker, "A Highly Robust Audio Fingerprinting System" (ISMIR 2002): the signs of differences of
    energy between neighbouring bands now and a little before. Windows overlap, so that a copy that begins between two
    steps still has words in common. Empty for a sound of less than 0.8 s.
    """
    size, step = round(_WINDOW_S * sample_rate_hz), round(STEP_S * sample_rate_hz)
    audio = audio[: (_MAX_WORDS + _LAG) * step + size]
    if len(audio) < size + _LAG * step:
        return b""
    windows = sliding_window_view(audio, size)[::step]
    shape = np.hanning(size).astype(np.float32)
    edges = np.geomspace(*_BANDS_HZ, _BANDS + 1) / (sample_rate_hz / size)
    places = np.maximum(np.rint(edges).astype(int), np.arange(_BANDS + 1) + 1)  # each band at least one bin
    cells = [_energies(windows[i : i + 256] * shape, places) for i in range(0, len(windows), 256)]
    level = np.log(np.concatenate(cells) + 1e-12)  # [T, bands]
    bits = np.diff(level[_LAG:], axis=1) > np.diff(level[:-_LAG], axis=1)
    words = np.packbits(bits, axis=1).view(np.uint32).reshape(-1)
    power = np.einsum("ij,ij->i", windows[_LAG:], windows[_LAG:]) / size
    words[power < 10 ** (_FLOOR_DB / 10)] = 0
    return words[:_MAX_WORDS].tobytes()


def _energies(windows: np.ndarray, places: np.ndarray) -> np.ndarray:
    waves = np.fft.rfft(windows, axis=1)[:, : places[-1]]
    return np.add.reduceat(waves.real**2 + waves.imag**2, places[:-1], axis=1)


def picture_print(luma: np.ndarray) -> bytes:
    """Grey pictures uint8 [N, h, w] as 64-bit words: N of each view, N - 1 of motion.

    Views are what lies within the black borders that all pictures have, the middle of that, and its four corners but
    for a tenth of each edge. Motion is the difference of successive pictures: a copy has the same, another take of the
    same thing has not.
    """
    framed = _without_borders(luma)
    views = [framed, _part(framed, _MIDDLE, _MIDDLE, 1 - 2 * _MIDDLE)]
    views += [_part(framed, top, left, 1 - _CUT) for top in (0, _CUT) for left in (0, _CUT)]
    motion = np.diff(luma.astype(np.int16), axis=0)
    return b"".join(np.packbits(picture_bits(part)).tobytes() for part in (*views, motion))


def _part(pictures: np.ndarray, top: float, left: float, size: float) -> np.ndarray:
    """All given as shares of the edges."""
    rows, columns = (
        slice(round(edge * first), round(edge * (first + size)))
        for edge, first in zip(pictures.shape[1:], (top, left), strict=True)
    )
    return pictures[:, rows, columns]


def _without_borders(luma: np.ndarray) -> np.ndarray:
    lit = luma.max(axis=0) > _MAX_BLACK
    rows, columns = np.flatnonzero(lit.any(axis=1)), np.flatnonzero(lit.any(axis=0))
    if not len(rows) or min(np.ptp(rows), np.ptp(columns)) + 1 < _MIN_PX:
        return luma
    return luma[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
