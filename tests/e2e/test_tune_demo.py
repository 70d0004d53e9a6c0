"""A sweep over the demo's align (make accept): what its winner is worth on the val split, and on the test split."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from aai.align import validate
from aai.bundle import read_bundle
from aai.encoders.aligner import load_aligner
from aai.features import load_split

pytestmark = [pytest.mark.accept, pytest.mark.timeout(7200)]
ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "runs" / "accept_tune"


@pytest.fixture(scope="module")
def swept() -> dict[str, Any]:
    """The figures of a sweep from nothing, or of the one that runs/accept_tune holds."""
    for command in (["world"], ["curate"], ["featurize"], ["tune", "align"]):
        words = [sys.executable, "-m", "pipelines", *command, "--set", f"run_dir={RUN}"]
        subprocess.run(words, cwd=ROOT, check=True, timeout=7200)
    return dict(json.loads((RUN / "tune" / "align" / "tune.json").read_text()))


def test_what_a_sweep_of_the_demo_finds(swept: dict[str, Any]) -> None:
    features, rows = str(RUN / "features"), []
    for trial in swept["standing"]:
        if trial["state"] == "finished":
            aligner = load_aligner(read_bundle(f"{trial['out']}/bundle"))
            figures = {split: validate(aligner, load_split(features, split, aligner.config.clip_samples))
                       for split in ("val", "test")}  # fmt: skip
            rows.append({"trial": trial["number"], "settings": trial["settings"], **figures})
            assert figures["val"]["a2v_r1"] == pytest.approx(trial["value"])
    (RUN / "tune_figures.json").write_text(json.dumps(rows, indent=1))
    print(json.dumps(rows, indent=1))
    assert {trial["number"] for trial in swept["standing"]} == set(range(8))
    base = next(row for row in rows if row["trial"] == 0)
    assert swept["best"]["value"] >= base["val"]["a2v_r1"] == swept["base_value"]
    assert ("nothing is better" in swept["summary"]) == (swept["best"]["value"] == swept["base_value"])
    assert any(trial["state"] == "stopped" for trial in swept["standing"])
