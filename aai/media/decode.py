"""Clips from bytes: every limit is checked while decoding, so that a hostile file costs what a good one costs.

The video is decoded once and in order (seeking to each frame is slower), frames are chosen by time, never by
index, and sound and picture share one origin: the earlier of the two streams' starts. Variable frame rates and
non-zero start times are therefore right by construction.
"""

import io
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import av
import numpy as np
import pydantic
from av.container import InputContainer
from av.video.reformatter import Interpolation, VideoReformatter

from aai.config import Config

FORMATS = "mov,mp4,m4a,matroska,webm,avi,mpegts,mpeg,flv,asf,wav,w64,aiff,au,caf,mp3,flac,ogg,aac,amr"
"""Containers that are opened. Playlists are not among them: those name other files."""
LUMA_PX = 32
_MAX_RAW_RATE_HZ = 192_000  # samples per second and channel; a forged rate must not stretch the limits


class ClipError(Exception):
    """Why a clip cannot be used. `code` is stable (UPPER_CASE), `transient` means that a retry may help."""

    def __init__(self, code: str, message: str, transient: bool = False) -> None:
        self.code, self.message, self.transient = code, message, transient
        super().__init__(code, message, transient)

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class DecodeConfig(Config):
    """How clips are decoded, and the limits beyond which they are refused."""

    num_frames: int = pydantic.Field(4, ge=1, le=64)
    """Frames kept of each clip (K), evenly spaced in time."""
    frame_size_px: int = pydantic.Field(64, ge=16)
    """Shorter side of the kept frames; set it to the input size of the CLIP in use or above."""
    sample_rate_hz: int = pydantic.Field(16_000, ge=8_000)
    """Rate of the kept mono audio."""
    max_bytes: int = pydantic.Field(512 * 2**20, gt=0)
    """Largest file that is opened."""
    max_pixels: int = pydantic.Field(4096 * 2304, gt=0)
    """Largest width x height that is decoded."""
    max_duration_s: float = pydantic.Field(600, gt=0)
    """Longest clip (end_s - start_s, or the whole file) that is decoded."""
    max_streams: int = pydantic.Field(16, ge=1)
    """Most streams in one file."""
    max_corrupt_fraction: float = pydantic.Field(0.05, ge=0, le=1)
    """Share of packets that may fail to decode before the file counts as unreadable."""
    timeout_s: float = pydantic.Field(60, gt=0)
    """Wall-clock limit per clip."""
    decode_threads: int = pydantic.Field(1, ge=1)
    """Threads of the video decoder; workers already fill the cores."""


@dataclass(frozen=True)
class DecodedClip:
    """One clip: sound, K frames, and what was read off the streams. Times count from the clip's start."""

    audio: np.ndarray  # float32 [S], mono
    frames: np.ndarray  # uint8 [K, h, w, 3], RGB
    frame_pts_s: list[float]  # [K], true times; the first may lie just before 0
    luma: np.ndarray  # uint8 [N, 32, 32], of all N decoded frames
    luma_pts_s: np.ndarray  # float64 [N]
    duration_s: float
    width: int
    height: int
    fps: float
    source_sample_rate_hz: int
    channels: int
    av_gap_s: float


@dataclass
class _Deadline:
    timeout_s: float
    started: float = field(default_factory=time.monotonic)

    def check(self) -> None:
        if time.monotonic() - self.started > self.timeout_s:
            raise ClipError("TIMEOUT", f"decoding took longer than {self.timeout_s:g} s", transient=True)


@dataclass
class _Sound:
    """Collects resampled audio inside [start_s, end_s) of the shared clock."""

    sample_rate_hz: int
    start_s: float
    end_s: float
    max_duration_s: float
    parts: list[np.ndarray] = field(default_factory=list)
    first_s: float | None = None
    length: int = 0
    raw: int = 0
    source_rate_hz: int = 0
    channels: int = 0

    def __post_init__(self) -> None:
        # To integers, because only then are channels averaged to full scale at most; to floats they are summed.
        self.waiting = av.AudioFifo()
        self.resampler = av.AudioResampler("s32p", "mono", self.sample_rate_hz)

    def add(self, frame: Any, time_s: float) -> bool:
        """Takes one decoded frame at its time; False when the window is over."""
        if time_s >= self.end_s:
            return False
        if time_s + frame.samples / frame.sample_rate <= self.start_s:
            return True
        if self.first_s is None:
            self.first_s, self.source_rate_hz = time_s, frame.sample_rate
            self.channels = frame.layout.nb_channels
        self.raw += frame.samples
        if self.raw > (self.max_duration_s + 1) * _MAX_RAW_RATE_HZ:
            raise ClipError("TOO_LONG", f"more than {self.raw} samples of sound")
        frame.pts = None  # samples are laid end to end; the first one's time places them all
        try:
            self.waiting.write(frame)
        except ValueError as error:
            raise ClipError("UNREADABLE", "rate or layout of the sound changes midway") from error
        if self.waiting.samples >= frame.sample_rate:  # frames are short: one call for a second of them
            self._take(self.resampler.resample(self.waiting.read()))
        return True

    def _take(self, frames: list[Any]) -> None:
        for out in frames:
            self.parts.append(out.to_ndarray().reshape(-1).astype(np.float32) / np.float32(2**31))
            self.length += out.samples
        if self.length > (self.max_duration_s + 1) * self.sample_rate_hz:
            raise ClipError("TOO_LONG", f"sound is longer than the limit of {self.max_duration_s:g} s")

    def finish(self) -> np.ndarray:
        """The samples [S] from start_s on: a lead is cut, a late start is filled with silence."""
        if self.first_s is None:
            return np.zeros(0, np.float32)
        if self.waiting.samples:
            self._take(self.resampler.resample(self.waiting.read()))
        self._take(self.resampler.resample(None))
        audio = np.concatenate([*self.parts, np.zeros(0, np.float32)])
        offset = round((self.first_s - self.start_s) * self.sample_rate_hz)
        audio = audio[-offset:] if offset < 0 else np.concatenate([np.zeros(offset, np.float32), audio])
        if np.isfinite(self.end_s):
            audio = audio[: round((self.end_s - self.start_s) * self.sample_rate_hz)]
        return np.ascontiguousarray(audio, np.float32)


class _Pictures:
    """Collects small lumas of all frames inside the window, and the frames shown at the target times."""

    def __init__(self, start_s: float, end_s: float, targets_s: np.ndarray, cfg: DecodeConfig) -> None:
        self.start_s, self.end_s, self.targets_s, self.cfg = start_s, end_s, targets_s, cfg
        # Each keeps the set-up of its last conversion; one for both would set up anew for every frame.
        self.small, self.large = VideoReformatter(), VideoReformatter()
        self.luma: list[np.ndarray] = []
        self.luma_pts_s: list[float] = []
        self.kept: list[np.ndarray] = []
        self.kept_pts_s: list[float] = []
        self.shown: tuple[Any, float] | None = None
        self.last_end_s = 0.0
        self.size = (0, 0)

    def add(self, frame: Any, time_s: float) -> bool:
        """Takes one decoded frame at its time; False when the window is over."""
        if frame.width * frame.height > self.cfg.max_pixels:
            raise ClipError("TOO_LARGE", f"frame of {frame.width}x{frame.height} px is over the limit")
        if time_s >= self.end_s:
            return False
        if time_s - self.start_s > self.cfg.max_duration_s + 1:
            raise ClipError("TOO_LONG", f"video is longer than the limit of {self.cfg.max_duration_s:g} s")
        self._keep_shown(until_s=time_s)
        self.shown, self.size = (frame, time_s), (frame.width, frame.height)
        length_s = float((frame.duration or 0) * frame.time_base) if frame.time_base else 0.0
        self.last_end_s = time_s + length_s
        if self.last_end_s > self.start_s or not length_s:
            self.luma.append(self._convert(self.small, frame, LUMA_PX, LUMA_PX, "gray"))
            self.luma_pts_s.append(time_s - self.start_s)
        return True

    def _keep_shown(self, until_s: float) -> None:
        """Keeps the frame on show for every target before `until_s`; before the first frame, the first one."""
        while self.shown and len(self.kept) < len(self.targets_s):
            if self.targets_s[len(self.kept)] >= until_s:
                break
            frame, time_s = self.shown
            self.kept.append(self._scaled(frame))
            self.kept_pts_s.append(time_s - self.start_s)

    @staticmethod
    def _convert(reformatter: VideoReformatter, frame: Any, width: int, height: int, pixels: str) -> np.ndarray:
        # One thread: pictures are small, and a pool of threads per clip costs more than it brings.
        area = Interpolation.AREA
        return reformatter.reformat(frame, width, height, pixels, interpolation=area, threads=1).to_ndarray()

    def _scaled(self, frame: Any) -> np.ndarray:
        scale = self.cfg.frame_size_px / min(frame.width, frame.height)
        width, height = round(frame.width * scale), round(frame.height * scale)
        rgb = self._convert(self.large, frame, width, height, "rgb24")
        quarter_turns = round(frame.rotation / 90) % 4  # phones store pictures lying on their side
        return np.ascontiguousarray(np.rot90(rgb, quarter_turns))

    def finish(self) -> None:
        """Ends the stream: the last frame stays on show."""
        self._keep_shown(until_s=float("inf"))


def _open(data: bytes, max_bytes: int, max_streams: int) -> InputContainer:
    """Opens a file in memory; the caller closes it."""
    if not data:
        raise ClipError("EMPTY_FILE", "file of 0 bytes")
    if len(data) > max_bytes:
        raise ClipError("TOO_LARGE", f"file of {len(data)} bytes is over the limit of {max_bytes}")
    options = {"format_whitelist": FORMATS, "protocol_whitelist": "none"}
    try:
        container = av.open(io.BytesIO(data), "r", options=options)
    except (av.FFmpegError, ValueError) as error:
        raise ClipError("UNREADABLE", f"not a media file that can be opened ({_reason(error)})") from error
    if len(container.streams) > max_streams:
        container.close()
        raise ClipError("TOO_LARGE", f"{len(container.streams)} streams are over the limit of {max_streams}")
    return container


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).split("\n")[0][:120]


def _audio_stream(container: InputContainer) -> Any:
    stream = next(iter(container.streams.audio), None)
    if stream is None or stream.codec_context is None or not stream.codec_context.sample_rate:
        raise ClipError("NO_AUDIO", "no audio stream that can be decoded")
    return stream


def _video_stream(container: InputContainer, cfg: DecodeConfig) -> Any:
    cover = av.stream.Disposition.attached_pic
    stream = next((s for s in container.streams.video if not s.disposition & cover), None)
    if stream is None or stream.codec_context is None:
        raise ClipError("NO_VIDEO", "no video stream that can be decoded")
    context = stream.codec_context
    if context.width * context.height > cfg.max_pixels:
        raise ClipError("TOO_LARGE", f"video of {context.width}x{context.height} px is over the limit")
    context.options = {"max_pixels": str(cfg.max_pixels)}  # also refuses frames that grow on the way
    context.thread_count = cfg.decode_threads
    context.thread_type = "AUTO" if cfg.decode_threads > 1 else "NONE"
    return stream


def _start_s(stream: Any) -> float:
    return float(stream.start_time * stream.time_base) if stream.start_time is not None else 0.0


def _frames(
    container: InputContainer, streams: list[Any], cfg: DecodeConfig, clock: _Deadline
) -> Iterator[tuple[Any, Any]]:
    """Decoded (stream, frame) pairs in file order; a few corrupt packets are skipped, more are an error."""
    total, bad, reason = 0, 0, ""
    try:
        for packet in container.demux(*streams):
            clock.check()
            total += 1
            try:
                frames = packet.decode()
            except av.FFmpegError as error:
                bad += 1
                reason = _reason(error)
                continue
            for frame in frames:
                yield packet.stream, frame
    except av.FFmpegError as error:
        raise ClipError("UNREADABLE", f"reading broke off ({_reason(error)})") from error
    if bad > cfg.max_corrupt_fraction * total:
        raise ClipError("UNREADABLE", f"{bad} of {total} packets are corrupt ({reason})")


def _declared_s(container: InputContainer, origin_s: float) -> float:
    """Length of the whole file from its origin by its header; 0 when the header does not say."""
    if container.duration is None or container.duration <= 0:
        return 0.0
    start_s = (container.start_time or 0) / av.time_base
    return float(max(0.0, start_s + container.duration / av.time_base - origin_s))


def _check_whole(stream: Any, origin_s: float, end_s: float, read_until_s: float) -> None:
    """A file cut off in the middle has a good header: compare what it promised with what came."""
    if stream.duration is None:
        return
    promised_s = min(_start_s(stream) + float(stream.duration * stream.time_base) - origin_s, end_s)
    if promised_s - read_until_s > max(0.25, 0.1 * promised_s):
        raise ClipError(
            "UNREADABLE", f"{stream.type} breaks off at {read_until_s:.2f} s of {promised_s:.2f} s declared"
        )


def _decode_once(
    data: bytes, start_s: float, end_s: float, length_s: float | None, cfg: DecodeConfig, clock: _Deadline
) -> tuple[DecodedClip, float]:
    """One pass over the file. `length_s`: of the clip, if known. Returns the clip and the length assumed."""
    with _open(data, cfg.max_bytes, cfg.max_streams) as container:
        video, audio = _video_stream(container, cfg), _audio_stream(container)
        origin_s = min(_start_s(video), _start_s(audio))
        declared_s = _declared_s(container, origin_s)
        if declared_s and start_s >= declared_s:
            raise ClipError("OUT_OF_RANGE", f"start_s={start_s:g} is past the end at {declared_s:.2f} s")
        assumed_s = length_s or max(0.0, min(end_s, declared_s) - start_s)
        if assumed_s > cfg.max_duration_s:
            raise ClipError("TOO_LONG", f"{assumed_s:.1f} s are over the limit of {cfg.max_duration_s:g} s")
        targets_s = start_s + (np.arange(cfg.num_frames) + 0.5) / cfg.num_frames * assumed_s
        pictures = _Pictures(start_s, end_s, targets_s if assumed_s else np.zeros(0), cfg)
        sound = _Sound(cfg.sample_rate_hz, start_s, end_s, cfg.max_duration_s)
        if start_s > 1:
            container.seek(int((start_s + origin_s) * av.time_base), backward=True)
        running = {video.index: True, audio.index: True}
        for stream, frame in _frames(container, [video, audio], cfg, clock):
            if frame.pts is None:  # no place in time
                continue
            taker = pictures if stream.index == video.index else sound
            running[stream.index] = taker.add(frame, frame.time - origin_s)
            if not any(running.values()):
                break
        pictures.finish()
        samples = sound.finish()
        audio_s = len(samples) / cfg.sample_rate_hz
        _check_whole(video, origin_s, end_s, pictures.last_end_s)
        _check_whole(audio, origin_s, end_s, start_s + audio_s)
        return _clip(pictures, sound, samples, video, end_s), assumed_s


def _clip(pictures: _Pictures, sound: _Sound, samples: np.ndarray, video: Any, end_s: float) -> DecodedClip:
    if not pictures.luma:
        raise ClipError("NO_VIDEO", "the video stream holds no frame of this clip")
    if not len(samples):
        raise ClipError("NO_AUDIO", "the audio stream holds no sample of this clip")
    audio_s = len(samples) / sound.sample_rate_hz
    video_s = min(pictures.last_end_s, end_s) - pictures.start_s
    rate = video.average_rate or video.guessed_rate
    return DecodedClip(
        audio=samples,
        frames=np.stack(pictures.kept) if pictures.kept else np.zeros((0, 0, 0, 3), np.uint8),
        frame_pts_s=pictures.kept_pts_s,
        luma=np.stack(pictures.luma),
        luma_pts_s=np.array(pictures.luma_pts_s),
        duration_s=max(audio_s, video_s),
        width=pictures.size[0],
        height=pictures.size[1],
        fps=float(rate) if rate else len(pictures.luma) / max(video_s, 1e-3),
        source_sample_rate_hz=sound.source_rate_hz,
        channels=sound.channels,
        av_gap_s=abs(audio_s - video_s),
    )


def decode_clip(data: bytes, start_s: float | None, end_s: float | None, cfg: DecodeConfig) -> DecodedClip:
    """Decodes the part [start_s, end_s) of a media file held in memory (None: from its start, to its end).

    K frames: the frame on show at each of K times (k + 0.5) / K of the clip. Raises ClipError with one of the
    codes EMPTY_FILE, UNREADABLE, NO_VIDEO, NO_AUDIO, OUT_OF_RANGE, TOO_LONG, TOO_LARGE, TIMEOUT.
    """
    start, end = start_s or 0.0, float("inf") if end_s is None else end_s
    if start < 0 or end <= start:
        raise ClipError("OUT_OF_RANGE", f"start_s={start_s} and end_s={end_s} do not span a clip")
    clock = _Deadline(cfg.timeout_s)
    clip, assumed_s = _decode_once(data, start, end, None, cfg, clock)
    if abs(clip.duration_s - assumed_s) > max(0.25, 0.1 * clip.duration_s):  # the header was silent or wrong
        clip, _ = _decode_once(data, start, end, clip.duration_s, cfg, clock)
    return clip


def decode_audio(
    data: bytes, max_duration_s: float, max_bytes: int, sample_rate_hz: int = 16_000, timeout_s: float = 30
) -> np.ndarray:
    """Any sound file (or the sound of a video) as mono float32 [S].

    Raises ClipError: EMPTY_AUDIO for 0 seconds, else a code of `decode_clip`.
    """
    cfg = DecodeConfig(max_duration_s=max_duration_s, max_bytes=max_bytes, timeout_s=timeout_s)
    with _open(data, max_bytes, cfg.max_streams) as container:
        stream = _audio_stream(container)
        if _declared_s(container, _start_s(stream)) > max_duration_s + 0.1:
            raise ClipError("TOO_LONG", f"sound is longer than the limit of {max_duration_s:g} s")
        sound = _Sound(sample_rate_hz, 0.0, float("inf"), max_duration_s)
        first_s: float | None = None
        for _, frame in _frames(container, [stream], cfg, _Deadline(timeout_s)):
            time_s = float(frame.time or 0.0)
            first_s = time_s if first_s is None else first_s
            sound.add(frame, time_s - first_s)
        samples = sound.finish()
    if not len(samples):
        raise ClipError("EMPTY_AUDIO", "the file holds no sound (0 seconds)")
    if len(samples) > round((max_duration_s + 0.1) * sample_rate_hz):
        raise ClipError("TOO_LONG", f"sound is longer than the limit of {max_duration_s:g} s")
    return samples
