"""The world's files: what is planned is what a decoder finds, and defects are where defects.json says."""

import csv
import io
import itertools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from aai.toy.grammar import COLOURS, COUNTS, Scene
from aai.toy.roster import Clip
from aai.toy.writer import (
    clip_sound,
    draw_frames,
    frame_times,
    index_first,
    labels_of,
    render_clip,
    write_images,
    write_world,
)

SCENE = Scene("dog", "rain", "photo", 0.8, 11)
PLAIN = Clip(name="a.mp4", scene=SCENE, sound=SCENE, split="train", sample_rate_hz=22050, layout="mono")


def _decode(data: bytes) -> tuple[list[np.ndarray], list[float], np.ndarray, av.AudioStream]:
    """Frames, their times, samples [C, S] and the audio stream of a file."""
    frames, times, parts = [], [], []
    with av.open(io.BytesIO(data)) as container:
        for packet in container.demux():
            for frame in packet.decode():
                if isinstance(frame, av.VideoFrame):
                    frames.append(frame.to_ndarray(format="rgb24"))
                    times.append(float(frame.time or 0))
                else:
                    parts.append(frame.to_ndarray())
        return frames, times, np.concatenate(parts, axis=1), container.streams.audio[0]


# ---------------------------------------------------------------- one clip


def test_a_plain_clip_decodes_to_what_was_drawn_and_heard() -> None:
    frames, times, samples, stream = _decode(render_clip(PLAIN))
    drawn = draw_frames(PLAIN, frame_times(PLAIN))
    assert times == pytest.approx([i / 8 for i in range(16)])
    errors = [np.abs(a.astype(float) - b).mean() for a, b in zip(frames, drawn, strict=True)]
    assert max(errors) < 8
    assert stream.rate == 22050
    assert samples.shape[1] / 22050 == pytest.approx(2.0, abs=0.06)
    heard = np.sqrt(np.mean(samples[:, : 2 * 22050] ** 2))
    assert 20 * np.log10(heard / np.sqrt(np.mean(clip_sound(PLAIN) ** 2))) == pytest.approx(0, abs=1.5)


def test_frames_move_even_without_weather() -> None:
    scene = replace(SCENE, obj="car", ambience="clear")
    frames = draw_frames(replace(PLAIN, scene=scene), [0.25, 0.75, 1.25, 1.75]).astype(float)
    assert all(np.abs(b - a).mean() > 1 for a, b in itertools.pairwise(frames))


@pytest.mark.parametrize(
    ("changes", "channels"), [({"layout": "stereo"}, 2), ({"layout": "5.1", "sample_rate_hz": 48000}, 6)]
)
def test_every_channel_carries_the_sound(changes: dict, channels: int) -> None:
    _, _, samples, stream = _decode(render_clip(replace(PLAIN, **changes)))
    assert stream.channels == len(samples) == channels
    assert np.corrcoef(samples[0], samples[2 if channels > 2 else 1])[0, 1] > 0.95


def test_start_offset_moves_both_streams() -> None:
    with av.open(io.BytesIO(render_clip(replace(PLAIN, kind="start_offset", start_s=1.5)))) as container:
        for stream in container.streams:
            assert float(stream.start_time * stream.time_base) == pytest.approx(1.5, abs=0.06)


def test_variable_frame_rate_varies() -> None:
    _, times, _, _ = _decode(render_clip(replace(PLAIN, kind="variable_frame_rate")))
    gaps = np.diff(times)
    assert gaps.min() > 0
    assert gaps.max() - gaps.min() > 0.03


def test_frozen_black_and_silent() -> None:
    frozen, _, _, _ = _decode(render_clip(replace(PLAIN, kind="frozen_video")))
    changes = [np.abs(b.astype(float) - a).mean() for a, b in itertools.pairwise(frozen)]
    assert max(changes) < 1.5  # what the encoder adds by refining its first frame
    black, _, _, _ = _decode(render_clip(replace(PLAIN, kind="black_video")))
    assert max(frame.mean() for frame in black) < 5
    _, _, silence, _ = _decode(render_clip(replace(PLAIN, kind="silent")))
    assert np.abs(silence).max() < 1e-4


def test_missing_streams() -> None:
    with av.open(io.BytesIO(render_clip(replace(PLAIN, kind="no_audio")))) as container:
        assert [s.type for s in container.streams] == ["video"]
    with av.open(io.BytesIO(render_clip(replace(PLAIN, kind="no_video")))) as container:
        assert [s.type for s in container.streams] == ["audio"]


def test_unreadable_files() -> None:
    assert render_clip(replace(PLAIN, kind="empty_file")) == b""
    for kind in ("cut_index", "text_file"):
        with pytest.raises(av.FFmpegError):
            av.open(io.BytesIO(render_clip(replace(PLAIN, kind=kind))))


def test_cut_media_opens_but_ends_early() -> None:
    with av.open(io.BytesIO(render_clip(replace(PLAIN, kind="cut_media")))) as container:
        stream = container.streams.video[0]
        assert stream.frames == 16
        assert 0 < sum(packet.size > 0 for packet in container.demux(stream)) < 13


def test_index_first_changes_order_but_no_content() -> None:
    data = render_clip(PLAIN)
    moved = index_first(data)
    assert data.index(b"moov") > data.index(b"mdat")
    assert moved.index(b"moov") < moved.index(b"mdat")
    assert all(np.array_equal(a, b) for a, b in zip(_decode(data)[0], _decode(moved)[0], strict=True))
    assert np.array_equal(_decode(data)[2], _decode(moved)[2])


# ---------------------------------------------------------------- the world


@pytest.mark.slow
def test_world_is_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    figures = write_world(str(tmp_path / "one"), 24, seed=9, num_workers=1, progress=False)
    write_world(str(tmp_path / "two"), 24, seed=9, num_workers=2, progress=False)
    assert figures["clips"] == 24
    one = {p.relative_to(tmp_path / "one"): p for p in (tmp_path / "one").rglob("*") if p.is_file()}
    two = {p.relative_to(tmp_path / "two"): p for p in (tmp_path / "two").rglob("*") if p.is_file()}
    assert one.keys() == two.keys()
    assert len(one) == 24 + 3
    assert all(one[name].read_bytes() == two[name].read_bytes() for name in one)


@pytest.mark.slow
def test_written_tables_agree(tmp_path: Path) -> None:
    figures = write_world(str(tmp_path), 100, seed=1, num_workers=1, progress=False)
    with (tmp_path / "manifest.csv").open(encoding="utf-8") as file:
        rows = {row["uri"]: row for row in csv.DictReader(file)}
    defects = {d["uri"]: d for d in json.loads((tmp_path / "defects.json").read_text())}
    scenes = json.loads((tmp_path / "scenes.json").read_text())
    assert rows.keys() == scenes.keys()
    assert all((tmp_path / uri).is_file() for uri in rows)
    assert Counter(d["expect"] for d in defects.values()) == {
        "reject": figures["defects"],
        "accept": figures["oddities"],
    }
    for uri, row in rows.items():
        labels = row["labels"].split(";")
        assert labels[:3] == [scenes[uri][key] for key in ("obj", "ambience", "medium")]
        assert labels[0] in row["caption"]
        assert labels == labels_of(Scene(**scenes[uri]))
        assert not {*COLOURS, *COUNTS[1:], "arch", "open", "left"} & set(row["caption"].split())
    exact = next(d for d in defects.values() if d["kind"] == "exact_duplicate")
    assert (tmp_path / exact["uri"]).read_bytes() == (tmp_path / exact["pair"]).read_bytes()
    near = next(d for d in defects.values() if d["kind"] == "near_duplicate")
    assert (tmp_path / near["uri"]).read_bytes() != (tmp_path / near["pair"]).read_bytes()
    assert any(Path(uri).name.startswith("-") for uri in defects)
    assert any(not uri.isascii() for uri in defects)


def test_images_with_captions(tmp_path: Path) -> None:
    write_images(str(tmp_path), 12, seed=2, num_workers=1, progress=False)
    with (tmp_path / "manifest.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    for row in rows:
        with Image.open(tmp_path / row["uri"]) as image:
            assert (image.size, image.format) == ((128, 128), "JPEG")
        assert row["labels"].split(";")[2] in row["caption"]
