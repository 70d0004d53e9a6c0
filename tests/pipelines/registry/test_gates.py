"""Gates: bounds are inclusive, and a figure that is missing or is no number fails."""

from typing import Any

import pytest

from pipelines.__main__ import CONFIGS
from pipelines.promote import PromoteConfig
from pipelines.registry.gates import Gate, Verdict, check_champion, check_gate, incomparable, table
from tests.pipelines.workshop import changed


@pytest.mark.parametrize(
    ("figures", "failed"),
    [
        ({}, {}),
        ({"retrieval__overlap": 1}, {"retrieval.overlap": 1}),
        ({"retrieval__overlap": None}, {"retrieval.overlap": None}),
        ({"retrieval__near_overlap": 1}, {"retrieval.near_overlap": 1}),
        (
            {"generation__uncaptioned__above_nearest_caption__low": 0.0},
            {"generation.uncaptioned.above_nearest_caption.low": 0.0},
        ),
        ({"generation__edit__given_nearer": 0.5}, {"generation.edit.given_nearer": 0.5}),
        ({"generation__edit__from_noise": {}}, {"generation.edit.given_nearer": 0.9}),
        ({"retrieval__same_object_by_caption": None}, {"retrieval.same_object_r1": 0.9}),
        ({"retrieval__same_object_r1": 0.7}, {"retrieval.same_object_r1": 0.7}),
        ({"retrieval__same_object_r1": float("nan")}, {"retrieval.same_object_r1": None}),
        ({"retrieval__same_object_r1": True}, {"retrieval.same_object_r1": None}),
        ({"retrieval__same_object_r1": "0.9"}, {"retrieval.same_object_r1": None}),
        ({"generation__ceiling__object": None}, {"generation.sound.object": 0.8}),
        ({"generation__ceiling__object": 0}, {"generation.sound.object": 0.8}),
        ({"generation__ceiling__object": float("nan")}, {"generation.sound.object": 0.8}),
        ({"generation__sound": {}}, {"generation.sound.object": None, "generation.sound.ambience": None}),
        ({"generation__sound__object": 0.7}, {"generation.sound.object": 0.7}),
        ({"generation__random_token__object": 0.21}, {"generation.random_token.object": 0.21}),
    ],
)
def test_gates_of_the_demo(figures: dict[str, Any], failed: dict[str, float | None]) -> None:
    config = PromoteConfig.load(CONFIGS / "demo" / "promote.yaml")
    verdicts = [check_gate(gate, changed(figures)) for gate in config.gates]
    assert {verdict.gate: verdict.value for verdict in verdicts if not verdict.passed} == failed


def test_gate_bounds_are_inclusive() -> None:
    figures = {"a": {"x": 0.5}, "b": 0.25}
    assert check_gate(Gate(metric="a.x", min=0.5, max=0.5), figures).passed
    assert not check_gate(Gate(metric="a.x", min=0.6), figures).passed
    assert not check_gate(Gate(metric="a.x", max=0.4), figures).passed
    assert check_gate(Gate(metric="a.x", min_ratio_of="b", ratio=2), figures).passed
    assert not check_gate(Gate(metric="a.x", min_ratio_of="b", ratio=2.1), figures).passed
    assert not check_gate(Gate(metric="a.x", min_ratio_of="b", ratio=1, max=0.4), figures).passed
    assert not check_gate(Gate(metric="a", min=0), figures).passed
    assert not check_gate(Gate(metric="a.x.y", min=0), figures).passed


@pytest.mark.parametrize(
    ("ceiling", "why"),
    [
        (0.0, "0, but it must be above 0"),
        (-0.5, "-0.5, but it must be above 0"),
        (float("nan"), "missing or not a number"),
        (float("inf"), "missing or not a number"),
        (None, "missing or not a number"),
    ],
)
def test_a_share_of_nothing_is_no_bound(ceiling: float | None, why: str) -> None:
    verdict = check_gate(Gate(metric="a", min_ratio_of="b", ratio=0.8), {"a": 0.0, "b": ceiling})
    assert not verdict.passed
    assert verdict.bound == f">= 0.8 x b ({why})"


@pytest.mark.parametrize(
    ("value", "low", "passed"),
    [(0.8, -0.0299, True), (0.8, -0.0301, False), (0.8, 0.01, True), (None, 0.01, False), (float("nan"), 0.01, False)],
)
def test_a_figure_may_fall_by_its_tolerance(value: float | None, low: float, passed: bool) -> None:
    found = {"difference": low + 0.01, "ci95": [low, low + 0.02], "pairs": 100}
    (verdict,) = check_champion({"a.x": 0.03}, {"a": {"x": value}}, {"a.x": found})
    assert verdict.passed == passed
    assert verdict.bound.startswith(">= champion's - 0.03 (")
    assert verdict.bound.endswith(", 100 pairs)")


def test_a_few_clips_show_nothing() -> None:
    found = {"difference": 0.0, "ci95": [0.0, 0.0], "pairs": 99}
    (verdict,) = check_champion({"a.x": 0.03}, {"a": {"x": 1.0}}, {"a.x": found})
    assert not verdict.passed
    assert verdict.bound.endswith("99 pairs, at least 100 needed)")


def test_what_cannot_be_compared_fails() -> None:
    for found in ({}, {"a.x": None}):
        (verdict,) = check_champion({"a.x": 0.03}, {"a": {"x": 1.0}}, found)
        assert not verdict.passed
        assert verdict.bound.startswith("comparable with the champion's, but marks.parquet")
    (verdict,) = incomparable(["a.x"], {"a": {"x": 1.0}}, "there is none", "evaluate it")
    told = (verdict.value, verdict.bound, verdict.passed, verdict.remedy)
    assert told == (1.0, "comparable with the champion's, but there is none", False, "evaluate it")


def test_the_table_is_aligned() -> None:
    verdicts = [Verdict("a.long_name", 0.51234, ">= 0.5", True), Verdict("b", None, "<= 1", False)]
    assert table(verdicts).splitlines() == [
        "gate         value    bound   verdict",
        "a.long_name  0.5123   >= 0.5  pass",
        "b            missing  <= 1    FAIL",
    ]
