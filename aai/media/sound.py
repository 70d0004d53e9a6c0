"""Sound at one rate in one channel, laid on the clip's clock while it is decoded."""

from dataclasses import dataclass, field
from typing import Any

import av
import numpy as np

from aai.media.limits import ClipError, reason

_MAX_SOURCE_RATE_HZ = 768_000  # nothing is recorded faster; a forged rate makes the resampler's filter gigabytes large
_CHANGED = "rate or layout of the sound changes midway"


@dataclass
class SoundTrack:
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
        if not 0 < frame.sample_rate <= _MAX_SOURCE_RATE_HZ:
            raise ClipError("UNREADABLE", f"a sample rate of {frame.sample_rate} Hz")
        if time_s + frame.samples / frame.sample_rate <= self.start_s:
            return True
        if self.first_s is None:
            self.first_s, self.source_rate_hz = time_s, frame.sample_rate
            self.channels = frame.layout.nb_channels
        if frame.layout.nb_channels != self.channels:  # the queue would read a channel that is not there, and crash
            raise ClipError("UNREADABLE", _CHANGED)
        self.raw += frame.samples
        if self.raw > (self.max_duration_s + 1) * frame.sample_rate:  # before a low rate is resampled to millions
            raise ClipError("TOO_LONG", f"sound is longer than the limit of {self.max_duration_s:g} s")
        frame.pts = None  # samples are laid end to end; the first one's time places them all
        try:
            self.waiting.write(frame)
        except ValueError as error:
            raise ClipError("UNREADABLE", _CHANGED) from error
        if self.waiting.samples >= frame.sample_rate:  # frames are short: one call for a second of them
            self._take(self.waiting.read())
        return True

    def _take(self, frame: Any) -> None:
        """Resamples a frame (None: what the resampler still holds)."""
        try:
            frames = self.resampler.resample(frame)
        except av.FFmpegError as error:
            rule = f"sound of {self.channels} channels at {self.source_rate_hz} Hz cannot be mixed and resampled"
            raise ClipError("UNREADABLE", f"{rule} ({reason(error)})") from error
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
            self._take(self.waiting.read())
        self._take(None)
        audio = np.concatenate([*self.parts, np.zeros(0, np.float32)])
        offset = round((self.first_s - self.start_s) * self.sample_rate_hz)
        audio = audio[-offset:] if offset < 0 else np.concatenate([np.zeros(offset, np.float32), audio])
        if np.isfinite(self.end_s):
            audio = audio[: round((self.end_s - self.start_s) * self.sample_rate_hz)]
        return np.ascontiguousarray(audio, np.float32)
