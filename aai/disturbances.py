"""Sounds as worse recordings have them, at stated levels: what hears a sound must hear it there too.

The ways are those of `aai.augment`, which draws their numbers at random for training; here they are given.
"""

import torch
from torch import Tensor

from aai import augment

DISTURBANCES: dict[str, tuple[float, ...]] = {
    "noise_snr_db": (20.0, 10.0, 0.0),
    "gain_db": (-10.0, -20.0, -30.0),
    "lowpass_hz": (4000.0, 2000.0, 1000.0),
    "reverb_rt60_s": (0.3, 1.0),
}
"""White noise; level; a Butterworth low-pass of order 4; a room as loud as the direct sound. From mild to harsh."""


@torch.no_grad()
def disturbed(waveforms: Tensor, kind: str, level: float, sample_rate_hz: int, seed: int) -> Tensor:
    """Waveforms [B, S] under a disturbance of DISTURBANCES; seed: of noise and room, nothing else draws from it."""
    levels = torch.full((len(waveforms), 1), level, device=waveforms.device)
    with torch.random.fork_rng(devices=[waveforms.device] if waveforms.is_cuda else []):
        torch.manual_seed(seed)
        if kind == "noise_snr_db":
            noise = augment.coloured_noise(waveforms, torch.zeros_like(levels), sample_rate_hz)
            return augment.add(waveforms, noise, levels)
        if kind == "gain_db":
            return augment.amplify(waveforms, levels)
        if kind == "lowpass_hz":
            return augment.lowpass(waveforms, levels, torch.full_like(levels, 4.0), sample_rate_hz)
        if kind == "reverb_rt60_s":
            response = augment.room(levels, torch.zeros_like(levels), level, sample_rate_hz)
            return augment.reverberate(waveforms, response)
    raise ValueError(f"disturbance {kind!r} is none of {', '.join(DISTURBANCES)}")
