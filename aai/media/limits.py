"""What a clip may cost, and what happens when it costs more or cannot be read."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import av
import pydantic

from aai.config import Config

SAMPLE_RATE_HZ = 16_000
"""Default rate at which sound is kept and heard."""


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
    """Shorter side of the kept frames; a smaller source keeps its own size."""
    policy: Literal["exact", "keyframe", "auto"] = "exact"
    """Which frames stand for the K times: exactly those on show, the nearest key frames (many times faster; a clip
    with few of them gives the same one twice), or key frames where they are near enough."""
    max_time_error_s: float = pydantic.Field(0.5, ge=0)
    """How far off a key frame may be with policy=auto; else the frame on show is decoded."""
    sample_rate_hz: int = pydantic.Field(SAMPLE_RATE_HZ, ge=8_000)
    """Rate of the kept mono audio; the encoder that hears it must have the same (encoder.sample_rate_hz)."""
    max_bytes: int = pydantic.Field(64 * 2**30, gt=0)
    """Largest file that is opened; large ones are read by range, not held in memory."""
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
    max_memory_mb: int = pydantic.Field(4096, ge=1024)
    """Address space of the child process that decodes."""
    recycle_after: int = pydantic.Field(500, ge=1)
    """Clips after which that child is replaced by a fresh one."""
    decode_threads: int = pydantic.Field(1, ge=1)
    """Threads of the video decoder; workers already fill the cores."""


@dataclass
class Deadline:
    """The soft limit: checked between packets, so it ends a clip by an error of its own."""

    timeout_s: float
    started: float = field(default_factory=time.monotonic)

    def check(self) -> None:
        """Raises TIMEOUT when the clip has taken longer than it may."""
        if time.monotonic() - self.started > self.timeout_s:
            raise ClipError("TIMEOUT", f"decoding took longer than {self.timeout_s:g} s", transient=True)


@dataclass
class Tally:
    """Packets that were decoded and those that failed to: a few are skipped, more are an error."""

    max_corrupt_fraction: float
    total: int = 0
    bad: int = 0
    reason: str = ""

    def decode(self, decoder: Callable[[Any], list[Any]], packet: Any) -> list[Any]:
        """The frames that come out when `packet` goes in (None: the last ones)."""
        self.total += 1
        try:
            return decoder(packet)
        except av.FFmpegError as error:
            self.bad += 1
            self.reason = reason(error)
            return []

    def check(self) -> None:
        """Raises UNREADABLE when too many packets failed."""
        if self.bad > self.max_corrupt_fraction * self.total:
            raise ClipError("UNREADABLE", f"{self.bad} of {self.total} packets are corrupt ({self.reason})")


def reason(error: Exception) -> str:
    """An error of the decoder library in one short line."""
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).split("\n")[0][:120]
