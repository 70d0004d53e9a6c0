"""The world's sounds: loud as the size says, never clipped, and told apart by a linear model."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torchaudio
from scipy.stats import spearmanr

from aai.toy.grammar import AMBIENCES, COLOURS, OBJECTS, PLACES, TIMBRES, Scene, random_scene
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
def test_attributes_are_heard_by_a_linear_model(mixes: tuple[list[Scene], np.ndarray]) -> None:
    scenes, audio = mixes
    mel = torchaudio.transforms.MelSpectrogram(RATE, n_fft=512, hop_length=160, n_mels=48)
    log_mel = (mel(torch.from_numpy(audio)) + 1e-8).log()
    features = torch.cat([log_mel.mean(-1), log_mel.std(-1)], dim=1)
    objects = _held_out_accuracy(features, [OBJECTS.index(s.obj) for s in scenes])
    ambiences = _held_out_accuracy(features, [AMBIENCES.index(s.ambience) for s in scenes])
    colours = _held_out_accuracy(features, [COLOURS.index(s.colour) for s in scenes])
    assert objects >= 0.55, f"object accuracy {objects:.3f}"
    assert colours >= 0.5, f"colour accuracy {colours:.3f}"
    assert ambiences >= 0.9, f"ambience accuracy {ambiences:.3f}"


@pytest.mark.parametrize("name", OBJECTS)
def test_pitch_moves_the_voice_up(name: str) -> None:
    """The spectral centroid of the object alone, in octaves, over the range of pitches."""
    centroids = []
    for pitch in (0.1, 0.4, 0.6, 0.9):
        sound = object_sound(Scene(name, "clear", "photo", 0.5, 3, pitch=pitch, rate=0.5), 2.0)
        power = np.abs(np.fft.rfft(sound)) ** 2
        f = np.fft.rfftfreq(len(sound), 1 / RATE)
        centroids.append(np.log2((power * f).sum() / power.sum()))
    assert np.all(np.diff(centroids) > 0.05), centroids
    assert centroids[-1] - centroids[0] > 0.5


@pytest.mark.parametrize("name", [name for name in OBJECTS if name not in ("car", "siren")])
def test_a_quicker_rate_has_more_events(name: str) -> None:
    """Rises of the envelope, on average over seeds; of the voices that are still between events."""
    counts = []
    for rate in (0.1, 0.5, 0.9):
        rises = 0
        for seed in range(6):
            sound = object_sound(Scene(name, "clear", "photo", 0.5, seed, pitch=0.5, rate=rate), 2.0)
            energy = np.square(sound)[: len(sound) // 160 * 160].reshape(-1, 160).mean(1)
            rises += int((np.diff(10 * np.log10(energy + 1e-9)) > 2.5).sum())
        counts.append(rises)
    assert counts[0] < counts[1] < counts[2], counts


def test_an_arch_rings_on() -> None:
    """Energy in the quietest tenth of the clip, where a dry voice of single strokes has none."""
    quiet = []
    for place in PLACES:
        sound = object_sound(Scene("clock", "clear", "photo", 0.5, 3, rate=0.1, place=place), 2.0)
        energy = np.sort(np.square(sound)[: len(sound) // 160 * 160].reshape(-1, 160).mean(1))
        quiet.append(10 * np.log10(energy[: len(energy) // 10].mean() / energy.mean() + 1e-12))
    assert quiet[1] > quiet[0] + 10


def test_timbres_and_voices_differ() -> None:
    scene = Scene("guitar", "clear", "photo", 0.5, 3)
    spectra = []
    for timbre in range(TIMBRES):
        sound = object_sound(replace(scene, timbre=timbre), 2.0)
        bands = np.array_split(np.abs(np.fft.rfft(sound)) ** 2, 60)
        spectra.append(10 * np.log10(np.array([band.mean() for band in bands]) + 1e-9))
    for i, one in enumerate(spectra):
        for other in spectra[:i]:
            assert np.abs((one - one.mean()) - (other - other.mean())).mean() > 1.5


def test_two_objects_sound_one_after_the_other() -> None:
    def half_of(obj: str, second: str, first: bool) -> np.ndarray:
        sound = object_sound(Scene(obj, "clear", "photo", 0.5, 3, second=second), 2.0)
        half = len(sound) // 2
        power = np.abs(np.fft.rfft(sound[:half] if first else sound[half:])) ** 2
        return np.log([band.mean() for band in np.array_split(power, 100)])

    alike = np.corrcoef(half_of("bird", "car", first=True), half_of("bird", "drum", first=True))[0, 1]
    assert alike > 0.8, "whatever comes second"
    assert np.corrcoef(half_of("bird", "car", first=True), half_of("bird", "car", first=False))[0, 1] < 0.5


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
    with pytest.raises(ValueError, match="read-only"):
        object_sound(scene, 1.0)[0] = 1.0  # it is kept for who asks next
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
