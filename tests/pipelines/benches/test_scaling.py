"""The page of `aai plan --scale`: its sums, and that docs/scale.md is one."""

import re
from pathlib import Path
from typing import Any

import pytest

from pipelines.benches.scaling import DRIVER, SIZES, page, short

DOC = Path(__file__).resolve().parents[3] / "docs" / "scale.md"
NUMBER = re.compile(r"\*{0,2}\d[\d,]*(?:\.\d+)?\*{0,2}")


def result(clips: int, **changed: Any) -> dict[str, Any]:
    """What `aai plan` finds for so many clips."""
    shape = {
        "cpus": 64, "gpus": 1, "curate_h": clips / 1e6, "featurize_h": 0.5, "featurize_waits_for": "GPU",
        "side_by_side_h": 1.5, "gpu_busy_side_by_side": 0.5, "read_mb_per_s_per_node": 200.0,
    }  # fmt: skip
    stored = ("input", "accepted and rejected", "kept for later runs", "features")
    return {
        "machine": {"cores": 2, "cpu": "a CPU", "gpu": None},
        "measured": {"sample": 8},
        "nodes": 8,
        "assumed": ["one thing"],
        "shapes": {"rich": shape, "poor": {**shape, "cpus": 8}},
        "storage_gb": dict.fromkeys(stored, clips / 10000.0),
        **changed,
    }


@pytest.fixture
def written() -> str:
    """A page."""
    return page([result(clips) for clips in SIZES.values()], "aai plan --scale")


def test_figures_stand_under_their_size(written: str) -> None:
    assert "| 200 k (VGGSound) | 64 CPU, 1 GPU | 0.2 | 0.5 | GPU | 1.5 | 50% | 200 |" in written
    assert "| 100 M | 8 CPU, 1 GPU | 100 | 0.5 | GPU | 1.5 | 50% | 200 |" in written
    assert "| 2 M (AudioSet) | 200 | 200 | 200 | 200 |" in written
    # 0.51 GB and 0.70 kB a clip, as measured on 100,000 and on 1,000,000
    assert "| memory of curate's driver | 0.65 GB | 1.9 GB | **71 GB** |" in written
    assert "**200 k (VGGSound)**: nothing" in written
    assert "    - memory of curate's driver: part the manifest" in written.partition("- **100 M**:")[2]


def test_what_the_driver_costs_is_what_was_measured() -> None:
    by_name = {grown.name: grown for grown in DRIVER}
    assert by_name["memory of curate's driver"].at(100_000) == pytest.approx(0.583, rel=0.05)
    assert by_name["memory of curate's driver"].at(1_000_000) == pytest.approx(1.211, rel=0.05)
    assert by_name["requests of the driver to S3"].at(204_800) == pytest.approx(4 * 800 + 111)


def test_numbers_have_no_exponents() -> None:
    assert [short(value) for value in (0.00019, 0.65, 71, 250.4, 1_562_611)] == [
        "0.00019",
        "0.65",
        "71",
        "250",
        "1,562,611",
    ]


def test_the_committed_page_is_one_but_for_its_figures() -> None:
    text = DOC.read_text()
    assumed = text.partition("## Assumed\n\n")[2].partition("\n\n")[0].removeprefix("- ").split("\n- ")
    command = text.partition("```sh\n")[2].partition("\n```")[0]
    sampled = re.search(r"on (\d+) cores \((.*)\), (.*): a sample", text)
    assert sampled is not None
    machine = {"cores": sampled[1], "cpu": sampled[2], "gpu": None if sampled[3] == "no GPU" else sampled[3]}
    again = page([result(clips, assumed=assumed, machine=machine) for clips in SIZES.values()], command)
    masked = [re.sub(r"\b(GPU|CPU)(?= \|)", "DEVICE", NUMBER.sub("N", page_)) for page_ in (text, again)]
    assert masked[0] == masked[1]


def test_a_changed_page_is_found() -> None:
    text = DOC.read_text()
    assert NUMBER.sub("N", text) == NUMBER.sub("N", text.replace("1.9 GB", "2.0 GB"))
    assert NUMBER.sub("N", text) != NUMBER.sub("N", text.replace("part the manifest", "buy more", 1))
