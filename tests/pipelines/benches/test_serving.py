"""`aai bench serve` on a tiny bundle with the real service, and what its figures are made of."""

import time
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from aai.addons import AddOns
from pipelines.__main__ import main
from pipelines.benches.asking import Outcome, Reply
from pipelines.benches.options import ServeBenchConfig
from pipelines.benches.serving import BARE, BATCH, ONE, Cell, Rounds, beside, goals, lines, mean_steps, row, summary
from tests.pipelines.benches.conftest import measured


def cell(variant: str, load: str, *times_s: float, refused: int = 0) -> Cell:
    """Pictures one after the other, of so many seconds, and refusals."""
    answers, now = [Reply(0.0, 0.01, "429 queue_full")] * refused, 0.0
    for time_s in times_s:
        answers.append(Reply(now, now + time_s, "200"))
        now += time_s
    return Cell(variant, load, [Outcome(answers, 0.25)])


def test_a_row_has_the_rates_of_rounds_and_the_times_of_all_pictures() -> None:
    found = row([cell(ONE, "8 clients", 1, 1, 2), cell(ONE, "8 clients", 0.5, 0.5, refused=3)])
    assert (found["painted"], found["per_s"], found["per_s_min_max"]) == (5, 1.375, [0.75, 2.0])
    assert (found["p50_ms"], found["p95_ms"], found["p99_ms"]) == (1000, 2000, 2000)
    assert found["not_painted"] == {"429 queue_full": 3}
    empty = row([cell(ONE, "open, 10 x", refused=2)])
    assert (empty["per_s"], empty["p50_ms"]) == (0.0, None)
    assert " - " in lines([empty])[1]


def test_one_client_is_compared_picture_by_picture() -> None:
    """A machine that is twice as slow for half of the time makes the service no slower than the painter."""
    bare, served = (Cell(name, "1 client", []) for name in (BARE, BATCH))
    for speed in (1, 1, 1, 2, 2):
        turns = [cell(BARE, "", *(speed * time_s for time_s in (1.0, 1.1, 0.9))) for _ in range(2)]
        turns[1] = cell(BATCH, "", *(speed * time_s for time_s in (1.05, 1.2, 0.95)))
        bare, served = (Cell(old.variant, old.load, [*old.outcomes, *new.outcomes])
                        for old, new in zip((bare, served), turns, strict=True))  # fmt: skip
    assert beside(served, bare) == pytest.approx(0.95 / 0.9)
    assert served.per_s() == pytest.approx(15 / (7 * 3.2))


def test_a_refusal_is_no_fast_picture() -> None:
    assert beside(cell(BATCH, "", 1.0, refused=1), cell(BARE, "", 1.0, 1.0)) == 1.0


def test_every_second_turn_goes_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def outcome(self: Rounds, variant: str, seconds: float, **load: float) -> Outcome:
        asked.append(variant)
        time.sleep(0.02)
        return Outcome([], 0.0)

    monkeypatch.setattr(Rounds, "_outcome", outcome)
    pools: Any = [None, None]
    rounds = Rounds(ServeBenchConfig(cell_s=0.03), ("", "cpu", "float32", AddOns()), 4, {}, *pools)
    rounds.cells.append([])
    rounds._in_turns([BARE, ONE, BATCH], 1, tqdm(disable=True))
    assert asked[:6] == [BARE, ONE, BATCH, BATCH, ONE, BARE]
    assert [each.variant for each in rounds.cells[0]] == [BARE, ONE, BATCH]


def test_ratios_are_medians_over_the_rounds() -> None:
    settings = ServeBenchConfig(clients=(1, 4), steps=10, open_shares=(), overload=1)
    pools: Any = [None, None]
    rounds = Rounds(settings, ("", "cpu", "float32", AddOns()), 4, {}, *pools)
    for one_s, batch_s in ((1.0, 0.5), (2.0, 0.4), (1.0, 0.25)):
        closed = [cell(BARE, "1 client", 1.0), cell(ONE, "1 client", 1.1), cell(BATCH, "1 client", 1.2)]
        rounds.cells.append([*closed, cell(BATCH, "4 clients", batch_s), cell(ONE, "4 clients", one_s)])
        rounds.unet_s.append({1: 0.05, 4: 0.1})
    found = summary(rounds)
    assert found["ratios"]["batch/one"] == 4.0  # of 2, 5 and 4
    assert found["figures"]["ratios_min_max"]["batch/one"] == [2.0, 5.0]
    assert found["ratios"]["batch_p50/bare_p50"] == 1.2
    assert found["figures"]["unet_of_4_per_s"] == pytest.approx(4 / (mean_steps(10) * 0.1), rel=1e-3)
    assert found["figures"]["rates_at_clients"] == 4
    assert [each["load"] for each in found["figures"]["loads"]] == ["1 client"] * 3 + ["4 clients"] * 2
    assert mean_steps(10) == pytest.approx(26 / 3)
    assert goals({"batch_p50/bare_p50": [1.2, 1.2, 1.2], "batch/one": [4, 2, 5]}, 4)[1].startswith("4 (2 to 5)")


def test_the_service_is_measured_beside_the_painter(
    tmp_path: Path, tiny_bundle: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = [f"serve.bundle={tiny_bundle}", "serve.clients=[1,3]", "serve.open_shares=[0.5]", "serve.overload=4"]
    sets += ["serve.cell_s=0.5", "serve.steps=3", "repeats=1", "overrides=['trust.public_keys=[]']"]
    words = [word for setting in sets for word in ("--set", setting)]
    result, shown = measured(capsys, tmp_path, "serve", *words)
    loads = {(one["variant"], one["load"]): one for one in result["figures"]["loads"]}
    closed, opened = ["1 client", "3 clients"], ["open, 50 %", "open, 4 x"]
    assert set(loads) == {(BARE, "1 client")} | {(name, load) for name in (ONE, BATCH) for load in closed + opened}
    assert all(one["painted"] % 3 == 0 for (_, load), one in loads.items() if load in closed)  # whole turns of verbs
    assert all(one["p50_ms"] <= one["p95_ms"] <= one["p99_ms"] for one in loads.values() if one["painted"])
    told = {code for one in loads.values() for code in one["not_painted"]}
    assert told <= {"429 queue_full"}, told
    assert result["ratios"]["batch/one"] > 0
    assert result["inputs"]["batch_pictures"] == 8
    assert any(line.startswith("3 clients") and "with batches" in line for line in shown)
    assert 0 < result["figures"]["asking_cpu_share"] < 1


def test_a_bundle_that_cannot_be_served_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--set", f"out={tmp_path}", "--set", f"serve.bundle={tmp_path}/none"]
    assert main(["bench", "serve", *words]) == 2
    assert "none" in capsys.readouterr().err
