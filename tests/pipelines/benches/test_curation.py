from pathlib import Path

import pytest

from tests.pipelines.benches.conftest import measured


def test_curate_beside_a_plain_pool_and_decoding_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each of 16 clips is listed twice, with another start."""
    words = ["--clips", "16", "--set", "repeats=1", "--set", "windows=2", "--set", "overrides=[rows_per_shard=8]"]
    result, lines = measured(capsys, tmp_path, "curate", *words)
    assert list(result["ratios"]) == ["ray/bare", "ray/decode", "bare/decode"]
    figures = result["figures"]
    assert result["ratios"]["ray/bare"] == pytest.approx(figures["ray_clips_per_s"] / figures["bare_clips_per_s"], 1e-3)
    for name in ("ray", "bare", "decode"):
        assert figures[f"{name}_clips_per_s"] > 0
        assert figures[f"{name}_start_s"] > 0
        assert figures[f"{name}_peak_gb"] > 0.1
        work_s = figures[f"{name}_wall_s"] - figures[f"{name}_start_s"] - figures[f"{name}_rest_s"]
        assert figures[f"{name}_clips_per_s"] == pytest.approx(32 / work_s, 0.05)
    assert figures["accepted"] == result["inputs"]["clips"] == 32
    assert lines[0].split() == ["name", "figure", "unit", "ratio"]
    assert lines[1].startswith("ray ")
    assert "x bare" in lines[1]
