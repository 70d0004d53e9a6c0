"""Shares of the time by small classifiers of the real classes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification

from aai.errors import UserError
from aai.foundation.tagger import SoundTagger, check_tags, groups_of
from aai.media.waveform import encode_flac, read_sound
from tests.taggers import TAGS, write_ast_tagger, write_wav2vec2_tagger

GROUPS = {"speech": TAGS[:2], "music": TAGS[2:3]}


def sounds() -> list[bytes]:
    """Sounds of several kinds and lengths, all of parts that are heard differently."""
    rng = np.random.default_rng(0)
    out = []
    for length_s in (2.0, 1.03, 0.05, 3.0):
        times = np.arange(round(length_s * 16_000)) / 16_000
        wave = np.sin(2 * np.pi * (200 + 900 * times) * times) * np.linspace(0.05, 1, len(times))
        wave[len(wave) // 2 :] += rng.normal(0, 0.3, len(wave) - len(wave) // 2)
        out.append(encode_flac(np.clip(wave, -1, 1).astype(np.float32), 16_000))
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_ast_tagger(tmp_path_factory.mktemp("ast")))


def test_shares_are_what_the_model_says_of_each_part(folder: str) -> None:
    model = AutoModelForAudioClassification.from_pretrained(folder).eval()
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    groups = groups_of(model.config.id2label, GROUPS)
    shares = SoundTagger(folder, None, GROUPS, window_s=0.5).shares(sounds())
    expected = []
    for sound in sounds():
        wave = read_sound(sound)
        parts = np.array_split(np.pad(wave, (0, max(0, 1600 - len(wave)))), max(1, round(len(wave) / 8000)))
        with torch.no_grad():
            logits = [model(**extractor(part, sampling_rate=16_000, return_tensors="pt")).logits for part in parts]
        heard = [groups[int(part.argmax())] for part in logits]
        expected.append([heard.count(group) / len(heard) for group in range(3)])
    assert shares == pytest.approx(np.array(expected))
    assert shares.sum(1) == pytest.approx(1)
    assert (shares.max(0) > 0).sum() >= 2, "the sounds are not told apart: the test shows nothing"


@pytest.mark.parametrize("write", [write_ast_tagger, write_wav2vec2_tagger])
def test_shares_do_not_depend_on_the_other_sounds(write: object, tmp_path: Path) -> None:
    """Wav2Vec2 takes sounds of any length, so that parts of one batch differ in shape."""
    place = str(write(tmp_path))  # type: ignore[operator]
    together = SoundTagger(place, None, GROUPS, window_s=0.5, batch_size=64).shares(sounds())
    alone = SoundTagger(place, None, GROUPS, window_s=0.5, batch_size=1)
    assert np.concatenate([alone.shares([sound]) for sound in sounds()]) == pytest.approx(together)
    assert alone.shares([]).shape == (0, 3)


def test_a_sound_of_another_rate_is_resampled(folder: str) -> None:
    times = np.arange(88_200) / 44_100
    high, low = (np.sin(2 * np.pi * 500 * t).astype(np.float32) for t in (times, np.arange(32_000) / 16_000))
    tagger = SoundTagger(folder, None, GROUPS)
    shares = tagger.shares([encode_flac(high, 44_100), encode_flac(low, 16_000)])
    assert shares[0] == pytest.approx(shares[1])


def test_tags_that_the_classifier_does_not_have_are_refused(folder: str, tmp_path: Path) -> None:
    check_tags(folder, None, GROUPS)
    with pytest.raises(UserError, match=r"scores\.tags\.speech=Speach: is no tag of the classifier; such are Speech"):
        check_tags(folder, None, {"speech": ("Speach",)})
    with pytest.raises(UserError, match="stands in two groups"):
        check_tags(folder, None, {"speech": TAGS[:1], "music": TAGS[:1]})
    with pytest.raises(UserError, match=r"scores\.tagger=.*: is neither a folder nor a hub id"):
        check_tags(f"{tmp_path}/none", None, GROUPS)
    with pytest.raises(UserError, match=r"scores\.tagger_revision=\(missing\)"):
        check_tags("someone/ast", None, GROUPS)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"scores\.tagger=.*: cannot be loaded"):
        check_tags(str(tmp_path), None, GROUPS)
