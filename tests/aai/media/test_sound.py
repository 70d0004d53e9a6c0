"""Sound on the clip's clock: cut, filled and refused while it comes in."""

import av
import numpy as np
import pytest

from aai.media.limits import ClipError
from aai.media.sound import SoundTrack

RATE_HZ = 16_000


def track(start_s: float = 0.0, end_s: float = float("inf"), max_duration_s: float = 10) -> SoundTrack:
    return SoundTrack(RATE_HZ, start_s, end_s, max_duration_s)


def frame(
    level: float, duration_s: float = 0.5, rate_hz: int = RATE_HZ, channels: tuple[float, ...] = (1,)
) -> av.AudioFrame:
    """Constant samples; channels: what each multiplies the level by."""
    samples = np.full((len(channels), round(duration_s * rate_hz)), level, np.float32) * np.array(channels)[:, None]
    layout = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}[len(channels)]
    made = av.AudioFrame.from_ndarray(samples.T.reshape(1, -1).astype(np.float32), "flt", layout)
    made.sample_rate = rate_hz
    return made


def levels(audio: np.ndarray, step_s: float = 0.25) -> list[float]:
    """The sample in the middle of every `step_s`."""
    return [round(float(x), 3) for x in audio[round(step_s * RATE_HZ / 2) :: round(step_s * RATE_HZ)]]


def test_a_lead_is_cut_and_a_late_start_filled_with_silence() -> None:
    early = track(start_s=1.0)
    for number in range(4):
        assert early.add(frame(0.1 * (number + 1)), 0.25 + 0.5 * number)
    assert levels(early.finish()) == [0.2, 0.3, 0.3, 0.4, 0.4]  # from 1 s to 2.25 s
    late = track(start_s=1.0)
    late.add(frame(0.5), 1.5)
    assert levels(late.finish()) == [0, 0, 0.5, 0.5]
    assert late.finish().dtype == np.float32


def test_the_window_ends_the_sound() -> None:
    window = track(start_s=0.0, end_s=0.75)
    assert window.add(frame(0.1), 0.0)
    assert window.add(frame(0.2), 0.5)
    assert not window.add(frame(0.3), 1.0)
    assert levels(window.finish()) == [0.1, 0.1, 0.2]
    assert len(track().finish()) == 0


def test_holes_are_silent_and_what_overlaps_is_cut() -> None:
    for times_s, expected in (
        ((0.0, 0.5, 1.5), [0.1, 0.1, 0.2, 0.2, 0, 0, 0.3, 0.3]),
        ((0.0, 0.25, 0.75), [0.1, 0.1, 0.2, 0.3, 0.3]),
        ((1.0, 0.0, 1.5), [0, 0, 0, 0, 0.1, 0.1, 0.3, 0.3]),  # a frame of the past is left out
    ):
        torn = track()
        assert all(torn.add(frame(0.1 * (number + 1)), time_s) for number, time_s in enumerate(times_s))
        assert levels(torn.finish()) == expected


def test_a_hole_at_the_end_of_the_window_is_silent_too() -> None:
    for last_s, length in ((1.5, 1.25), (None, 0.5)):
        window = track(end_s=1.25)
        window.add(frame(0.1), 0.0)
        assert last_s is None or not window.add(frame(0.2), last_s)
        assert len(window.finish()) == length * RATE_HZ


def test_rounded_times_do_not_tear_the_sound_and_small_losses_do_not_add_up() -> None:
    rounded = track()
    for number in range(100):
        rounded.add(frame(0.1, duration_s=0.04, rate_hz=44_100), round(0.04 * number + 0.008 * (number % 2), 3))
    assert len(rounded.runs) == 1
    assert len(rounded.finish()) == pytest.approx(4 * RATE_HZ, abs=2)
    losing = track()
    for number in range(50):
        losing.add(frame(0.1, duration_s=0.099), 0.1 * number)
    assert len(losing.finish()) == pytest.approx(5 * RATE_HZ, abs=0.02 * RATE_HZ)


def test_a_frame_without_a_time_follows_the_one_before() -> None:
    for first_s, expected in ((None, [0.2, 0.2, 0.3, 0.3]), (0.0, [0.1, 0.1, 0.2, 0.2, 0.3, 0.3])):
        entered = SoundTrack(RATE_HZ, 0.0, float("inf"), 10, next_s=first_s)
        for number, time_s in enumerate((None, 0.5 if first_s is not None else 0.0, None)):
            assert entered.add(frame(0.1 * (number + 1)), time_s)
        assert levels(entered.finish()) == expected


@pytest.mark.parametrize(
    ("channels", "level"),
    [
        ((1,), 0.5), ((1, 1), 0.5), ((0, 0, 1, 0, 0, 0), 0.5), ((1, 1, 0, 0, 0, 0), 0.5),
        ((0, 0, 1, 0, 0, 0, 0, 0), 0.5), ((1, 0), 0.25), ((1, 0, 0, 0, 0, 0), 0.25), ((0, 0, 0, 0, 1, 1), 0.354),
    ],
)  # fmt: skip
def test_a_sound_is_as_loud_from_any_layout(channels: tuple[float, ...], level: float) -> None:
    mixed = track()
    mixed.add(frame(0.5, channels=channels), 0.0)
    assert levels(mixed.finish()) == pytest.approx([level, level], abs=1e-3)


def test_a_mix_beyond_full_scale_is_turned_down_as_a_whole() -> None:
    loud = track()
    loud.add(frame(0.25, channels=(1,) * 6), 0.0)
    loud.add(frame(1.0, channels=(1,) * 6), 0.5)
    mixed = loud.finish()
    assert levels(mixed) == pytest.approx([0.25, 0.25, 1, 1], abs=0.02)
    assert np.abs(mixed).max() <= 1


def test_channels_are_averaged_to_full_scale_at_most() -> None:
    stereo = track()
    stereo.add(frame(1.0, channels=(1, 0.5)), 0.0)
    assert levels(stereo.finish()) == [0.75, 0.75]
    assert (stereo.channels, stereo.source_rate_hz) == (2, RATE_HZ)


def test_another_rate_keeps_the_length() -> None:
    other = track()
    for number in range(6):
        other.add(frame(0.5, rate_hz=44_100), 0.5 * number)
    assert len(other.finish()) == pytest.approx(3 * RATE_HZ, abs=2)


def test_forged_rates_changes_midway_and_endless_sound_are_refused() -> None:
    with pytest.raises(ClipError, match="UNREADABLE: a sample rate of 1000000 Hz"):
        track().add(frame(0.1, duration_s=0.001, rate_hz=1_000_000), 0.0)
    for other in (frame(0.1), frame(0.1, channels=(1, 1), rate_hz=8000)):
        mixed = track()
        mixed.add(frame(0.1, channels=(1, 1)), 0.0)
        with pytest.raises(ClipError, match="UNREADABLE: rate or layout of the sound changes midway"):
            mixed.add(other, 0.5)
    endless = track(max_duration_s=1)
    for number in range(4):  # a second more is forgiven
        endless.add(frame(0.1), 0.5 * number)
    with pytest.raises(ClipError, match=r"TOO_LONG: sound is longer than the limit of 1 s"):
        endless.add(frame(0.1), 2.0)
    late = track(max_duration_s=1)
    with pytest.raises(ClipError, match=r"TOO_LONG: sound is longer than the limit of 1 s"):
        late.add(frame(0.1), 3600.0)  # silence of an hour would be laid before it
