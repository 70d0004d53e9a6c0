"""The painter without a service."""

from itertools import pairwise

from aai.addons import AddOns
from pipelines.benches.asking import VERBS
from pipelines.benches.painter_alone import paint_alone, unet_alone


def test_it_paints_whole_turns_one_after_the_other(tiny_bundle: str) -> None:
    answers = paint_alone((tiny_bundle, "cpu", "float32", AddOns()), first=5, steps=2, seconds=0.01)
    assert len(answers) % len(VERBS) == 0
    assert all(answer.code == "200" and answer.end_s > answer.begin_s for answer in answers)
    assert all(after.begin_s >= before.end_s for before, after in pairwise(answers))


def test_the_unet_takes_longer_for_more_pictures(tiny_bundle: str) -> None:
    painter = tiny_bundle, "cpu", "float32", AddOns()
    assert 0 < unet_alone(painter, 1, 0.2) < unet_alone(painter, 16, 0.2)
