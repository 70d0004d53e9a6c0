"""What the driver writes down of a running training, where storage is away for a while; the rest is tested on Ray."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from tqdm import tqdm

from pipelines.training.board import Board
from pipelines.training.following import HISTORY, SAMPLES, SKIPPED, Follower, history, samples


def follower(board: Board, out: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Follower, list[int]]:
    """Beside a board in this process."""
    monkeypatch.setattr(ray, "get", lambda value: value)
    seen: list[int] = []

    def on_log(step: int, figures: dict[str, float]) -> None:
        seen.append(step)

    remote: Any = SimpleNamespace(take=SimpleNamespace(remote=board.take))
    return Follower("test", remote, str(out), tqdm(disable=True), on_log, lambda step, png: seen.append(step)), seen


def test_what_could_not_be_written_is_written_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board, out = Board(), tmp_path / "out"
    found, seen = follower(board, out, monkeypatch)
    board.post({"step": 1, "loss": 2.0, "learning_rate": 0.1})
    found.poll()
    (out / HISTORY).unlink()
    out.rmdir()
    out.write_text("in the way")
    board.post({"step": 2, "loss": 1.0, "learning_rate": 0.1})
    board.post({"step": 3, "clips": ["c1"], "rank": 0})
    for _ in range(2):
        with pytest.raises(OSError, match=r"exists|directory"):
            found.poll()
    out.unlink()
    found.poll()
    assert [entry["step"] for entry in history(str(out))] == [1, 2]
    assert (out / SKIPPED).read_text().count("\n") == 1
    assert seen == [1, 2]


def test_pictures_wait_for_storage_and_are_heard_of_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board, folder = Board(), tmp_path / SAMPLES
    found, seen = follower(board, tmp_path, monkeypatch)
    folder.write_text("in the way")
    for step in (900, 1_000):
        board.post({"step": step, "picture": f"picture {step}".encode()})
    for _ in range(2):
        with pytest.raises(OSError, match=r"exists|directory"):
            found.poll()
    assert seen == []
    folder.unlink()
    found.poll()
    found.poll()
    assert seen == [900, 1_000]
    assert samples(str(tmp_path)) == [(900, b"picture 900"), (1_000, b"picture 1000")]


def test_entries_of_an_earlier_call_stay_and_those_that_come_again_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for losses in ({1: 9.0, 2: 8.0}, {2: 7.0, 3: 6.0}):
        board = Board()
        found, _ = follower(board, tmp_path, monkeypatch)
        for step, loss in losses.items():
            board.post({"step": step, "loss": loss, "learning_rate": 0.1})
            board.post({"step": step, "val_r1": loss / 10})
        found.poll()
    entries = history(str(tmp_path))
    assert [(e["step"], e.get("loss")) for e in entries] == [
        (1, 9.0),
        (1, None),
        (2, 7.0),
        (2, None),
        (3, 6.0),
        (3, None),
    ]
    assert entries[3]["val_r1"] == 0.7


def test_the_history_has_an_entry_before_anybody_hears_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who hears of it may end the process."""
    board, written = Board(), []
    found, _ = follower(board, tmp_path, monkeypatch)
    found.on_log = lambda step, figures: written.append((step, [e["step"] for e in history(str(tmp_path))]))
    for step in (2, 4):
        board.post({"step": step, "loss": 1.0, "learning_rate": 0.1})
        found.poll()
    assert written == [(2, [2]), (4, [2, 4])]
