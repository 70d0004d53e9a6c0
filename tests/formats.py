"""Files of every make, written by ffmpeg's command line, and what that program itself decodes of them."""

import itertools
import json
import random
import re
import shutil
import struct
import subprocess
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

SIZE = (160, 120)
LENGTH_S = 1.6
HOLE_S = (0.6, 0.95)
LATIN1 = "àéüß".encode("latin-1")
CONTAINERS: dict[str, tuple[str, str]] = {
    "mp4": ("libx264 -preset ultrafast -g 10", "aac"),
    "mkv": ("libx264 -preset ultrafast -g 12 -bf 2", "libmp3lame"),
    "webm": ("libvpx -deadline realtime -cpu-used 8 -g 10", "libopus"),
    "mov": ("mpeg4 -g 12 -bf 2", "pcm_s16le"),
    "avi": ("mpeg4 -g 10", "libmp3lame"),
    "ts": ("libx264 -preset ultrafast -g 10 -bf 2", "mp2"),
    "3gp": ("mpeg4 -g 10", "aac"),
    "ogv": ("libtheora -g 8", "libvorbis"),
}
"""Ending -> how video and sound are coded."""
TURNS = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0), -1: (-1, 0, 0, 1)}
"""Degrees clockwise (-1: mirrored) -> the matrix of a QuickTime track header."""
_FILTERS = {0: "", 90: ",transpose=clock", 180: ",hflip,vflip", 270: ",transpose=cclock", -1: ",hflip"}
_SITES = {
    "left": ":in_h_chr_pos=0:in_v_chr_pos=128",
    "center": ":in_h_chr_pos=128:in_v_chr_pos=128",
    "topleft": ":in_h_chr_pos=0:in_v_chr_pos=0",
}
"""Where the file says its chroma samples lie -> what ffmpeg's scaler, which does not look, is told of it."""
_IN_MP4 = ("mp4", "mov", "3gp")


@dataclass(frozen=True)
class Make:
    """How a file is made: one of 24,000."""

    container: str = "mp4"
    sound_first: bool = False
    pixel_aspect: str = "1/1"
    title: str | None = None
    turn: int = 0
    hole: bool = False
    tracks: str = "one"
    """one, second sound (the default one, after another), or preview (a small video before the large one)."""
    rate: str = "25"
    sample_rate_hz: int = 44_100
    layout: str = "stereo"

    def __str__(self) -> str:
        return " ".join(str(getattr(self, f.name)) for f in fields(self))

    @property
    def shown(self) -> tuple[int, int]:
        """Width and height on a screen."""
        over, under = map(int, self.pixel_aspect.split("/"))
        size = round(SIZE[0] * over / under), SIZE[1]
        return size[::-1] if self.turn in (90, 270) else size

    @property
    def is_possible(self) -> bool:
        """Whether the container can hold that."""
        ending, is_mp4 = self.container, self.container in _IN_MP4
        return (
            (is_mp4 or not self.turn)
            and (ending not in ("avi", "ogv") or not self.hole)  # AVI has no times; Ogg counts packets
            and (ending not in ("avi", "ts", "ogv", "3gp") or self.tracks == "one")  # no default tracks there
            and (self.title != "latin1" or ending in ("mp4", "mkv", "avi", "mov"))  # Ogg and WebM insist on UTF-8
            and (ending != "webm" or self.sample_rate_hz == 48_000)  # Opus
            and (ending not in ("avi", "mkv", "ts") or (self.layout != "5.1" and self.sample_rate_hz > 11_025))
        )


AXES: dict[str, tuple[Any, ...]] = {
    "sound_first": (False, True),
    "pixel_aspect": ("1/1", "64/45", "8/9"),
    "title": (None, "latin1"),
    "turn": tuple(TURNS),
    "hole": (False, True),
    "tracks": ("one", "second sound", "preview"),
    "rate": ("25", "30000/1001", "12.5", "8"),
    "sample_rate_hz": (44_100, 48_000, 22_050, 11_025),
    "layout": ("stereo", "mono", "5.1"),
}


def makes(count: int, container: str, seed: int) -> list[Make]:
    """Different ones of a container, by chance."""
    every = [Make(container, *values) for values in itertools.product(*AXES.values())]
    possible = [make for make in every if make.is_possible]
    return random.Random(f"{seed}{container}").sample(possible, min(count, len(possible)))


def absent() -> str | None:
    """Why these files cannot be made here."""
    missing = [name for name in ("ffmpeg", "ffprobe") if shutil.which(name) is None]
    return f"{' and '.join(missing)} not found: apt-get install ffmpeg" if missing else None


def _ffmpeg(*args: str) -> subprocess.CompletedProcess[bytes]:
    command = ["ffmpeg", "-nostdin", "-hide_banner", "-y", "-threads", "1", *args]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.decode(errors='replace')[-2000:]}")
    return done


def write(make: Make, folder: Path) -> Path:
    """Makes the file."""
    path = folder / f"clip.{make.container}"
    video_codec, sound_codec = CONTAINERS[make.container]
    width, height = SIZE
    moving = f"testsrc2=size={width}x{height}:rate={make.rate}:duration={LENGTH_S}"
    # Without treble: sound may lie half a sample off, which decorrelates the highest octave alone.
    noise = f"anoisesrc=color=pink:amplitude=0.4:duration={LENGTH_S}:sample_rate={make.sample_rate_hz}"
    inputs = [moving, f"{noise}:seed=1", f"{noise}:seed=2", moving.replace(f"{width}x{height}", "80x60")]
    sounds = ["-map", "2:a", "-map", "1:a"] if make.tracks == "second sound" else ["-map", "1:a"]
    videos = ["-map", "3:v", "-map", "0:v"] if make.tracks == "preview" else ["-map", "0:v"]
    dispositions = ["-disposition:a:0", "0", "-disposition:a:1", "default"] if make.tracks == "second sound" else []
    samples = {"aac": 1024, "pcm_s16le": 1024, "libopus": 960}.get(sound_codec, 1152)
    if sound_codec == "libmp3lame" and make.sample_rate_hz < 32_000:
        samples = 576
    first, last = (round(edge_s * make.sample_rate_hz / samples) for edge_s in HOLE_S)
    hole = f"noise=drop='between(n,{first},{last})'"
    _ffmpeg(
        *itertools.chain.from_iterable(("-f", "lavfi", "-i", source) for source in inputs),
        *(sounds + videos if make.sound_first else videos + sounds),
        *("-filter:v", f"setsar={make.pixel_aspect}", "-pix_fmt", "yuv420p", "-c:v", *video_codec.split()),
        *("-c:a", sound_codec, "-af", f"lowpass=f=1500,aformat=channel_layouts={make.layout}", "-flags", "+bitexact"),
        *dispositions,
        *(("-bsf:a", hole) if make.hole else ()),
        *(("-metadata", "title=~~~~") if make.title else ()),
        *("-t", str(LENGTH_S), str(path)),
    )
    data = path.read_bytes()
    if make.title:
        if b"~~~~" not in data:
            raise ValueError(f"{make.container} keeps no title")
        data = data.replace(b"~~~~", LATIN1)
    if make.turn:
        data = turned(data, make.turn)
    path.write_bytes(data)
    return path


def turned(data: bytes, turn: int) -> bytes:
    """The same MP4 or QuickTime file whose video is shown turned: the matrix in its track header (ISO/IEC 14496-12)."""
    raw, at = bytearray(data), -1
    a, b, c, d = TURNS[turn]
    while (at := data.find(b"tkhd", at + 1)) >= 0:
        if any(data[at + 80 : at + 88]):  # width and height: of sound they are 0
            matrix = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
            raw[at + 44 : at + 80] = matrix
    return bytes(raw)


# ---------------------------------------------------------------- what ffmpeg decodes


@dataclass(frozen=True)
class Decoded:
    """Times count from the earlier one of the two streams' starts."""

    times_s: np.ndarray  # [N]
    frames: np.ndarray  # uint8 [N, h, w, 3]
    sound: np.ndarray  # float32 [S]


def decoded(path: Path, make: Make, size: tuple[int, int], sample_rate_hz: int) -> Decoded:
    """All frames, upright and scaled to a size, and the sound on its time line."""
    entries = "stream=index,codec_type,chroma_location"
    asked = ["ffprobe", "-v", "error", "-of", "json", "-show_entries", entries, str(path)]
    probe = subprocess.run(asked, capture_output=True, check=True)
    streams = json.loads(probe.stdout.decode(errors="replace"))["streams"]
    picked = {kind: [s for s in streams if s["codec_type"] == kind][-1] for kind in ("video", "audio")}
    video, audio = (f"0:{picked[kind]['index']}" for kind in ("video", "audio"))
    site = _SITES.get(picked["video"].get("chroma_location", ""), "")
    lying = size[::-1] if make.turn in (90, 270) else size
    seeing = f"showinfo,scale={lying[0]}:{lying[1]}:flags=area{site}{_FILTERS[make.turn]}"
    hearing = f"aresample={sample_rate_hz}:async=1:min_hard_comp=0.02,ashowinfo,aformat=channel_layouts=mono"
    sound = path.with_suffix(".f32le")
    done = _ffmpeg(
        *("-copyts", "-noautorotate", "-i", str(path), "-map", audio, "-af", hearing, "-f", "f32le", str(sound)),
        *("-map", video, "-fps_mode", "passthrough", "-vf", seeing, "-pix_fmt", "rgb24", "-f", "rawvideo", "-"),
    )
    frames = np.frombuffer(done.stdout, np.uint8).reshape(-1, size[1], size[0], 3)
    times_s, sound_s = (
        np.array([float(text) for text in re.findall(rb"Parsed_%s_.*pts_time:(\S+)" % filter_name, done.stderr)])
        for filter_name in (b"showinfo", b"ashowinfo")
    )
    origin_s = min(times_s[0], sound_s[0])
    before = np.zeros(round((sound_s[0] - origin_s) * sample_rate_hz), np.float32)
    return Decoded(times_s - origin_s, frames, np.concatenate([before, np.fromfile(sound, np.float32)]))


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of 8-bit pictures."""
    error = float(np.mean(np.square(a.astype(np.float64) - b)))
    return 10 * float(np.log10(255**2 / max(error, 1e-9)))


def alignment(ours: np.ndarray, theirs: np.ndarray, sample_rate_hz: int, reach_s: float = 0.03) -> tuple[float, float]:
    """(offset in seconds, correlation there) of two sounds, over their common length."""
    length = min(len(ours), len(theirs))
    a, b = ours[:length].astype(np.float64), theirs[:length].astype(np.float64)
    reach = round(reach_s * sample_rate_hz)

    def correlation(lag: int) -> float:
        x, y = a[max(0, lag) : length + min(0, lag)], b[max(0, -lag) : length - max(0, lag)]
        return float(x @ y / max(1e-12, np.sqrt((x @ x) * (y @ y))))

    best = max(range(-reach, reach + 1), key=correlation)
    return best / sample_rate_hz, correlation(best)
