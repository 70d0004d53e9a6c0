"""What a walk found, in lines."""

import pytest

from pipelines.tracing.telling import print_origin, print_spread, words_of
from pipelines.tracing.walks import origin_of_picture, spread_of
from tests.pipelines.tracing.archive import Archive


def test_the_way_back(archive: Archive, capsys: pytest.CaptureFixture[str]) -> None:
    print_origin(*origin_of_picture(archive.cfg, {"bundle": "both"}))
    told = capsys.readouterr().out
    assert told.startswith("version 1 of aai-demo (champion)  bundle both\n  adapt  run " + archive.runs["both"])
    assert "clips  40 of train, 20 of val" in told


def test_the_way_on(archive: Archive, capsys: pytest.CaptureFixture[str]) -> None:
    print_spread(spread_of(archive.cfg, frozenset(["c1"])))
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"features   {archive.features(1)}: 1 of train"
    assert [line.split()[0] for line in told[-4:]] == ["align", "adapt", "version", "unknown"]
    assert "KILLED" in told[-4]
    assert told[-2] == "version    1 of aai-demo (champion)  bundle both"


def test_what_a_picture_says_of_itself_is_shown_as_text() -> None:
    told = words_of({"prompt": "\x1b[2J" + "x" * 9999, "seed": {"a": 1}})
    assert "\x1b" not in told
    assert len(told) < 900
