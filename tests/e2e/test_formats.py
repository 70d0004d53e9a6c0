"""Files of every make decode as ffmpeg decodes them: frames, times, sizes and sound.

`make accept` decodes 336; the ordinary tests 12, one for each container and each thing that once went wrong.
"""

from pathlib import Path

import numpy as np
import pytest

from aai.media.decode import ClipError, DecodeConfig, decode_clip
from tests import formats
from tests.formats import CONTAINERS, Make

pytestmark = pytest.mark.skipif(formats.absent() is not None, reason=formats.absent() or "")

CFG = DecodeConfig(num_frames=4, frame_size_px=64)
SAMPLE = [
    Make("mp4", sound_first=True, pixel_aspect="64/45", title="latin1", rate="30000/1001"),
    Make("mp4", turn=90, pixel_aspect="8/9", tracks="second sound"),
    Make("mov", turn=-1, hole=True),
    Make("mov", turn=270, tracks="preview", title="latin1"),
    Make("mkv", hole=True, sound_first=True, pixel_aspect="64/45", rate="12.5"),
    Make("mkv", tracks="preview", title="latin1"),
    Make("webm", tracks="second sound", sample_rate_hz=48_000, layout="5.1", pixel_aspect="8/9"),
    Make("avi", sound_first=True, title="latin1", sample_rate_hz=22_050, rate="8"),
    Make("ts", hole=True, sound_first=True, pixel_aspect="64/45", sample_rate_hz=48_000),
    Make("3gp", turn=180, layout="mono", sample_rate_hz=11_025),
    Make("3gp", sound_first=True, hole=True),
    Make("ogv", sound_first=True, pixel_aspect="64/45", rate="8"),
]


def faults(make: Make, folder: Path, cfg: DecodeConfig = CFG) -> list[str]:
    """What is wrong with what we decode of such a file."""
    path = formats.write(make, folder)
    try:
        clip = decode_clip(path.read_bytes(), None, None, cfg)
    except ClipError as error:
        return [f"{make}: {error}"]
    found = []
    if (clip.width, clip.height) != make.shown:
        found.append(f"{make}: {clip.width}x{clip.height} px instead of {make.shown}")
    scale = min(1.0, cfg.frame_size_px / min(make.shown))
    width, height = (round(edge * scale) for edge in make.shown)
    if clip.frames.shape[1:3] != (height, width):
        return [*found, f"{make}: pictures of {clip.frames.shape}"]
    theirs = formats.decoded(path, make, (width, height), cfg.sample_rate_hz)
    targets_s = (np.arange(cfg.num_frames) + 0.5) / cfg.num_frames * clip.duration_s
    for target_s, time_s, frame in zip(targets_s, clip.frame_pts_s, clip.frames, strict=True):
        nearest = int(np.abs(theirs.times_s - time_s).argmin())
        shown_s = [theirs.times_s[theirs.times_s <= target_s + slack_s][-1] for slack_s in (-2e-3, 2e-3)]
        if abs(theirs.times_s[nearest] - time_s) > 1e-3 or not shown_s[0] - 1e-3 <= time_s <= shown_s[1] + 1e-3:
            found.append(f"{make}: a frame of {time_s:.4f} s for {target_s:.4f} s, where {shown_s} s is shown")
        if (quality := formats.psnr_db(frame, theirs.frames[nearest])) < 40:
            found.append(f"{make}: the frame of {time_s:.3f} s at {quality:.1f} dB")
    offset_s, correlation = formats.alignment(clip.audio, theirs.sound, cfg.sample_rate_hz)
    if abs(offset_s) > 1e-3 or correlation < 0.99:
        found.append(f"{make}: sound {1000 * offset_s:.2f} ms off, correlation {correlation:.4f}")
    if abs(len(clip.audio) - len(theirs.sound)) > 0.03 * cfg.sample_rate_hz:
        found.append(f"{make}: {len(clip.audio)} samples of sound, {len(theirs.sound)} by ffmpeg")
    over, _, under = make.rate.partition("/")
    if abs(clip.fps / (float(over) / float(under or 1)) - 1) > 0.02:
        found.append(f"{make}: {clip.fps:.3f} frames/s")
    return found


@pytest.mark.parametrize("make", SAMPLE, ids=str)
def test_a_file_decodes_as_ffmpeg_decodes_it(make: Make, tmp_path: Path) -> None:
    assert faults(make, tmp_path) == []


@pytest.mark.accept
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("container", CONTAINERS)
def test_j1_every_make_of_file_decodes_as_ffmpeg_decodes_it(container: str, tmp_path: Path) -> None:
    made = formats.makes(42, container, seed=1)
    assert len(made) == 42
    assert [fault for make in made for fault in faults(make, tmp_path)] == []
