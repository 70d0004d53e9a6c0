"""How close curation and features come to a plain loop, and that memory does not grow (make accept)."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.accept, pytest.mark.timeout(7200)]
ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "runs" / "accept-bench"


def bench(name: str, **settings: Any) -> dict[str, Any]:
    """Runs a bench in a fresh process; settings as for --set."""
    sets = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "pipelines", "bench", name, "--set", f"out={OUT}", *sets]
    subprocess.run(command, cwd=ROOT, check=True, timeout=3600)
    return dict(json.loads((OUT / f"{name}.json").read_text()))


@pytest.mark.parametrize("name", ["curate", "featurize"])
def test_b2_ray_keeps_most_of_a_plain_loops_rate(name: str) -> None:
    result = bench(name)
    assert result["inputs"]["clips"] >= 2000
    assert result["ratios"]["ray/bare"] >= 0.85


def test_b3_memory_is_flat() -> None:
    """Ten windows of each of 2,000 clips against one."""
    few, many = (bench("curate", clips=2000, repeats=1, compare="false", windows=count) for count in (1, 10))
    assert (few["inputs"]["clips"], many["inputs"]["clips"]) == (2000, 20_000)
    assert many["figures"]["ray_peak_gb"] <= 1.25 * few["figures"]["ray_peak_gb"]
