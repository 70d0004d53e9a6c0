"""Disturbances do what their name and level say."""

import pytest
import torch
from torch import Tensor

from aai.disturbances import DISTURBANCES, disturbed

RATE_HZ = 16_000
TIME_S = torch.arange(RATE_HZ) / RATE_HZ


def tones(*frequencies_hz: float) -> Tensor:
    return torch.stack([0.1 * torch.sin(2 * torch.pi * f * TIME_S) for f in frequencies_hz])


def level_db(waves: Tensor) -> Tensor:
    return 10 * waves.square().mean(1).log10()


def test_noise_and_gain_have_their_levels() -> None:
    x = tones(440, 2000)
    for snr_db in DISTURBANCES["noise_snr_db"]:
        noise = disturbed(x, "noise_snr_db", snr_db, RATE_HZ, 0) - x
        torch.testing.assert_close(level_db(x) - level_db(noise), torch.full((2,), snr_db), atol=0.01, rtol=0)
        quarters = torch.fft.rfft(noise[0]).abs().square()[1:].view(4, -1).mean(1)
        assert quarters.max() < 1.2 * quarters.min(), "white"
    for gain_db in DISTURBANCES["gain_db"]:
        torch.testing.assert_close(disturbed(x, "gain_db", gain_db, RATE_HZ, 0), x * 10 ** (gain_db / 20))


def test_a_filter_takes_what_lies_above_and_a_room_rings_on() -> None:
    low, high = tones(500, 4000)
    dull = disturbed(torch.stack([low, high]), "lowpass_hz", 1000, RATE_HZ, 0)
    assert level_db(dull - torch.stack([low, high]))[0] < -40
    assert level_db(dull)[1] < level_db(high[None])[0] - 45  # 4 x 6 dB in each of two octaves
    burst = torch.zeros(1, RATE_HZ)
    burst[0, :800] = low[:800]
    late = {rt60_s: disturbed(burst, "reverb_rt60_s", rt60_s, RATE_HZ, 0)[:, 6400:] for rt60_s in (0.3, 1.0)}
    assert level_db(burst[:, 6400:]) < -90
    assert level_db(late[1.0]) > -62
    assert level_db(late[1.0]) > level_db(late[0.3]) + 15


@pytest.mark.parametrize("kind", DISTURBANCES)
def test_it_draws_by_its_seed_and_leaves_other_draws_alone(kind: str) -> None:
    x, level = tones(440), DISTURBANCES[kind][0]
    torch.manual_seed(7)
    first = disturbed(x, kind, level, RATE_HZ, 1)
    drawn = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), drawn)
    assert torch.equal(disturbed(x, kind, level, RATE_HZ, 1), first)
    assert torch.equal(disturbed(x, kind, level, RATE_HZ, 2), first) == (kind in ("gain_db", "lowpass_hz"))
    with pytest.raises(ValueError, match="none of noise_snr_db"):
        disturbed(x, "echo", 1.0, RATE_HZ, 0)
