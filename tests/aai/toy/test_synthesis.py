"""The world's sounds: loud as the size says, never clipped, and told apart by a linear model."""

import numpy as np
import pytest
import torch
import torchaudio
from scipy.stats import spearmanr

from aai.toy.grammar import AMBIENCES, OBJECTS, Scene, random_scene
from aai.toy.synthesis import AMBIENCE_DB, ambience_sound, level_envelope, object_sound, synthesise

RATE = 16000


def _db(signal: np.ndarray) -> float:
    return float(10 * np.log10(np.mean(np.square(signal, dtype=np.float64)) + 1e-20))


@pytest.fixture(scope="module")
def mixes() -> tuple[list[Scene], np.ndarray]:
    """450 scenes and their sounds [N, S]."""
    rng = np.random.default_rng(7)
    scenes = [random_scene(rng) for _ in range(450)]
    return scenes, np.stack([synthesise(scene, 2.0, RATE) for scene in scenes])


def _held_out_accuracy(features: torch.Tensor, labels: list[int], num_train: int = 320) -> float:
    """Accuracy of multinomial logistic regression (L-BFGS, weak L2) on the rows after `num_train`."""
    y = torch.tensor(labels)
    train = features[:num_train]
    x = (features - train.mean(0)) / train.std(0)
    weight = torch.zeros(x.shape[1], int(y.max()) + 1, requires_grad=True)
    bias = torch.zeros(int(y.max()) + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        logits = x[:num_train] @ weight + bias
        loss = torch.nn.functional.cross_entropy(logits, y[:num_train]) + 1e-3 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    right = (x[num_train:] @ weight + bias).argmax(1) == y[num_train:]
    return right.float().mean().item()


@pytest.mark.slow
def test_object_and_ambience_are_linearly_separable(mixes: tuple[list[Scene], np.ndarray]) -> None:
    scenes, audio = mixes
    mel = torchaudio.transforms.MelSpectrogram(RATE, n_fft=512, hop_length=160, n_mels=48)
    log_mel = (mel(torch.from_numpy(audio)) + 1e-8).log()
    features = torch.cat([log_mel.mean(-1), log_mel.std(-1)], dim=1)
    objects = _held_out_accuracy(features, [OBJECTS.index(s.obj) for s in scenes])
    ambiences = _held_out_accuracy(features, [AMBIENCES.index(s.ambience) for s in scenes])
    assert objects >= 0.95, f"object accuracy {objects:.3f}"
    assert ambiences >= 0.95, f"ambience accuracy {ambiences:.3f}"


def test_loudness_follows_size(mixes: tuple[list[Scene], np.ndarray]) -> None:
    scenes, audio = mixes
    correlation = spearmanr([s.size for s in scenes], [_db(a) for a in audio]).statistic
    assert correlation > 0.9


def test_no_sound_clips(mixes: tuple[list[Scene], np.ndarray]) -> None:
    _, audio = mixes
    assert audio.dtype == np.float32
    assert np.isfinite(audio).all()
    assert np.abs(audio).max() <= 0.98 + 1e-6


@pytest.mark.parametrize("name", OBJECTS)
def test_object_level_spans_18_db(name: str) -> None:
    quiet, loud = (_db(object_sound(Scene(name, "clear", "photo", size, 5), 2.0)) for size in (0.0, 1.0))
    assert loud - quiet == pytest.approx(18, abs=0.01)
    assert -37.1 <= quiet <= -34.9


@pytest.mark.parametrize("name", AMBIENCES)
def test_ambience_level_is_constant(name: str) -> None:
    for size, seed in ((0.0, 1), (1.0, 2)):
        assert _db(ambience_sound(Scene("dog", name, "photo", size, seed), 2.0)) == pytest.approx(AMBIENCE_DB[name])


def test_same_scene_same_sound_other_seed_other_sound() -> None:
    scene = Scene("frog", "rain", "photo", 0.5, 1)
    assert np.array_equal(synthesise(scene, 1.0), synthesise(scene, 1.0))
    other = synthesise(Scene("frog", "rain", "photo", 0.5, 2), 1.0)
    assert abs(np.corrcoef(synthesise(scene, 1.0), other)[0, 1]) < 0.5


@pytest.mark.parametrize(("duration_s", "rate"), [(0.2, 16000), (3.3, 22050)])
def test_length_in_samples(duration_s: float, rate: int) -> None:
    for name in OBJECTS:
        assert len(synthesise(Scene(name, "night", "photo", 0.5, 3), duration_s, rate)) == round(duration_s * rate)


@pytest.mark.parametrize(("duration_s", "rate"), [(0.0, 16000), (1.0, 8000)])
def test_impossible_requests_are_refused(duration_s: float, rate: int) -> None:
    with pytest.raises(ValueError, match="sample_rate_hz"):
        synthesise(Scene("dog", "rain", "photo", 0.5, 3), duration_s, rate)


def test_level_envelope_follows_a_burst() -> None:
    audio = np.zeros(RATE)
    audio[8000:9600] = np.sin(np.arange(1600))
    levels = level_envelope(audio, RATE, np.array([0.1, 0.55, 0.9]))
    assert levels.tolist() == [0.0, 1.0, 0.0]


def test_level_envelope_of_silence_is_zero() -> None:
    assert not level_envelope(np.zeros(RATE), RATE, np.array([0.0, 0.5])).any()
