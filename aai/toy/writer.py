"""Writes the toy world: real .mp4 clips (H.264 + AAC) with captions, and defects planted on purpose.

Every clip is a pure function of its plan, and the plan a pure function of (number of clips, seed): the number
of worker processes changes nothing. What is planted stands in defects.json, so that curation can be scored.
"""

import csv
import io
import logging
import multiprocessing
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from fractions import Fraction
from functools import partial

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from aai import storage
from aai.toy.draw import draw_scene, region
from aai.toy.grammar import Scene, clip_caption, partial_caption, random_scene
from aai.toy.roster import KINDS, Clip, plan_world, split_of
from aai.toy.synthesis import level_envelope, object_sound, synthesise

log = logging.getLogger(__name__)

VERSION = 3
"""Counts up when the same settings would give other files."""
SYNTHESIS_RATE_HZ = 16000


def labels_of(scene: Scene) -> list[str]:
    """What the manifest says of a clip: `Scene.labels`, then the region of its objects (`draw.region`) as text."""
    return [*scene.labels, " ".join(map(str, region(scene)))]


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
        shift = np.round(2 * np.sin(2 * np.pi * np.array([0.45, 0.3]) * t + phase)).astype(int)
        columns, rows = np.clip(np.arange(128) + shift[:, None], 0, 127)
        image = Image.fromarray(np.asarray(image)[rows][:, columns])
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
    stream.bit_rate = {"mono": 64_000, "stereo": 96_000, "5.1": 320_000}[clip.layout]
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

    manifest.csv: uri (relative to its folder), start_s, end_s, caption, labels, split; for the labels see
    `Scene.labels`. defects.json: a list of {uri, kind, expect: reject|accept, code, pair}, where
    pair is the file a duplicate was made from. scenes.json: uri -> the true scene. shares: see plan_world.
    Returns how many clips, planted defects and oddities there are.
    """
    clips = plan_world(num_clips, seed, shares)
    done = _each(partial(_write_clip, out), clips, num_workers)
    for _ in tqdm(done, total=len(clips), desc="world", unit="clip", disable=not progress, mininterval=1.0):
        pass
    rows = [[c.uri, "", "", clip_caption(c.scene), ";".join(labels_of(c.scene)), c.split] for c in clips]
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
    return random_scene(rng, two=0.3), rng  # what is painted of two objects needs more pictures than of one


def write_images(out: str, num_images: int, seed: int = 0, num_workers: int = 2, progress: bool = True) -> None:
    """Writes images/*.jpg (128 px) and manifest.csv with captions that leave some attributes open."""
    done = _each(partial(_write_image, out, seed), range(num_images), num_workers)
    for _ in tqdm(done, total=num_images, desc="images", unit="image", disable=not progress, mininterval=1.0):
        pass
    rows = []
    for i in range(num_images):
        scene, rng = _image_scene(seed, i)
        caption = partial_caption(scene, rng)
        rows.append([f"images/{i:06d}.jpg", "", "", caption, ";".join(scene.labels), split_of(f"{seed}:{i}")])
    _write_csv(storage.join(out, "manifest.csv"), rows)
