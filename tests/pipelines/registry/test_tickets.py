"""Promotions take turns: by a lock of the kernel on sqlite, by tickets on a server."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from aai.errors import UserError
from pipelines.registry import tickets as registry_tickets
from pipelines.registry import tracking
from pipelines.registry.tickets import Tickets, turn
from pipelines.registry.tracking import OpenRun
from tests.pipelines.workshop import Workshop


@pytest.fixture
def run(tmp_path: Path, empty_store: Path) -> Iterator[OpenRun]:
    with tracking.run(Workshop(tmp_path, empty_store).cfg, "promotion") as opened:
        yield opened


@pytest.fixture
def tickets(tmp_path: Path, run: OpenRun) -> Tickets:
    """On sqlite too a registry numbers its versions one by one."""
    return Tickets(Workshop.config_of(tmp_path), run)


def test_on_sqlite_one_waits_for_the_other(tmp_path: Path, run: OpenRun, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = Workshop.config_of(tmp_path)
    order: list[str] = []

    def second() -> None:
        with turn(cfg, run, "second") as mine:
            order.append(f"second {mine.number}")

    with turn(cfg, run, "first") as mine:
        other = threading.Thread(target=second)
        other.start()
        time.sleep(1)
        mine.check()
        order.append(f"first {mine.number}")
    other.join(60)
    assert order == ["first 1", "second 2"]
    monkeypatch.setattr(registry_tickets, "PATIENCE_S", 0.5)
    with (
        turn(cfg, run, "first"),
        pytest.raises(UserError, match="another process is promoting or rolling back"),
        turn(cfg, run, "second"),
    ):
        pass
    with turn(cfg.model_copy(update={"model_name": "other"}), run, "me"), turn(cfg, run, "me"):
        pass  # of another model


def test_a_ticket_waits_for_all_lower_ones(tickets: Tickets, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = (tickets.draw(who) for who in ("ann", "bob", "eve"))
    assert (first, second, third) == (1, 2, 3)
    tickets.wait(first)
    tickets.close(second)  # it gave up waiting
    monkeypatch.setattr(registry_tickets, "PATIENCE_S", 0.5)
    with pytest.raises(UserError, match="ann is promoting or rolling back aai-demo"):
        tickets.wait(third)
    monkeypatch.setattr(registry_tickets, "PATIENCE_S", 60)
    threading.Timer(1, tickets.close, [first]).start()
    tickets.wait(third)
    tickets.check(third)


def test_a_holder_that_is_heard_of_keeps_its_turn_and_a_dead_one_loses_it(
    tickets: Tickets, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(registry_tickets, "LEASE_S", 6.0)
    monkeypatch.setattr(registry_tickets, "BEAT_S", 0.5)
    monkeypatch.setattr(registry_tickets, "PATIENCE_S", 12.0)
    alive, ended = tickets.draw("ann"), threading.Event()
    beat = threading.Thread(target=tickets.beat, args=(alive, ended))
    beat.start()
    waiting = tickets.draw("bob")
    with pytest.raises(UserError, match="ann is promoting"):
        tickets.wait(waiting)
    tickets.check(alive)
    ended.set()
    beat.join()
    monkeypatch.setattr(registry_tickets, "PATIENCE_S", 60.0)
    tickets.wait(waiting)
    assert "turn 1 of ann is over, nothing was heard of it" in caplog.text
    with pytest.raises(UserError, match="since nothing was heard of this one"):
        tickets.check(alive)
    tickets.close(waiting)


def test_who_was_silent_while_it_waited_does_not_begin(
    tickets: Tickets, run: OpenRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tickets, "wait", lambda self, number: self._tag(number, "state", "given up"))
    cfg = tickets.cfg.model_copy(update={"uri": "http://elsewhere"})
    monkeypatch.setattr(registry_tickets, "Tickets", lambda *_: tickets)
    with pytest.raises(UserError, match="since nothing was heard of this one"), turn(cfg, run, "ann"):
        pytest.fail("it must not begin")
