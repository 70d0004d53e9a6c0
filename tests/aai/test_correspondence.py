import numpy as np
import pytest

from aai.correspondence import sample, shuffled_null, threshold


def unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def test_the_stated_share_of_false_pairs_passes() -> None:
    rng = np.random.default_rng(0)
    audio, image = unit(rng.normal(size=(300, 16))), unit(rng.normal(size=(300, 16)))
    null = shuffled_null(audio, image, [""] * 300)
    assert len(null) == 300 * 299
    for rate in (0.01, 0.05, 0.3):
        fresh = unit(rng.normal(size=(20_000, 16)))
        others = unit(rng.normal(size=(20_000, 16)))
        passed = ((fresh * others).sum(1) >= threshold(null, rate)).mean()
        assert passed == pytest.approx(rate, rel=0.15)


def test_pairs_of_one_label_are_not_false() -> None:
    eye = np.eye(4, dtype=np.float32)
    null = shuffled_null(eye, eye[[1, 0, 3, 2]], ["dog", "dog", "cat", ""])
    assert len(null) == 4 * 3 - 2
    assert sorted(null)[-2:] == [
        1,
        1,
    ]  # the cat and the clip without a label; not the two dogs


def test_the_sample_does_not_depend_on_order() -> None:
    keys = [f"{n * 7919 % 1009:04x}" for n in range(200)]
    chosen = {keys[i] for i in sample(keys, 50)}
    mixed = keys[::-1]
    assert {mixed[i] for i in sample(mixed, 50)} == chosen
    assert len(sample(keys[:10], 50)) == 10
