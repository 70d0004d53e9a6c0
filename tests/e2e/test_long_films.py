"""A film of two hours in windows: what it costs, beside one plain decode of the same file (make accept)."""

import hashlib
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from aai import storage
from aai.media.limits import DecodeConfig
from pipelines.curation.curate_config import CurateConfig, CutConfig
from pipelines.curation.cut import CutWorker, _clips
from pipelines.curation.layout import MEASURED, shard_file
from pipelines.curation.ledger import Entry
from pipelines.curation.measuring import MeasureShard, MeasureWorker
from pipelines.manifests.row import ManifestRow

FPS, RATE_HZ = 25, 48_000
SCENE_S = 20.16
"""A whole number of frames, and of packets of sound."""
SCENES = 358
"""Two hours."""


def write_scene(path: Path, size: tuple[int, int]) -> None:
    """SCENE_S of a drifting landscape of smooth colours with a little grain, and a voice-like sound."""
    rng, (width, height) = np.random.default_rng(0), size
    coarse = (
        rng.integers(0, 200, (height // 40 + 1, width // 40 + 1, 3), np.uint8)
        .repeat(40, 0)
        .repeat(40, 1)[:height, :width]
    )
    grain = rng.integers(0, 16, (8, height, width, 1), np.uint8)
    with av.open(str(path), "w", format="mp4") as out:
        video = out.add_stream("libx264", rate=FPS, options={"preset": "veryfast", "g": "250"})
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        audio = out.add_stream("aac", rate=RATE_HZ, layout="stereo")
        for number in range(round(SCENE_S * FPS)):
            frame = av.VideoFrame.from_ndarray(np.roll(coarse, 2 * number, 1) + grain[number % 8], "rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            out.mux(video.encode(frame))
        times_s = np.arange(round(SCENE_S * RATE_HZ)) / RATE_HZ
        sound = 0.3 * np.sin(2 * np.pi * 200 * times_s) * np.sin(3 * times_s) + 0.02 * rng.normal(size=len(times_s))
        heard = av.AudioFrame.from_ndarray(np.tile(sound.astype(np.float32), (2, 1)), "fltp", "stereo")
        heard.sample_rate, heard.pts, heard.time_base = RATE_HZ, 0, Fraction(1, RATE_HZ)
        out.mux([*video.encode(None), *audio.encode(heard), *audio.encode(None)])


def write_film(path: Path, scene: Path, count: int) -> None:
    """The scene `count` times, one after the other; nothing is encoded again."""
    with av.open(str(scene), "r") as given, av.open(str(path), "w", format="mp4") as out:
        streams = [out.add_stream_from_template(stream) for stream in given.streams]
        for number in range(count):
            given.seek(0)
            for packet in given.demux():
                if packet.dts is None or not 0 <= packet.pts * packet.time_base < SCENE_S:
                    continue
                shift = round(number * Fraction(str(SCENE_S)) / packet.time_base)
                packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                packet.stream = streams[packet.stream.index]
                out.mux(packet)


def plain_decode(path: Path) -> None:
    """Reads and hashes the file once and decodes every frame and sample on one thread; nothing is made of them."""
    with path.open("rb") as file:
        hashlib.file_digest(file, "sha256")
    with av.open(str(path), "r") as container:
        container.streams.video[0].codec_context.thread_count = 1
        for _ in container.decode():
            pass


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """(seconds of the processors, of the clock); children that have ended count."""

    def cpu_s() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(one.ru_utime + one.ru_stime for one in used)

    before_s, started_s = cpu_s(), time.monotonic()
    work()
    return cpu_s() - before_s, time.monotonic() - started_s


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes each read of the storage gave, from now on."""
    sizes: list[int] = []

    def counting(read: Callable[..., bytes], *args: Any) -> bytes:
        sizes.append(len(found := read(*args)))
        return found

    for name in ("read_bytes", "read_range"):
        monkeypatch.setattr(storage, name, partial(counting, getattr(storage, name)))
    return sizes


@pytest.mark.accept
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("place", ["disk", "s3"])
def test_j3_a_film_of_two_hours_in_windows_costs_about_one_decode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3: str, place: str
) -> None:
    scene, film, out = tmp_path / "scene.mp4", tmp_path / "film.mp4", str(tmp_path / "out")
    write_scene(scene, (1280, 720))
    write_film(film, scene, SCENES)
    size = film.stat().st_size
    plain_cpu_s, plain_s = timed(lambda: plain_decode(film))
    print(f"\n{SCENES * SCENE_S:.0f} s, {size / 1e6:.0f} MB; plain decode: {plain_cpu_s:.0f} s CPU, {plain_s:.0f} s")

    sizes, cfg, row = counted(monkeypatch), CutConfig(mode="windows"), ManifestRow(uri=str(film), split="train")
    clips: list[ManifestRow] = []
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    kept_bytes = CurateConfig(manifest="", out=out).kept_bytes
    if place == "s3":
        row = replace(row, uri=f"{s3}/film.mp4")
        storage.filesystem(s3)[0].put_file(str(film), row.uri)

    def look() -> None:
        worker = CutWorker(out, cfg.model_dump(), {}, kept_bytes)
        clips.extend(_clips(row, worker.probe(row.uri), cfg))
        worker.child.close()

    def measure() -> None:
        worker = MeasureWorker(out, DecodeConfig().model_dump(), {}, kept_bytes)
        for first in range(0, len(clips), 128):
            entries = [Entry(f"{clip.start_s}", clip.uri, clip.start_s, clip.end_s) for clip in clips[first:][:128]]
            hashes = {row.uri: str(clips[0].content_hash)}
            worker(MeasureShard(name=f"{first}", rows=len(entries), clips=entries, hashes=hashes))
        worker.child.close()

    spent = {}
    for name, work in (("looking through it", look), ("measuring", measure)):
        sizes.clear()
        cpu_s, clock_s = timed(work)
        spent[name] = (cpu_s / plain_cpu_s, sum(sizes) / size)
        print(f"{name}: {cpu_s:.0f} s CPU ({cpu_s / plain_cpu_s:.2f}), {clock_s:.0f} s ({clock_s / plain_s:.2f}), "
              f"{sum(sizes) / size:.2f} of its bytes")  # fmt: skip
    assert len(clips) == SCENES * SCENE_S // 10 + 1
    codes = storage.read_table(storage.join(out, MEASURED), ["code"])["code"].to_pylist()
    assert codes == [None] * len(clips)
    assert spent["measuring"][0] + spent["looking through it"][0] <= 1.3
    assert max(read for _, read in spent.values()) <= 1.3
    if place == "s3":
        assert sum(read for _, read in spent.values()) <= 1.0
    assert storage.exists(shard_file(out, MEASURED, "0"))
