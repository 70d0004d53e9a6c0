"""What a clip may cost: by time and by corrupt packets."""

import time

import av
import pytest

from aai.media.limits import ClipError, Deadline, Tally, reason


def test_a_clip_that_takes_too_long_may_be_tried_again() -> None:
    Deadline(timeout_s=60).check()
    with pytest.raises(ClipError, match=r"^TIMEOUT: decoding took longer than 1\.5 s$") as caught:
        Deadline(timeout_s=1.5, started=time.monotonic() - 2).check()
    assert caught.value.transient


def torn(packet: object) -> list[object]:
    """A decoder that fails on the packet "bad"."""
    if packet == "bad":
        raise av.InvalidDataError(1094995529, "Invalid data found", "clip.mp4")
    return [packet]


def test_a_few_corrupt_packets_are_skipped_and_more_are_an_error() -> None:
    tally = Tally(max_corrupt_fraction=0.25)
    frames = [tally.decode(torn, packet) for packet in ("a", "bad", "b", None)]
    assert frames == [["a"], [], ["b"], [None]]
    tally.check()  # 1 of 4 is what may be
    assert (tally.bad, tally.total) == (1, 4)
    tally.decode(torn, "bad")
    with pytest.raises(ClipError, match=r"^UNREADABLE: 2 of 5 packets are corrupt \(Invalid data found\)$") as caught:
        tally.check()
    assert not caught.value.transient


def test_errors_of_ours_pass_through_a_tally() -> None:
    def refuse(packet: object) -> list[object]:
        raise ClipError("TOO_LONG", "sound")

    with pytest.raises(ClipError, match="TOO_LONG"):
        Tally(1.0).decode(refuse, "a")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (av.InvalidDataError(1, "Invalid data", "f"), "Invalid data"),
        (ValueError("first\nsecond"), "first"),
        (KeyError(), "KeyError"),
        (ValueError("x" * 500), "x" * 120),
    ],
)
def test_a_reason_is_one_short_line(error: Exception, expected: str) -> None:
    assert reason(error) == expected
