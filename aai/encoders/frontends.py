"""What an audio backbone hears: waveforms -> log-mel spectrograms, each backbone's own.

A pretrained backbone knows the spectrogram that it was trained with and no other. The front ends here compute what the
feature extractors of transformers do (which run on the CPU, clip by clip), in batches on the waveforms' device.
Spectra are taken in float32 or better even under autocast: squares of quiet sounds are below bfloat16's resolution.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchaudio.compliance import kaldi
from torchaudio.transforms import MelSpectrogram

if TYPE_CHECKING:
    from transformers import (
        ASTFeatureExtractor,
        ClapFeatureExtractor,
        PeAudioFeatureExtractor,
        WhisperFeatureExtractor,
    )

KALDI_WINDOW_S, KALDI_HOP_S, KALDI_PREEMPHASIS, KALDI_LOWEST_HZ = 0.025, 0.010, 0.97, 20.0
"""What ASTFeatureExtractor leaves at Kaldi's defaults."""
LOWEST_POWER = 1e-10
"""Floor of Whisper's and CLAP's mel energies."""
WHISPER_RANGE = 8.0
"""Whisper's spectrogram reaches this many powers of ten below its loudest cell."""


class LogMel(nn.Module):
    """The front end of our own encoder: waveforms [B, S] -> normalised log-mel energies [B, T, M]."""

    def __init__(
        self, sample_rate_hz: int, window_samples: int, hop_samples: int, bins: int, mean: float, std: float
    ) -> None:
        super().__init__()
        self.hop, self.mean, self.std = hop_samples, mean, std
        self.power = MelSpectrogram(
            sample_rate=sample_rate_hz,
            n_fft=_power_of_two(window_samples),
            win_length=window_samples,
            hop_length=hop_samples,
            n_mels=bins,
            power=2.0,
        )

    def forward(self, waveforms: Tensor) -> Tensor:
        """[B, S] -> [B, S // hop, M]."""
        power = self.power(waveforms)[..., : waveforms.shape[1] // self.hop]
        mel: Tensor = (torch.log(power + 1e-6) - self.mean) / self.std
        return mel.transpose(1, 2)


class ASTFrontEnd(nn.Module):
    """Kaldi's log filter banks as ASTFeatureExtractor gives them (arXiv 2104.01778): [B, S] -> [B, T, M]."""

    def __init__(self, extractor: "ASTFeatureExtractor") -> None:
        super().__init__()
        rate_hz = extractor.sampling_rate
        self.window, self.hop = int(rate_hz * KALDI_WINDOW_S), int(rate_hz * KALDI_HOP_S)
        self.n_fft = _power_of_two(self.window)
        self.num_frames = extractor.max_length
        # Twice the deviation: the published models were trained so.
        self.mean: float = extractor.mean if extractor.do_normalize else 0.0
        self.scale: float = 2 * extractor.std if extractor.do_normalize else 1.0
        bins, whole_band, no_warp = extractor.num_mel_bins, 0.0, (100.0, -500.0, 1.0)
        banks, _ = kaldi.get_mel_banks(bins, self.n_fft, rate_hz, KALDI_LOWEST_HZ, whole_band, *no_warp)
        self.register_buffer("banks", F.pad(banks, (0, 1)).T.contiguous(), persistent=False)
        self.register_buffer("hann", torch.hann_window(self.window, periodic=False), persistent=False)

    def forward(self, waveforms: Tensor) -> Tensor:
        """[B, S] -> [B, T, M] with T as the model takes; frames after the sound's end are zeros before normalising."""
        frames = F.pad(waveforms, (0, max(0, self.window - waveforms.shape[1]))).unfold(1, self.window, self.hop)
        frames = frames - frames.mean(dim=-1, keepdim=True)
        before = torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
        frames = (frames - KALDI_PREEMPHASIS * before) * self.hann
        power = torch.fft.rfft(frames, n=self.n_fft).abs().square()
        mel = (power @ self.banks).clamp(min=torch.finfo(torch.float32).eps).log()[:, : self.num_frames]
        mel = F.pad(mel, (0, 0, 0, self.num_frames - mel.shape[1]))
        return (mel - self.mean) / self.scale


class WhisperFrontEnd(nn.Module):
    """Whisper's log-mel (arXiv 2212.04356, section 2.2): [B, S] -> [B, T, M] of 30 s, silence after the sound."""

    def __init__(self, extractor: "WhisperFeatureExtractor") -> None:
        super().__init__()
        self.n_fft, self.hop, self.samples = extractor.n_fft, extractor.hop_length, extractor.n_samples
        filters = torch.from_numpy(extractor.mel_filters).float()
        self.register_buffer("filters", filters, persistent=False)
        self.register_buffer("hann", torch.hann_window(self.n_fft), persistent=False)

    def forward(self, waveforms: Tensor) -> Tensor:
        """[B, S] -> [B, T, M]."""
        padded = F.pad(waveforms, (0, self.samples - waveforms.shape[1]))
        spectra = torch.stft(padded, self.n_fft, self.hop, window=self.hann, return_complex=True)
        power = spectra[..., :-1].abs().square()
        mel = (self.filters.T @ power).clamp(min=LOWEST_POWER).log10()
        mel = torch.maximum(mel, mel.amax(dim=(1, 2), keepdim=True) - WHISPER_RANGE)
        return ((mel + 4.0) / 4.0).transpose(1, 2)


class ClapFrontEnd(nn.Module):
    """CLAP's mel spectrogram in dB (arXiv 2211.06687): [B, S] -> [B, T, M]; a short sound is repeated.

    In float64 like the extractor's: decibels magnify what float32 leaves of quiet cells beside loud ones.
    """

    def __init__(self, extractor: "ClapFeatureExtractor") -> None:
        super().__init__()
        self.n_fft, self.hop = extractor.fft_window_size, extractor.hop_length
        self.samples, self.padding = extractor.nb_max_samples, extractor.padding
        fused = extractor.truncation == "fusion"
        filters = extractor.mel_filters if fused else extractor.mel_filters_slaney
        self.register_buffer("filters", torch.from_numpy(filters).double(), persistent=False)
        self.register_buffer("hann", torch.hann_window(self.n_fft, dtype=torch.float64), persistent=False)

    def forward(self, waveforms: Tensor) -> Tensor:
        """[B, S] -> [B, T, M]."""
        times = self.samples // waveforms.shape[1]
        if self.padding == "repeatpad":
            waveforms = waveforms.repeat(1, times)
        elif self.padding == "repeat":
            waveforms = waveforms.repeat(1, times + 1)[:, : self.samples]
        padded = F.pad(waveforms, (0, self.samples - waveforms.shape[1])).double()
        spectra = torch.stft(padded, self.n_fft, self.hop, window=self.hann, return_complex=True)
        mel = self.filters.T @ spectra.abs().square()
        return (10 * mel.clamp(min=LOWEST_POWER).log10()).float().transpose(1, 2)


class PEAudioFrontEnd(nn.Module):
    """PE-AV's audio tower hears the waveform: [B, S] -> [B, S'], mirrored at its end to whole hops of the codec."""

    def __init__(self, extractor: "PeAudioFeatureExtractor") -> None:
        super().__init__()
        self.hop = extractor.hop_length

    def forward(self, waveforms: Tensor) -> Tensor:
        """[B, S] -> [B, S']."""
        missing = -waveforms.shape[1] % self.hop
        return F.pad(waveforms, (0, missing), mode="reflect") if missing else waveforms


def _power_of_two(samples: int) -> int:
    """The next power of two."""
    return 1 << (samples - 1).bit_length()
