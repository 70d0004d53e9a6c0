"""HDR made of SDR by the formulas of the standards comes back."""

import av
import numpy as np
import pytest
from av.video.reformatter import ColorPrimaries, ColorTrc

from aai.media.tones import HDR, to_sdr


def hdr_frame(srgb: np.ndarray, curve: ColorTrc) -> av.VideoFrame:
    """A picture uint8 [h, w, 3] as an HDR frame, its white at 203 cd/m2 (ITU-R BT.2408), by BT.2087 and BT.2100."""
    light = (srgb / 255.0) ** 2.4
    to_2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
    wide = light @ to_2020.T
    if curve == ColorTrc.SMPTE2084:
        y = (wide * 203 / 10_000) ** 0.1593017578125
        signal = ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375
    else:
        luminance = wide @ [0.2627, 0.678, 0.0593]
        scene = 0.203 * wide * np.maximum(0.203 * luminance, 1e-6)[..., None] ** (1 / 1.2 - 1)
        signal = np.where(
            scene <= 1 / 12,
            np.sqrt(3 * scene),
            0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-6)) + 0.55991073,
        )
    frame = av.VideoFrame.from_ndarray((signal.clip(0, 1) * 65_535).astype(np.uint16), "rgb48le")
    frame.color_trc, frame.color_primaries = curve, ColorPrimaries.BT2020
    return frame


@pytest.mark.parametrize("curve", HDR)
def test_what_is_not_brighter_than_white_comes_back(curve: ColorTrc) -> None:
    original = np.random.default_rng(0).integers(20, 230, (40, 30, 3), np.uint8)
    frame = hdr_frame(original, curve)
    shown = to_sdr(frame.to_ndarray(), curve)
    assert (shown.shape, shown.dtype) == (original.shape, np.uint8)
    assert np.abs(shown.astype(int) - original).mean() < 1
    assert np.abs(frame.to_ndarray(format="rgb24").astype(int) - original).mean() > 15  # what untreated ones look like


@pytest.mark.parametrize("curve", HDR)
def test_brighter_light_is_bent_and_never_wraps(curve: ColorTrc) -> None:
    ramp = np.repeat(np.linspace(0, 65_535, 256).astype(np.uint16)[None, :, None], 3, axis=2)
    grey = to_sdr(ramp, curve)[0].astype(int)
    assert (np.diff(grey, axis=0) >= 0).all()
    assert grey[0].tolist() == [0, 0, 0]
    assert grey[-1].tolist() == pytest.approx([255] * 3, abs=1)
    assert (np.ptp(grey, axis=1) <= 1).all()
