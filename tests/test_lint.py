"""Lint and type checks run with the tests, so that one command tells whether a change is fit."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def check(*command: str) -> None:
    """Runs a checker of this environment over the checkout."""
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def test_ruff() -> None:
    check("ruff", "check", ".")


def test_mypy() -> None:
    check("mypy")
