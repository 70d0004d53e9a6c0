"""Media files that lie: flipped bits, cut ends, forged sizes, hours of silence. By seed."""

import io
import struct
from collections.abc import Iterator
from fractions import Fraction
from functools import cache

import av
import numpy as np

from tests.clips import index_first, make_clip, make_moving, remuxed

_HUGE = (0xFFFFFFFF, 0x7FFFFFFF, 0x80000000, 0x00FFFFFF, 0xFFFFFFF0)
_FIELDS = (b"mvhd", b"tkhd", b"mdhd", b"stts", b"ctts", b"stsz", b"stsc", b"stco", b"stss", b"elst", b"avc1", b"mp4a",
           b"hvc1", b"trun", b"mdat", b"moov", b"LIST", b"movi", b"strh", b"strf", b"idx1", b"avih")  # fmt: skip


@cache
def sources() -> list[bytes]:
    """Small good files of the common kinds."""
    small = {"num_frames": 20, "size": (64, 48)}
    return [
        make_clip(),
        index_first(make_clip()),
        make_moving(**small, options={"g": "7"}),
        make_moving("libx265", "matroska", **small, options={"x265-params": "log-level=none:pools=1"}),
        make_moving("libvpx-vp9", "webm", **small, options={"cpu-used": "8", "deadline": "realtime"}, sound="libopus"),
        make_moving("mpeg4", "avi", **small, sound="libmp3lame"),
        make_moving("libx264", "mpegts", **small),
        make_moving("libx264", "flv", **small),
        make_moving("mpeg2video", "mpegts", **small, sound="mp2"),
        make_moving("libx264", "mp4", **small, live={"movflags": "frag_keyframe+empty_moov"}),
        remuxed(make_moving(**small), "mp4", sound_first=True),
        remuxed(make_moving(**small, options={"g": "7"}), "matroska", sound_first=True),
    ]


def flipped(data: bytes, rng: np.random.Generator) -> bytes:
    """1 to 300 bits changed, anywhere or in the first 2 kB."""
    raw = np.frombuffer(data, np.uint8).copy()
    last = len(raw) if rng.random() < 0.6 else min(len(raw), 2000)
    for _ in range(int(rng.integers(1, 300))):
        raw[rng.integers(last)] ^= 1 << rng.integers(8)
    return raw.tobytes()


def truncated(data: bytes, rng: np.random.Generator) -> bytes:
    """The beginning of the file, now and then without its first bytes too."""
    cut = data[: int(rng.integers(1, len(data)))]
    return cut[int(rng.integers(0, 64)) :] if rng.random() < 0.2 else cut


def swapped(data: bytes, rng: np.random.Generator) -> bytes:
    """Another kind's header in front, or two pieces of the file exchanged."""
    other = sources()[int(rng.integers(len(sources())))]
    if rng.random() < 0.5:
        size = int(rng.integers(16, 2000))
        return other[:size] + data[size:]
    a, b, size = (int(n) for n in rng.integers(1, len(data) // 3, 3))
    b += len(data) // 3 + a
    return data[:a] + data[b : b + size] + data[a + size : b] + data[a : a + size] + data[b + size :]


def forged(data: bytes, rng: np.random.Generator) -> bytes:
    """Giant sizes, counts, dimensions, rates or durations in the fields of a header."""
    raw = bytearray(data)
    places = [at for name in _FIELDS if (at := data.find(name)) >= 4]
    for _ in range(int(rng.integers(1, 5))):
        at = int(rng.choice(places)) + 4 * int(rng.integers(-1, 12)) if places else int(rng.integers(len(data) - 8))
        at = min(max(at, 0), len(raw) - 4)
        raw[at : at + 4] = struct.pack(">I", int(rng.choice(_HUGE)))
    return bytes(raw)


def noise(data: bytes, rng: np.random.Generator) -> bytes:
    """Random bytes, behind the real first ones of a file half of the time."""
    return (data[: int(rng.integers(0, 400))] if rng.random() < 0.5 else b"") + rng.bytes(int(rng.integers(0, 5000)))


@cache
def long_silence(hours: float = 8.0) -> bytes:
    """An .mkv that declares no length: 1 s of pictures, hours of silence in few bytes."""
    sink = io.BytesIO()
    with av.open(sink, "w", format="matroska", options={"live": "1"}) as out:
        video = out.add_stream("mpeg4", rate=10)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        audio = out.add_stream("aac", rate=8000, layout="mono")
        for number in range(10):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20 * number, np.uint8), "rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        block = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        block.sample_rate = 8000
        silence = bytes(next(packet for _ in range(4) for packet in audio.encode(block)))
        for number in range(round(hours * 3600 * 8000 / 1024)):
            packet = av.Packet(silence)
            packet.stream, packet.time_base, packet.is_keyframe = audio, Fraction(1, 8000), True
            packet.pts = packet.dts = number * 1024
            packet.duration = 1024
            out.mux(packet)
    return sink.getvalue()


def declared_silence(data: bytes, hours: float = 8.0) -> bytes:
    """An .mp4 whose index spreads the sound over hours."""
    data = data.replace(b"elst", b"free")  # the list of edits would cut it again
    raw, at = bytearray(data), data.rfind(b"stts")
    count = struct.unpack(">I", data[at + 12 : at + 16])[0]
    raw[at + 16 : at + 20] = struct.pack(">I", round(hours * 3600 * 44_100 / count))
    at = data.rfind(b"mdhd")
    raw[at + 20 : at + 24] = struct.pack(">I", round(hours * 3600 * 44_100))
    return bytes(raw)


def damaged_files(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """(kind, bytes) of damaged files, all kinds in turn."""
    rng = np.random.default_rng(seed)
    ways = {"flipped": flipped, "truncated": truncated, "swapped": swapped, "forged": forged, "noise": noise}
    for number in range(count):
        data = sources()[int(rng.integers(len(sources())))]
        kind = [*ways, "forged", "flipped", "other"][number % 8]
        if kind in ways:
            yield kind, ways[kind](data, rng)
        else:
            other = number // 8 % 4
            yield kind, (b"", long_silence(), declared_silence(sources()[0]), declared_silence(sources()[2]))[other]
