"""The few pictures that are kept of a video, by decoding as little of it as gives them.

All packets are read, which is cheap; their times say which frames are wanted, and only the groups of pictures that
hold those are decoded, each up to the last wanted frame. There is no seeking.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from aai.media.limits import ClipError, Deadline, DecodeConfig, Tally
from aai.media.picking import pick, seconds, spans
from aai.media.showing import Picture, Scaler, pixel_aspect

HASH_FRAMES = 4
"""Evenly spaced pictures that the perceptual hash is made of."""
_LATER = 5 / 16
"""Of a frame: so much later than evenly spaced. Eighths of a clip often fall on the very moment where a frame begins,
and another container or speed rounds that moment the other way; a sixteenth is as far from all eighths as can be."""
_MAX_FPS = 1000  # packets per second; a forged index must not fill the memory
# Decoding from any key frame gives what decoding from the start does (tests hold that); others are decoded whole.
_FROM_KEY_FRAME = {"h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "mpeg4", "mpeg2video", "mjpeg"}
_SAME_RATE = 0.1  # a dropped frame or two make no other rate, and times may be in whole milliseconds
_SKIPS_UNREFERENCED = {"h264", "hevc"}


class Pictures:
    """Collects the packets of a window [start_s, end_s) of the shared clock, then decodes what is wanted."""

    def __init__(
        self, stream: Any, origin_s: float, start_s: float, end_s: float, cfg: DecodeConfig, tally: Tally
    ) -> None:
        self.stream, self.origin_s, self.start_s, self.end_s = stream, origin_s, start_s, end_s
        self.cfg, self.tally, self.scaler = cfg, tally, Scaler(cfg.frame_size_px, pixel_aspect(stream))
        self.time_base = stream.time_base
        self.packets: list[Any] = []
        self.in_avi = stream.container.format.name == "avi"  # made-up times: one per frame, in the order of decoding
        self.last_key = 0
        self.count = 0  # frames within the window
        self.shown_s = (np.inf, -np.inf)  # of the first and the last of these
        self.last_end_s = 0.0

    def _time_s(self, pts: int) -> float:
        return seconds(pts, self.time_base) - self.origin_s

    def add(self, packet: Any) -> bool:
        """Takes one packet; False when the window is over."""
        if not packet.size:  # the end of the stream
            return True
        if packet.dts is not None and self._time_s(packet.dts) >= self.end_s:
            return False
        if packet.is_keyframe and packet.pts is not None and self._time_s(packet.pts) <= self.start_s:
            del self.packets[: self.last_key]  # nothing wanted is shown before; the last group may yet be referred to
            self.last_key = len(self.packets)
        self.packets.append(packet)
        if len(self.packets) > (self.cfg.max_duration_s + 1) * _MAX_FPS:
            raise ClipError("TOO_LONG", f"more than {len(self.packets)} video packets")
        stamp = packet.dts if packet.pts is None or self.in_avi else packet.pts
        if stamp is None or packet.is_discard or self._time_s(stamp) >= self.end_s:
            return True
        time_s = self._time_s(stamp)
        if time_s - self.start_s > self.cfg.max_duration_s + 1:
            raise ClipError("TOO_LONG", f"video is longer than the limit of {self.cfg.max_duration_s:g} s")
        length_s = seconds(packet.duration or 0, self.time_base)
        self.last_end_s = max(self.last_end_s, time_s + length_s)
        if time_s + length_s > self.start_s or not length_s:
            self.count += 1
            self.shown_s = min(self.shown_s[0], time_s), max(self.shown_s[1], time_s)
        return True

    def rate(self, duration_s: float) -> float:
        """Frames per second as the file declares it where its own frames agree, else theirs; of one frame, 1 / length.

        Files may declare the resolution of their clock instead, such as 1000.
        """
        span_s = self.shown_s[1] - self.shown_s[0]
        rate = (self.count - 1) / span_s if span_s > 0 else self.count / max(duration_s, 1e-3)
        declared = (float(told or 0) for told in (self.stream.average_rate, self.stream.guessed_rate))
        return next((told for told in declared if abs(told - rate) <= _SAME_RATE * rate), rate)

    def hash_times_s(self) -> np.ndarray:
        """When the HASH_FRAMES are shown: even parts of what the video shows itself, whatever the length of its sound,
        which padding and other containers change."""
        begin_s, end_s = max(self.shown_s[0], self.start_s), min(self.last_end_s, self.end_s)
        even = (np.arange(HASH_FRAMES) + 0.5) / HASH_FRAMES * (end_s - begin_s)
        times_s: np.ndarray = begin_s + even + _LATER / self.rate(end_s - begin_s)
        return times_s

    def begins_late(self) -> bool:
        """Whether the frame on show at start_s is missing: a file without an index was entered in the middle."""
        first = self.packets[0] if self.packets else None
        return first is None or not first.is_keyframe or first.pts is None or self._time_s(first.pts) > self.start_s

    def decode(self, targets_s: np.ndarray, hash_s: np.ndarray, clock: Deadline) -> tuple[list[Picture], list[Picture]]:
        """The pictures for the targets [K], with pixels, and those for the hash; empty if nothing can be decoded."""
        self.clock = clock
        made = self._decode_picked(targets_s, hash_s) or self._decode_all(targets_s, hash_s)
        return made[: len(targets_s)], made[len(targets_s) :]

    def _frames(self, first: int, last: int, picked: frozenset[int]) -> Iterator[Any]:
        """Frames of the packets [first, last), in the order of showing; unpicked ones may be left out."""
        context = self.stream.codec_context
        skips = bool(picked) and context.name in _SKIPS_UNREFERENCED
        for index in range(first, last + 1):
            self.clock.check()
            if skips:
                context.skip_frame = "DEFAULT" if index in picked else "NONREF"
            for frame in self.tally.decode(context.decode, self.packets[index] if index < last else None):
                if frame.width * frame.height > self.cfg.max_pixels:
                    raise ClipError("TOO_LARGE", f"frame of {frame.width}x{frame.height} px is over the limit")
                if frame.pts is not None:  # else it has no place in time
                    yield frame
        context.skip_frame = "DEFAULT"
        context.flush_buffers()

    def _decode_picked(self, targets_s: np.ndarray, hash_s: np.ndarray) -> list[Picture]:
        """By the policy; empty if the packets do not say enough, or a frame does not come out whole."""
        stamps = [packet.pts for packet in self.packets]
        if self.in_avi or None in stamps or len({*stamps}) < len(stamps):
            return []
        if self.stream.codec_context.name not in _FROM_KEY_FRAME:
            return []
        shown = [s if not p.is_discard else None for s, p in zip(stamps, self.packets, strict=True)]
        times_s = np.array([np.nan if s is None else self._time_s(s) for s in shown])
        times_s[times_s >= self.end_s] = np.nan
        if np.isnan(times_s).all():
            return []
        keys = np.array([packet.is_keyframe for packet in self.packets])
        policy = self.cfg.policy, self.cfg.max_time_error_s
        kept, hashed = (pick(times_s, keys, wanted, *policy) for wanted in (targets_s, hash_s))
        picked = frozenset([*kept.tolist(), *hashed.tolist()])
        times = {stamps[index]: (index, float(times_s[index])) for index in picked}
        made: dict[int, Picture] = {}
        for first, last in spans(np.array([*picked]), times_s, keys):
            for frame in self._frames(first, last, picked):
                if frame.pts in times and not frame.is_corrupt:
                    index, time_s = times[frame.pts]
                    made[index] = self.scaler.picture(frame, time_s, keep=index in kept)
        return [made[index] for index in (*kept, *hashed)] if len(made) == len(picked) else []

    def _timed(self) -> Iterator[tuple[Any, float]]:
        """Every frame with its time, and at last none."""
        stamps = sorted(packet.dts for packet in self.packets if packet.dts is not None) if self.in_avi else []
        for number, frame in enumerate(self._frames(0, len(self.packets), frozenset())):
            yield frame, self._time_s(stamps[number] if number < len(stamps) else frame.pts)
        yield None, float("inf")

    def _decode_all(self, targets_s: np.ndarray, hash_s: np.ndarray) -> list[Picture]:
        """The frames on show, by decoding every one; empty if there is none."""
        wanted_s = np.concatenate([targets_s, hash_s])
        order = np.argsort(wanted_s, kind="stable")
        made: dict[int, Picture] = {}
        shown: tuple[Any, float] | None = None
        for frame, time_s in self._timed():
            if time_s >= self.end_s:
                time_s = float("inf")
            numbers = [number for number in order[len(made) :].tolist() if wanted_s[number] < time_s]
            if shown and numbers:
                made |= dict.fromkeys(numbers, self.scaler.picture(*shown, keep=min(numbers) < len(targets_s)))
            if len(made) == len(wanted_s):
                break
            shown = frame, time_s
        return [made[number] for number in range(len(made))]
