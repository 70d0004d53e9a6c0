"""What painters told, until they tell nothing any more."""

import time
from types import SimpleNamespace

import pytest
from ray import serve

from pipelines.service.noticeboard import STALE_S, Noticeboard, board_name


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


def test_each_application_of_a_cluster_has_a_board_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    for app in ("one", "two"):
        monkeypatch.setattr(serve, "get_replica_context", lambda app=app: SimpleNamespace(app_name=app))
        names.append(board_name("board"))
    assert names == ["board-one", "board-two"]
