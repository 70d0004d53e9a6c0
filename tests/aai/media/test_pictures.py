"""Smart decoding gives, bit by bit, what decoding every frame gives."""

import io
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.reformatter import Interpolation

from aai.media.decode import ClipError, DecodeConfig, DecodedClip, decode_clip
from aai.media.duplicates import DuplicateConfig
from aai.media.pictures import Pictures
from aai.media.showing import whole_lines
from aai.media.signals import video_hash
from aai.toy import writer
from tests.clips import make_clip, make_moving, remuxed

CLIPS = Path(os.environ.get("AAI_REAL_CLIPS", Path(__file__).resolve().parents[4] / "shared" / "data" / "clips"))
OPEN_GOP = {"g": "12", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}
PYRAMID = {"g": "250", "bf": "8", "x264-params": "b-pyramid=normal:b-adapt=0:direct=temporal:weightb=1"}
X265 = "log-level=none:keyint=12:min-keyint=12:bframes=4:pools=1:frame-threads=1"
KINDS: dict[str, tuple[str, str, dict[str, str], str]] = {
    "h264 defaults": ("libx264", "mp4", {}, "aac"),
    "h264 short groups": ("libx264", "mp4", {"g": "7", "bf": "2"}, "aac"),
    "h264 one long group": ("libx264", "mp4", PYRAMID, "aac"),
    "h264 open groups": ("libx264", "matroska", OPEN_GOP, "aac"),
    "h264 intra refresh": ("libx264", "mpegts", {"g": "20", "x264-params": "intra-refresh=1"}, "aac"),
    "h264 mpegts": ("libx264", "mpegts", OPEN_GOP, "aac"),
    "h264 interlaced": ("libx264", "mp4", {"g": "12", "bf": "2", "x264-params": "interlaced=1"}, "aac"),
    "h264 flv": ("libx264", "flv", {"g": "12"}, "aac"),
    "hevc": ("libx265", "mp4", {"x265-params": f"{X265}:open-gop=0"}, "aac"),
    "hevc open groups": ("libx265", "matroska", {"x265-params": f"{X265}:open-gop=1"}, "aac"),
    "hevc temporal layers": ("libx265", "mp4", {"x265-params": f"{X265}:temporal-layers=3:b-pyramid=1"}, "aac"),
    "vp9": ("libvpx-vp9", "webm", {"g": "12", "cpu-used": "8", "deadline": "realtime"}, "libopus"),
    "vp9 alternate references": ("libvpx-vp9", "webm", {"g": "30", "cpu-used": "5", "lag-in-frames": "16"}, "libopus"),
    "vp8": ("libvpx", "webm", {"g": "12", "cpu-used": "8", "deadline": "realtime"}, "libopus"),
    "av1": ("libsvtav1", "mp4", {"g": "12", "preset": "12", "svtav1-params": "lp=1"}, "aac"),
    "mpeg4": ("mpeg4", "mp4", {"g": "12", "bf": "2"}, "aac"),
    "mpeg2": ("mpeg2video", "mpegts", {"g": "12", "bf": "2"}, "mp2"),
    "mjpeg": ("mjpeg", "matroska", {}, "pcm_s16le"),
}


def frames_of(data: bytes) -> list[tuple[float, Any]]:
    """(time, frame) of every frame, in order, by a plain decode of the whole file; times from the file's start."""
    with av.open(io.BytesIO(data), "r") as container:
        starts = [
            float((s.start_time or 0) * s.time_base) for s in (*container.streams.video[:1], *container.streams.audio)
        ]
        frames = list(container.decode(video=0))
        times = [frame.time for frame in frames]
        if container.format.name == "avi":  # it has no times of presentation; frames come in their order
            container.seek(0)
            stamps = [(packet.dts, packet.time_base) for packet in container.demux(video=0) if packet.dts is not None]
            times = [float(dts * base) for dts, base in stamps[: len(frames)]]
        return [(time_s - min(starts), frame) for time_s, frame in zip(times, frames, strict=True)]


def scaled(frame: Any, width: int, height: int, pixels: str) -> np.ndarray:
    if frame.interlaced_frame and pixels == "rgb24":
        frame = whole_lines(frame)
    return frame.reformat(width, height, pixels, interpolation=Interpolation.AREA).to_ndarray()


def assert_exact(clip: DecodedClip, data: bytes, start_s: float = 0.0, size_px: int = 64) -> None:
    """Frames, their times and both sets of lumas are those on show at the evenly spaced times."""
    decoded = frames_of(data)
    times_s = np.array([time_s for time_s, _ in decoded])

    def shown(targets_s: np.ndarray) -> list[int]:
        return np.maximum(np.searchsorted(times_s, targets_s, "right") - 1, 0).tolist()

    def even(count: int, begin_s: float, end_s: float) -> np.ndarray:
        return begin_s + (np.arange(count) + 0.5) / count * (end_s - begin_s)

    first = decoded[0][1]
    scale = size_px / min(first.width, first.height)
    size = round(first.width * scale), round(first.height * scale)
    end_s, frame_s = start_s + clip.duration_s, 1 / clip.fps
    kept = shown(even(len(clip.frames), start_s, end_s))
    assert clip.frame_pts_s == pytest.approx(times_s[kept] - start_s, abs=1e-6)
    assert np.array_equal(clip.frames, [scaled(decoded[i][1], *size, "rgb24") for i in kept])
    assert np.array_equal(clip.luma, [scaled(decoded[i][1], 32, 32, "gray") for i in kept])
    inside_s = times_s[(times_s + frame_s > start_s) & (times_s < end_s)]
    seen_s = max(inside_s[0], start_s), min(inside_s[-1] + frame_s, end_s)
    hashed = shown(even(4, *seen_s) + 5 / 16 * frame_s)
    assert np.array_equal(clip.hash_luma, [scaled(decoded[i][1], 32, 32, "gray") for i in hashed])


@pytest.fixture
def never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test when a clip is decoded whole after all."""
    monkeypatch.setattr(Pictures, "_decode_all", lambda *_: pytest.fail("decoded whole"))


@pytest.mark.usefixtures("never_whole")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("h264 intra refresh", "vp8")])
def test_exact_equals_a_plain_decode(kind: str) -> None:
    codec, container, options, sound = KINDS[kind]
    data = make_moving(codec, container, options=options, sound=sound)
    for num_frames in (1, 4, 7):
        assert_exact(decode_clip(data, None, None, DecodeConfig(num_frames=num_frames)), data)


@pytest.mark.parametrize("kind", ["h264 intra refresh", "vp8"])
def test_frames_that_do_not_come_out_are_found_by_decoding_all(kind: str) -> None:
    codec, container, options, sound = KINDS[kind]
    data = make_moving(codec, container, options=options, sound=sound)
    assert_exact(decode_clip(data, None, None, DecodeConfig(num_frames=9)), data)


@pytest.mark.parametrize(("codec", "b_frames"), [("libx264", "0"), ("libx264", "2"), ("mpeg4", "0"), ("mpeg4", "2")])
def test_files_without_presentation_times_are_decoded_whole(codec: str, b_frames: str) -> None:
    data = make_moving(codec, "avi", options={"g": "12", "bf": b_frames}, sound="libmp3lame")
    for policy in ("exact", "keyframe"):
        assert_exact(decode_clip(data, None, None, DecodeConfig.parse({"policy": policy})), data)


@pytest.mark.usefixtures("never_whole")
@pytest.mark.slow
def test_exact_on_odd_times() -> None:
    for data in (make_clip([0.0, 0.1, 0.15, 0.9, 1.0, 1.05, 1.8, 1.9]), make_clip(start_s=1.5)):
        assert_exact(decode_clip(data, None, None, DecodeConfig()), data)
    for kind in ("h264 defaults", "h264 short groups", "h264 open groups", "hevc open groups", "mpeg2"):
        codec, container, options, sound = KINDS[kind]
        data = make_moving(codec, container, 160, options=options, sound=sound)
        for start_s, end_s in ((0.0, 2.0), (2.51, 4.49), (6.0, 7.75)):
            assert_exact(decode_clip(data, start_s, end_s, DecodeConfig()), data, start_s)


@pytest.mark.usefixtures("never_whole")
@pytest.mark.slow
def test_exact_on_the_toy_world(tmp_path: Path) -> None:
    writer.write_world(str(tmp_path), 10, 3, 1)
    same = 0
    for path in sorted((tmp_path / "clips").iterdir()):
        try:
            clip = decode_clip(path.read_bytes(), None, None, DecodeConfig())
        except ClipError:
            continue  # a planted defect
        assert_exact(clip, path.read_bytes())
        same += 1
    assert same >= 6


@pytest.mark.usefixtures("never_whole")
@pytest.mark.parametrize("threads", [1, 2])
def test_exact_on_real_clips(threads: int) -> None:
    paths = sorted(CLIPS.glob("*.mp4"))
    if not paths:
        pytest.skip("no real clip is at hand")
    for path in paths:
        cfg = DecodeConfig(num_frames=8, frame_size_px=224, decode_threads=threads)
        assert_exact(decode_clip(path.read_bytes(), None, None, cfg), path.read_bytes(), size_px=224)


@pytest.mark.parametrize("container", ["mp4", "matroska", "flv", "mpegts"])
def test_the_frame_rate_is_that_of_the_frames(container: str) -> None:
    """Matroska and FLV made so declare 1000, the resolution of their clock."""
    uneven = [0, 0.04, 0.08, 0.12, 0.2, 0.21, 0.3, 0.45, 0.5, 0.6, 0.62, 0.7, 0.8, 0.9, 1.0, 1.3, 1.5, 1.7, 1.8, 1.9]
    for times_s in (None, uneven):
        data = remuxed(make_clip(times_s), container)
        assert decode_clip(data, None, None, DecodeConfig()).fps == pytest.approx(10, rel=0.001)
    assert decode_clip(data, 0.0, 0.5, DecodeConfig()).fps == pytest.approx(7 / 0.45, rel=0.01)  # of its own part


def test_a_single_frame_has_the_rate_of_its_length() -> None:
    assert 0 < decode_clip(make_clip([0.0]), None, None, DecodeConfig()).fps <= 1000


@pytest.mark.parametrize(("frame_size_px", "kept"), [(32, (32, 48)), (64, (64, 96)), (224, (64, 96))])
def test_a_small_source_is_not_enlarged(frame_size_px: int, kept: tuple[int, int]) -> None:
    clip = decode_clip(make_clip(size=(96, 64)), None, None, DecodeConfig(frame_size_px=frame_size_px))
    assert clip.frames.shape[1:3] == kept


@pytest.mark.usefixtures("never_whole")
@pytest.mark.slow
def test_key_frames_and_bounded_errors() -> None:
    data = make_moving(num_frames=120, options={"g": "50", "x264-params": "scenecut=0"})  # key frames at 0, 2.5, 5 s
    cfg = {"num_frames": 6, "frame_size_px": 64}
    key = decode_clip(data, None, None, DecodeConfig.parse(cfg | {"policy": "keyframe"}))
    assert key.frame_pts_s == pytest.approx([0, 2.5, 2.5, 2.5, 5, 5], abs=0.06)
    exact = decode_clip(data, None, None, DecodeConfig.parse(cfg))
    assert exact.frame_pts_s == pytest.approx([0.5, 1.5, 2.5, 3.5, 4.5, 5.5], abs=0.06)
    auto = decode_clip(data, None, None, DecodeConfig.parse(cfg | {"policy": "auto"}))
    assert auto.frame_pts_s == pytest.approx([0, 1.5, 2.5, 3.5, 5, 5], abs=0.56)
    targets = (np.arange(6) + 0.5) / 6 * auto.duration_s
    assert np.abs(np.array(auto.frame_pts_s) - targets).max() <= 0.5
    assert np.abs(np.array(auto.frame_pts_s) - targets).max() > 0.3  # key frames were taken
    assert np.array_equal(auto.frames[[1, 3]], exact.frames[[1, 3]])
    assert np.array_equal(auto.audio, exact.audio)


@pytest.mark.parametrize("num_frames", [22, 40, 45])
def test_a_copy_with_other_time_stamps_has_the_same_hash(num_frames: int) -> None:
    """Frames begin at the very eighths of some of these clips; the copies round them elsewhere, and start elsewhere."""
    data = make_moving(num_frames=num_frames)
    wanted = decode_clip(data, None, None, DecodeConfig()).hash_luma
    for copy in (remuxed(data, "matroska"), make_moving(num_frames=num_frames, fps=Fraction(9_637, 1000))):
        hashed = decode_clip(copy, None, None, DecodeConfig()).hash_luma
        assert np.abs(hashed.astype(int) - wanted).mean(axis=(1, 2)).max() < 3  # successive frames differ by more


def test_copies_with_other_key_frames_have_the_same_hash_under_exact_alone() -> None:
    copies = [make_moving(num_frames=40, options={"g": g, "x264-params": "scenecut=0"}) for g in ("9", "40")]
    bits = {}
    for policy in ("exact", "auto"):
        cfg = DecodeConfig.parse({"policy": policy})
        ours, theirs = (video_hash(decode_clip(data, None, None, cfg).hash_luma) for data in copies)
        bits[policy] = (int.from_bytes(ours) ^ int.from_bytes(theirs)).bit_count()
    assert bits["exact"] <= 8
    assert bits["auto"] > DuplicateConfig().max_video_bits
