"""Runs that take turns: their order, and the medians and ratios made of them."""

from collections.abc import Callable
from functools import partial

from pipelines.benches.engines import Timing, summarise, take_turns


def timing(work_s: float, clips: int = 100) -> Timing:
    """A run that started for 1 s, worked, and rested for 2 s."""
    return Timing(clips, work_s + 3, 1.0, work_s, 0.002, {"cut": work_s}, 0.5)


def test_every_second_turn_goes_backwards() -> None:
    order = []

    def once(name: str) -> Timing:
        order.append(name)
        return timing(10)

    runs: dict[str, Callable[[], Timing]] = {name: partial(once, name) for name in ("ray", "bare")}
    assert {name: len(made) for name, made in take_turns(runs, 3).items()} == {"ray": 3, "bare": 3}
    assert order == ["ray", "bare", "bare", "ray", "ray", "bare"]


def test_figures_are_medians_and_ratios_are_of_turns() -> None:
    turns = {"ray": [timing(10), timing(20), timing(50)], "bare": [timing(5), timing(40), timing(40)]}
    figures, ratios = summarise(turns)
    assert (figures["ray_clips_per_s"], figures["bare_clips_per_s"]) == (5.0, 2.5)
    assert (figures["ray_start_s"], figures["ray_rest_s"], figures["ray_wall_s"]) == (1.0, 2.0, 23.0)
    assert figures["ray_stages_s"] == {"cut": 20.0}
    assert figures["ray_between_shards_ms"] == 2.0
    assert ratios == {"ray/bare": 0.8}  # of 0.5, 2 and 0.8: not 5 / 2.5
