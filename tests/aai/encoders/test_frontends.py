"""Each front end beside the feature extractor of transformers that it stands for, on toy, noisy and real sounds."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchaudio.functional import resample
from transformers import (
    ASTFeatureExtractor,
    ClapFeatureExtractor,
    PeAudioFeatureExtractor,
    WhisperFeatureExtractor,
)

from aai.encoders.frontends import ASTFrontEnd, ClapFrontEnd, LogMel, PEAudioFrontEnd, WhisperFrontEnd
from aai.media.decode import decode_audio
from aai.toy.grammar import random_scene
from aai.toy.synthesis import synthesise
from tests.fake_cuda import fake_cuda

REAL = Path(os.environ.get("AAI_REAL_CLIPS", Path(__file__).resolve().parents[4] / "shared" / "data" / "clips"))
PAIRS: dict[str, tuple[Any, Any, str]] = {
    "ast": (ASTFeatureExtractor(), ASTFrontEnd, "input_values"),
    "ast, not normalised": (ASTFeatureExtractor(do_normalize=False, max_length=128), ASTFrontEnd, "input_values"),
    "whisper": (WhisperFeatureExtractor(), WhisperFrontEnd, "input_features"),
    "whisper, 128 bins": (WhisperFeatureExtractor(feature_size=128), WhisperFrontEnd, "input_features"),
    "clap": (ClapFeatureExtractor(truncation="rand_trunc"), ClapFrontEnd, "input_features"),
    "clap, fused": (ClapFeatureExtractor(), ClapFrontEnd, "input_features"),
    "clap, repeat": (ClapFeatureExtractor(truncation="rand_trunc", padding="repeat"), ClapFrontEnd, "input_features"),
    "clap, pad": (ClapFeatureExtractor(truncation="rand_trunc", padding="pad"), ClapFrontEnd, "input_features"),
    "pe_audio": (PeAudioFeatureExtractor(), PEAudioFrontEnd, "input_values"),
}


def toy_sounds(count: int, rate_hz: int) -> list[np.ndarray]:
    """Scenes of the toy world, of 1 to 9 s."""
    rng = np.random.default_rng(0)
    sounds = [synthesise(random_scene(rng), 1.0 + 8.0 * i / (count - 1)) for i in range(count)]
    return [resample(torch.from_numpy(sound), 16_000, rate_hz).numpy() for sound in sounds]


def odd_sounds(rate_hz: int) -> list[np.ndarray]:
    """Silence, one click, full-scale noise, and a constant."""
    click = np.zeros(rate_hz, np.float32)
    click[rate_hz // 3] = 1.0
    noise = np.random.default_rng(1).uniform(-1, 1, rate_hz + 1_234).astype(np.float32)
    return [np.zeros(rate_hz, np.float32), click, noise, np.full(rate_hz, 0.5, np.float32)]


def real_sounds(rate_hz: int) -> list[np.ndarray]:
    """The first 10 s of each real file."""
    waves = [decode_audio((REAL / name).read_bytes(), 60.0, 1 << 25, rate_hz) for name in sorted(os.listdir(REAL))]
    return [wave[: 10 * rate_hz] for wave in waves]


def largest_difference(pair: str, sounds: list[np.ndarray]) -> float:
    """Over all cells of all sounds at the extractor's rate, each alone."""
    extractor, front_end, key = PAIRS[pair]
    ours, largest = front_end(extractor), 0.0
    for wave in sounds:
        # CLAP's extractor computes in float64 when it is given such; both hear the same float32 samples.
        asked = wave.astype(np.float64) if isinstance(extractor, ClapFeatureExtractor) else wave
        theirs = torch.as_tensor(np.array(extractor(asked, sampling_rate=extractor.sampling_rate)[key][0]))
        if isinstance(extractor, WhisperFeatureExtractor):
            theirs = theirs.T
        if isinstance(extractor, ClapFeatureExtractor):
            theirs = theirs[0]  # the fused one stacks the same four times
        heard = ours(torch.from_numpy(wave)[None])[0]
        theirs = theirs.reshape(heard.shape)
        largest = max(largest, float((heard.double() - theirs.double()).abs().max()))
    return largest


@pytest.mark.parametrize("pair", PAIRS)
def test_front_ends_equal_the_extractors(pair: str) -> None:
    rate_hz = PAIRS[pair][0].sampling_rate
    assert largest_difference(pair, toy_sounds(3, rate_hz) + odd_sounds(rate_hz)) <= 1e-4


@pytest.mark.accept
@pytest.mark.parametrize("pair", PAIRS)
def test_k2_front_ends_equal_the_extractors_on_50_toy_clips_and_real_sounds(pair: str) -> None:
    rate_hz = PAIRS[pair][0].sampling_rate
    toy, real = largest_difference(pair, toy_sounds(50, rate_hz)), largest_difference(pair, real_sounds(rate_hz))
    print(f"{pair}: largest difference {toy:.1e} on 50 toy clips, {real:.1e} on the real sounds")
    assert max(toy, real) <= 1e-4


@pytest.mark.parametrize("pair", PAIRS)
def test_a_batch_gives_what_its_clips_give_alone(pair: str) -> None:
    extractor, front_end, _ = PAIRS[pair]
    ours = front_end(extractor)
    waves = 0.1 * torch.randn(3, extractor.sampling_rate, generator=torch.Generator().manual_seed(0))
    waves[1] *= 8  # a floor that follows the loudest clip of a batch would tell
    alone = torch.cat([ours(wave[None]) for wave in waves])
    torch.testing.assert_close(ours(waves), alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("pair", PAIRS)
def test_front_ends_run_where_the_waveforms_are(pair: str) -> None:
    extractor, front_end, _ = PAIRS[pair]
    ours = front_end(extractor)
    assert not ours.state_dict(), "constants of the extractor are no weights"
    waves = torch.randn(2, extractor.sampling_rate)
    expected = ours(waves)
    with fake_cuda():
        heard = ours.to("cuda")(waves.to("cuda"))
    assert heard.device.type == "cuda"
    torch.testing.assert_close(heard.cpu(), expected)


def test_a_sound_shorter_than_a_window_is_heard() -> None:
    for pair in ("ast", "whisper", "clap"):
        extractor, front_end, _ = PAIRS[pair]
        assert front_end(extractor)(torch.ones(1, 100)).isfinite().all(), pair


def test_our_own_log_mel_keeps_loudness() -> None:
    mel = LogMel(16_000, 400, 160, 64, mean=0.0, std=1.0)
    noise = 0.1 * torch.randn(1, 16_000, generator=torch.Generator().manual_seed(0))
    quiet, loud = mel(torch.cat([noise, 4 * noise]))
    assert quiet.shape == (100, 64)
    # 4 times the amplitude is 16 times the power in every cell.
    torch.testing.assert_close((loud - quiet).mean(), torch.tensor(16.0).log(), atol=0.02, rtol=0)
