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
    made = av.AudioFrame.from_ndarray(samples.astype(np.float32), "fltp", {1: "mono", 2: "stereo"}[len(channels)])
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
