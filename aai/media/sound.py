"""Sound at one rate in one channel, laid on the clip's clock while it is decoded."""

from dataclasses import dataclass, field
from typing import Any

import av
import numpy as np

from aai.media.limits import ClipError, reason

_MAX_SOURCE_RATE_HZ = 768_000  # nothing is recorded faster; a forged rate makes the resampler's filter gigabytes large
_CHANGED = "rate or layout of the sound changes midway"
_HOLE_S = 0.02  # one lost AAC frame is 0.021 s; less is the rounding of time stamps
_HEADROOM = 4.0  # the parts of the mix-down below add up to 3.1 for 7.1 channels


def _mixer(channels: int, sample_rate_hz: int) -> tuple[av.AudioResampler, float]:
    """What makes mono of so many channels, and the factor to full scale of what comes out.

    A sound in the middle is as loud from any layout: left and right count half, the centre is whole, surround channels
    are 3 dB below left and right as in ITU-R BS.775. The library's own mix of 5.1 puts the centre 10.7 dB lower.
    """
    # To integers, because only then are two channels averaged to full scale at most; to floats they are summed.
    if channels <= 2:
        return av.AudioResampler("s32p", "mono", sample_rate_hz), 1.0
    # The library's matrix has left and right at 0.707 and the centre at 1.414 x center_mix_level.
    options = {"center_mix_level": "1", "rematrix_maxval": "1000", "rematrix_volume": f"{0.5**0.5 / _HEADROOM:.6f}"}
    return av.AudioResampler("s32p", "mono", sample_rate_hz, options=options), _HEADROOM


@dataclass
class SoundTrack:
    """Collects resampled audio inside [start_s, end_s) of the shared clock.

    Frames are laid end to end as long as their times agree with that; behind a hole or before an overlap a new run
    begins at its own time.
    """

    sample_rate_hz: int
    start_s: float
    end_s: float
    max_duration_s: float
    next_s: float | None = None
    """When the next frame begins if it does not say; None: nobody knows, and such a frame is left out."""
    runs: list[tuple[float, list[np.ndarray]]] = field(default_factory=list)
    """(time of the first sample, resampled parts) of what is without a hole."""
    length: int = 0
    raw: int = 0
    source_rate_hz: int = 0
    channels: int = 0
    is_over: bool = False
    """Whether the sound goes on behind the window."""

    def add(self, frame: Any, time_s: float | None) -> bool:
        """Takes one decoded frame at its time; False when the window is over."""
        time_s = self.next_s if time_s is None else time_s
        if time_s is None:
            return True
        if time_s >= self.end_s:
            self.is_over = True
            return False
        if not 0 < frame.sample_rate <= _MAX_SOURCE_RATE_HZ:
            raise ClipError("UNREADABLE", f"a sample rate of {frame.sample_rate} Hz")
        length_s = frame.samples / frame.sample_rate
        if time_s + length_s <= self.start_s:
            self.next_s = time_s + length_s
            return True
        if time_s - self.start_s > self.max_duration_s + 1:  # silence would fill it
            raise ClipError("TOO_LONG", f"sound is longer than the limit of {self.max_duration_s:g} s")
        if not self.runs or self.next_s is None or abs(time_s - self.next_s) > _HOLE_S:
            self._begin(frame, time_s)
            self.next_s = time_s
        self.next_s += length_s  # not the frame's own time: errors of rounding would tear the sound apart
        self._queue(frame)
        return True

    def _begin(self, frame: Any, time_s: float) -> None:
        """Ends the run so far, and begins another."""
        self._drain()
        if not self.runs:
            self.source_rate_hz, self.channels = frame.sample_rate, frame.layout.nb_channels
        self.waiting = av.AudioFifo()
        self.resampler, self.full_scale = _mixer(self.channels, self.sample_rate_hz)
        self.runs.append((time_s, []))

    def _queue(self, frame: Any) -> None:
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

    def _take(self, frame: Any) -> None:
        """Resamples a frame (None: what the resampler still holds)."""
        try:
            frames = self.resampler.resample(frame)
        except av.FFmpegError as error:
            rule = f"sound of {self.channels} channels at {self.source_rate_hz} Hz cannot be mixed and resampled"
            raise ClipError("UNREADABLE", f"{rule} ({reason(error)})") from error
        for out in frames:
            samples = out.to_ndarray().reshape(-1).astype(np.float32)
            self.runs[-1][1].append(samples * np.float32(self.full_scale / 2**31))
            self.length += out.samples
        if self.length > (self.max_duration_s + 1) * self.sample_rate_hz:
            raise ClipError("TOO_LONG", f"sound is longer than the limit of {self.max_duration_s:g} s")

    def _drain(self) -> None:
        if not self.runs:
            return
        if self.waiting.samples:
            self._take(self.waiting.read())
        self._take(None)

    def finish(self) -> np.ndarray:
        """The samples [S] from start_s on: holes are silent, of what overlaps the earlier stays, a lead is cut."""
        self._drain()
        pieces, length = [np.zeros(0, np.float32)], 0
        for begin_s, parts in self.runs:
            hole = round((begin_s - self.start_s) * self.sample_rate_hz) - length
            samples = np.concatenate([*parts, np.zeros(0, np.float32)])[max(0, -hole) :]
            pieces += [np.zeros(max(0, hole), np.float32), samples]
            length += max(0, hole) + len(samples)
        if np.isfinite(self.end_s):
            wanted = round((self.end_s - self.start_s) * self.sample_rate_hz)
            pieces.append(np.zeros(max(0, wanted - length) if self.runs and self.is_over else 0, np.float32))
            length = wanted
        audio = np.concatenate(pieces)[:length]
        if self.channels > 2 and len(audio) and (peak := float(np.abs(audio).max())) > 1:
            audio /= peak  # all of it, so that nothing is clipped
        return np.ascontiguousarray(audio, np.float32)
