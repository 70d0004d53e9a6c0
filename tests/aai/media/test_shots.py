"""Lengths and shots of real files, sound and broken."""

import io
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction

import av
import numpy as np
import pytest

from aai.media.decode import ClipError, DecodeConfig, decode_clip
from aai.media.shots import extent, shots
from tests.clips import index_first, make_clip

CFG = DecodeConfig()
COLOURS = ((200, 40, 30), (30, 60, 190), (40, 180, 60))


def make_shots(
    lengths_s: Sequence[float],
    fps: int = 25,
    start_s: float = 0.0,
    format: str = "mp4",
    size: tuple[int, int] = (160, 96),
) -> bytes:
    """A video of one moving pattern per shot with hard cuts, each in a colour of its own."""
    sink = io.BytesIO()
    noise = np.random.default_rng(0).integers(-8, 8, (size[1], size[0], 1))
    with av.open(sink, "w", format=format) as out:
        video = out.add_stream("libx264", rate=fps, options={"preset": "ultrafast", "g": "250", "sc_threshold": "0"})
        video.width, video.height, video.pix_fmt = *size, "yuv420p"
        number = 0
        for shot, length_s in enumerate(lengths_s):
            for _ in range(round(length_s * fps)):
                pixels = np.clip(np.roll(noise, 2 * number, 1) + COLOURS[shot % len(COLOURS)], 0, 255).astype(np.uint8)
                frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
                frame.time_base, frame.pts = Fraction(1, fps), number + round(start_s * fps)
                out.mux(video.encode(frame))
                number += 1
        out.mux(video.encode(None))
    return sink.getvalue()


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_clip(duration_s=3),
        lambda: make_clip(duration_s=3, start_s=5),
        lambda: make_clip(duration_s=3, has_video=False),
        lambda: make_clip(duration_s=3, has_audio=False),
        lambda: make_clip(times_s=[0, 0.3, 1.7, 2.9], duration_s=3),
        lambda: make_shots([1, 2], format="matroska"),
        lambda: make_shots([1, 2], format="mpegts"),
        lambda: make_shots([1, 2], format="avi"),
    ],
    ids=["mp4", "late start", "sound", "silent", "uneven", "mkv", "ts", "avi"],
)
def test_extent_of_sound_files(make: Callable[[], bytes]) -> None:
    found = extent(make(), CFG, 10)
    assert found.is_whole
    assert found.duration_s == pytest.approx(3, abs=0.12)


def test_extent_of_a_file_that_breaks_off() -> None:
    data = index_first(make_shots([10, 10], size=(320, 192)))
    found = extent(data[: len(data) // 2], CFG, 10)
    assert not found.is_whole
    assert 5 < found.duration_s < 15


def test_what_cannot_be_probed_has_a_code() -> None:
    for data, cfg, code in (
        (b"", CFG, "EMPTY_FILE"),
        (b"no media" * 100, CFG, "UNREADABLE"),
        (b"#EXTM3U\n#EXTINF:9,\n/etc/passwd\n", CFG, "UNREADABLE"),
        (make_clip(), DecodeConfig(max_bytes=100), "TOO_LARGE"),
        (make_clip(), DecodeConfig(max_streams=1), "TOO_LARGE"),
    ):
        for probe in (lambda: extent(data, cfg, 10), lambda: shots(data, 3, cfg, 10)):  # noqa: B023
            with pytest.raises(ClipError) as caught:
                probe()
            assert caught.value.code == code
    for data, cfg, limit_s, code in (
        (make_clip(), DecodeConfig(max_pixels=100), 10, "TOO_LARGE"),
        (make_clip(has_video=False), CFG, 10, "NO_VIDEO"),
        (make_clip(), CFG, 0, "TIMEOUT"),
    ):
        with pytest.raises(ClipError) as caught:
            shots(data, 3, cfg, limit_s)
        assert (caught.value.code, caught.value.transient) == (code, code == "TIMEOUT")


@pytest.mark.parametrize(("fps", "start_s", "format"), [(25, 0, "mp4"), (30, 4, "mp4"), (24, 0, "matroska")])
def test_shots_are_found_to_the_frame(fps: int, start_s: float, format: str) -> None:
    found = shots(make_shots([4, 3, 5], fps, start_s, format), 3, CFG, 60)
    assert len(found) == 3
    for (start, end), (wanted_start, wanted_end) in zip(found, ((0, 4), (4, 7), (7, 12)), strict=True):
        assert start == pytest.approx(wanted_start, abs=0.5 / fps)
        assert end == pytest.approx(wanted_end, abs=0.5 / fps)


def test_no_shot_shows_a_frame_of_another() -> None:
    """29.97 frames per second: no boundary falls on a full millisecond."""
    data = with_sound(make_shots([1.9, 2.1, 2], 30, size=(64, 64)), Fraction(1001, 1000))
    found = shots(data, 3, CFG, 60)
    assert len(found) == 3
    for number, (start_s, end_s) in enumerate(found):
        clip = decode_clip(data, start_s, end_s, DecodeConfig(num_frames=64))
        colours = clip.frames.mean((1, 2))
        assert np.abs(colours - COLOURS[number]).max() < 30, "every picture has the colour of its shot"
        assert np.ptp(clip.luma.mean((1, 2))) < 8


def with_sound(data: bytes, stretch: Fraction) -> bytes:
    """The same video, its times stretched, with silence beside it."""
    sink = io.BytesIO()
    with av.open(io.BytesIO(data), "r") as given, av.open(sink, "w", format="mp4") as out:
        source = given.streams.video[0]
        video, audio = out.add_stream_from_template(source), out.add_stream("aac", rate=8000, layout="mono")
        length_s = float(source.duration * source.time_base * stretch)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, round(8000 * length_s)), np.float32), "fltp", "mono")
        sound.sample_rate, sound.time_base, sound.pts = 8000, Fraction(1, 8000), 0
        out.mux([*audio.encode(sound), *audio.encode(None)])
        for packet in given.demux(source):
            if packet.dts is not None:
                packet.pts, packet.dts = round(packet.pts * stretch), round(packet.dts * stretch)
                packet.duration, packet.stream = round(packet.duration * stretch), video
                out.mux(packet)
    return sink.getvalue()


def test_movement_is_no_cut() -> None:
    assert [round(end_s) for _, end_s in shots(make_shots([6]), 3, CFG, 60)] == [6]


def test_shots_of_broken_files_end_where_they_break() -> None:
    good = make_shots([4, 4], format="mpegts")
    broken = bytearray(good)
    broken[len(good) // 3 : len(good) // 3 + 400] = bytes(400)
    assert [round(end_s) for _, end_s in shots(bytes(broken), 3, CFG, 60)][-1] == 8
    cut_off = shots(good[: int(len(good) * 0.75)], 3, CFG, 60)
    assert len(cut_off) == 2
    assert 4 < cut_off[-1][1] < 8


def test_the_finder_of_shots_is_loaded_only_when_it_is_used() -> None:
    code = "import sys, aai.media.shots, pipelines.curation.cut; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True, text=True)
    loaded = set(done.stdout.split())
    assert "aai.media.shots" in loaded
    assert not loaded & {"cv2", "scenedetect"}


def damaged(seed: int, files: Sequence[bytes]) -> bytes:
    """One of the files with flipped bits, cut off, with another's beginning, giant numbers or noise in it."""
    chance = random.Random(seed)
    data = bytearray(chance.choice(files))
    place = chance.randrange(len(data) - 64)
    kind = chance.randrange(5)
    if kind == 0:
        for _ in range(chance.randrange(1, 40)):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif kind == 1:
        del data[place:]
    elif kind == 2:
        data[:place] = chance.choice(files)[:place]
    else:
        data[place : place + 64] = b"\x7f\xff\xff\xff" * 16 if kind == 3 else chance.randbytes(64)
    return bytes(data)


def outcome(probe: Callable[[], object]) -> str:
    """Whether something is found, or the code of what is wrong."""
    try:
        return "found" if probe() else "nothing"
    except ClipError as error:
        return error.code


def check_damaged(count: int) -> None:
    """Every damaged file has a length and shots, or a code."""
    files = [make_shots([1, 1], size=(64, 64), format=name) for name in ("mp4", "matroska", "mpegts", "avi")]
    files.append(index_first(make_clip(duration_s=1)))
    for seed in range(count):
        data = damaged(seed, files)
        for probe in (lambda: extent(data, CFG, 20), lambda: shots(data, 3, CFG, 20)):  # noqa: B023
            assert outcome(probe) in ("found", "UNREADABLE", "NO_VIDEO", "TOO_LARGE", "EMPTY_FILE")


def test_damaged_files_are_probed_or_explained() -> None:
    check_damaged(30)


@pytest.mark.accept
def test_b5_damaged_files_are_probed_or_explained() -> None:
    check_damaged(1000)
