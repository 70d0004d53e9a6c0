import numpy as np
import pyarrow as pa
import pytest

from pipelines.curation.clip_keys import ClipKeys, Keyed


def test_they_are_texts() -> None:
    given = [f"{number:06x}" for number in range(10_000)]
    keys = ClipKeys(given)
    assert (len(keys), keys[3], keys[-1], list(keys)) == (10_000, given[3], given[-1], given)
    assert list(keys[5:9]) == given[5:9]
    assert keys.packed.nbytes == 60_000
    assert (
        ClipKeys.of_column(pa.chunked_array([given[:7], given[7:]])) == keys == ClipKeys.joined([keys[:10], keys[10:]])
    )
    assert "000001" in keys
    assert "00001" not in keys
    assert 1 not in keys
    assert list(ClipKeys([])) == list(ClipKeys.joined([])) == []
    assert ClipKeys([]).places(keys).tolist() == [-1] * 10_000


def test_places_are_those_of_the_first_and_the_last_of_equal_ones() -> None:
    keys = ClipKeys(["b", "a", "b", "c", "a"])
    assert keys.places(ClipKeys(["a", "c", "x", "b"])).tolist() == [1, 3, -1, 0]
    assert keys.are_last().tolist() == [False, False, True, True, True]
    assert ClipKeys([]).are_last().tolist() == []
    rng = np.random.default_rng(0)
    drawn = [f"{number:03x}" for number in rng.integers(0, 2000, 3000)]
    assert ClipKeys(drawn).places(ClipKeys(drawn)).tolist() == [drawn.index(key) for key in drawn]


def test_what_stands_in_a_keys_place_is_found_in_any_order() -> None:
    keyed = Keyed(ClipKeys(["b", "a", "c"]), [1, 2, 3])
    assert [keyed[key] for key in ("b", "a", "c", "a", "c", "b")] == [1, 2, 3, 2, 3, 1]
    assert list(keyed) == ["b", "a", "c"]
    assert list(keyed.values()) == [1, 2, 3]
    assert "x" not in keyed
    with pytest.raises(KeyError):
        keyed["x"]
