"""Writes the toy world: real .mp4 clips (H.264 + AAC) with captions, and defects planted on purpose.

Every clip is a pure function of its plan, and the plan a pure function of (number of clips, seed): the number
of worker processes changes nothing. What is planted stands in defects.json, so that curation can be scored.
"""

import csv
import hashlib
import io
import logging
import multiprocessing
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import partial

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from aai import storage
from aai.toy.draw import draw_scene
from aai.toy.grammar import AMBIENCES, MEDIA, OBJECTS, Scene, full_caption, partial_caption
from aai.toy.sound import level_envelope, object_sound, synthesise

log = logging.getLogger(__name__)

VERSION = 1
"""Counts up when the same settings would give other files."""
SYNTHESIS_RATE_HZ = 16000
SPLITS = (("train", 0.6), ("val", 0.1), ("test", 0.3))
MEDIA_SHARES = {"photo": 0.5, "sketch": 0.25, "painting": 0.25}
SOUND_FORMATS = ((44100, "stereo"), (16000, "mono"), (22050, "mono"), (24000, "mono"), (32000, "stereo"))
"""(sample rate in Hz, channel layout) of ordinary clips."""


@dataclass(frozen=True)
class Kind:
    """A planted peculiarity: its share of all clips, and the code curation must reject it with (None: accept)."""

    share: float
    code: str | None = None


KINDS = {
    "cut_index": Kind(0.005, "UNREADABLE"),
    "cut_media": Kind(0.005, "UNREADABLE"),
    "text_file": Kind(0.005, "UNREADABLE"),
    "empty_file": Kind(0.005, "EMPTY_FILE"),
    "silent": Kind(0.010, "SILENT"),
    "no_audio": Kind(0.010, "NO_AUDIO"),
    "no_video": Kind(0.0075, "NO_VIDEO"),
    "black_video": Kind(0.010, "BLACK_VIDEO"),
    "frozen_video": Kind(0.010, "FROZEN_VIDEO"),
    "exact_duplicate": Kind(0.0125, "EXACT_DUPLICATE"),
    "near_duplicate": Kind(0.0125, "NEAR_DUPLICATE"),
    "cross_split_duplicate": Kind(0.010, "CROSS_SPLIT_DUPLICATE"),
    "wrong_audio": Kind(0.010, "WRONG_AUDIO"),
    "too_short": Kind(0.0075, "TOO_SHORT"),
    "variable_frame_rate": Kind(0.0075),
    "rate_8khz": Kind(0.006),
    "rate_11khz": Kind(0.006),
    "rate_48khz": Kind(0.006),
    "mono": Kind(0.006),
    "surround_5_1": Kind(0.0075),
    "start_offset": Kind(0.0075),
    "dash_name": Kind(0.006),
    "unicode_name": Kind(0.006),
}
"""Defects (with a code: to be rejected) and oddities (without: to be accepted)."""
DUPLICATES = ("exact_duplicate", "near_duplicate", "cross_split_duplicate")


@dataclass(frozen=True)
class Clip:
    """The plan of one file: everything its bytes depend on."""

    name: str
    scene: Scene
    sound: Scene
    """Whose sound is heard: the scene's own, except where the sound is planted wrong."""
    split: str
    kind: str = "plain"
    duration_s: float = 2.0
    fps: int = 8
    size_px: int = 128
    sample_rate_hz: int = 44100
    layout: str = "stereo"
    gain_db: float = 0.0
    start_s: float = 0.0
    """Presentation time of the first frame and the first sound."""
    quality: int = 24
    """x264's constant rate factor."""
    pair: str | None = None
    """Name of the file this one duplicates."""

    @property
    def uri(self) -> str:
        """Relative to the manifest's folder, so that the world can be moved."""
        return f"clips/{self.name}"


# ---------------------------------------------------------------- the plan


def plan_world(num_clips: int, seed: int, shares: Mapping[str, float] | None = None) -> list[Clip]:
    """What to write: `num_clips` clips, the planted ones among them. From 100 clips on every kind occurs.

    shares: of some kinds, in place of those in KINDS.
    """
    rng = np.random.default_rng((seed, 0))
    clips = [_plain(i, seed) for i in range(num_clips)]
    order = [int(i) for i in rng.permutation(num_clips)]
    least = 1 if num_clips >= 100 else 0
    chosen = {}
    for kind, spec in KINDS.items():
        for _ in range(max(least, round((shares or {}).get(kind, spec.share) * num_clips))):
            chosen[order.pop()] = kind
    for i, kind in chosen.items():
        if kind not in DUPLICATES:
            clips[i] = _planted(clips[i], kind, np.random.default_rng((seed, 2, i)))
    originals = sorted(order)
    for i, kind in sorted(chosen.items()):
        if kind in DUPLICATES:
            wanted = [j for j in originals if kind != "cross_split_duplicate" or clips[j].split == "test"]
            if wanted:  # a handful of clips may hold no test clip to copy
                j = wanted[int(rng.integers(len(wanted)))]
                originals.remove(j)
                clips[i] = _duplicate(clips[j], clips[i].name, kind)
    return clips


def _plain(index: int, seed: int) -> Clip:
    """An ordinary clip."""
    rng = np.random.default_rng((seed, 1, index))
    scene = Scene(
        obj=OBJECTS[rng.integers(len(OBJECTS))],
        ambience=AMBIENCES[rng.integers(len(AMBIENCES))],
        medium=str(rng.choice(MEDIA, p=[MEDIA_SHARES[m] for m in MEDIA])),
        size=float(rng.random()),
        seed=int(rng.integers(2**31)),
    )
    rate, layout = SOUND_FORMATS[rng.integers(len(SOUND_FORMATS))]
    return Clip(
        name=f"clip_{index:06d}.mp4",
        scene=scene,
        sound=scene,
        split=_split(f"{seed}:{index}"),
        sample_rate_hz=rate,
        layout=layout,
        quality=int(rng.integers(20, 27)),
    )


def _split(key: str) -> str:
    share = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 2**32
    for name, size in SPLITS:
        if share < size:
            return name
        share -= size
    return SPLITS[-1][0]


def _planted(clip: Clip, kind: str, rng: np.random.Generator) -> Clip:
    """The clip with a defect or an oddity; kinds not named here only differ when they are written."""
    clip = replace(clip, kind=kind)
    scene = clip.scene
    changes: dict[str, dict[str, object]] = {
        "wrong_audio": {
            "sound": replace(
                scene,
                obj=str(rng.choice([o for o in OBJECTS if o != scene.obj])),
                ambience=str(rng.choice([a for a in AMBIENCES if a != scene.ambience])),
                seed=scene.seed + 1,
            )
        },
        "too_short": {"duration_s": 0.2},
        "rate_8khz": {"sample_rate_hz": 8000, "layout": "mono"},
        "rate_11khz": {"sample_rate_hz": 11025, "layout": "mono"},
        "rate_48khz": {"sample_rate_hz": 48000, "layout": "stereo"},
        "mono": {"sample_rate_hz": 44100, "layout": "mono"},
        "surround_5_1": {"sample_rate_hz": 48000, "layout": "5.1"},
        "start_offset": {"start_s": float(rng.choice([0.5, 1.5, 3.0]))},
        "dash_name": {"name": f"-{clip.name}"},
        "unicode_name": {"name": clip.name.replace("clip_", "Klang ö ♪ ")},
    }
    return replace(clip, **changes.get(kind, {}))  # type: ignore[arg-type]


def _duplicate(original: Clip, name: str, kind: str) -> Clip:
    """A second file of the original's scene; all but the exact one are encoded differently."""
    copy = replace(original, name=name, kind=kind, pair=original.name)
    if kind == "exact_duplicate":
        return copy
    rate = 32000 if original.sample_rate_hz != 32000 else 48000
    copy = replace(copy, sample_rate_hz=rate, layout="mono", gain_db=-1.5)
    copy = replace(copy, quality=original.quality + 6, size_px=112)
    return replace(copy, split="train") if kind == "cross_split_duplicate" else copy


# ---------------------------------------------------------------- one clip


def frame_times(clip: Clip) -> list[float]:
    """Presentation times of the frames in seconds from the clip's beginning."""
    times = [i / clip.fps for i in range(max(1, round(clip.duration_s * clip.fps)))]
    if clip.kind == "variable_frame_rate":
        rng = np.random.default_rng((clip.scene.seed, 20))
        times = [0.0, *(t + float(rng.uniform(-0.05, 0.05)) for t in times[1:] if rng.random() < 0.75)]
    return [round(t, 3) for t in times]


def draw_frames(clip: Clip, times_s: Sequence[float]) -> NDArray[np.uint8]:
    """The frames [F, H, W, 3]: the object bounces with its sound, weather falls, a hand holds the camera."""
    if clip.kind == "black_video":
        return np.zeros((len(times_s), clip.size_px, clip.size_px, 3), np.uint8)
    sound = object_sound(clip.scene, clip.duration_s, SYNTHESIS_RATE_HZ)
    levels = level_envelope(sound, SYNTHESIS_RATE_HZ, np.asarray(times_s))
    phase = np.random.default_rng((clip.scene.seed, 21)).uniform(0, 2 * np.pi, 2)
    frames = []
    for t, level in zip(times_s, levels, strict=True):
        image = draw_scene(clip.scene, 128, t, float(level))
        dx, dy = np.round(2 * np.sin(2 * np.pi * np.array([0.45, 0.3]) * t + phase)).astype(int) + 2
        padded = np.pad(np.asarray(image), ((2, 2), (2, 2), (0, 0)), mode="edge")
        image = Image.fromarray(padded[dy : dy + 128, dx : dx + 128])
        frames.append(np.asarray(image.resize((clip.size_px, clip.size_px), Image.Resampling.BICUBIC)))
    if clip.kind == "frozen_video":
        frames = frames[:1] * len(frames)
    return np.stack(frames)


def clip_sound(clip: Clip) -> NDArray[np.float32]:
    """What is heard, mono at `SYNTHESIS_RATE_HZ`: float32 [S]."""
    audio = synthesise(clip.sound, clip.duration_s, SYNTHESIS_RATE_HZ)
    return np.zeros_like(audio) if clip.kind == "silent" else audio * np.float32(10 ** (clip.gain_db / 20))


def render_clip(clip: Clip) -> bytes:
    """The file's bytes."""
    if clip.kind == "empty_file":
        return b""
    if clip.kind == "text_file":
        return f"503 upstream busy, try again later ({clip.scene.seed})\n".encode()
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        times = [] if clip.kind == "no_video" else frame_times(clip)
        # Both streams must exist before the first packet is written.
        video = _video_stream(container, clip) if times else None
        audio = None if clip.kind == "no_audio" else _audio_stream(container, clip)
        if video is not None:
            _encode_video(container, video, clip, times)
        if audio is not None:
            _encode_audio(container, audio, clip)
    data = index_first(buffer.getvalue()) if clip.kind == "cut_media" else buffer.getvalue()
    if clip.kind in ("cut_index", "cut_media"):
        return data[: len(data) * (35 + clip.scene.seed % 25) // 100]
    return data


def index_first(data: bytes) -> bytes:
    """An mp4 file with its index (moov) moved before the media data, as for streaming (ISO/IEC 14496-12)."""
    boxes, at = [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        boxes.append(data[at : at + size])
        at += size
    index = bytearray(next(box for box in boxes if box[4:8] == b"moov"))
    at = index.find(b"stco")
    while at >= 0:  # chunk offsets count from the beginning of the file
        count = int.from_bytes(index[at + 8 : at + 12], "big")
        offsets = np.frombuffer(bytes(index), ">u4", count, at + 12) + len(index)
        index[at + 12 : at + 12 + 4 * count] = offsets.astype(">u4").tobytes()
        at = index.find(b"stco", at + 4)
    rest = [box for box in boxes if box[4:8] != b"moov"]
    return b"".join([rest[0], bytes(index), *rest[1:]])


def _video_stream(container: av.container.OutputContainer, clip: Clip) -> av.VideoStream:
    stream = container.add_stream("libx264", rate=clip.fps)
    stream.width = stream.height = clip.size_px
    stream.pix_fmt = "yuv420p"
    stream.options = {"preset": "ultrafast", "crf": str(clip.quality)}
    stream.codec_context.thread_count = 1
    stream.codec_context.time_base = Fraction(1, 1000)
    return stream


def _encode_video(
    container: av.container.OutputContainer, stream: av.VideoStream, clip: Clip, times_s: Sequence[float]
) -> None:
    for t, pixels in zip(times_s, draw_frames(clip, times_s), strict=True):
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame.time_base = Fraction(1, 1000)
        frame.pts = round((clip.start_s + t) * 1000)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def _audio_stream(container: av.container.OutputContainer, clip: Clip) -> av.AudioStream:
    stream = container.add_stream("aac", rate=clip.sample_rate_hz, layout=clip.layout)
    stream.bit_rate = 64000 if clip.layout == "mono" else 96000
    # The encoder's search for savings takes most of a clip's time and saves 3 % of its bytes.
    stream.options = {"aac_coder": "fast", "aac_pns": "0", "aac_is": "0", "aac_ms": "0", "aac_tns": "0"}
    return stream


def _encode_audio(container: av.container.OutputContainer, stream: av.AudioStream, clip: Clip) -> None:
    """Every channel carries the same sound, so that any way of mixing down gives it back at its level."""
    mono = av.AudioFrame.from_ndarray(clip_sound(clip)[None], format="fltp", layout="mono")
    mono.sample_rate = SYNTHESIS_RATE_HZ
    resampler = av.AudioResampler(format="fltp", layout="mono", rate=clip.sample_rate_hz)
    parts = [f.to_ndarray() for f in [*resampler.resample(mono), *resampler.resample(None)]]
    samples = np.repeat(np.concatenate(parts, axis=1), stream.layout.nb_channels, axis=0)
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout=clip.layout)
    frame.sample_rate = clip.sample_rate_hz
    frame.time_base = Fraction(1, clip.sample_rate_hz)
    frame.pts = round(clip.start_s * clip.sample_rate_hz)
    container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


# ---------------------------------------------------------------- the world


def _write_clip(out: str, clip: Clip) -> None:
    storage.write_bytes(storage.join(out, clip.uri), render_clip(clip))


def _each(work: partial[None], items: Sequence[object], num_workers: int) -> Iterator[None]:
    """Calls `work` on every item, in `num_workers` processes."""
    if num_workers == 1:
        yield from map(work, items)
        return
    with ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(work, items, chunksize=8)


def write_world(
    out: str,
    num_clips: int,
    seed: int = 0,
    num_workers: int = 2,
    progress: bool = True,
    shares: Mapping[str, float] | None = None,
) -> dict[str, int]:
    """Writes clips/*.mp4, manifest.csv, defects.json and scenes.json under `out` (a folder or s3:// prefix).

    manifest.csv: uri (relative to its folder), start_s, end_s, caption, labels, split; the labels are
    object;ambience;medium;size. defects.json: a list of {uri, kind, expect: reject|accept, code, pair}, where
    pair is the file a duplicate was made from. scenes.json: uri -> the true scene. shares: see plan_world.
    Returns how many clips, planted defects and oddities there are.
    """
    clips = plan_world(num_clips, seed, shares)
    done = _each(partial(_write_clip, out), clips, num_workers)
    for _ in tqdm(done, total=len(clips), desc="world", unit="clip", disable=not progress, mininterval=1.0):
        pass
    rows = [[c.uri, "", "", full_caption(c.scene), ";".join(c.scene.labels), c.split] for c in clips]
    _write_csv(storage.join(out, "manifest.csv"), rows)
    planted = [_defect(c) for c in clips if c.kind != "plain"]
    storage.write_json(storage.join(out, "defects.json"), planted)
    storage.write_json(storage.join(out, "scenes.json"), {c.uri: asdict(c.scene) for c in clips})
    count = Counter(entry["expect"] for entry in planted)
    return {"clips": len(clips), "defects": count["reject"], "oddities": count["accept"]}


def _defect(clip: Clip) -> dict[str, str | None]:
    code, pair = KINDS[clip.kind].code, f"clips/{clip.pair}" if clip.pair else None
    expect = "reject" if code else "accept"
    return {"uri": clip.uri, "kind": clip.kind, "expect": expect, "code": code, "pair": pair}


def _write_csv(uri: str, rows: Sequence[Sequence[str]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["uri", "start_s", "end_s", "caption", "labels", "split"])
    writer.writerows(rows)
    storage.write_bytes(uri, text.getvalue().encode())


# ---------------------------------------------------------------- pictures for the foundation recipe


def _write_image(out: str, seed: int, index: int) -> None:
    scene, rng = _image_scene(seed, index)
    image = draw_scene(scene, 128, time_s=float(rng.uniform(0, 10)), level=float(rng.random()))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling=0)
    storage.write_bytes(storage.join(out, f"images/{index:06d}.jpg"), buffer.getvalue())


def _image_scene(seed: int, index: int) -> tuple[Scene, np.random.Generator]:
    rng = np.random.default_rng((seed, 3, index))
    return replace(_plain(index, seed).scene, seed=int(rng.integers(2**31))), rng


def write_images(out: str, num_images: int, seed: int = 0, num_workers: int = 2, progress: bool = True) -> None:
    """Writes images/*.jpg (128 px) and manifest.csv with captions that leave some attributes open."""
    done = _each(partial(_write_image, out, seed), range(num_images), num_workers)
    for _ in tqdm(done, total=num_images, desc="images", unit="image", disable=not progress, mininterval=1.0):
        pass
    rows = []
    for i in range(num_images):
        scene, rng = _image_scene(seed, i)
        caption = partial_caption(scene, rng)
        rows.append([f"images/{i:06d}.jpg", "", "", caption, ";".join(scene.labels), _split(f"{seed}:{i}")])
    _write_csv(storage.join(out, "manifest.csv"), rows)
