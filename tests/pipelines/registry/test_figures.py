"""Figures by dotted name: only finite numbers count."""

import pytest

from pipelines.registry.figures import figure, flatten, numbers

FIGURES = {"a": {"x": 1, "y": float("nan"), "flag": True, "text": "1", "list": [1]}, "b": 0.5, "empty": {}}


def test_flatten_keeps_leaves_and_empty_mappings() -> None:
    assert flatten({"a": {"b": {"c": 1}}, "d": [1, 2], "e": {}}) == {"a.b.c": 1, "d": [1, 2], "e": {}}


def test_numbers_are_the_finite_ones() -> None:
    assert numbers(FIGURES) == {"a.x": 1.0, "b": 0.5}


@pytest.mark.parametrize(
    ("name", "value"),
    [("a.x", 1.0), ("b", 0.5), ("a.y", None), ("a.flag", None), ("a.text", None), ("a", None), ("b.x", None)],
)
def test_a_figure_is_a_finite_number_or_none(name: str, value: float | None) -> None:
    assert figure(FIGURES, name) == value
