import json
from pathlib import Path
from typing import Any

import pytest

from pipelines import bench
from pipelines.__main__ import load_config, main

KEYS = ["name", "machine", "inputs", "figures", "ratios"]


def measured(capsys: pytest.CaptureFixture[str], out: Path, name: str, *words: str) -> tuple[dict[str, Any], list[str]]:
    """What the command writes, and the lines it prints."""
    assert main(["bench", name, "--set", f"out={out}", *words]) == 0
    result = json.loads((out / f"{name}.json").read_text())
    assert list(result) == KEYS
    assert result["name"] == name
    return result, capsys.readouterr().out.splitlines()


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


def test_curate_beside_a_plain_pool_and_decoding_alone(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each of 30 clips is listed twice, with another start."""
    words = ["--clips", "30", "--set", "repeats=1", "--set", "windows=2", "--set", "overrides=[rows_per_shard=10]"]
    result, lines = measured(capsys, out, "curate", *words)
    assert list(result["ratios"]) == ["ray/bare", "ray/decode", "bare/decode"]
    figures = result["figures"]
    assert result["ratios"]["ray/bare"] == pytest.approx(figures["ray_clips_per_s"] / figures["bare_clips_per_s"], 1e-3)
    for name in ("ray", "bare", "decode"):
        assert figures[f"{name}_clips_per_s"] > 0
        assert figures[f"{name}_start_s"] > 0
        assert figures[f"{name}_peak_gb"] > 0.1
        work_s = figures[f"{name}_wall_s"] - figures[f"{name}_start_s"] - figures[f"{name}_rest_s"]
        assert figures[f"{name}_clips_per_s"] == pytest.approx(60 / work_s, 0.05)
    assert figures["accepted"] == result["inputs"]["clips"] == 60
    assert lines[0].split() == ["name", "figure", "unit", "ratio"]
    assert lines[1].startswith("ray ")
    assert "x bare" in lines[1]


@pytest.mark.accept
def test_featurize_beside_a_plain_pool_and_the_models_alone(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result, _ = measured(capsys, out, "featurize", "--clips", "30", "--set", "repeats=1")
    assert list(result["ratios"]) == ["ray/bare", "ray/models", "bare/models"]
    assert result["inputs"]["clips"] == 30


def test_the_table_shows_ratios_beside_their_rates() -> None:
    figures = {"a_clips_per_s": 12.0, "b_clips_per_s": 10.0, "each": [1, 2], "a_peak_gb": 0.5}
    lines = bench.table({"figures": figures, "ratios": {"a/b": 1.2, "cosine": 0.98}})
    assert [line.split() for line in lines] == [
        ["name", "figure", "unit", "ratio"],
        ["a", "12", "clips/s", "1.2", "x", "b"],
        ["b", "10", "clips/s"],
        ["a_peak", "0.5", "GB"],
        ["cosine", "0.98"],
    ]


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "curate", "--set", "cluster.address=auto"]) == 2
    assert "one machine" in capsys.readouterr().err
    assert main(["bench", "curate", "--set", "out=s3://bucket/x"]) == 2
    assert "not a local folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        load_config("bench", ["nothing"])
