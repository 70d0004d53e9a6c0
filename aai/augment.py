"""Augmentation of training sounds on their device: noise, gain, filter, room, other sounds, rotation, SpecAugment.

All functions take whole batches [B, S] and draw from torch's global generator, which training seeds for each step. A
share of the clips is changed, each clip by numbers of its own; the shapes depend on no random number, so that nothing
waits for the device. A ratio of powers (SNR) is taken over the whole clip, its padding included.
"""

import math
from collections.abc import Callable
from typing import Annotated

import pydantic
import torch
from torch import Tensor

from aai.config import Config


def _in_order(limits: tuple[float, float]) -> tuple[float, float]:
    if limits[0] > limits[1]:
        raise ValueError("the lower limit stands first")
    return limits


Share = Annotated[float, pydantic.Field(ge=0, le=1)]
Positive = Annotated[float, pydantic.Field(gt=0)]
Limits = Annotated[tuple[float, float], pydantic.AfterValidator(_in_order)]
PositiveLimits = Annotated[tuple[Positive, Positive], pydantic.AfterValidator(_in_order)]

LOWEST_NOISE_HZ = 20.0
"""Coloured noise is flat below: what lies there is not heard, and would take up all of brown noise's power."""


class AugmentConfig(Config):
    """What is done to a training sound; nothing is done to any other.

    A probability is that of each clip, 0 leaves an augmentation out; limits are those of a uniform draw.
    """

    time_shift: Share = 0.1
    """A sound is rotated in time by up to this share of its length."""
    mix_probability: Share = 0.0
    """That another clip of the same chunk of the batch is mixed in."""
    mix_snr_db: Limits = (10.0, 30.0)
    """Level of the clip above the one mixed in, in dB."""
    reverb_probability: Share = 0.25
    """That a room is added: noise that decays exponentially; the clip's energy stays."""
    reverb_rt60_s: PositiveLimits = (0.1, 1.0)
    """Time in which the room's sound decays by 60 dB, in seconds; drawn uniformly in its logarithm."""
    reverb_drr_db: Limits = (-10.0, 10.0)
    """Direct-to-reverberant ratio: level of the direct sound above the room's, in dB."""
    lowpass_probability: Share = 0.2
    """That high frequencies are taken off, by a Butterworth filter's response without its delay."""
    lowpass_cutoff_hz: PositiveLimits = (1000.0, 4000.0)
    """Its cut-off frequency (-3 dB), in Hz; drawn uniformly in its logarithm."""
    lowpass_order: PositiveLimits = (2.0, 10.0)
    """Its order: the slope is 6 dB per octave for each."""
    noise_probability: Share = 0.35
    """That Gaussian noise is added."""
    noise_snr_db: Limits = (5.0, 30.0)
    """Signal-to-noise ratio in dB."""
    noise_slope_db: Limits = (-3.0, 1.0)
    """Slope of the noise's spectrum in dB per octave: 0 is white, -3 pink, -6 brown."""
    gain_probability: Share = 0.3
    """That the level is changed. Loudness carries meaning: the clips that keep theirs teach it."""
    gain_db: Limits = (-26.0, 6.0)
    """Change of the level in dB. The result is not clipped."""
    mask_share: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.1
    """Largest share of frames, and of mel bins, that is blanked (SpecAugment, arXiv 1904.08779); of a waveform
    (pe_audio) the largest share of its length."""


@torch.no_grad()
def augment(waveforms: Tensor, sample_rate_hz: int, config: AugmentConfig) -> Tensor:
    """Waveforms [B, S] as a training step hears them, float32, also under autocast; `mask` comes after the front end.

    In the order in which it happens to a sound: others beside it, the room, the channel, a recorder's noise and level.
    """
    x = rotate(waveforms.float(), config.time_shift)
    if config.mix_probability and len(x) > 1:
        x = on_some(config.mix_probability, lambda x, y: add(x, y, draw(x, config.mix_snr_db)), x, others(x))
    x = on_some(config.reverb_probability, lambda x: _in_some_room(x, sample_rate_hz, config), x)
    x = on_some(config.lowpass_probability, lambda x: _through_some_filter(x, sample_rate_hz, config), x)
    x = on_some(config.noise_probability, lambda x: _with_some_noise(x, sample_rate_hz, config), x)
    return on_some(config.gain_probability, lambda x: amplify(x, draw(x, config.gain_db)), x)


def _in_some_room(x: Tensor, sample_rate_hz: int, config: AugmentConfig) -> Tensor:
    rt60_s = draw_log(x, config.reverb_rt60_s)
    response = room(rt60_s, draw(x, config.reverb_drr_db), config.reverb_rt60_s[1], sample_rate_hz)
    return reverberate(x, response)


def _through_some_filter(x: Tensor, sample_rate_hz: int, config: AugmentConfig) -> Tensor:
    return lowpass(x, draw_log(x, config.lowpass_cutoff_hz), draw(x, config.lowpass_order), sample_rate_hz)


def _with_some_noise(x: Tensor, sample_rate_hz: int, config: AugmentConfig) -> Tensor:
    return add(x, coloured_noise(x, draw(x, config.noise_slope_db), sample_rate_hz), draw(x, config.noise_snr_db))


def on_some(probability: float, change: Callable[..., Tensor], waveforms: Tensor, *more: Tensor) -> Tensor:
    """Puts into the place of each of the waveforms [B, S], with this probability, `change` of it and its row of `more`.

    As few as the probability needs are computed: ceil(probability B) clips drawn at random, of which each is then
    taken with what the probability leaves. The others, and all of them for 0, stay bit for bit what they were.
    """
    if probability == 0:
        return waveforms
    count = math.ceil(probability * len(waveforms))
    rows = torch.rand(len(waveforms), device=waveforms.device).argsort()[:count]
    taken = torch.rand(count, 1, device=waveforms.device) * count < probability * len(waveforms)
    before = waveforms[rows]
    after = torch.where(taken, change(before, *(tensor[rows] for tensor in more)), before)
    return waveforms.index_copy_(0, rows, after)


def draw(waveforms: Tensor, limits: tuple[float, float]) -> Tensor:
    """A number [B, 1] for each clip, uniform between two limits."""
    low, high = limits
    return low + (high - low) * torch.rand(len(waveforms), 1, device=waveforms.device)


def draw_log(waveforms: Tensor, limits: tuple[float, float]) -> Tensor:
    """A number [B, 1] for each clip, whose logarithm is uniform between those of two limits above 0."""
    return draw(waveforms, (math.log(limits[0]), math.log(limits[1]))).exp()


def power(waveforms: Tensor) -> Tensor:
    """Mean square [B, 1]."""
    return waveforms.square().mean(dim=1, keepdim=True)


def with_power(waveforms: Tensor, wanted: Tensor) -> Tensor:
    """Waveforms [B, S] scaled to a mean square [B, 1]; silence stays silence."""
    found = power(waveforms)
    return waveforms * torch.where(found > 0, wanted / found, 0).sqrt()


def amplify(waveforms: Tensor, gain_db: Tensor) -> Tensor:
    """Each waveform [B, S] at another level, by gain_db [B, 1]."""
    return waveforms * 10 ** (gain_db / 20)


def add(waveforms: Tensor, noise: Tensor, snr_db: Tensor) -> Tensor:
    """Waveforms [B, S] with noise [B, S] of any level added at snr_db [B, 1]; silence stays silence."""
    return waveforms + with_power(noise, power(waveforms) * 10 ** (-snr_db / 10))


def others(waveforms: Tensor) -> Tensor:
    """For each of several waveforms [B, S] another one of them, drawn at random."""
    batch, device = len(waveforms), waveforms.device
    return waveforms[(torch.arange(batch, device=device) + torch.randint(1, batch, (batch,), device=device)) % batch]


def coloured_noise(waveforms: Tensor, slope_db: Tensor, sample_rate_hz: int) -> Tensor:
    """Gaussian noise [B, S] of any level, in the shape of `waveforms`; slope_db [B, 1] of its spectrum per octave."""
    batch, samples = waveforms.shape
    f = torch.fft.rfftfreq(samples, 1 / sample_rate_hz, device=waveforms.device)
    octaves = (f.clamp(min=LOWEST_NOISE_HZ) / LOWEST_NOISE_HZ).log2()
    spectrum = torch.view_as_complex(torch.randn(batch, len(f), 2, device=waveforms.device))
    return torch.fft.irfft(spectrum * 10 ** (slope_db * octaves / 20), n=samples)


def lowpass(waveforms: Tensor, cutoff_hz: Tensor, order: Tensor, sample_rate_hz: int) -> Tensor:
    """Waveforms [B, S] through a Butterworth low-pass, by its magnitude; cutoff_hz and order [B, 1].

    Zeros are put behind, a quarter of its length, so that its end does not come out at its beginning.
    """
    samples = waveforms.shape[1]
    whole = samples + samples // 4
    f = torch.fft.rfftfreq(whole, 1 / sample_rate_hz, device=waveforms.device)
    response = (1 + (f / cutoff_hz) ** (2 * order)).rsqrt()
    return torch.fft.irfft(torch.fft.rfft(waveforms, n=whole) * response, n=whole)[:, :samples]


def room(rt60_s: Tensor, drr_db: Tensor, longest_s: float, sample_rate_hz: int) -> Tensor:
    """Impulse responses [B, longest_s rate]: a direct sound of 1, then noise that decays by 60 dB in rt60_s [B, 1].

    drr_db [B, 1]: energy of the direct sound over that of the noise.
    """
    samples = max(2, math.ceil(longest_s * sample_rate_hz))
    t_s = torch.arange(samples, device=rt60_s.device) / sample_rate_hz
    tail = torch.randn(len(rt60_s), samples, device=rt60_s.device) * 10 ** (-3 * t_s / rt60_s)
    tail[:, 0] = 0
    tail = with_power(tail, 10 ** (-drr_db / 10) / samples)
    tail[:, 0] = 1
    return tail


def reverberate(waveforms: Tensor, response: Tensor) -> Tensor:
    """Waveforms [B, S] in rooms of these impulse responses [B, R], with the energy and the length that they had."""
    samples = waveforms.shape[1]
    response = response[:, :samples]  # what comes later lies after the clip's end
    whole = samples + response.shape[1]
    spectrum = torch.fft.rfft(waveforms, n=whole) * torch.fft.rfft(response, n=whole)
    return with_power(torch.fft.irfft(spectrum, n=whole)[:, :samples], power(waveforms))


def rotate(waveforms: Tensor, share: float) -> Tensor:
    """Each waveform [B, S] rotated in time by its own random offset of up to `share` of its length either way."""
    batch, samples = waveforms.shape
    reach = int(share * samples)
    shift = torch.randint(-reach, reach + 1, (batch,), device=waveforms.device)
    around = torch.cat([waveforms[:, samples - reach :], waveforms, waveforms[:, :reach]], dim=1)
    # Rows of a view of all offsets: an index of each sample would be as large as the sounds, and slower by far.
    return around.unfold(1, samples, 1)[torch.arange(batch, device=waveforms.device), shift + reach]


def mask(heard: Tensor, share: float, blank: Tensor | float = 0.0) -> Tensor:
    """Spectrograms [B, T, M] with one random stretch of frames and one of bins set to `blank` (the data's mean).

    Of waveforms [B, S], which some backbones take, a stretch of time alone is blanked.
    """
    keep = _stretch(heard.shape[0], heard.shape[1], share, heard.device)
    if heard.ndim == 3:
        keep = keep[:, :, None] & _stretch(heard.shape[0], heard.shape[2], share, heard.device)[:, None, :]
    return torch.where(keep, heard, blank)


def _stretch(batch: int, length: int, share: float, device: torch.device) -> Tensor:
    """Bool [batch, length], false on one stretch of a random length up to `share` of the whole."""
    width = torch.rand(batch, 1, device=device) * share * length
    start = torch.rand(batch, 1, device=device) * (length - width)
    position = torch.arange(length, device=device)
    return (position < start) | (position >= start + width)
