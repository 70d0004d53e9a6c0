"""Following an alias: what is taken up, what is refused, and what a registry that is away changes (nothing)."""

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from aai.errors import UserError
from pipelines.registry import versions
from pipelines.service.http import ServedModel
from pipelines.service.watching import STALE_S, Noticeboard, Watcher, refuse_other
from pipelines.settings import TrackingConfig
from tests.pipelines.registry.test_versions import make_bundle


class Follower:
    """A registry with three versions, version 1 champion, and a watcher that takes up what it is given."""

    def __init__(self, folder: Path, store: Path) -> None:
        shutil.copy(store, folder / "mlflow.db")
        self.cfg = TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db", model_name="toy")
        for number in (1, 2, 3):
            versions.register(self.cfg, make_bundle(folder / str(number), number).folder, {}, {})
        self.point(1)
        served = ServedModel(name="toy", version="1", alias="champion", sha="s", sample_rate_hz=16_000)
        self.watcher = Watcher("models:/toy@champion", self.cfg, served, self.take)
        self.taken: list[str] = []
        self.errors: dict[str, Exception] = {}

    def point(self, version: int) -> None:
        versions.set_alias(self.cfg, "champion", version)

    def take(self, pinned: str, model: ServedModel) -> None:
        self.taken.append(pinned)
        if model.version in self.errors:
            raise self.errors[model.version]
        self.watcher.served = model

    def look(self) -> tuple[str, dict[str, str], str]:
        self.watcher.look()
        return self.watcher.served.label(), self.watcher.refused, self.watcher.trouble


@pytest.fixture
def follower(tmp_path: Path, empty_store: Path) -> Follower:
    return Follower(tmp_path, empty_store)


def test_another_version_is_taken_up_once_and_a_rollback_too(follower: Follower) -> None:
    assert follower.look() == ("toy/1@champion", {}, "")
    assert follower.taken == []
    follower.point(2)
    assert follower.look() == follower.look() == ("toy/2@champion", {}, "")
    assert follower.taken == ["models:/toy/2"]
    follower.point(1)
    assert follower.look()[0] == "toy/1@champion"


def test_a_bad_version_is_refused_and_the_old_one_stays(follower: Follower, caplog: pytest.LogCaptureFixture) -> None:
    follower.errors["2"] = ValueError("a shape")
    follower.point(2)
    label, refused, _ = follower.look()
    assert (label, refused) == ("toy/1@champion", {"2": "ValueError: a shape"})
    follower.look()
    assert follower.taken == ["models:/toy/2"]  # it is not tried at every look
    assert "version 2 is refused, toy/1@champion stays" in caplog.text
    follower.point(3)
    assert follower.look() == ("toy/3@champion", {}, "")
    del follower.errors["2"]
    follower.point(2)  # once more, on purpose
    assert follower.look()[0] == "toy/2@champion"


def test_going_back_forgets_what_was_refused(follower: Follower) -> None:
    follower.errors["2"] = ValueError("a shape")
    follower.point(2)
    assert follower.look()[1]
    follower.point(1)
    assert follower.look() == ("toy/1@champion", {}, "")


def test_a_registry_that_is_away_changes_nothing(follower: Follower, caplog: pytest.LogCaptureFixture) -> None:
    follower.point(2)
    away = UserError("tracking.uri", "u", "cannot be reached", "wait")
    follower.errors["2"] = away
    assert follower.look() == ("toy/1@champion", {}, str(away))
    del follower.errors["2"]
    assert follower.look() == ("toy/2@champion", {}, "")  # tried again
    versions.delete_alias(follower.cfg, "champion")
    label, _, trouble = follower.look()
    assert label == "toy/2@champion"
    assert "no alias 'champion'" in trouble
    assert caplog.text.count("cannot be followed") == 2


def test_it_looks_again_and_again_and_ends_with_the_process(follower: Follower) -> None:
    told = threading.Event()
    follower.point(2)
    before = set(threading.enumerate())
    follower.watcher.start(0.1, told.set)
    (thread,) = set(threading.enumerate()) - before
    assert not thread.daemon
    assert told.wait(10)
    assert follower.watcher.served.version == "2"
    main = threading.main_thread()
    ended: Any = type(main).is_alive
    try:
        main.is_alive = lambda: False  # type: ignore[method-assign]
        thread.join(10)
        assert not thread.is_alive()
    finally:
        main.is_alive = ended.__get__(main)  # type: ignore[method-assign]


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


def test_what_cannot_change_is_named() -> None:
    refuse_other("x", 1, 1)
    with pytest.raises(UserError, match="x=2: the service runs with 1; start the service again"):
        refuse_other("x", 1, 2)
