"""A bench as a user calls it."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.__main__ import main

KEYS = ["name", "machine", "inputs", "figures", "ratios"]


def measured(capsys: pytest.CaptureFixture[str], out: Path, name: str, *words: str) -> tuple[dict[str, Any], list[str]]:
    """What the command writes, and the lines it prints."""
    assert main(["bench", name, "--set", f"out={out}", *words]) == 0
    result = json.loads((out / f"{name}.json").read_text())
    assert list(result) == KEYS
    assert result["name"] == name
    return result, capsys.readouterr().out.splitlines()
