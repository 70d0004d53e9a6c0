"""Following an alias: what is taken up, what is refused, and what a registry that is away changes (nothing)."""

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from aai.errors import UserError
from pipelines.registry import versions
from pipelines.service.answers import ServedModel
from pipelines.service.watching import Watcher, refuse_other
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


@pytest.fixture(autouse=True)
def _serve_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("ray.serve"), "propagate", True)  # Serve's own setup takes it from pytest


def test_a_bad_version_is_refused_and_the_old_one_stays(follower: Follower, caplog: pytest.LogCaptureFixture) -> None:
    follower.errors["2"] = ValueError("a shape")
    follower.point(2)
    label, refused, _ = follower.look()
    assert (label, refused) == ("toy/1@champion", {"2": "ValueError"})  # /healthz is open: the reason is in the log
    assert "(a shape)" in caplog.text
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
    for _ in range(3):
        assert follower.look() == ("toy/1@champion", {}, "UserError: tracking.uri")
    assert caplog.text.count("cannot be followed") == 1
    del follower.errors["2"]
    assert follower.look() == ("toy/2@champion", {}, "")  # tried again
    versions.delete_alias(follower.cfg, "champion")
    label, _, trouble = follower.look()
    assert label == "toy/2@champion"
    assert trouble == "UserError: bundle"
    assert "no alias 'champion'" in caplog.text
    assert caplog.text.count("cannot be followed") == 2


def test_a_refused_version_is_tried_again_after_a_while(follower: Follower, monkeypatch: pytest.MonkeyPatch) -> None:
    follower.errors["2"] = OSError("the disk is full")
    follower.point(2)
    now = time.monotonic()
    for later_s, tries in ((0, 1), (59, 1), (61, 2), (170, 2), (190, 3)):  # after one minute, after two more
        monkeypatch.setattr(time, "monotonic", lambda later_s=later_s: now + later_s)
        follower.look()
        assert len(follower.taken) == tries, later_s
    del follower.errors["2"]
    monkeypatch.setattr(time, "monotonic", lambda: now + 900)
    assert follower.look() == ("toy/2@champion", {}, "")


def test_a_store_that_vanished_is_not_made_anew(follower: Follower, tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").unlink()
    assert follower.look() == ("toy/1@champion", {}, "UserError: tracking.uri")
    assert not (tmp_path / "mlflow.db").exists()


@contextmanager
def watching(follower: Follower, every_s: float, moved: Callable[[float], bool]) -> Iterator[list[str]]:
    """What is told while the watcher looks; it ends with the process, here as if this one ended."""
    before, told = set(threading.enumerate()), []
    main = threading.main_thread()
    is_alive: Any = type(main).is_alive.__get__(main)
    try:
        follower.watcher.start(every_s, lambda: told.append(follower.watcher.served.version), moved)
        (thread,) = set(threading.enumerate()) - before
        assert not thread.daemon
        yield told
    finally:
        main.is_alive = lambda: False  # type: ignore[method-assign]
        thread.join(30)
        main.is_alive = is_alive  # type: ignore[method-assign]
    assert not thread.is_alive()


def until(true: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end_s
        time.sleep(0.05)


def test_it_looks_again_and_again_and_ends_with_the_process(follower: Follower) -> None:
    follower.point(2)
    with watching(follower, 0.1, threading.Event().wait) as told:
        until(lambda: len(told) >= 4)
        assert told[:3] == ["1", "2", "2"]  # before and after each look


def test_it_looks_at_once_when_the_alias_moved_and_otherwise_after_a_long_time(follower: Follower) -> None:
    moves = threading.Semaphore(0)
    with watching(follower, 3600, lambda wait_s: moves.acquire(timeout=wait_s)) as told:
        for version in (2, 3):
            follower.point(version)
            moves.release()
            until(lambda version=version: told[-1:] == [str(version)])  # type: ignore[misc]
        assert told == ["1", "2", "2", "3"]


def test_what_failed_is_tried_again_before_the_next_look_is_due(
    follower: Follower, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a webhook that came while the registry was away would be for nothing."""
    monkeypatch.setattr("pipelines.service.watching.AGAIN_S", 0.3)
    follower.errors["2"] = UserError("tracking.uri", "u", "cannot be reached", "wait")
    follower.point(2)
    moves = threading.Semaphore(1)
    with watching(follower, 3600, lambda wait_s: moves.acquire(timeout=wait_s)) as told:
        until(lambda: len(follower.taken) >= 2)
        del follower.errors["2"]
        until(lambda: told[-1:] == ["2"])


def test_what_cannot_change_is_named() -> None:
    refuse_other("x", 1, 1)
    with pytest.raises(UserError, match="x=2: the service runs with 1; start the service again"):
        refuse_other("x", 1, 2)
