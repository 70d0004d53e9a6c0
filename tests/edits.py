"""Everyday edits of a video, as whoever uploads it again makes them."""

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

import av
import numpy as np
from PIL import Image, ImageDraw

Rng = np.random.Generator


@dataclass(frozen=True)
class Footage:
    """A decoded clip: pictures uint8 [F, H, W, 3] at a steady rate, and sound float32 [S], mono."""

    frames: np.ndarray
    fps: float
    audio: np.ndarray
    sample_rate_hz: int

    @property
    def duration_s(self) -> float:
        """Of the pictures."""
        return len(self.frames) / self.fps

    def part(self, start_s: float, end_s: float) -> "Footage":
        """Both from start_s to end_s."""
        first, last = round(start_s * self.fps), round(end_s * self.fps)
        begin, end = (round(i / self.fps * self.sample_rate_hz) for i in (first, last))
        return replace(self, frames=self.frames[first:last], audio=self.audio[begin:end])


def opened(data: bytes) -> Footage:
    """The footage of a file with sound and pictures."""
    with av.open(io.BytesIO(data)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        resampler = av.AudioResampler("fltp", "mono", audio.rate)
        frames, sound = [], []
        for frame in container.decode(video, audio):
            if isinstance(frame, av.VideoFrame):
                frames.append(frame.to_ndarray(format="rgb24"))
            else:
                sound += [part.to_ndarray()[0] for part in resampler.resample(frame)]
        return Footage(np.stack(frames), float(video.average_rate), np.concatenate(sound), audio.rate)


def encoded(footage: Footage, crf: int = 26, sound_bps: int = 64_000) -> bytes:
    """An .mp4 of it: H.264 and AAC."""
    sink, rate = io.BytesIO(), Fraction(footage.fps).limit_denominator(1001)
    height, width = (edge // 2 * 2 for edge in footage.frames.shape[1:3])
    with av.open(sink, "w", format="mp4") as out:
        video = out.add_stream("libx264", rate=rate, options={"preset": "ultrafast", "crf": str(crf)})
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        sound = out.add_stream("aac", rate=footage.sample_rate_hz, layout="mono")
        sound.bit_rate = sound_bps
        for number, pixels in enumerate(footage.frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels[:height, :width]), "rgb24")
            picture.pts, picture.time_base = number, 1 / rate
            out.mux(video.encode(picture))
        frame = av.AudioFrame.from_ndarray(footage.audio[None].astype(np.float32), "fltp", "mono")
        frame.sample_rate, frame.pts = footage.sample_rate_hz, 0
        frame.time_base = Fraction(1, footage.sample_rate_hz)
        for stream, last in ((video, []), (sound, [frame])):
            for one in (*last, None):
                out.mux(stream.encode(one))
    return sink.getvalue()


def in_matroska(data: bytes) -> bytes:
    """The same streams in another container."""
    sink = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(sink, "w", format="matroska") as out:
        streams = {stream.index: out.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream_index]
                out.mux(packet)
    return sink.getvalue()


def _resized(frames: np.ndarray, width: int, height: int) -> np.ndarray:
    area = Image.Resampling.BICUBIC
    return np.stack([np.asarray(Image.fromarray(frame).resize((width, height), area)) for frame in frames])


# ---------------------------------------------------------------- edits: (footage, other sound, random) -> footage


def _crop(footage: Footage, _: Footage, rng: Rng) -> Footage:
    """A tenth of the height and of the width goes, from either side."""
    height, width = footage.frames.shape[1:3]
    top, left = (int(rng.uniform(0, 0.1) * edge) for edge in (height, width))
    return replace(footage, frames=footage.frames[:, top : top + int(0.9 * height), left : left + int(0.9 * width)])


def _letterbox(footage: Footage, _: Footage, rng: Rng) -> Footage:
    """Black bars above and below, of an eighth to a quarter of the height each."""
    bar = int(rng.uniform(0.12, 0.25) * footage.frames.shape[1])
    return replace(footage, frames=np.pad(footage.frames, ((0, 0), (bar, bar), (0, 0), (0, 0))))


def _logo(footage: Footage, _: Footage, rng: Rng) -> Footage:
    """A coloured badge in a corner, a quarter of the width."""
    height, width = footage.frames.shape[1:3]
    left, top = rng.integers(2) * 0.72 * width, rng.integers(2) * 0.8 * height
    colour, marked = tuple(int(part) for part in rng.integers(0, 256, 3)), []
    for frame in footage.frames:
        image = Image.fromarray(frame)
        draw = ImageDraw.Draw(image)
        draw.rectangle((left, top, left + 0.26 * width, top + 0.16 * height), fill=colour, outline="white")
        draw.text((left + 2, top + 2), "LOGO", fill="white")
        marked.append(np.asarray(image))
    return replace(footage, frames=np.stack(marked))


def _mirror(footage: Footage, _: Footage, __: Rng) -> Footage:
    return replace(footage, frames=footage.frames[:, :, ::-1])


def _trim(footage: Footage, _: Footage, rng: Rng) -> Footage:
    """Begins later, by a tenth to a quarter of the length."""
    return footage.part(rng.uniform(0.1, 0.25) * footage.duration_s, footage.duration_s)


def _cut(footage: Footage, _: Footage, rng: Rng) -> Footage:
    """Ends earlier, by a fifth to two fifths of the length."""
    return footage.part(0, rng.uniform(0.6, 0.8) * footage.duration_s)


def _speed(footage: Footage, _: Footage, rng: Rng) -> Footage:
    """A twentieth to a fifth faster or slower, and as much higher or lower."""
    factor = float(rng.choice([-1, 1]) * rng.uniform(0.05, 0.2) + 1)
    count = round(len(footage.audio) / factor)
    audio = np.interp(np.arange(count) * factor, np.arange(len(footage.audio)), footage.audio)
    return replace(footage, fps=footage.fps * factor, audio=audio.astype(np.float32))


def _brightness(footage: Footage, _: Footage, rng: Rng) -> Footage:
    gain, shift = rng.choice([0.7, 1.3]), rng.uniform(-15, 15)
    return replace(footage, frames=np.clip(footage.frames * gain + shift, 0, 255).astype(np.uint8))


def _noise(footage: Footage, _: Footage, rng: Rng) -> Footage:
    """Grain, and hiss 20 dB below the sound."""
    grain = footage.frames + rng.normal(0, 12, footage.frames.shape)
    hiss = 0.1 * np.sqrt(np.mean(footage.audio**2)) * rng.standard_normal(len(footage.audio))
    audio = (footage.audio + hiss).astype(np.float32)
    return replace(footage, frames=np.clip(grain, 0, 255).astype(np.uint8), audio=audio)


def _resizing(footage: Footage, _: Footage, rng: Rng) -> Footage:
    """Smaller by a quarter to a half, and a little out of shape."""
    height, width = footage.frames.shape[1:3]
    factor = rng.uniform(0.5, 0.75)
    return replace(footage, frames=_resized(footage.frames, int(factor * width), int(factor * 1.1 * height)))


def _other_sound(footage: Footage, other: Footage, _: Rng) -> Footage:
    """Another clip's sound, repeated where it is too short."""
    count = round(footage.duration_s * other.sample_rate_hz)
    audio = np.resize(other.audio, count)
    return replace(footage, audio=audio, sample_rate_hz=other.sample_rate_hz)


EDITS: dict[str, Callable[[Footage, Footage, Rng], Footage]] = {
    "crop": _crop,
    "letterbox": _letterbox,
    "logo": _logo,
    "mirror": _mirror,
    "trim": _trim,
    "cut": _cut,
    "speed": _speed,
    "brightness": _brightness,
    "noise": _noise,
    "resize": _resizing,
    "other sound": _other_sound,
}
KINDS = (*EDITS, "re-encode", "container")
"""Thirteen."""


def edited(kind: str, data: bytes, other: Footage, rng: Rng) -> bytes:
    """The file after one edit; all but `container` are encoded anew. other: whose sound replaces."""
    if kind == "container":
        return in_matroska(data)
    footage = opened(data)
    if kind == "re-encode":
        return encoded(footage, crf=36, sound_bps=32_000)
    return encoded(EDITS[kind](footage, other, rng))
