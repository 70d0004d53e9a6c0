import json
import os
from functools import partial
from pathlib import Path

import pytest

from aai.foundation.identity import FoundationSpec
from aai.media.decode import ClipError, DecodeConfig, decode_clip
from aai.toy import writer
from pipelines.__main__ import main
from pipelines.benches import decoding
from pipelines.benches.decoding import auto_cosine, run_decode, write_clips

CLIPS = Path(os.environ.get("AAI_REAL_CLIPS", Path(__file__).resolve().parents[4] / "shared" / "data" / "clips"))
TOY = FoundationSpec(clip="toy:clip")


def test_compares_all_that_is_there(tmp_path: Path) -> None:
    clips = write_clips(str(tmp_path), 2, seed=0, duration_s=1.0, height_px=144)
    assert [decode_clip(Path(path).read_bytes(), None, None, DecodeConfig()).fps for path in clips] == [25, 30]
    result = run_decode(clips, processes=1, repeats=1)
    for name in ("exact", "auto", "keyframe", "floor"):
        assert result["figures"][f"{name}_clips_per_s"] > 0
        assert result["figures"][f"{name}_cpu_s_per_clip"] > 0
    assert ("exact/ffmpeg" in result["ratios"]) != ("ffmpeg" in result["absent"])
    assert auto_cosine(clips, TOY)["mean"] > 0.9


def test_without_media_it_makes_clips_of_its_own_and_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(decoding, "write_clips", partial(write_clips, duration_s=0.5, height_px=144))
    argv = ["bench", "decode", "--clips", "1", "--set", f"out={tmp_path}", "--set", "repeats=1"]
    assert main([*argv, "--set", "cluster.num_workers=1"]) == 0
    (clip,) = (tmp_path / "clips").iterdir()  # and nothing half-written beside it
    assert json.loads((tmp_path / "decode.json").read_text())["inputs"]["media"] == [str(clip)]
    assert "exact" in capsys.readouterr().out
    before = clip.stat().st_mtime_ns
    assert decoding.made_clips(str(tmp_path / "clips"), 1, 1) == [str(clip)]
    assert clip.stat().st_mtime_ns == before
    assert len(decoding.made_clips(str(tmp_path / "many"), 2400, 1)) == decoding.MADE_CLIPS


@pytest.mark.accept
def test_b1_decoding_is_faster_than_the_others_and_auto_is_close(tmp_path: Path) -> None:
    real = [str(path) for path in sorted(CLIPS.glob("*.mp4"))]
    clips = [*write_clips(str(tmp_path), 4, seed=1), *real * 2]
    result = run_decode(clips, processes=2, repeats=5)
    print(result)
    if "ffmpeg" not in result["absent"]:
        assert result["ratios"]["exact/ffmpeg"] >= 1.0
        assert result["ratios"]["keyframe/ffmpeg"] >= 10
    if "torchcodec" not in result["absent"]:
        assert result["ratios"]["exact/torchcodec"] >= 1.0
    writer.write_world(str(tmp_path / "world"), 40, 2, 2)
    toys = []
    for path in sorted((tmp_path / "world" / "clips").iterdir()):
        try:
            decode_clip(path.read_bytes(), None, None, DecodeConfig())
        except ClipError:
            continue  # a planted defect
        toys.append(str(path))
    for name, paths in (("real", real), ("toy", toys[:24])):
        if paths:
            cosine = auto_cosine(paths, TOY)
            print(name, cosine)
            assert cosine["mean"] >= 0.97
