import logging

import numpy as np
import pytest

from aai.errors import UserError
from pipelines.training.lengths import check_cut, fitting_clip_s


@pytest.mark.parametrize(
    ("lengths_s", "clip_s"),
    [
        ([2.005] * 50 + [2.048] * 49 + [2.112], 2.0),  # the toy's clips, with what the codec appends
        ([3.0], 3.0),
        ([2.0] * 19 + [9.0], 2.0),  # one in twenty may be cut,
        ([2.0] * 18 + [9.0] * 2, 9.0),  # two may not
        ([10.03] * 20, 10.0),
        ([60.0] * 20, 10.0),
        ([0.05], 0.1),
    ],
)
def test_the_length_that_keeps_most_clips_whole(lengths_s: list[float], clip_s: float) -> None:
    choice = fitting_clip_s(np.array(lengths_s))
    assert choice.value == clip_s
    assert type(choice.value) is float
    assert str(choice).startswith(f"{clip_s:g} (auto: 95% of {len(lengths_s)} clips last ")
    assert ("10 s at most" in choice.why) == (lengths_s[0] > 10)


def test_what_is_cut_is_told_and_too_much_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    lengths_s = np.array([2.0, 2.05, 4.0, 12.0])
    with caplog.at_level(logging.WARNING):
        check_cut("align", lengths_s, 12.0, 0.5)
        assert caplog.text == ""
        check_cut("align", lengths_s, 4.0, 0.5)  # 8 s of 20.05 s
    assert "align: 1 of 4 clips are longer than encoder.clip_s=4: 39.9% of the sound is cut away" in caplog.text
    message = (
        r"encoder\.clip_s=2: cuts away 60% of the sound \(2 of 4 clips are longer.*cut\.mode=windows.*max_cut_share"
    )
    with pytest.raises(UserError, match=message):
        check_cut("align", lengths_s, 2.0, 0.5)
    check_cut("align", lengths_s, 2.0, 0.7)
    with pytest.raises(UserError, match=r"max_cut_share is 0\.3"):
        check_cut("align", lengths_s, 4.0, 0.3)
