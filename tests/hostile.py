"""Files and requests that were made to break a decoder."""

import io
import struct
import wave
import zlib

import numpy as np
from PIL import Image


def wav(duration_s: float = 0.5, sample_rate_hz: int = 16_000) -> bytes:
    """A 440 Hz tone as a WAV file."""
    time_s = np.arange(round(duration_s * sample_rate_hz)) / sample_rate_hz
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate_hz)
        file.writeframes((8000 * np.sin(2 * np.pi * 440 * time_s)).astype("<i2").tobytes())
    return buffer.getvalue()


def forged_wav(**fields: int) -> bytes:
    """A half-second WAV whose header says something else: kind, channels, rate_hz, byte_rate, align, bits."""
    said = {"kind": 1, "channels": 1, "rate_hz": 16_000, "byte_rate": 32_000, "align": 2, "bits": 16} | fields
    whole = bytearray(wav())
    whole[20:36] = struct.pack("<HHIIHH", *said.values())
    return bytes(whole)


def png(width: int = 64, height: int = 64, kind: str = "PNG") -> bytes:
    """A plain picture."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 80, 40)).save(buffer, kind)
    return buffer.getvalue()


def jpeg_with_exif(tag: int, kind: int, count: int = 1) -> bytes:
    """A JPEG to be turned by its EXIF, which has one more entry, of a kind that its tag cannot have."""
    entries = sorted([(0x0112, 3, 1, b"\6\0\0\0"), (tag, kind, count, b"\1\0\0\0")])
    packed = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    buffer = io.BytesIO()
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + packed + bytes(4)
    Image.new("RGB", (64, 32)).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def forged_png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG whose header says a size, with more chunks before pixels that are far too few for most sizes."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    more = b"".join(_chunk(*chunk) for chunk in chunks)
    pixels = _chunk(b"IDAT", zlib.compress(bytes((1 + 3 * 64) * 64)))
    return b"\x89PNG\r\n\x1a\n" + header + more + pixels + _chunk(b"IEND", b"")


SOUNDS: dict[str, tuple[bytes, str]] = {
    "rate 0": (forged_wav(rate_hz=0), "unreadable"),
    "rate 1 Hz": (forged_wav(rate_hz=1), "too_long"),
    "rate 1 Hz, byte rate to match no limit": (forged_wav(rate_hz=1, byte_rate=2**31), "too_long"),
    "rate of 2 GHz": (forged_wav(rate_hz=2**31 - 1), "unreadable"),
    "rate of 2 GHz, negative": (forged_wav(rate_hz=2**32 - 1), "unreadable"),
    "rate whose filter takes gigabytes": (forged_wav(rate_hz=0x192E3E80), "unreadable"),
    "rate whose filter takes half a minute": (forged_wav(rate_hz=0x13E12E30), "unreadable"),
    "no channels": (forged_wav(channels=0), "unreadable"),
    "128 channels": (forged_wav(channels=128), "unreadable"),
    "65535 channels": (forged_wav(channels=65_535), "unreadable"),
    "0 bits": (forged_wav(bits=0), "unsupported_audio"),
    "no such codec": (forged_wav(kind=0x7777), "unsupported_audio"),
    "header only": (wav()[:20], "unreadable"),
}
"""Name -> a sound file, and the code of its refusal."""

PICTURES: dict[str, tuple[bytes, str]] = {
    "EXIF: a width that is text": (jpeg_with_exif(0x0100, 1), "image_unreadable"),
    "EXIF: a text that is a fraction": (jpeg_with_exif(0x010E, 5), "image_unreadable"),
    "EXIF: a text that is a float": (jpeg_with_exif(0x010E, 11), "image_unreadable"),
    "EXIF: a fraction that is bytes": (jpeg_with_exif(0x011A, 1), "image_unreadable"),
    "EXIF: a fraction that is text": (jpeg_with_exif(0x011A, 2), "image_unreadable"),
    "EXIF: none in it": (forged_png(64, 64, (b"eXIf", b"not a TIFF header")), "image_unreadable"),
    "3.6 gigapixels": (forged_png(60_000, 60_000), "image_unreadable"),
    "100 megapixels": (forged_png(10_000, 10_000), "image_too_large"),
    "2**31 wide": (forged_png(2**31 - 1, 1), "image_unreadable"),
    "a strip": (forged_png(16_000, 1), "image_too_large"),
    "0 px": (forged_png(0, 64), "image_unreadable"),
    "too few pixels": (forged_png(128, 128), "image_unreadable"),
    "a text that unpacks to 100 MB": (
        forged_png(64, 64, (b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))),
        "image_unreadable",
    ),
    "PNG cut in a chunk": (png()[:60], "image_unreadable"),
    "JPEG cut in its header": (png(kind="JPEG")[:30], "image_unreadable"),
    "WebP cut in its header": (png(kind="WEBP")[:18], "image_unreadable"),
}
"""Name -> a picture, and the code of its refusal."""

HARMLESS: dict[str, bytes] = {
    "profile of garbage": forged_png(64, 64, (b"iCCP", b"a\0\0" + zlib.compress(b"no profile" * 100))),
    "profile that does not unpack": forged_png(64, 64, (b"iCCP", b"a\0\0not deflated")),
}
"""Name -> a picture with nonsense beside its pixels, which can be painted over all the same."""
