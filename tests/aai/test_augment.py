"""Each augmentation does what it says, measured by means of its own: scipy's filters, levels, decay curves."""

import re

import numpy as np
import pytest
import scipy.signal
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from aai.augment import (
    AugmentConfig,
    add,
    amplify,
    augment,
    coloured_noise,
    draw,
    draw_log,
    lowpass,
    mask,
    on_some,
    others,
    power,
    reverberate,
    room,
    rotate,
)
from aai.errors import UserError

RATE = 16_000
KINDS = ("mix", "reverb", "lowpass", "noise", "gain")
OFF = {f"{kind}_probability": 0.0 for kind in KINDS}
STILL = AugmentConfig.parse({**OFF, "time_shift": 0.0})
ALL = AugmentConfig.parse(dict.fromkeys(OFF, 1.0))


def sounds(batch: int = 4, samples: int = RATE) -> Tensor:
    return 0.1 * torch.randn(batch, samples, generator=torch.Generator().manual_seed(1))


def column(*values: float) -> Tensor:
    return torch.tensor(values)[:, None]


def level_db(x: Tensor) -> Tensor:
    """rms level of each row."""
    return 10 * x.square().mean(1).log10()


def only(kind: str, probability: float = 1.0, **settings: object) -> AugmentConfig:
    """One augmentation alone."""
    return AugmentConfig.parse({**STILL.model_dump(), f"{kind}_probability": probability, **settings})


def run(config: AugmentConfig, x: Tensor, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return augment(x, RATE, config)


# ---------------------------------------------------------------- each by what it says


def test_noise_has_its_signal_to_noise_ratio() -> None:
    x, snr_db = sounds(), column(30.0, 10.0, 0.0, -5.0)
    noise = add(x, coloured_noise(x, column(0.0, -3.0, -6.0, 3.0), RATE), snr_db) - x
    torch.testing.assert_close(level_db(x) - level_db(noise), snr_db[:, 0], atol=1e-3, rtol=0)
    loud = run(only("noise", noise_snr_db=(12, 12)), x)
    torch.testing.assert_close(level_db(x) - level_db(loud - x), torch.full((4,), 12.0), atol=1e-3, rtol=0)


@pytest.mark.parametrize("slope_db", [0.0, -3.0, -6.0, 3.0])
def test_noise_has_its_slope(slope_db: float) -> None:
    noise = coloured_noise(torch.empty(8, RATE), torch.full((8, 1), slope_db), RATE).numpy()
    f, spectrum = scipy.signal.welch(noise, RATE, nperseg=2048)
    octaves = [10 * np.log10(spectrum[:, (f > hz) & (f < 2 * hz)].mean()) for hz in (100, 200, 400, 800, 1600, 3200)]
    assert np.diff(octaves).mean() == pytest.approx(slope_db, abs=0.3)
    # Gaussian, and of no period: not a few tones.
    assert np.mean(noise**4) / np.mean(noise**2) ** 2 == pytest.approx(3, abs=0.3)


def test_gain_in_db() -> None:
    x = sounds(2)
    torch.testing.assert_close(amplify(x, column(-20.0, 6.0206)), x * column(0.1, 2.0), rtol=1e-5, atol=0)
    gains_db = level_db(run(only("gain", gain_db=(-26, 6)), sounds(500, 50))) - level_db(sounds(500, 50))
    assert gains_db.min() > -26.01
    assert gains_db.max() < 6.01
    assert gains_db.mean() == pytest.approx(-10, abs=1.5)
    assert gains_db.std() == pytest.approx(32 / 12**0.5, abs=1)


@pytest.mark.parametrize(("cutoff_hz", "order"), [(500.0, 2), (2000.0, 4), (6000.0, 8)])
def test_the_filter_is_butterworths(cutoff_hz: float, order: int) -> None:
    impulse = torch.zeros(1, RATE)
    impulse[0, RATE // 2] = 1
    found = np.abs(np.fft.rfft(lowpass(impulse, column(cutoff_hz), column(float(order)), RATE)[0].numpy()))
    f = np.fft.rfftfreq(RATE, 1 / RATE)
    # Of the analogue filter: scipy's digital one bends near half the rate.
    b, a = scipy.signal.butter(order, 2 * np.pi * cutoff_hz, analog=True)
    expected = np.abs(scipy.signal.freqs(b, a, 2 * np.pi * f)[1])
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_little_is_left_above_the_cutoff_and_nothing_comes_round() -> None:
    x = sounds(3)
    filtered = run(only("lowpass", lowpass_cutoff_hz=(1000, 2000), lowpass_order=(6, 6)), x).numpy()
    f, before = scipy.signal.welch(x.numpy(), RATE)
    after = scipy.signal.welch(filtered, RATE)[1]
    assert (10 * np.log10(after / before)[:, f > 4000]).max() < -30
    assert np.abs(10 * np.log10(after / before)[:, f < 500]).max() < 1
    late = torch.zeros(1, RATE)
    late[0, -1] = 1
    assert lowpass(late, column(1000.0), column(4.0), RATE)[0, : RATE // 2].abs().max() < 1e-4


@pytest.mark.parametrize("rt60_s", [0.2, 0.5, 1.0])
def test_the_room_decays_by_60_db_in_its_time(rt60_s: float) -> None:
    torch.manual_seed(0)
    tail = room(torch.full((16, 1), rt60_s), column(*[0.0] * 16), 1.0, RATE)[:, 1:].numpy()
    left = 10 * np.log10(np.cumsum((tail**2).mean(0)[::-1])[::-1])  # Schroeder's integral
    at, until = int(0.05 * RATE), int((0.05 + rt60_s / 4) * RATE)
    assert (left[at] - left[until]) * 4 == pytest.approx(60, rel=0.07)


def test_the_room_has_its_ratio_and_the_sound_keeps_energy_and_length() -> None:
    torch.manual_seed(0)
    response = room(column(0.3, 0.5), column(-6.0, 9.0), 0.5, RATE)
    torch.testing.assert_close(response[:, 0], torch.ones(2))
    torch.testing.assert_close(-10 * response[:, 1:].square().sum(1).log10(), torch.tensor([-6.0, 9.0]))
    x = sounds(2, 5000)
    wet = reverberate(x, response)
    assert wet.shape == x.shape
    torch.testing.assert_close(level_db(wet), level_db(x))
    by_hand = np.stack([scipy.signal.fftconvolve(a, b)[:5000] for a, b in zip(x, response, strict=True)])
    by_hand *= np.sqrt(power(x).numpy() / (by_hand**2).mean(1, keepdims=True))
    np.testing.assert_allclose(wet.numpy(), by_hand, atol=1e-5)


def test_a_room_sounds_on_where_the_clip_was_silent() -> None:
    x = sounds(3)
    x[:, RATE // 2 :] = 0
    wet = run(only("reverb", reverb_rt60_s=(0.5, 0.5), reverb_drr_db=(0, 0)), x)
    tail, before = wet[:, RATE // 2 + 160 :], wet[:, : RATE // 2]
    assert (tail.square().sum(1) / before.square().sum(1) > 0.005).all()
    assert (wet[:, -1600:].abs().amax(1) < tail[:, :1600].abs().amax(1)).all()


def test_another_clip_is_mixed_in_at_its_ratio() -> None:
    x = torch.eye(6).repeat_interleave(10, 1) + 0.5 * torch.eye(6).roll(3, 1).repeat_interleave(10, 1)
    mixed_in = run(only("mix", mix_snr_db=(6, 6)), x) - x
    torch.testing.assert_close(level_db(x) - level_db(mixed_in), torch.full((6,), 6.0), atol=1e-3, rtol=0)
    alike = torch.nn.functional.normalize(mixed_in) @ torch.nn.functional.normalize(x).T
    assert (alike.max(1).values > 0.999).all(), "a clip of the batch, at another level"
    assert (alike.argmax(1) != torch.arange(6)).all(), "and not itself"
    partners = torch.stack([others(torch.arange(4.0)[:, None])[:, 0] for _ in range(100)])
    assert (partners != torch.arange(4.0)).all()
    assert all(len(partners[:, i].unique()) == 3 for i in range(4))


def test_a_clip_alone_has_nothing_to_be_mixed_with() -> None:
    assert torch.equal(run(only("mix"), sounds(1)), sounds(1))


# ---------------------------------------------------------------- shares, seeds, limits


@pytest.mark.parametrize("kind", KINDS)
def test_each_clip_is_changed_with_its_probability_and_by_itself(kind: str) -> None:
    x = sounds(40, 400)
    changed = torch.stack([(run(only(kind, 0.3), x, seed) != x).any(1) for seed in range(50)]).float()
    assert changed.mean() == pytest.approx(0.3, abs=0.03)
    assert changed.mean(0).max() < 0.65
    assert changed.mean(0).min() > 0.02
    assert torch.equal(run(only(kind, 0.0), x), x)


@pytest.mark.parametrize(("probability", "batch"), [(0.3, 1), (0.9, 3), (0.01, 7), (1.0, 5)])
def test_a_probability_holds_in_batches_of_any_size(probability: float, batch: int) -> None:
    torch.manual_seed(0)
    x = torch.zeros(batch, 2)
    share = torch.stack([on_some(probability, lambda x: x + 1, x.clone())[:, 0] for _ in range(4000 // batch)]).mean(0)
    torch.testing.assert_close(share, torch.full((batch,), probability), atol=0.08, rtol=0)


def test_each_clip_goes_with_its_own_row() -> None:
    x, y = torch.arange(8.0)[:, None], 10 * torch.arange(8.0)[:, None]
    torch.manual_seed(0)
    found = on_some(0.5, lambda x, y: x + y, x.clone(), y)[:, 0]
    assert {float(value) / (i or 1) for i, value in enumerate(found)} == {0.0, 1.0, 11.0}


@pytest.mark.parametrize("kind", KINDS)
def test_clips_differ_and_a_seed_repeats(kind: str) -> None:
    x = sounds(1).expand(4, -1) if kind != "mix" else sounds()
    first = run(only(kind), x)
    assert torch.equal(run(only(kind), x), first)
    assert not torch.equal(run(only(kind), x, 1), first)
    if kind != "mix":
        assert all(not torch.allclose(first[0], first[i]) for i in range(1, 4))


def test_draws_lie_between_their_limits() -> None:
    torch.manual_seed(0)
    x = torch.zeros(4000, 1)
    even, log = draw(x, (-3.0, 5.0)), draw_log(x, (10.0, 1000.0))
    assert even.shape == (4000, 1)
    assert (even.min(), even.max()) == (pytest.approx(-3, abs=0.05), pytest.approx(5, abs=0.05))
    assert even.mean() == pytest.approx(1, abs=0.2)
    assert (log.min(), log.max()) == (pytest.approx(10, rel=0.05), pytest.approx(1000, rel=0.05))
    assert log.median() == pytest.approx(100, rel=0.15)


def test_nothing_asked_leaves_every_bit_and_the_batch_is_never_touched() -> None:
    assert torch.equal(run(STILL, sounds()), sounds())
    batch = sounds()
    run(ALL, batch)
    assert torch.equal(batch, sounds())


@pytest.mark.parametrize("samples", [1, 2, 3, 37, 801])
def test_silence_and_short_clips_stay_finite(samples: int) -> None:
    x = torch.cat([sounds(2, samples), torch.zeros(1, samples)])
    for kind in KINDS:
        found = run(only(kind), x)
        assert found.shape == x.shape
        assert found.isfinite().all(), kind
        assert not found[2].any(), "silence stays silence"
    assert run(ALL, x).isfinite().all()
    assert run(ALL, torch.zeros(2, samples)).isfinite().all()


def test_numbers_stay_float32_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        half = run(ALL, sounds())
        assert run(ALL, sounds().bfloat16()).dtype == torch.float32
    assert half.dtype == torch.float32
    assert torch.equal(half, run(ALL, sounds()))


def test_fake_tensors_go_through_and_no_gradient_is_kept() -> None:
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        assert augment(torch.ones(8, 1000), RATE, ALL).shape == (8, 1000)
    assert not augment(sounds().requires_grad_(), RATE, ALL).requires_grad


def test_the_order_is_that_of_a_recording() -> None:
    """Noise is no part of the room and passes no filter; the level is what comes last."""
    settings = {"lowpass_cutoff_hz": (500, 500), "lowpass_order": (8, 8), "noise_snr_db": (20, 20)}
    quiet = {"noise_slope_db": (0, 0), "gain_db": (-40, -40), "mix_probability": 0, "reverb_drr_db": (40, 40)}
    found = run(AugmentConfig.parse({**ALL.model_dump(), **settings, **quiet, "time_shift": 0}), sounds())
    f, spectrum = scipy.signal.welch(found.numpy(), RATE)
    floor_db = 10 * np.log10(spectrum[:, f > 2000].mean() / spectrum[:, (f > 50) & (f < 400)].mean())
    assert floor_db == pytest.approx(-20 - 12, abs=2)  # 20 dB in all, over a band 16 times as wide
    assert (level_db(found) - level_db(sounds())).mean() == pytest.approx(-40 - 12, abs=0.3)


# ---------------------------------------------------------------- rotation and SpecAugment


def test_a_sound_is_rotated_by_up_to_its_share_either_way() -> None:
    torch.manual_seed(0)
    turned = rotate(torch.arange(10.0).expand(200, 10), 0.25)
    assert set(turned[:, 0].tolist()) == {8.0, 9.0, 0.0, 1.0, 2.0}
    assert ((turned.diff(dim=1) % 10) == 1).all()
    assert torch.equal(rotate(sounds(), 0.0), sounds())
    assert not torch.equal(run(only("gain", 0.0, time_shift=0.2), sounds()), sounds())


def test_one_stretch_of_frames_and_one_of_bins_is_blanked() -> None:
    torch.manual_seed(0)
    masked = mask(torch.ones(400, 40, 20), 0.25) == 0
    frames, bins = masked.all(dim=2), masked.all(dim=1)
    assert torch.equal(masked, frames[:, :, None] | bins[:, None, :])
    for blanked, longest in ((frames, 10), (bins, 5)):
        length = blanked.sum(dim=1)
        assert length.max() == longest  # the largest share, and no more
        assert length.min() <= 1
        assert (blanked[:, 1:] & ~blanked[:, :-1]).sum(dim=1).max() == 1
        assert blanked.any(dim=0)[1:].all()
    assert (frames != frames[0]).any()
    assert torch.equal(mask(torch.ones(5, 40, 20), 0.0), torch.ones(5, 40, 20))
    assert ((mask(sounds(200, 100), 0.25, 7.0) == 7).sum(1) > 15).any(), "of a waveform, a stretch of time"


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("time_shift", 1.1),
        ("mask_share", 1.0),
        ("noise_probability", 1.01),
        ("gain_probability", -0.1),
        ("gain_db", (6, -6)),
        ("reverb_rt60_s", (0, 1)),
        ("lowpass_cutoff_hz", (2000, 1000)),
        ("lowpass_order", (0, 4)),
        ("noise_snr_db", (1,)),
        ("shout", 1),
    ],
)
def test_settings_outside_their_limits_are_named(setting: str, value: object) -> None:
    with pytest.raises(UserError, match=re.escape(setting)):
        AugmentConfig.parse({setting: value})


def test_settings_survive_their_own_yaml() -> None:
    config = AugmentConfig.parse({"gain_db": [-3, 3]})
    assert config.gain_db == (-3.0, 3.0)
    assert AugmentConfig.parse(config.model_dump(mode="json")) == config
