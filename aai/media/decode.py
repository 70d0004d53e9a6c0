"""Clips from bytes: every limit is checked while decoding, so that a hostile file costs what a good one costs.

The file is read once and in order. Frames are chosen by time, never by index, and sound and picture share one origin:
the earlier of the two streams' starts. Variable frame rates and non-zero start times are therefore right by
construction.
"""

from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from av.container import InputContainer

from aai.media.container import (
    audio_stream,
    find_video,
    open_media,
    packets,
    shared_origin_s,
    stream_start_s,
    video_stream,
)
from aai.media.limits import ClipError, Deadline, DecodeConfig, Tally
from aai.media.picking import seconds
from aai.media.pictures import Pictures
from aai.media.ranged import Content
from aai.media.sound import SoundTrack

_LEAD_S = 1.0  # of sound decoded before the window: codecs need some to settle


@dataclass(frozen=True)
class DecodedClip:
    """One clip: sound, K frames, and what was read off the streams. Times count from the clip's start."""

    audio: np.ndarray  # float32 [S], mono
    frames: np.ndarray  # uint8 [K, h, w, 3], RGB
    frame_pts_s: list[float]  # [K], true times; the first may lie just before 0
    luma: np.ndarray  # uint8 [K, 32, 32], the same frames in grey
    hash_luma: np.ndarray  # uint8 [4, 32, 32], of `hash_times_s`
    duration_s: float
    width: int  # as shown: upright, with square pixels
    height: int
    fps: float
    source_sample_rate_hz: int
    channels: int
    av_gap_s: float


def _hear(sound: SoundTrack, packet: Any, tally: Tally, origin_s: float) -> bool:
    """Decodes one packet of sound; False when the window is over."""
    if packet.pts is not None and seconds(packet.pts, packet.time_base) - origin_s < sound.start_s - _LEAD_S:
        return True
    frames = tally.decode(packet.stream.decode, packet)
    return all(sound.add(frame, None if frame.pts is None else frame.time - origin_s) for frame in frames)


def _declared_s(container: InputContainer, origin_s: float) -> float:
    """Length of the whole file from its origin by its header; 0 when the header does not say."""
    if container.duration is None or container.duration <= 0:
        return 0.0
    start_s = (container.start_time or 0) / av.time_base
    return float(max(0.0, start_s + container.duration / av.time_base - origin_s))


def _check_window(container: InputContainer, origin_s: float, start_s: float, end_s: float, cfg: DecodeConfig) -> None:
    declared_s = _declared_s(container, origin_s)
    if declared_s and start_s >= declared_s:
        raise ClipError("OUT_OF_RANGE", f"start_s={start_s:g} is past the end at {declared_s:.2f} s")
    if min(end_s, declared_s) - start_s > cfg.max_duration_s:
        raise ClipError(
            "TOO_LONG", f"{min(end_s, declared_s) - start_s:.1f} s are over the limit of {cfg.max_duration_s:g} s"
        )


def _check_whole(stream: Any, origin_s: float, end_s: float, read_until_s: float) -> None:
    """A file cut off in the middle has a good header: compare what it promised with what came."""
    if stream.duration is None:
        return
    promised_s = min(stream_start_s(stream) + float(stream.duration * stream.time_base) - origin_s, end_s)
    if promised_s - read_until_s > max(0.25, 0.1 * promised_s):
        raise ClipError(
            "UNREADABLE", f"{stream.type} breaks off at {read_until_s:.2f} s of {promised_s:.2f} s declared"
        )


def _decode(data: Content, start_s: float, end_s: float, cfg: DecodeConfig, clock: Deadline, seek: bool) -> DecodedClip:
    """One pass over the file: sound is decoded on the way, pictures when the clip's length is known."""
    with open_media(data, cfg.max_bytes, cfg.max_streams) as container:
        video, audio = video_stream(container, cfg), audio_stream(container)
        origin_s = shared_origin_s([video, audio])
        _check_window(container, origin_s, start_s, end_s, cfg)
        tally = Tally(cfg.max_corrupt_fraction)
        begin_s = None if seek else stream_start_s(audio) - origin_s
        sound = SoundTrack(cfg.sample_rate_hz, start_s, end_s, cfg.max_duration_s, begin_s)
        pictures = Pictures(video, origin_s, start_s, end_s, cfg, tally)
        if seek:
            container.seek(int((start_s + origin_s) * av.time_base), backward=True)
        running = {video.index: True, audio.index: True}
        for packet in packets(container, [video, audio], clock):
            if packet.stream.index == video.index:
                running[video.index] = pictures.add(packet)
            else:
                running[audio.index] = _hear(sound, packet, tally, origin_s) and running[audio.index]
            if not any(running.values()):
                break
        if seek and pictures.begins_late():
            return _decode(data, start_s, end_s, cfg, clock, seek=False)
        samples = sound.finish()
        _check_whole(video, origin_s, end_s, pictures.last_end_s)
        _check_whole(audio, origin_s, end_s, start_s + len(samples) / cfg.sample_rate_hz)
        return _clip(pictures, sound, samples, clock)


def _clip(pictures: Pictures, sound: SoundTrack, samples: np.ndarray, clock: Deadline) -> DecodedClip:
    cfg = pictures.cfg
    if not pictures.count:
        raise ClipError("NO_VIDEO", "the video stream holds no frame of this clip")
    if not len(samples):
        pictures.tally.check()
        raise ClipError("NO_AUDIO", "the audio stream holds no sample of this clip")
    audio_s = len(samples) / cfg.sample_rate_hz
    video_s = min(pictures.last_end_s, pictures.end_s) - pictures.start_s
    duration_s = max(audio_s, video_s)
    targets_s = pictures.start_s + (np.arange(cfg.num_frames) + 0.5) / cfg.num_frames * duration_s
    kept, hashed = pictures.decode(targets_s, pictures.hash_times_s(), clock)
    pictures.tally.check()
    if not kept:
        raise ClipError("UNREADABLE", "no frame of the video can be decoded")
    if len({(picture.width, picture.height) for picture in kept}) > 1:
        raise ClipError("UNREADABLE", "size of the pictures changes midway")
    return DecodedClip(
        audio=samples,
        frames=np.stack([picture.pixels for picture in kept if picture.pixels is not None]),
        frame_pts_s=[picture.time_s - pictures.start_s for picture in kept],
        luma=np.stack([picture.luma for picture in kept]),
        hash_luma=np.stack([picture.luma for picture in hashed]),
        duration_s=duration_s,
        width=kept[-1].width,
        height=kept[-1].height,
        fps=pictures.rate(video_s),
        source_sample_rate_hz=sound.source_rate_hz,
        channels=sound.channels,
        av_gap_s=abs(audio_s - video_s),
    )


@dataclass(frozen=True)
class DecodedSound:
    """The sound of a clip whose pictures, if there are any, do not count."""

    audio: np.ndarray  # float32 [S], mono
    duration_s: float
    source_sample_rate_hz: int
    channels: int


def decode_sound(data: Content, start_s: float | None, end_s: float | None, cfg: DecodeConfig) -> DecodedSound:
    """The sound of the part [start_s, end_s) of a media file, as `decode_clip` counts and keeps it. Raises as that."""
    start, end = _window(start_s, end_s)
    return _decode_sound(data, start, end, cfg, Deadline(cfg.timeout_s), seek=start > _LEAD_S)


def _decode_sound(
    data: Content, start_s: float, end_s: float, cfg: DecodeConfig, clock: Deadline, seek: bool
) -> DecodedSound:
    with open_media(data, cfg.max_bytes, cfg.max_streams) as container:
        audio, video = audio_stream(container), find_video(container, cfg)
        origin_s = shared_origin_s([audio] if video is None else [video, audio])
        _check_window(container, origin_s, start_s, end_s, cfg)
        tally = Tally(cfg.max_corrupt_fraction)
        begin_s = None if seek else stream_start_s(audio) - origin_s
        sound = SoundTrack(cfg.sample_rate_hz, start_s, end_s, cfg.max_duration_s, begin_s)
        if seek:
            container.seek(int((start_s + origin_s) * av.time_base), backward=True)
        for packet in packets(container, [audio], clock):
            if not _hear(sound, packet, tally, origin_s):
                break
        if seek and not sound.runs:
            return _decode_sound(data, start_s, end_s, cfg, clock, seek=False)
        samples = sound.finish()
        length_s = len(samples) / cfg.sample_rate_hz
        _check_whole(audio, origin_s, end_s, start_s + length_s)
        tally.check()
    if not len(samples):
        raise ClipError("NO_AUDIO", "the audio stream holds no sample of this clip")
    return DecodedSound(samples, length_s, sound.source_rate_hz, sound.channels)


def _window(start_s: float | None, end_s: float | None) -> tuple[float, float]:
    start, end = start_s or 0.0, float("inf") if end_s is None else end_s
    if start < 0 or not end > start:
        raise ClipError("OUT_OF_RANGE", f"start_s={start_s} and end_s={end_s} do not span a clip")
    return start, end


def decode_clip(data: Content, start_s: float | None, end_s: float | None, cfg: DecodeConfig) -> DecodedClip:
    """Decodes the part [start_s, end_s) of a media file (None: from its start, to its end).

    K frames for the K times (k + 0.5) / K of the clip, by `cfg.policy`. A file whose packets carry no times is
    decoded whole and gives exact frames. Raises ClipError with one of the codes EMPTY_FILE, UNREADABLE, NO_VIDEO,
    NO_AUDIO, UNSUPPORTED_VIDEO, UNSUPPORTED_AUDIO, OUT_OF_RANGE, TOO_LONG, TOO_LARGE, TIMEOUT.
    """
    start, end = _window(start_s, end_s)
    return _decode(data, start, end, cfg, Deadline(cfg.timeout_s), seek=start > _LEAD_S)


def decode_audio(
    data: bytes,
    max_duration_s: float,
    max_bytes: int,
    sample_rate_hz: int,
    timeout_s: float = 30,
    part_s: tuple[float | None, float | None] = (None, None),
) -> np.ndarray:
    """Any sound file (or the sound of a video) as mono float32 [S] at the given rate.

    part_s: only [start_s, end_s) of it, counted as `decode_clip` counts; the limit is then the part's. Raises
    ClipError: EMPTY_AUDIO for 0 seconds, OUT_OF_RANGE for a part without sound, else a code of `decode_clip`.
    """
    cfg = DecodeConfig(max_duration_s=max_duration_s, max_bytes=max_bytes, timeout_s=timeout_s)
    start_s, end_s = part_s[0] or 0.0, float("inf") if part_s[1] is None else part_s[1]
    whole = part_s == (None, None)
    if start_s < 0 or not end_s > start_s:
        raise ClipError("OUT_OF_RANGE", f"start_s={part_s[0]} and end_s={part_s[1]} do not span a sound")
    with open_media(data, max_bytes, cfg.max_streams) as container:
        stream = audio_stream(container)
        pictures = find_video(container, cfg)
        streams = [stream] if whole or pictures is None else [stream, pictures]
        if min(end_s, _declared_s(container, stream_start_s(stream))) - start_s > max_duration_s + 0.1:
            raise ClipError("TOO_LONG", f"sound is longer than the limit of {max_duration_s:g} s")
        sound = SoundTrack(sample_rate_hz, start_s, end_s, max_duration_s, next_s=0.0)
        tally, first_s = Tally(cfg.max_corrupt_fraction), None if whole else shared_origin_s(streams)
        for packet in packets(container, [stream], Deadline(timeout_s)):
            for frame in tally.decode(stream.decode, packet):
                if frame.pts is not None and first_s is None:
                    first_s = frame.time - sound.next_s
                sound.add(frame, None if frame.pts is None else frame.time - first_s)
        tally.check()
        samples = sound.finish()
    if not len(samples) and not whole:
        raise ClipError("OUT_OF_RANGE", f"start_s={part_s[0]}, end_s={part_s[1]}: no sound there")
    if not len(samples):
        raise ClipError("EMPTY_AUDIO", "the file holds no sound (0 seconds)")
    if len(samples) > round((max_duration_s + 0.1) * sample_rate_hz):
        raise ClipError("TOO_LONG", f"sound is longer than the limit of {max_duration_s:g} s")
    return samples
