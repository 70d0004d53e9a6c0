"""Shares of the time, by small classifiers of the real classes."""

from pathlib import Path

import numpy as np
import pytest

from aai.errors import UserError
from aai.foundation.tagger import SoundTagger, check_tags
from aai.media.waveform import encode_flac
from tests.taggers import TAGS, sound_of, write_ast_tagger, write_wav2vec2_tagger

GROUPS = {"speech": TAGS[:2], "music": TAGS[2:3]}


def sound(*tags: str) -> bytes:
    """Half a second of each."""
    return encode_flac(np.concatenate([sound_of(tag, 0.5) for tag in tags]), 16_000)


SOUNDS = [sound("Speech", "Dog", "Music", "Speech"), sound("Conversation", "Rain"), sound("Music"),
          sound("Rain", "Music", "Music")]  # fmt: skip
SHARES = np.array([[1 / 2, 1 / 4, 1 / 4], [1 / 2, 0, 1 / 2], [0, 1, 0], [0, 2 / 3, 1 / 3]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_ast_tagger(tmp_path_factory.mktemp("ast")))


def test_shares_are_of_the_time(folder: str) -> None:
    tagger = SoundTagger(folder, None, GROUPS, window_s=0.5)
    assert tagger.shares(SOUNDS) == pytest.approx(SHARES)
    assert tagger.shares([]).shape == (0, 3)
    cut = encode_flac(sound_of("Speech", 0.01), 16_000)  # too short for a spectrogram
    assert tagger.shares([cut]).sum() == 1
    halves = encode_flac(sound_of("Music", 0.65), 16_000)  # 1.3 windows are one
    assert tagger.shares([halves]).max() == 1


def test_shares_do_not_depend_on_the_other_sounds(tmp_path: Path) -> None:
    """Wav2Vec2 takes sounds of any length, so that the parts of one batch differ in shape."""
    place = str(write_wav2vec2_tagger(tmp_path))
    odd = [encode_flac(sound_of(tag, 0.5 + i / 100), 16_000) for i, tag in enumerate(TAGS)]
    together = SoundTagger(place, None, GROUPS, window_s=0.5).shares([*SOUNDS, *odd])
    alone = SoundTagger(place, None, GROUPS, window_s=0.5, batch_size=1)
    assert np.concatenate([alone.shares([one]) for one in [*SOUNDS, *odd]]) == pytest.approx(together)
    assert together[[0, 2]] == pytest.approx(SHARES[[0, 2]])


def test_a_sound_of_another_rate_is_resampled(folder: str) -> None:
    fast = [encode_flac(sound_of(tag, 0.5, 48_000), 48_000) for tag in ("Speech", "Music")]
    assert SoundTagger(folder, None, GROUPS, window_s=0.5).shares(fast) == pytest.approx(np.eye(3)[:2])


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
