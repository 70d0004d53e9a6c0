"""Small good files of every kind that may be uploaded, their mutations by seed, and bombs."""

import io
import struct
import zipfile
import zlib
from collections.abc import Iterator
from functools import cache

import av
import numpy as np
from PIL import Image

from tests.clips import tone
from tests.damage import declared_silence, flipped, long_silence, noise, truncated
from tests.hostile import forged_png, forged_wav, jpeg_with_exif, png, wav

SOUND_KINDS = ("wav", "flac", "mp3", "ogg", "m4a", "webm")
PICTURE_KINDS = ("png", "jpeg", "webp")
_WRITTEN_AS = {
    "wav": ("wav", "pcm_s16le", "s16"),
    "flac": ("flac", "flac", "s16"),
    "mp3": ("mp3", "libmp3lame", "s16p"),
    "ogg": ("ogg", "libopus", "s16"),
    "m4a": ("ipod", "aac", "fltp"),
    "webm": ("webm", "libopus", "s16"),
}
_HUGE = (0xFFFFFFFF, 0x7FFFFFFF, 0x80000000, 0x00FFFFFF, 0xFFFFFFF0, 0)


@cache
def sound(kind: str, duration_s: float = 0.5, rate_hz: int = 16_000) -> bytes:
    """A tone in a file of one of SOUND_KINDS."""
    container, codec, sample_format = _WRITTEN_AS[kind]
    rate_hz = 48_000 if _WRITTEN_AS[kind][1] == "libopus" else rate_hz
    samples = tone(duration_s, rate_hz)[None]
    if not sample_format.startswith("flt"):
        samples = (samples * 32_767).astype(np.int16)
    sink = io.BytesIO()
    with av.open(sink, "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate_hz, layout="mono", format=sample_format)
        frame = av.AudioFrame.from_ndarray(samples, sample_format, "mono")
        frame.sample_rate = rate_hz
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            out.mux(packet)
    return sink.getvalue()


@cache
def picture(kind: str, side_px: int = 48) -> bytes:
    """A textured picture in a file of one of PICTURE_KINDS."""
    pixels = np.random.default_rng(1).integers(0, 255, (side_px // 4, side_px // 4, 3), np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).resize((side_px, side_px)).save(sink, kind.upper())
    return sink.getvalue()


def mutations(count: int, seed: int, kinds: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    """(kind, bytes): flipped bits, cut ends, forged fields, noise, pieces moved, grown or of another kind's file."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        kind = kinds[number % len(kinds)]
        data = sound(kind) if kind in SOUND_KINDS else picture(kind)
        way = int(rng.integers(7))
        if way < 3:
            yield kind, (flipped, truncated, noise)[way](data, rng)
        elif way == 3:
            yield kind, _forged(data, rng)
        elif way == 4:
            other = kinds[int(rng.integers(len(kinds)))]
            head = (sound(other) if other in SOUND_KINDS else picture(other))[: int(rng.integers(4, 400))]
            yield kind, head + data[len(head) :]
        elif way == 5:
            at, size = (int(n) for n in rng.integers(1, len(data) // 2, 2))
            yield kind, data[:at] + data[at : at + size] * int(rng.integers(2, 6)) + data[at:]
        else:
            yield kind, _forged(flipped(data[: int(rng.integers(12, len(data)))], rng), rng)


def _forged(data: bytes, rng: np.random.Generator) -> bytes:
    """Giant numbers in the first bytes, where headers have their sizes, rates and counts."""
    raw = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        at, order = int(rng.integers(0, min(len(raw) - 8, 200))), (">I", "<I")[int(rng.integers(2))]
        raw[at : at + 4] = struct.pack(order, int(rng.choice(_HUGE)))
    return bytes(raw)


def _float_wav(values: list[float]) -> bytes:
    samples = np.resize(np.array(values, "<f4"), 8000).tobytes()
    head = struct.pack("<4sI4s4sIHHIIHH", b"RIFF", 36 + len(samples), b"WAVE", b"fmt ", 16, 3, 1, 16_000, 64_000, 4, 32)
    return head + struct.pack("<4sI", b"data", len(samples)) + samples


def _claims(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


def _hours_of_flac(hours: float = 1) -> bytes:
    sink = io.BytesIO()
    with av.open(sink, "w", format="flac") as out:
        stream = out.add_stream("flac", rate=8000, layout="mono", format="s16")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, round(hours * 3600 * 8000)), np.int16), "s16", "mono")
        frame.sample_rate = 8000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            out.mux(packet)
    return sink.getvalue()


@cache
def sound_bombs() -> dict[str, bytes]:
    """Sounds that claim or decode to hours, playlists that name other files, tags larger than the file, two in one."""
    flac, ogg, tag = sound("flac"), bytearray(sound("ogg")), b"ID3\4\0\0\x7f\x7f\x7f\x7f"
    last = ogg.rfind(b"OggS")
    ogg[last + 6 : last + 14] = struct.pack("<Q", 2**62)
    html = b"<html><script>alert(1)</script></html>"
    chunk = b"note" + struct.pack("<I", len(html)) + html
    return {
        "flac: claims 2**36 samples": _claims(flac, 21, b"\xff\xff\xff\xff\xff"),
        "flac: an hour of silence": _hours_of_flac(),
        "ogg: ends in 2**62 samples": bytes(ogg),
        "ogg: a thousand streams": sound("ogg") * 1000,
        "mkv: eight hours of silence": long_silence(),
        "m4a: claims hours": declared_silence(sound("m4a")),
        "wav: claims 4 GB": _claims(wav(), 40, b"\xff\xff\xff\xff"),
        "wav: RF64": b"RF64" + wav()[4:],
        "wav: a header in a header": wav()[:44] * 5000 + wav(),
        "wav: byte rate 1": forged_wav(byte_rate=1),
        "wav: 24 bits in 2 bytes": forged_wav(bits=24),
        "wav: IEEE kind, 16 bits": forged_wav(kind=3),
        "wav: NaN": _float_wav([float("nan")]),
        "wav: infinite": _float_wav([float("inf"), -float("inf")]),
        "wav: 1e38": _float_wav([1e38, -1e38, 1e-45]),
        "wav: two minutes": wav(120, 8000),
        "wav: 40 channels": forged_wav(channels=40, align=80),
        "mp3: a tag of 256 MB": tag + sound("mp3"),
        "mp3: tags only": tag * 2000,
        "playlist: m3u8": b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n",
        "playlist: concat": b"ffconcat version 1.0\nfile /etc/passwd\n",
        "playlist: sdp": b"v=0\nc=IN IP4 127.0.0.1\nm=audio 5004 RTP/AVP 0\n",
        "playlist: dash": b'<?xml version="1.0"?><MPD><BaseURL>file:///etc/passwd</BaseURL></MPD>',
        "html in wav": wav()[:36] + chunk + wav()[36:],
        "wav and png": wav() + png(),
        "png and wav": png() + wav(),
        "zip of a sound": zipped({"a.wav": wav()}),
        "gzip of nothing": zlib.compress(bytes(10**7)),
        "shell script": b"#!/bin/sh\nrm -rf /\n" * 100,
    }


def zipped(files: dict[str, bytes]) -> bytes:
    """A ZIP file."""
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as out:
        for name, data in files.items():
            out.writestr(name, data)
    return sink.getvalue()


def scans(times: int, side_px: int = 2000) -> bytes:
    """A progressive JPEG whose last scan comes again and again: each costs a pass over all its pixels."""
    sink = io.BytesIO()
    Image.new("RGB", (side_px, side_px), (200, 80, 40)).save(sink, "JPEG", progressive=True)
    data = sink.getvalue()
    scan = data[data.rfind(b"\xff\xda") : -2]
    return data[:-2] + scan * times + data[-2:]


def _animated(kind: str, frames: int = 200) -> bytes:
    pictures = [Image.new("RGB", (64, 64), (i % 255, 0, 0)) for i in range(frames)]
    sink = io.BytesIO()
    pictures[0].save(sink, kind, save_all=True, append_images=pictures[1:])
    return sink.getvalue()


def _plain(kind: str, width: int, height: int, mode: str = "L") -> bytes:
    sink = io.BytesIO()
    Image.new(mode, (width, height), 0).save(sink, kind)
    return sink.getvalue()


@cache
def picture_bombs() -> dict[str, bytes]:
    """Pictures of many pixels in few bytes, tricks with EXIF and chunks, other formats, two files in one."""
    jpeg, text = png(kind="JPEG"), zlib.compress(bytes(10**7))
    size = jpeg.find(b"\xff\xc0") + 5
    return {
        "png: 12000x12000 of one colour": _plain("PNG", 12_000, 12_000, "1"),
        "png: just the limit": _plain("PNG", 4096, 4096),
        "webp: 16383x16383 claimed": _claims(picture("webp"), 26, b"\xff\x3f\xff\x3f"),
        "webp: 10000x10000": _plain("WEBP", 10_000, 10_000, "RGB"),
        "jpeg: 65535x65535 claimed": _claims(jpeg, size, b"\xff\xff\xff\xff"),
        "jpeg: no height": _claims(jpeg, size, b"\0\0"),
        "jpeg: three thousand scans": scans(3000),
        "png: ten texts": forged_png(64, 64, *[(b"zTXt", b"a\0\0" + text)] * 10),
        "png: ten thousand chunks": forged_png(64, 64, *[(b"tEXt", b"a\0b")] * 10_000),
        "png: chunk longer than the file": png()[:33] + b"\x7f\xff\xff\xffIDAT" + png()[41:],
        "png: animated": _animated("PNG"),
        "webp: animated": _animated("WEBP"),
        "gif": _plain("GIF", 64, 64),
        "tiff": _plain("TIFF", 64, 64),
        "bmp": _plain("BMP", 64, 64),
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n(/etc/passwd) (r) file\n",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "gif and script": b"GIF89a/*" + bytes(30) + b"*/=1;alert(1)//",
        "png and zip": png() + zipped({"../../evil.sh": b"rm"}),
        "jpeg and php": jpeg[:2] + b"\xff\xfe\0\x1e<?php system($_GET['c']); ?>" + jpeg[2:],
        "pdf and jpeg": b"%PDF-1.4\n" + jpeg,
        "exif: turned": jpeg_with_exif(0x0132, 2),
        "exif: claims 2**31 values": jpeg_with_exif(0x010E, 2, 2**31),
        "exif: another directory of itself": jpeg_with_exif(0x8769, 4),
        "exif: a place of itself": jpeg_with_exif(0x8825, 4, 8),
    }
