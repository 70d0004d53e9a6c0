"""What painters told, until they tell nothing any more."""

import time

import pytest

from pipelines.service.noticeboard import STALE_S, Noticeboard


def test_the_board_forgets_who_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    board = Noticeboard()
    board.tell("a", {"n": 1})
    board.tell("b", {"n": 2})
    board.tell("a", {"n": 3})
    assert board.read() == [{"n": 3}, {"n": 2}]
    later = time.monotonic() + STALE_S + 1
    monkeypatch.setattr(time, "monotonic", lambda: later)
    board.tell("b", {"n": 4})
    assert board.read() == [{"n": 4}]
