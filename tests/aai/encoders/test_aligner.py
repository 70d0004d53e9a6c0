"""The trained encoder as others use it: out of a bundle, and on files of any number and length."""

from pathlib import Path

import numpy as np
import pytest
import torch

from aai.bundle import read_bundle
from aai.encoders.aligner import embed, embed_files, load_aligner
from aai.encoders.audio import AudioEncoder
from aai.errors import UserError
from aai.foundation.identity import FoundationSpec
from aai.media.waveform import encode_flac
from tests.tiny import write_bundle_of


@pytest.fixture(scope="module")
def aligner(tmp_path_factory: pytest.TempPathFactory) -> AudioEncoder:
    folder: Path = write_bundle_of(tmp_path_factory.mktemp("aligner") / "bundle", FoundationSpec())
    return load_aligner(read_bundle(folder))


def test_a_loaded_aligner_is_frozen(aligner: AudioEncoder) -> None:
    assert not aligner.training
    assert not any(p.requires_grad for p in aligner.parameters())


def test_files_are_embedded_as_their_waveforms_are(aligner: AudioEncoder) -> None:
    samples = aligner.config.clip_samples
    rng = np.random.default_rng(0)
    waves = [(0.1 * rng.standard_normal(n)).astype(np.float32) for n in (samples, samples // 2, 2 * samples)]
    found = embed_files(aligner, [encode_flac(wave, 16_000) for wave in waves], batch_size=2)
    middle = waves[2][samples // 2 : samples // 2 + samples]
    fixed = torch.from_numpy(np.stack([waves[0], np.pad(waves[1], (0, samples - samples // 2)), middle]))
    np.testing.assert_allclose(found, embed(aligner, fixed, batch_size=2).numpy(), atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert embed_files(aligner, []).shape == (0, aligner.config.embed_dim)


def test_sounds_of_another_rate_are_refused(aligner: AudioEncoder) -> None:
    sounds = [encode_flac(np.zeros(900, np.float32), rate_hz) for rate_hz in (16_000, 8_000)]
    with pytest.raises(UserError, match=r"encoder\.sample_rate_hz=16000: the sounds are kept at 8000 Hz"):
        embed_files(aligner, sounds)


def test_embed_gives_the_mode_back(aligner: AudioEncoder) -> None:
    waves = torch.zeros(1, aligner.config.clip_samples)
    for training in (True, False):
        aligner.train(training)
        assert torch.equal(embed(aligner, waves), embed(aligner, waves))  # no dropout
        assert aligner.training == training


def test_embed_keeps_no_gradients_of_an_encoder_in_training(aligner: AudioEncoder) -> None:
    encoder = AudioEncoder(aligner.config)
    waves = 0.1 * torch.randn(5, aligner.config.clip_samples, generator=torch.Generator().manual_seed(0))
    found = embed(encoder, waves, batch_size=2)
    assert not found.requires_grad
    torch.testing.assert_close(found, encoder.eval()(waves).detach())
