"""Pictures as a screen shows them: their shape, upright, without combs, within SDR's range."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest
from av.video.reformatter import ColorTrc

from aai.media.decode import decode_clip
from aai.media.limits import DecodeConfig
from aai.media.showing import Scaler
from tests.aai.media.test_tones import hdr_frame
from tests.clips import make_clip
from tests.formats import TURNS, turned

CFG = DecodeConfig()


def shaped(aspect: Fraction, size: tuple[int, int] = (96, 64)) -> bytes:
    """A second of video whose pixels have this width by height, with sound."""
    sink = io.BytesIO()
    with av.open(sink, "w", format="matroska") as out:
        video, audio = out.add_stream("mpeg4", rate=10), out.add_stream("aac", rate=16_000, layout="mono")
        video.width, video.height, video.pix_fmt = *size, "yuv420p"
        video.codec_context.sample_aspect_ratio = aspect
        for number in range(10):
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), 20 * number, np.uint8), "rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        sound = av.AudioFrame.from_ndarray(np.full((1, 16_000), 0.1, np.float32), "fltp", "mono")
        sound.sample_rate = 16_000
        out.mux([*audio.encode(sound), *audio.encode(None)])
    return sink.getvalue()


@pytest.mark.parametrize(
    ("aspect", "shown", "kept"),
    [
        (Fraction(64, 45), (137, 64), (32, 68)),
        (Fraction(8, 9), (85, 64), (32, 42)),
        (Fraction(1, 2), (48, 64), (43, 32)),
        (Fraction(1), (96, 64), (32, 48)),
        (Fraction(50, 1), (96, 64), (32, 48)),  # is no camera's
    ],
)
def test_pixels_that_are_not_square_are_made_so(
    aspect: Fraction, shown: tuple[int, int], kept: tuple[int, int]
) -> None:
    clip = decode_clip(shaped(aspect), None, None, DecodeConfig(frame_size_px=32))
    assert (clip.width, clip.height) == shown
    assert clip.frames.shape[1:3] == kept


@pytest.mark.parametrize("turn", TURNS)
def test_a_lying_or_mirrored_video_is_shown_as_a_player_does(turn: int) -> None:
    """make_clip has a white corner at the top left; a player turns clockwise."""
    clip = decode_clip(turned(make_clip(), turn), None, None, CFG)
    assert (clip.width, clip.height) == ((64, 96) if turn in (90, 270) else (96, 64))
    assert clip.frames.shape[1:3] == (clip.height, clip.width)
    corners = {0: (0, 0), 90: (0, -1), 180: (-1, -1), 270: (-1, 0), -1: (0, -1)}
    for pictures in (clip.frames[..., 0], clip.luma):
        for y, x in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
            assert (pictures[0, y, x] > 200) == ((y, x) == corners[turn])


def test_interlaced_frames_are_not_combed() -> None:
    """A bar that has moved between the two fields of each frame."""
    sink = io.BytesIO()
    with av.open(sink, "w", format="matroska") as out:
        video = out.add_stream("libx264", rate=25, options={"x264-params": "interlaced=1", "crf": "10"})
        video.width, video.height, video.pix_fmt = 128, 96, "yuv420p"
        for number in range(10):
            pixels = np.full((96, 128, 3), 40, np.uint8)
            for field in (0, 1):
                left = 8 * number + 12 * field
                pixels[field::2, left : left + 20] = 220
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))

    def combs(pixels: np.ndarray) -> float:
        rows = pixels[..., 0].astype(float)
        return float(np.abs(rows[1:-1] - (rows[:-2] + rows[2:]) / 2).mean())

    scaler = Scaler(96)
    with av.open(io.BytesIO(sink.getvalue()), "r") as container:
        frames = list(container.decode(video=0))
        shown = [scaler.picture(frame, 0.0, keep=True).pixels for frame in frames]
        assert all(frame.interlaced_frame for frame in frames)
        assert shown[4] is not None
        assert shown[4].shape == (96, 128, 3)
        assert combs(frames[4].to_ndarray(format="rgb24")) > 10
        assert combs(shown[4]) < 2
        error = np.abs(shown[4].astype(int) - frames[4].to_ndarray(format="rgb24"))
        assert min(error[::2].mean(), error[1::2].mean()) < 3  # one of the fields is as it was


def test_hdr_is_shown_as_its_sdr_original() -> None:
    picture = np.kron(np.arange(48, 240, 4).reshape(6, 8)[..., None] * [1, 0.8, 0.6], np.ones((8, 8, 1)))
    frame = hdr_frame(picture.astype(np.uint8), ColorTrc.SMPTE2084)
    shown = Scaler(24).picture(frame, 0.0, keep=True).pixels
    assert shown is not None
    assert shown.shape == (24, 32, 3)
    assert np.abs(shown[::4, ::4].astype(int) - picture[::8, ::8]).mean() < 4
