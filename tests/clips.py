"""Small real clips, written with PyAV, whose every frame and sample says when it is."""

import io
import os
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def frame_value(time_s: float) -> int:
    """Brightness that tells the time of a frame: 20 at 0 s, 35 more for each second."""
    return round(20 + 35 * time_s)


def make_clip(
    times_s: Sequence[float] | None = None,
    duration_s: float = 2.0,
    sample_rate_hz: int = 44_100,
    layout: str = "stereo",
    start_s: float = 0.0,
    size: tuple[int, int] = (96, 64),
    has_audio: bool = True,
    has_video: bool = True,
) -> bytes:
    """An .mp4: frames of brightness `frame_value(t)`, and a tone that starts in the middle of the clip."""
    times_s = [i / 10 for i in range(round(duration_s * 10))] if times_s is None else times_s
    sink = io.BytesIO()
    with av.open(sink, "w", format="mp4") as out:
        if has_video:  # both streams must exist before the first packet
            video = out.add_stream("libx264", rate=10, options={"preset": "ultrafast", "crf": "12"})
            video.width, video.height, video.pix_fmt = *size, "yuv420p"
            video.codec_context.time_base = Fraction(1, 1000)
        audio = out.add_stream("aac", rate=sample_rate_hz, layout=layout) if has_audio else None
        if has_video:
            for t in times_s:
                pixels = np.full((size[1], size[0], 3), frame_value(t), np.uint8)
                pixels[: size[1] // 4, : size[0] // 4] = 255
                frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
                frame.time_base, frame.pts = Fraction(1, 1000), round((start_s + t) * 1000)
                out.mux(video.encode(frame))
            out.mux(video.encode(None))
        if audio is not None:
            samples = np.tile(tone(duration_s, sample_rate_hz), (audio.layout.nb_channels, 1))
            sound = av.AudioFrame.from_ndarray(samples, "fltp", layout)
            sound.sample_rate, sound.time_base = sample_rate_hz, Fraction(1, sample_rate_hz)
            sound.pts = round(start_s * sample_rate_hz)
            out.mux(audio.encode(sound))
            out.mux(audio.encode(None))
    return sink.getvalue()


def index_first(data: bytes) -> bytes:
    """The same .mp4 with its index in front of the content, as for streaming."""
    return remuxed(data, options={"movflags": "faststart"})


def remuxed(
    data: bytes,
    container: str = "mp4",
    sound_first: bool = False,
    options: dict[str, str] | None = None,
    title: str | None = None,
) -> bytes:
    """The same packets in another file; sound_first: its stream 0 is the sound."""
    with tempfile.NamedTemporaryFile(suffix=".media") as file:
        target = av.open(file.name, "w", format=container, options=options or {})
        with av.open(io.BytesIO(data), "r") as given, target as out:
            if title is not None:
                out.metadata["title"] = title
            order = sorted(given.streams, key=lambda stream: (stream.type == "audio") != sound_first)
            streams = {stream.index: out.add_stream_from_template(stream) for stream in order}
            for packet in given.demux():
                if packet.dts is not None:
                    packet.stream = streams[packet.stream.index]
                    out.mux(packet)
        return Path(file.name).read_bytes()


def latin1_title(data: bytes, container: str) -> bytes:
    """The same packets in a file whose title is Latin-1 text where UTF-8 is due."""
    tagged = remuxed(data, container, title="a title of ~~~~")
    if b"~~~~" not in tagged:
        raise ValueError(f"{container} keeps no title")
    return tagged.replace(b"~~~~", "àéüß".encode("latin-1"))


def tone(duration_s: float, sample_rate_hz: int) -> np.ndarray:
    """Silence, then from the middle on a tone of 440 Hz at -9 dB: float32 [S]."""
    t = np.arange(round(duration_s * sample_rate_hz)) / sample_rate_hz
    return (0.5 * np.sin(2 * np.pi * 440 * t) * (t >= duration_s / 2)).astype(np.float32)


def make_moving(
    codec: str = "libx264",
    container: str = "mp4",
    num_frames: int = 60,
    fps: int | Fraction = 20,
    size: tuple[int, int] = (128, 96),
    options: dict[str, str] | None = None,
    sound: str = "aac",
    seed: int = 0,
    live: dict[str, str] | None = None,
) -> bytes:
    """A clip in which every frame differs: a drifting texture with noise, cut to another one in the middle."""
    rng, (width, height) = np.random.default_rng(seed), size
    coarse = rng.integers(0, 256, (2, height // 8 + 1, width // 4 + 1, 3))
    policy = os.sched_getscheduler(0)
    scenes = np.kron(coarse, np.ones((1, 8, 8, 1)))[:, :height].astype(np.int16)
    sink = io.BytesIO()
    with av.open(sink, "w", format=container, options=live or {}) as out:
        video = out.add_stream(codec, rate=fps, options=options or {})
        video.width, video.height, video.pix_fmt = width, height, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        audio = out.add_stream(sound, rate=48_000 if "opus" in sound else 44_100, layout="stereo")
        for number in range(num_frames):
            pixels = np.roll(scenes[number * 2 // num_frames], -3 * number, axis=1)[:, :width]
            pixels = (pixels * 3 // 4 + rng.integers(0, 40, (height, width, 1))).clip(0, 255).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
            frame.pts, frame.time_base = number, 1 / Fraction(fps)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        kind = "s16" if sound.startswith("pcm") else "s16p" if "mp2" in sound else "fltp"
        samples = np.tile(tone(float(num_frames / fps), audio.rate), (2, 1))
        if not kind.startswith("flt"):
            samples = (samples * 32_767).astype(np.int16)
        if kind == "s16":
            samples = samples.T.reshape(1, -1)
        heard = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), kind, "stereo")
        heard.sample_rate, heard.pts, heard.time_base = audio.rate, 0, Fraction(1, audio.rate)
        out.mux(audio.encode(heard))
        out.mux(audio.encode(None))
    # SVT-AV1 makes root's calling thread a real-time one, beside which nothing else of the machine gets to run.
    os.sched_setscheduler(0, policy, os.sched_param(0))
    return sink.getvalue()
