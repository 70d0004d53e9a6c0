"""HDR pictures as SDR ones: PQ and HLG with BT.2020's colours (ITU-R BT.2100) to BT.709.

Diffuse white, 203 cd/m2 by ITU-R BT.2408, becomes full scale; what is brighter is bent below it. The decoder library
can do that too, by a table that takes seconds to make for each file.
"""

import numpy as np
from av.video.reformatter import ColorTrc

HDR = (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)  # PQ and HLG
_WHITE, _HLG_PEAK = 203.0, 1000.0  # cd/m2
_TO_709 = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32)
_LUMINANCE = np.array([0.2627, 0.6780, 0.0593], np.float32)
_KNEE = 0.8  # of diffuse white; below it light stays as it is


def to_sdr(signal: np.ndarray, curve: int) -> np.ndarray:
    """Pixels uint16 [h, w, 3] of one of the HDR curves, R'G'B' at full range, as uint8 [h, w, 3]."""
    coded = signal.astype(np.float32) / 65_535
    light = (_pq(coded) if curve == ColorTrc.SMPTE2084 else _hlg(coded)) / _WHITE
    light = np.maximum(light @ _TO_709.T, 0)
    brightest = light.max(axis=-1, keepdims=True)
    bent = _KNEE + (1 - _KNEE) * (1 - np.exp(-(brightest - _KNEE) / (1 - _KNEE)))
    light *= np.where(brightest > _KNEE, bent / np.maximum(brightest, _KNEE), 1)  # all three alike: the hue stays
    return np.rint(255 * light ** (1 / 2.4)).astype(np.uint8)  # ITU-R BT.1886


def _pq(coded: np.ndarray) -> np.ndarray:
    """Light in cd/m2."""
    root = coded ** (1 / 78.84375)
    return 10_000 * (np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)) ** (1 / 0.1593017578125)


def _hlg(coded: np.ndarray) -> np.ndarray:
    """Light in cd/m2 on a screen of 1000."""
    bright = (np.exp((coded - 0.55991073) / 0.17883277) + 0.28466892) / 12
    scene = np.where(coded <= 0.5, coded**2 / 3, bright)
    return _HLG_PEAK * scene * (scene @ _LUMINANCE)[..., None] ** 0.2
