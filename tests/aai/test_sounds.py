"""Names of sounds, and what is heard of a long one."""

import numpy as np
import pytest

from aai.errors import UserError
from aai.sounds import name_of, named, prompt_for, windows

TONE = np.ones(10, np.float32)


def test_sounds_without_names_are_numbered() -> None:
    assert [name_of(i) for i in range(3)] == ["sound", "sound2", "sound3"]
    assert list(named(TONE)) == ["sound"]
    assert list(named([TONE, TONE])) == ["sound", "sound2"]
    assert list(named({"rain": TONE, "dog_2": TONE})) == ["rain", "dog_2"]
    assert prompt_for("<sound> at night", ["dog", "rain"]) == "<dog> and <rain> at night"


@pytest.mark.parametrize("name", ["", "Dog", "2dog", "a b", "dog*1", "a>"])
def test_a_name_that_no_placeholder_can_have_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="is no name of a placeholder"):
        named({name: TONE})


@pytest.mark.parametrize("count", [0, 9])
def test_the_number_of_sounds_is_bounded(count: int) -> None:
    with pytest.raises(UserError, match=f"{count} sounds: is not 1 to 8"):
        named([TONE] * count)


def test_what_is_heard_of_a_long_sound() -> None:
    audio = np.arange(10, dtype=np.float32)
    assert windows(audio, 4, "middle").tolist() == [audio.tolist()]
    assert windows(audio, 10, "loudest").tolist() == [audio.tolist()]
    assert windows(audio, 20, "mean").tolist() == [audio.tolist()]
    assert windows(audio, 4, "mean").tolist() == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7], [6, 7, 8, 9]]
    assert windows(audio[:9], 4, "mean")[-1].tolist() == [5, 6, 7, 8]
    for place in range(10):
        audio = np.full(10, 0.1, np.float32)
        audio[place] = -1
        (heard,) = windows(audio, 4, "loudest")
        assert heard.shape == (4,)
        assert heard.min() == -1
