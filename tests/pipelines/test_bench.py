import pytest

from pipelines import bench
from pipelines.__main__ import load_config, main


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


def test_the_help_names_every_bench(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    shown = capsys.readouterr().out
    assert [name for name in bench.NAMES if f"aai bench {name} " not in shown] == []
    assert {load_config("bench", [name])[0].name for name in bench.NAMES} == set(bench.NAMES)
