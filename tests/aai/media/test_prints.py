import numpy as np

from aai.media.edited import PICTURE_PRINT_BYTES
from aai.media.prints import STEP_S, picture_print, sound_print

RNG = np.random.default_rng(0)
RATE_HZ = 16_000


def sound(seconds: float) -> np.ndarray:
    """Noise whose colour and level change all the time."""
    count = round(seconds * RATE_HZ)
    parts = [np.convolve(RNG.standard_normal(1600), RNG.standard_normal(12), "same") for _ in range(count // 1600)]
    return (0.05 * np.concatenate(parts)).astype(np.float32)


def words(audio: np.ndarray) -> np.ndarray:
    return np.frombuffer(sound_print(audio, RATE_HZ), np.uint32)


def share_of_errors(left: np.ndarray, right: np.ndarray) -> float:
    count = min(len(left), len(right))
    return float(np.bitwise_count(left[:count] ^ right[:count]).mean() / 32)


def test_a_word_for_each_step_whatever_the_level() -> None:
    audio = sound(5)
    first = words(audio)
    assert len(first) == (5 - 3 * 0.256) // STEP_S + 1
    assert share_of_errors(first, words(audio * 0.1)) < 0.01
    assert abs(share_of_errors(first, words(sound(5))) - 0.5) < 0.06


def test_a_sound_that_begins_between_two_steps_has_words_in_common() -> None:
    audio = sound(6)
    first, later = words(audio), words(audio[round(10.5 * STEP_S * RATE_HZ) :])
    assert share_of_errors(first[10:], later) < 0.15
    assert np.isin(later, first).sum() >= 3


def test_silence_has_no_words() -> None:
    audio = np.concatenate([sound(2), np.zeros(2 * RATE_HZ, np.float32), sound(2)])
    silent = words(audio) == 0
    assert silent[round(1.8 / STEP_S) : round(3.2 / STEP_S)].all()
    assert not silent[: round(1.4 / STEP_S)].any()
    assert sound_print(sound(0.4), RATE_HZ) == b""
    assert len(words(np.zeros(400 * RATE_HZ, np.float32))) == 2048, "the first two minutes"


def picture(height: int = 32, width: int = 32) -> np.ndarray:
    return np.kron(RNG.integers(30, 250, (4, 4, 4)), np.ones((height // 4, width // 4))).astype(np.uint8)


def test_a_picture_is_known_within_its_borders() -> None:
    pixels = picture(24)
    framed = np.pad(pixels, ((0, 0), (4, 4), (0, 0)))
    print_, of_framed = picture_print(pixels), picture_print(framed)
    assert len(print_) == PICTURE_PRINT_BYTES
    assert print_[:192] == of_framed[:192]
    black = np.zeros((4, 32, 32), np.uint8)
    assert len(picture_print(black)) == PICTURE_PRINT_BYTES


def test_what_stands_still_has_no_motion() -> None:
    pixels = picture()
    still = np.repeat(pixels[:1], 4, axis=0)
    assert not any(picture_print(still)[192:])
    assert all(np.frombuffer(picture_print(pixels)[192:], np.uint64))
