"""How long a file is and where its shots change, for cutting long videos into clips. Times count as decoding's do.

A file that is broken in parts is followed as far as it can be read: whether a clip is good is for its decoding to say.
"""

import importlib.util
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import Interpolation, VideoReformatter

from aai.errors import UserError
from aai.media.container import (
    find_audio,
    find_video,
    open_media,
    packets,
    shared_origin_s,
    stream_start_s,
    video_stream,
)
from aai.media.limits import ClipError, Deadline, DecodeConfig
from aai.media.ranged import Content

log = logging.getLogger(__name__)

_COMPARED_PX = 128  # longer side of the pictures that are compared
_BREAK_S, _BREAK_FRACTION = 1.0, 0.02  # content that ends this much before what its header promises is cut off


@dataclass(frozen=True, slots=True)
class Extent:
    """How much of a file can be read."""

    duration_s: float
    is_whole: bool
    """Whether that is all that its header promises."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What is known of a file that is to be cut: its extent, and its shots if they were looked for."""

    duration_s: float
    is_whole: bool
    shots: tuple[tuple[float, float], ...] | None = None
    """(start, end) in seconds."""
    content_hash: str | None = None
    """SHA-256 of a file that is too large to be read once more for it."""


def probe_to_json(found: Probe | ClipError) -> dict[str, Any]:
    """A probe, or why there is none, as JSON values."""
    if isinstance(found, ClipError):
        return {"code": found.code, "message": found.message, "transient": found.transient}
    values: dict[str, Any] = {"duration_s": found.duration_s, "is_whole": found.is_whole}
    if found.shots is not None:
        values["shots"] = [list(shot) for shot in found.shots]
    return values if found.content_hash is None else values | {"content_hash": found.content_hash}


def probe_from_json(values: Mapping[str, Any]) -> Probe | ClipError:
    """What `probe_to_json` gave."""
    if "code" in values:
        return ClipError(values["code"], values["message"], values["transient"])
    shots = tuple((start_s, end_s) for start_s, end_s in values["shots"]) if "shots" in values else None
    return Probe(values["duration_s"], values["is_whole"], shots, values.get("content_hash"))


def probe_bytes(
    data: Content, shot_threshold: float | None, max_file_s: float, cfg: DecodeConfig, timeout_s: float
) -> Probe | ClipError:
    """The length of a file, with a threshold its shots too; of a bad file, what is wrong with it. Nothing is raised.

    max_file_s: a longer file is TOO_LONG. The rest is as in `extent` and `shots`; the time limit holds for each.
    """
    try:
        length = extent(data, cfg, timeout_s)
        if length.duration_s > max_file_s:
            raise ClipError("TOO_LONG", f"{length.duration_s:.0f} s are over the limit of {max_file_s:g} s")
        found = None if shot_threshold is None else tuple(shots(data, shot_threshold, cfg, timeout_s))
        return Probe(length.duration_s, length.is_whole, found)
    except ClipError as error:
        return error
    except MemoryError:
        return ClipError("OUT_OF_MEMORY", f"the file needs more than the limit of {cfg.max_memory_mb} MB")
    except Exception as error:  # one file must not end the job
        log.exception("unexpected error in a file that is to be cut")
        return ClipError("UNEXPECTED", f"{type(error).__name__}: {error}"[:300])


def require_shots() -> None:
    """Raises UserError where the packages that find shots are missing; imports nothing."""
    for name in ("cv2", "scenedetect"):
        if importlib.util.find_spec(name) is None:
            remedy = "pip install 'aai[shots]', or cut in windows"
            raise UserError("cut.mode", "shots", f"needs the package {name}", remedy)


def extent(data: Content, cfg: DecodeConfig, timeout_s: float) -> Extent:
    """Length of the longer of sound and video, from the times of the packets; nothing is decoded.

    Raises ClipError: EMPTY_FILE, TOO_LARGE, UNREADABLE or TIMEOUT.
    """
    with open_media(data, cfg.max_bytes, cfg.max_streams) as container:
        streams = _streams(container, cfg)
        origin_s = shared_origin_s(streams)
        ends_s = {stream.index: 0.0 for stream in streams}
        for packet in packets(container, streams, Deadline(timeout_s), to_the_break=True):
            begin = packet.pts if packet.pts is not None else packet.dts
            if begin is not None and packet.time_base:
                end_s = float((begin + (packet.duration or 0)) * packet.time_base) - origin_s
                ends_s[packet.stream.index] = max(ends_s[packet.stream.index], end_s)
        missing_s = max(_promised_s(stream, origin_s) - ends_s[stream.index] for stream in streams)
    found_s = max(ends_s.values())
    if not found_s:
        raise ClipError("UNREADABLE", "no packet has a place in time")
    return Extent(found_s, missing_s <= max(_BREAK_S, _BREAK_FRACTION * found_s))


def shots(data: Content, threshold: float, cfg: DecodeConfig, timeout_s: float) -> list[tuple[float, float]]:
    """(start, end) in seconds of each shot, up to the last frame; all frames are decoded once, in order.

    threshold: how many times stronger than its neighbours' a change must be to count as a cut (PySceneDetect's
    AdaptiveDetector). Ends lie less than 1 ms before the cut and starts less than 1 ms after, so that no shot shows a
    frame of another. Raises ClipError as `extent` does, and NO_VIDEO.
    """
    detector = _detector(threshold)
    from scenedetect import FrameTimecode
    from scenedetect.common import Timecode

    with open_media(data, cfg.max_bytes, cfg.max_streams) as container:
        video = video_stream(container, cfg)
        origin_s = shared_origin_s(_streams(container, cfg))
        rate = video.average_rate or video.guessed_rate or 25
        cuts, first, last, end_s = [], 0, None, 0.0
        for frame, picture in _pictures(container, video, Deadline(timeout_s)):
            if last is None:
                first = frame.pts
            last = FrameTimecode(Timecode(frame.pts - first, frame.time_base), fps=rate)
            cuts += detector.process_frame(last, picture)
            end_s = float((frame.pts + (frame.duration or 0)) * frame.time_base) - origin_s
            start_s = float(first * frame.time_base) - origin_s
        if last is None:
            raise ClipError("NO_VIDEO", "the video stream holds no frame that can be decoded")
        cuts += detector.post_process(last)
    edges = [0.0, *(start_s + cut.seconds for cut in cuts), end_s]
    inner = [(math.ceil(a * 1000) / 1000, math.floor(b * 1000) / 1000) for a, b in pairwise(edges)]
    return [(a, b) for a, b in inner if b > a]


def _detector(threshold: float) -> Any:
    import cv2
    from scenedetect import AdaptiveDetector

    cv2.setNumThreads(1)  # pictures are small, and workers fill the cores already
    return AdaptiveDetector(adaptive_threshold=threshold, min_scene_len=0)


def _streams(container: InputContainer, cfg: DecodeConfig) -> list[Any]:
    """The video and the sound that clips are made of, or the one of them that is there."""
    found = [stream for stream in (find_video(container, cfg), find_audio(container)) if stream is not None]
    if not found:
        raise ClipError("UNREADABLE", "neither video nor sound that can be decoded")
    return found


def _promised_s(stream: Any, origin_s: float) -> float:
    if stream.duration is None:
        return 0.0
    return stream_start_s(stream) + float(stream.duration * stream.time_base) - origin_s


def _pictures(container: InputContainer, video: Any, clock: Deadline) -> Iterator[tuple[Any, np.ndarray]]:
    """Frames in the order of their times, each with a small BGR picture [h, w, 3] of one size throughout."""
    scaler, size, before = VideoReformatter(), (0, 0), None
    for packet in packets(container, [video], clock, to_the_break=True):
        try:
            frames = packet.decode()
        except av.FFmpegError:
            continue
        for frame in frames:
            if frame.pts is None or (before is not None and frame.pts <= before):
                continue
            before = frame.pts
            if not size[0]:
                scale = min(1.0, _COMPARED_PX / max(frame.width, frame.height))
                size = max(2, round(frame.width * scale)), max(2, round(frame.height * scale))
            small = scaler.reformat(frame, *size, "bgr24", interpolation=Interpolation.AREA, threads=1)
            yield frame, small.to_ndarray()
