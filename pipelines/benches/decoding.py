"""How fast clips are decoded: ours beside others on the same files in one run, and the floor below which none can get.

Each makes the same of a clip: mono audio at 16 kHz, and 8 frames, evenly spaced, of 224 px on their shorter side.
"""

import importlib.util
import multiprocessing
import resource
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer

from aai import storage
from aai.foundation.identity import FoundationSpec
from aai.media.container import open_media
from aai.media.decode import decode_clip
from aai.media.limits import SAMPLE_RATE_HZ, DecodeConfig

NUM_FRAMES, FRAME_SIZE_PX = 8, 224
MADE_CLIPS = 8
Decoder = Callable[[str], None]


def ours(policy: str, path: str) -> None:
    """Our decoder by one of its policies."""
    decode_clip(Path(path).read_bytes(), None, None, _config(policy))


def _config(policy: str) -> DecodeConfig:
    return DecodeConfig.parse({"num_frames": NUM_FRAMES, "frame_size_px": FRAME_SIZE_PX, "policy": policy})


def _opened(path: str) -> InputContainer:
    cfg = DecodeConfig()
    return open_media(Path(path).read_bytes(), cfg.max_bytes, cfg.max_streams)


@cache  # what the others are told of a clip is not counted against them
def _facts(path: str) -> tuple[float, int, int]:
    """Length in s, width and height in px."""
    with _opened(path) as container:
        video = container.streams.video[0]
        return (container.duration or 0) / av.time_base, video.width, video.height


def ffmpeg(path: str) -> None:
    """ffmpeg's command line: the whole clip, scaled and resampled, on one thread."""
    duration_s = _facts(path)[0]
    scale = f"scale='if(gt(iw,ih),-2,{FRAME_SIZE_PX})':'if(gt(iw,ih),{FRAME_SIZE_PX},-2)':flags=area"
    subprocess.run(
        [
            *("ffmpeg", "-nostdin", "-v", "error", "-y", "-threads", "1", "-filter_threads", "1", "-i", path),
            *("-map", "0:v:0", "-vf", f"fps={NUM_FRAMES / max(duration_s, 0.1):.6f},{scale}", "-pix_fmt", "rgb24"),
            *("-f", "rawvideo", "/dev/null"),
            *("-map", "0:a:0", "-ar", str(SAMPLE_RATE_HZ), "-ac", "1", "-f", "f32le", "/dev/null"),
        ],
        check=True,
    )


def torchcodec(seek_mode: str, path: str) -> None:
    """torchcodec's decoders on one thread, with its own resizing; `seek_mode` is its "exact" or "approximate"."""
    from torchcodec.decoders import AudioDecoder, VideoDecoder
    from torchcodec.transforms import Resize

    length_s, width, height = _facts(path)
    scale = FRAME_SIZE_PX / min(width, height)
    resize = Resize((round(height * scale), round(width * scale)))
    video = VideoDecoder(path, seek_mode=seek_mode, num_ffmpeg_threads=1, transforms=[resize])
    video.get_frames_played_at([(k + 0.5) / NUM_FRAMES * length_s for k in range(NUM_FRAMES)])
    AudioDecoder(path, sample_rate=SAMPLE_RATE_HZ, num_channels=1).get_all_samples()


def floor(path: str) -> None:
    """Every frame decoded and thrown away, nothing scaled, no sound: what decoding the whole picture costs at least."""
    with _opened(path) as container:
        container.streams.video[0].codec_context.thread_count = 1
        for _ in container.decode(video=0):
            pass


def decoders() -> dict[str, Decoder]:
    """What can be compared on this machine, by name."""
    found: dict[str, Decoder] = {policy: partial(ours, policy) for policy in ("exact", "auto", "keyframe")}
    if shutil.which("ffmpeg"):
        found["ffmpeg"] = ffmpeg
    if importlib.util.find_spec("torchcodec"):
        found |= {
            "torchcodec": partial(torchcodec, "exact"),
            "torchcodec_approximate": partial(torchcodec, "approximate"),
        }
    return found | {"floor": floor}


def _cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in used)


def _timed(decoder: Decoder, path: str) -> float:
    """CPU seconds of one clip, those of programs it starts among them."""
    before = _cpu_s()
    decoder(path)
    return _cpu_s() - before


def made_clips(folder: str, count: int, seed: int) -> list[str]:
    """The clips to compare on where none are given: at most MADE_CLIPS, more would tell nothing new."""
    return write_clips(folder, min(count, MADE_CLIPS), seed)


def run_decode(clips: Sequence[str], processes: int = 2, repeats: int = 3) -> dict[str, Any]:
    """Compares all `decoders()` on the same files, in turns.

    Returns `figures`: for each NAME the median over the repeats of NAME_clips_per_s, and of NAME_cpu_s_per_clip, which
    tells more on a machine that does other things too; `ratios` of clips/s; and `absent`: who could not take part.
    """
    found = decoders()
    rates: dict[str, list[float]] = {name: [] for name in found}
    cpu_s: dict[str, list[float]] = {name: [] for name in found}
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for turn in range(repeats + 1):
            for name, decoder in found.items():
                started = time.perf_counter()
                used = list(pool.map(partial(_timed, decoder), clips))
                if turn:  # the first one loads libraries and files
                    rates[name].append(len(clips) / (time.perf_counter() - started))
                    cpu_s[name].append(statistics.mean(used))
    speed = {name: statistics.median(values) for name, values in rates.items()}
    figures = {f"{name}_clips_per_s": round(value, 3) for name, value in speed.items()}
    figures |= {f"{name}_cpu_s_per_clip": round(statistics.median(values), 4) for name, values in cpu_s.items()}
    ratios = {}
    for other in ("ffmpeg", "torchcodec", "torchcodec_approximate", "floor"):
        if other in speed:
            for mine in ("exact", "auto", "keyframe"):
                ratios[f"{mine}/{other}"] = round(speed[mine] / speed[other], 3)
    return {"figures": figures, "ratios": ratios, "absent": [n for n in ("ffmpeg", "torchcodec") if n not in found]}


def auto_cosine(clips: Sequence[str], spec: FoundationSpec) -> dict[str, float]:
    """How much policy=auto changes CLIP's features: `mean` and `min` of the cosine to exact, over all frames."""
    from aai.foundation.clip import FrozenClip  # the processes that only decode need not load it

    clip = FrozenClip(spec)
    cosines: list[float] = []
    for path in clips:
        data = Path(path).read_bytes()
        exact, auto = (clip.images(decode_clip(data, None, None, _config(name)).frames) for name in ("exact", "auto"))
        cosines += (exact * auto).sum(-1).tolist()
    return {"mean": statistics.mean(cosines), "min": min(cosines)}


def write_clips(folder: str, count: int, seed: int, duration_s: float = 10.0, height_px: int = 720) -> list[str]:
    """H.264 clips (x264's defaults, 25 and 30 frames/s, AAC) of a drifting landscape; returns their paths."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    paths = [str(Path(folder) / f"clip-{seed}-{number}-{height_px}p.mp4") for number in range(count)]
    for number, path in enumerate(paths):
        if not Path(path).exists():
            rng = np.random.default_rng([seed, number])
            with storage.writing(path) as whole:  # a kill must not leave half a clip for the next run
                _write_clip(whole, rng, duration_s, height_px, fps=(25, 30)[number % 2])
    return paths


def _landscape(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Smooth noise of several sizes: uint8 [h, w, 3]."""
    total = np.zeros((height, width, 3), np.float32)
    for octave in range(6):
        rows, columns = 3 << octave, 5 << octave
        coarse = av.VideoFrame.from_ndarray(rng.integers(0, 256, (rows, columns, 3), np.uint8), "rgb24")
        fine = coarse.reformat(width, height, interpolation="BICUBIC").to_ndarray()
        total += (fine.astype(np.float32) - 128) / 1.6**octave
    return (total * 0.6 + 120).clip(0, 255).astype(np.uint8)


def _write_clip(path: Path, rng: np.random.Generator, duration_s: float, height: int, fps: int) -> None:
    width, margin = height * 16 // 9, height // 4
    scene = _landscape(rng, height + margin, width + margin)
    things = [(_landscape(rng, height // 5, height // 5), rng.uniform(0.3, 2, 4)) for _ in range(4)]
    with av.open(path, "w", format="mp4") as out:
        video: Any = out.add_stream("libx264", rate=fps)
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        audio: Any = out.add_stream("aac", rate=44_100, layout="stereo")
        for number in range(round(duration_s * fps)):
            t = number / fps
            top, left = (round(margin / 2 * (1 + np.sin(speed * t))) for speed in (0.31, 0.47))
            pixels = scene[top : top + height, left : left + width].copy()
            for thing, (a, b, c, d) in things:
                y, x = (round(float(0.4 * n * (1 + np.sin(p * t + q)))) for n, p, q in ((height, a, b), (width, c, d)))
                pixels[y : y + len(thing), x : x + len(thing)] = thing
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        sound = rng.standard_normal((2, round(duration_s * 44_100))).cumsum(axis=1).astype(np.float32)
        heard = av.AudioFrame.from_ndarray(np.sin(sound * 0.05) * 0.3, "fltp", "stereo")
        heard.sample_rate, heard.pts, heard.time_base = 44_100, 0, Fraction(1, 44_100)
        out.mux([*audio.encode(heard), *audio.encode(None)])
