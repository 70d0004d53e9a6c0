"""Each condition against the prompt that it stands for."""

import numpy as np
import pytest
import torch

from aai.conditions import CONDITIONS, Conditions, HeldOutClip
from aai.foundation.clip import FrozenClip
from aai.painter import Painter
from aai.sampling import PaintRequest

CAPTIONS = ("a sketch of a big dog in the rain", "a photo of a bell at night", "a clock")
TRAIN = ["a photo of a bell at night", "a photo of a big dog in the rain", "a photo of a clock"]


def sound(seed: int) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(32000)).astype(np.float32)


LABELS = ["dog", "rain", "photo", "big", "red", "two", "arch", "none"]
CLIPS = [HeldOutClip(sound(i), CAPTIONS[i % 2], 40 + i, LABELS) for i in range(3)]


@pytest.fixture(scope="module")
def clip(painter: Painter) -> FrozenClip:
    return FrozenClip(painter.foundation)


@pytest.fixture(scope="module")
def conditions(painter: Painter, clip: FrozenClip) -> Conditions:
    return Conditions(painter, clip, CAPTIONS, painter.listen(sound(3))[0])


def test_every_condition_gives_a_prompt_and_none_depends_on_its_batch(conditions: Conditions) -> None:
    for name in CONDITIONS:
        whole = conditions.embed(name, CLIPS)
        assert whole.shape == (3, 32, 32)
        assert not whole.requires_grad
        torch.testing.assert_close(conditions.embed(name, CLIPS[1:2]), whole[1:2], atol=1e-4, rtol=0, msg=name)
    with pytest.raises(ValueError, match="'other' is none of"):
        conditions.embed("other", CLIPS)


def test_sounds_are_painted_as_a_request_has_them_and_cut_ones_share_a_batch_with_others(
    painter: Painter, conditions: Conditions, monkeypatch: pytest.MonkeyPatch
) -> None:
    halves = [painter.listen(np.tile(half, 2))[0] for half in np.split(CLIPS[0].audio, 2)]
    below = {"apart_below": float(halves[0] @ halves[1]) + 1e-6}
    monkeypatch.setattr(painter.aligner, "config", painter.aligner.config.model_copy(update=below))
    quiet = CLIPS[1].audio * np.repeat([1, 0.01], 16000).astype(np.float32)  # its second half tells of nothing
    found = conditions.embed("sound", [CLIPS[0], HeldOutClip(quiet, CAPTIONS[0], 1)])
    asked = PaintRequest(prompt=painter.prompt)
    cut, whole = (painter.embed_request(audio, asked)[0] for audio in (CLIPS[0].audio, quiet))
    assert (found.shape, whole.shape) == ((2, 96, 32), (1, 32, 32))
    assert torch.equal(found, torch.cat([cut, whole.repeat(1, 3, 1)]))


def test_captions_as_they_are_and_under_the_common_head(painter: Painter, conditions: Conditions) -> None:
    plain = painter.embed_text([clip.caption for clip in CLIPS])
    torch.testing.assert_close(conditions.embed("caption", CLIPS), plain)
    common = painter.embed_text(["a photo of a big dog in the rain", "a photo of a bell at night"])
    torch.testing.assert_close(conditions.embed("ceiling", CLIPS[:2]), common)
    bare = [HeldOutClip(sound(0), "clock", 1)]  # a label alone: the ceiling paints what the sound's prompt asks for
    torch.testing.assert_close(conditions.embed("ceiling", bare), painter.embed_text(["a photo of clock"]))
    torch.testing.assert_close(conditions.embed("caption", bare), painter.embed_text(["clock"]))
    assert conditions.captions == TRAIN


def test_prompt_and_head_are_the_bundles(painter: Painter, clip: FrozenClip) -> None:
    own = Painter(
        painter.pipe,
        painter.aligner,
        painter.adapter,
        painter.foundation,
        None,
        "thing",
        "hear <sound>",
        "^the noise of",
    )
    other = Conditions(own, clip, ["the noise of a dog", "a photo of a dog"], torch.zeros(32))
    assert other.captions == ["hear a dog", "hear a photo of a dog"]
    expected, _ = painter.injector.encode(["hear <sound>"], painter.hear(CLIPS[0].audio)[None])
    torch.testing.assert_close(other.embed("sound", CLIPS[:1]), expected.detach())


def test_sounds_are_written_into_the_prompt(painter: Painter, conditions: Conditions) -> None:
    for name, prompt in (
        ("sound", "a photo of <sound>"),
        ("shuffled_audio", "a photo of <sound>"),
        ("sketch", "a sketch of <sound>"),
    ):
        found = conditions.embed(name, CLIPS)
        for row, clip in zip(found, CLIPS, strict=True):
            torch.testing.assert_close(row, painter.embed(clip.audio, prompt)[0], atol=1e-4, rtol=0)


def test_random_tokens_are_as_long_as_a_word_and_drawn_by_the_clips_seed(
    painter: Painter, conditions: Conditions
) -> None:
    tokens = conditions._random_tokens(5)
    torch.testing.assert_close(tokens.norm(dim=-1), torch.full((2,), painter.injector.median_norm))
    assert torch.equal(tokens, conditions._random_tokens(5))
    assert not torch.allclose(tokens, conditions._random_tokens(6))
    written = conditions.embed("random_token", [HeldOutClip(sound(0), "", 5), HeldOutClip(sound(0), "", 6)])
    prompts = ["a photo of <sound>"] * 2
    expected, _ = painter.injector.encode(prompts, torch.stack([tokens, conditions._random_tokens(6)]))
    torch.testing.assert_close(written, expected)


def test_the_nearest_caption_is_the_one_most_similar_to_the_sound(
    painter: Painter, conditions: Conditions, clip: FrozenClip
) -> None:
    features = clip.texts(conditions.captions)
    chosen = [int((painter.listen(held.audio) * features).sum(-1).argmax()) for held in CLIPS]
    expected = painter.embed_text([conditions.captions[i] for i in chosen])
    torch.testing.assert_close(conditions.embed("nearest_caption", CLIPS), expected)
    # Let each sound have a caption of its own that is exactly where the sound is.
    exact = Conditions(painter, clip, CAPTIONS, torch.zeros(32))
    exact.caption_features = torch.cat([painter.listen(held.audio) for held in reversed(CLIPS)])
    backwards = painter.embed_text(list(reversed(exact.captions)))
    torch.testing.assert_close(exact.embed("nearest_caption", CLIPS), backwards)


def test_the_closed_form_is_taken_around_the_mean_sound(painter: Painter, clip: FrozenClip) -> None:
    """A sound that is the mean of the training sounds says what the mean caption says."""
    held = HeldOutClip(sound(3), "", 0)
    mean = painter.listen(held.audio)[0]
    found = Conditions(painter, clip, CAPTIONS, mean).embed("closed_form", [held])
    _, pooled = painter.injector.encode(TRAIN)
    end = painter.injector.slots("a photo of thing", {}).end
    torch.testing.assert_close(found[0, end:], pooled.mean(0).expand(32 - end, -1), atol=1e-5, rtol=0)
    torch.testing.assert_close(found[0, :end], painter.embed_text(["a photo of thing"])[0, :end])


def test_the_closed_form_is_the_tikhonov_solution(painter: Painter, clip: FrozenClip) -> None:
    """min |W x - e|^2 + lambda |x|^2 as an ordinary least-squares problem with lambda's root as further rows."""
    for ridge in (1e-2, 0.5):
        mean = (painter.listen(sound(3)) + painter.listen(sound(4)))[0] / 2
        conditions = Conditions(painter, clip, CAPTIONS, mean, ridge=ridge)
        weight = clip.model.text_projection.weight.double().numpy()
        _, pooled = painter.injector.encode(conditions.captions)
        length = np.linalg.norm(pooled.double().numpy() @ weight.T, axis=1).mean()
        wanted = (painter.listen(CLIPS[1].audio) - mean)[0].double().numpy() * length
        penalty = ridge * (weight**2).sum(axis=1).mean()
        rows = np.concatenate([weight, penalty**0.5 * np.eye(weight.shape[1])])
        solution = np.linalg.lstsq(rows, np.concatenate([wanted, np.zeros(weight.shape[1])]), rcond=None)[0]
        expected = pooled.mean(0) + torch.from_numpy(solution).float()
        found = conditions.embed("closed_form", CLIPS)[1, -1]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_a_full_caption_names_all_labels_under_the_common_head(conditions: Conditions) -> None:
    clips = [HeldOutClip(sound(0), "", 1, labels) for labels in (LABELS, [*LABELS[:2], "sketch", *LABELS[3:]])]
    said = conditions.painter.embed_text(["a photo of two big red dogs under an arch in the rain"])
    torch.testing.assert_close(conditions.embed("full_caption", clips), said.expand(2, -1, -1), atol=1e-5, rtol=0)
