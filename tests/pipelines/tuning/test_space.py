"""What is drawn: within its bounds, the same for a seed, and more trials begin with the same ones."""

import math

import pytest

from aai.errors import UserError
from pipelines.tuning.space import Distribution, by_dotted_name, drawn

RATE = Distribution(log_uniform=(1e-4, 1e-2))
SPACE = {"rate": RATE, "decay": Distribution(uniform=(0.1, 0.3)), "kind": Distribution(choice=("a", 2, None))}
BASE = {"rate": 1e-3, "decay": 0.1, "kind": "a"}


def test_values_lie_in_their_distributions() -> None:
    found = list(drawn(SPACE, BASE, 401, seed=3))
    assert len(found) == 400
    rates = [settings["rate"] for settings in found]
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
    middle = sum(math.log10(rate) for rate in rates) / len(rates)
    assert middle == pytest.approx(-3, abs=0.1)  # of the logarithms; of the numbers it would be -2.3
    decays = [settings["decay"] for settings in found]
    assert all(0.1 <= decay <= 0.3 for decay in decays)
    assert sum(decays) / len(decays) == pytest.approx(0.2, abs=0.01)
    assert {settings["kind"] for settings in found} == {"a", 2, None}
    assert all(float(f"{rate:.4g}") == rate for rate in rates)


def test_a_seed_repeats_and_more_trials_begin_with_the_same() -> None:
    few, many = list(drawn(SPACE, BASE, 4, seed=0)), list(drawn(SPACE, BASE, 9, seed=0))
    assert many[:3] == few
    assert list(drawn(SPACE, BASE, 4, seed=1)) != few


def test_no_settings_come_twice_nor_the_base_again() -> None:
    space = {"kind": Distribution(choice=("a", "b", "c"))}
    found = list(drawn(space, {"kind": "b"}, 10, seed=0))
    assert sorted(settings["kind"] for settings in found) == ["a", "c"]


def test_a_drawn_number_never_leaves_its_bounds_by_rounding() -> None:
    narrow = Distribution(uniform=(1.00001, 1.00002))
    assert {settings["x"] for settings in drawn({"x": narrow}, {"x": 0}, 3, 0)} <= {1.00001, 1.00002}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "exactly one of"),
        ({"choice": [1], "uniform": [1, 2]}, "exactly one of"),
        ({"choice": []}, "no values"),
        ({"uniform": [2, 1]}, "below its second"),
        ({"log_uniform": [0, 1]}, "above 0"),
        ({"uniform": [1]}, "required setting is absent"),
        ({"uniforn": [1, 2]}, "did you mean 'uniform'"),
    ],
)
def test_a_wrong_distribution_is_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Distribution.parse(given)


def test_nested_names_become_dotted() -> None:
    given = {"fit.steps": {"choice": [1]}, "loss": {"temperature": {"uniform": [1, 2]}}, "wrong": 3}
    expected = {"fit.steps": {"choice": [1]}, "loss.temperature": {"uniform": [1, 2]}, "wrong": 3}
    assert by_dotted_name(given) == expected


def test_a_plan_says_it_in_words() -> None:
    assert str(RATE) == "log-uniform in 0.0001 .. 0.01"
    assert str(SPACE["kind"]) == "one of a, 2, None"
