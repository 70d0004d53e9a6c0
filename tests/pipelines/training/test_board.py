"""Figures on their way from rank 0 to the driver: each is taken once, in order."""

import subprocess
import sys

from pipelines.training.board import Board


def test_every_entry_is_taken_once() -> None:
    board = Board()
    assert board.take() == []
    for step in (1.0, 2.0):
        board.post({"step": step})
    taken = board.take()
    board.post({"step": 3.0})
    assert taken == [{"step": 1.0}, {"step": 2.0}]  # what was taken does not grow
    assert board.take() == [{"step": 3.0}]
    assert board.take() == []


def test_its_process_starts_without_heavy_libraries() -> None:
    code = "import sys, pipelines.training.board; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert "pipelines.training.board" in done.stdout.split()
    assert not {"torch", "ray", "mlflow", "pyarrow"} & set(done.stdout.split())
