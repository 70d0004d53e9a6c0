"""The trained audio encoder apart from its training: out of a bundle, and applied to many sounds."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from aai.bundle import Bundle
from aai.encoders.audio import AudioEncoder, AudioEncoderConfig, fit_length
from aai.errors import UserError
from aai.media.waveform import read_sound, sound_rate_hz


def encoder_config(bundle: Bundle) -> AudioEncoderConfig:
    """The settings of a bundle's audio encoder."""
    return AudioEncoderConfig.parse(bundle.config.encoder, "bundle")


def load_aligner(bundle: Bundle) -> AudioEncoder:
    """A bundle's audio encoder, frozen."""
    aligner = AudioEncoder(encoder_config(bundle))
    aligner.load_state_dict(bundle.aligner())
    return aligner.eval().requires_grad_(False)


@torch.no_grad()
def embed(encoder: AudioEncoder, waveforms: Tensor, batch_size: int = 128) -> Tensor:
    """Embeddings [N, D] on the CPU of waveforms [N, S] in -1..1, in eval mode."""
    was_training = encoder.training
    encoder.eval()
    device = next(encoder.parameters()).device
    parts = [encoder(part.to(device)).float().cpu() for part in waveforms.split(batch_size)]
    encoder.train(was_training)
    return torch.cat(parts)


def embed_files(aligner: AudioEncoder, sounds: Sequence[bytes], batch_size: int = 64, parts: int = 0) -> np.ndarray:
    """Aligned embeddings of FLAC sounds, computed on the aligner's device: [N, D], or with parts [N, 1 + parts, D].

    Raises UserError for sound of another rate than the aligner hears.
    """
    heard_hz = aligner.config.sample_rate_hz
    for rate_hz in {sound_rate_hz(data) for data in sounds} - {heard_hz}:
        rule = f"the sounds are kept at {rate_hz} Hz"
        raise UserError("encoder.sample_rate_hz", heard_hz, rule, "give a bundle that was aligned at their rate")
    device = next(aligner.parameters()).device
    rows = (1 + parts, aligner.config.embed_dim) if parts else (aligner.config.embed_dim,)
    found = [np.empty((0, *rows), np.float32)]
    for at in range(0, len(sounds), batch_size):
        waves = [torch.from_numpy(read_sound(data)) for data in sounds[at : at + batch_size]]
        batch = torch.stack([fit_length(wave, aligner.config.clip_samples) for wave in waves])
        with torch.no_grad():
            heard = aligner.parts(batch.to(device), parts)
            found.append(heard.view(-1, *rows).cpu().numpy())
    return np.concatenate(found)
