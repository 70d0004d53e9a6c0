"""What painters told, until they tell nothing any more, and what they are told."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import serve

from pipelines.service import noticeboard
from pipelines.service.gateway import Gateway
from pipelines.service.guard import ApiError
from pipelines.service.noticeboard import STALE_S, BoardClient, Noticeboard, board_name
from tests.pipelines.service.test_gateway import MODEL


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


def test_who_waits_for_a_move_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    board = Noticeboard()
    for painter in ("a", "b"):
        board.tell(painter, {"of": painter})
    later = time.monotonic() + STALE_S + 1
    monkeypatch.setattr(time, "monotonic", lambda: later)
    asyncio.run(board.moved("a", 0))
    asyncio.run(board.moved("c", 0))  # which has told nothing here yet
    assert board.read() == [{"of": "a"}]


def test_all_who_wait_hear_of_a_move_and_of_a_burst_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        board = Noticeboard()
        seen = await board.moved("a", 0)  # the first time at once
        waiting = [asyncio.create_task(board.moved(painter, seen)) for painter in "ab"]
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in waiting)
        for _ in range(5):
            board.move()
        assert set(await asyncio.gather(*waiting)) == {seen + 5}
        assert await board.moved("late", seen) == seen + 5
        monkeypatch.setattr(noticeboard, "HOLD_S", 0.05)
        assert await board.moved("a", seen + 5) == seen + 5  # nothing moved
        assert seen not in (await board.moved("a", 0), await Noticeboard().moved("a", seen + 5))

    asyncio.run(asyncio.wait_for(run(), 30))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.shutdown()  # files tested before this one may have left it
    ray.init("local", num_cpus=1, include_dashboard=False)
    yield
    ray.shutdown()


def until_moved(client: BoardClient, told: bool = True) -> None:
    """Waits until the client says so."""
    end_s = time.monotonic() + 60
    while client.moved(0.2) is not told:
        assert time.monotonic() < end_s


@pytest.mark.usefixtures("cluster")
def test_a_painter_hears_of_moves_and_waits_for_no_board_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def board() -> Any:
        return ray.remote(Noticeboard).options(name="board", num_cpus=0).remote()

    monkeypatch.setattr(noticeboard, "PAUSE_S", 0.3)
    client = BoardClient("board")
    client.tell({"n": 1})
    assert [client.moved(0.01) for _ in range(3)] == [False] * 3  # there is none
    first = board()
    until_moved(client)  # there is one: what moved before?
    client.tell({"n": 1})
    assert [client.moved(0.2) for _ in range(3)] == [False] * 3
    ray.get([first.move.remote() for _ in range(3)])
    until_moved(client)
    assert sum(client.moved(0.2) for _ in range(5)) <= 1  # what came while the first of them was told
    assert client._answer is not None
    assert ray.get(first.read.remote()) == [{"n": 1}]
    ray.kill(first)
    end_s = time.monotonic() + 30
    while client._answer is not None:  # a call ends with its board
        assert time.monotonic() < end_s
        assert not client.moved(0.05)
    second = board()
    until_moved(client)
    ray.get(second.move.remote())
    until_moved(client)


def until_gone(board: Any) -> None:
    """A kill is only asked for: the actor may answer a few times more."""
    with suppress(ray.exceptions.RayActorError):
        while True:
            ray.get(board.read.remote())


@pytest.mark.usefixtures("cluster")
def test_a_gateway_whose_board_is_gone_sends_mlflow_away_to_come_again() -> None:
    gateway: Any = Gateway(None, MODEL, {"retry_after_s": 7}, 1, 1, False)  # type: ignore[arg-type]
    gateway._board = ray.remote(Noticeboard).options(num_cpus=0).remote()
    before = ray.get(gateway._board.moved.remote("a", 0))
    asyncio.run(gateway.moved())
    assert ray.get(gateway._board.moved.remote("a", before)) == before + 1
    ray.kill(gateway._board)
    until_gone(gateway._board)
    with pytest.raises(ApiError, match="cannot be told") as told:
        asyncio.run(gateway.moved())
    assert (told.value.status_code, told.value.headers) == (503, {"Retry-After": "7"})
