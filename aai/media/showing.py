"""A decoded frame as a screen would show it, scaled down: square pixels, whole lines, upright, within SDR's colours."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.sidedata.sidedata import Type
from av.video.reformatter import Interpolation, VideoReformatter

from aai.media.tones import HDR, to_sdr

LUMA_PX = 32
_MAX_PIXEL_ASPECT = 4.0  # Cinemascope has 2; beyond is a forged header

Matrix = tuple[int, int, int, int]


@dataclass(frozen=True)
class Picture:
    """One frame, scaled down and upright (`pixels` None: only the luma was asked for)."""

    time_s: float
    luma: np.ndarray  # uint8 [32, 32]
    pixels: np.ndarray | None  # uint8 [h, w, 3], RGB
    width: int  # of the source, as shown
    height: int


def pixel_aspect(stream: Any) -> float:
    """Width of a pixel by its height; 1 where a file does not say, or says what cannot be."""
    aspect = float(stream.sample_aspect_ratio or 1)
    return aspect if 1 / _MAX_PIXEL_ASPECT <= aspect <= _MAX_PIXEL_ASPECT else 1.0


class Scaler:
    """Frames to pictures, by the decoder library's own scaler."""

    def __init__(self, frame_size_px: int, aspect: float = 1.0) -> None:
        """aspect: of the pixels, width by height."""
        self.frame_size_px, self.aspect = frame_size_px, aspect
        # Each keeps the set-up of its last conversion; one for both would set up anew for every frame.
        self.small, self.large = VideoReformatter(), VideoReformatter()

    @staticmethod
    def _convert(reformatter: VideoReformatter, frame: Any, width: int, height: int, pixels: str) -> np.ndarray:
        # One thread: pictures are small, and a pool of threads per clip costs more than it brings.
        area = Interpolation.AREA
        return reformatter.reformat(frame, width, height, pixels, interpolation=area, threads=1).to_ndarray()

    def picture(self, frame: Any, time_s: float, keep: bool) -> Picture:
        """The picture of a decoded frame; with its pixels if `keep`."""
        matrix = _display_matrix(frame)
        luma = _upright(self._convert(self.small, frame, LUMA_PX, LUMA_PX, "gray"), matrix)
        width, height = max(1, round(frame.width * self.aspect)), frame.height
        pixels = _upright(self._pixels(frame, width, height), matrix) if keep else None
        if _is_lying(matrix):
            width, height = height, width
        return Picture(time_s, luma, pixels, width, height)

    def _pixels(self, frame: Any, width: int, height: int) -> np.ndarray:
        # Never enlarged: that would hide from every later stage how little the source shows.
        scale = min(1.0, self.frame_size_px / min(width, height))
        size = max(1, round(width * scale)), max(1, round(height * scale))
        if frame.interlaced_frame:
            frame = whole_lines(frame)
        if frame.color_trc in HDR:
            return to_sdr(self._convert(self.large, frame, *size, "rgb48le"), frame.color_trc)
        return self._convert(self.large, frame, *size, "rgb24")


def _display_matrix(frame: Any) -> Matrix:
    """(a, b, c, d) of the file's x' = a x + c y and y' = b x + d y: how a player turns and mirrors the frame."""
    data = frame.side_data.get(Type.DISPLAYMATRIX)
    if data is None:
        return 1, 0, 0, 1
    a, b, _, c, d, *_ = np.frombuffer(data, np.int32).tolist()
    return a, b, c, d


def _is_lying(matrix: Matrix) -> bool:
    return abs(matrix[0]) < abs(matrix[1])


def _upright(pixels: np.ndarray, matrix: Matrix) -> np.ndarray:
    """Pixels [h, w, ...] as a player shows them, by quarter turns and mirrorings."""
    a, b, c, d = matrix
    if _is_lying(matrix):  # phones store pictures lying on their side
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def whole_lines(frame: Any) -> Any:
    """An interlaced frame with the lines of one field alone, those between made of their neighbours."""
    graph = av.filter.Graph()
    clock = frame.time_base or Fraction(1, 1000)
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=clock)
    graph.link_nodes(source, graph.add("estdif", "mode=frame"), graph.add("buffersink")).configure()
    graph.push(frame)
    graph.push(None)
    return graph.pull()
