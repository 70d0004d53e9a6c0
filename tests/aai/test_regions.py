"""Several sounds of one prompt: each strip of the picture attends to its own sound, and one alone is as it was."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention

from aai.batching import Together, view_of
from aai.errors import UserError
from aai.inject import Learned, Sound
from aai.painter import Painter
from aai.regions import embed_in_regions, in_regions, own_prompt, side_by_side, strips, widened
from aai.sampling import PaintRequest
from tests.aai.test_painter import pixels, sound

TWO = PaintRequest(steps=2, prompt="<b> and <a*0.5>")


def both() -> dict[str, np.ndarray]:
    return {"a": sound(1), "b": sound(2)}


def test_strips_go_from_left_to_right() -> None:
    two = strips(16, 3, 3)
    assert two.shape == (1, 16, 9)
    for place in range(16):
        own = slice(0, 3) if place % 4 < 2 else slice(3, 6)
        assert (two[0, place, own] == 0).all()
        assert (two[0, place, 6:] == 0).all(), "the last block is everyone's"
        assert (two[0, place] < 0).sum() == 3
    assert (strips(16, 4, 1)[0, :4] == 0).int().argmax(1).tolist() == [0, 1, 1, 2]
    assert (strips(64, 9, 1)[0, :8] == 0).int().argmax(1).tolist() == list(range(8))
    with pytest.raises(UserError, match="5 sounds: the model's coarsest attention has 4 columns"):
        strips(16, 6, 1)


@torch.no_grad()
def test_each_strip_attends_to_its_own_tokens_alone() -> None:
    torch.manual_seed(0)
    attention = Attention(query_dim=6, cross_attention_dim=6, heads=2, dim_head=4)
    places, first, second, last = torch.randn(2, 16, 6), *torch.randn(3, 2, 3, 6)
    left = torch.arange(16) % 4 < 2
    with in_regions([attention], 3, 3):
        found = attention(places, encoder_hidden_states=torch.cat([first, second, last], dim=1))
        one, itself = attention(places, encoder_hidden_states=first), attention(places)
    for strip, own in ((left, first), (~left, second)):
        alone = attention(places, encoder_hidden_states=torch.cat([own, last], dim=1))
        torch.testing.assert_close(found[:, strip], alone[:, strip])
    assert torch.equal(one, attention(places, encoder_hidden_states=first)), "one prompt is as it was"
    assert torch.equal(itself, attention(places))
    whole = attention(places, encoder_hidden_states=torch.cat([first, second, last], dim=1))
    assert not torch.allclose(found, whole), "afterwards the model is as it was"


def test_each_sound_has_a_prompt_in_which_the_others_are_silent(painter: Painter) -> None:
    injector = painter.injector
    a, b = (Sound(painter.hear(sound(number))) for number in (1, 2))
    found = embed_in_regions(injector, "<b> and <a*0.5> at night", {"a": a, "b": b}, "a clock")
    alone = [injector.embed(text, {name: one}) for text, name, one in
             (("<b> and a clock at night", "b", b), ("<a*0.5> and a clock at night", "a", a))]  # fmt: skip
    assert torch.equal(found, torch.cat([*alone, injector.embed("a clock and a clock at night", {})], dim=1))
    three = embed_in_regions(injector, "<b>, <c> and <a>", {"a": a, "b": b, "c": Sound(a.tokens, 0)}, "a clock")
    assert torch.equal(three[:, -32:], injector.embed("a clock, thing and a clock", {}))
    assert torch.equal(three[:, 32:64], injector.embed("<a>, a clock and thing", {"a": a}))
    apart = embed_in_regions(injector, "a <b> at night, the <a*0.5> in rain", {"a": a, "b": b}, "a clock")
    own = injector.embed("a thing at night, the <a*0.5> in rain", {"a": a})
    assert torch.equal(apart[:, 32:64], own), "what stands between them may belong to either"
    assert torch.equal(apart[:, 64:], injector.embed("a clock at night, a clock in rain", {})), "with its article"
    for text, silent in (("<b> and <a*0>", "<b> and thing"), ("<a*0> and <b*0>", "thing and thing")):
        given = {"b": b} if "<b>" in silent else {}
        found = embed_in_regions(injector, text, {"a": a, "b": b}, "a clock")
        assert torch.equal(found, injector.embed(silent, given))
    big = embed_in_regions(injector, "a big <a> and <b>", {"a": a, "b": b}, "a clock")
    assert torch.equal(big[:, 32:64], injector.embed("a big thing and <b>", {"b": b})), "words before a stay its own"
    twice = embed_in_regions(injector, "<a> and <a>", {"a": a}, "a clock")
    assert torch.equal(twice, injector.embed("<a> and <a>", {"a": a}))
    with pytest.raises(UserError, match="has no placeholder <b>"):
        embed_in_regions(injector, "<a>", {"a": a, "b": b}, "a clock")


@pytest.mark.parametrize(
    ("prompt", "own", "text"),
    [
        ("a photo of <a> and <b>", "a", "a photo of <a> and a thing"),
        ("a photo of <a> and <b>", "b", "a photo of <b> and a thing"),
        ("the <a>, a <b*.5> & an <c> in rain", "b", "a <b*.5>, a thing & a thing in rain"),
        ("<a> next to <b>, beside <c>", "c", "<c> next to a thing, beside a thing"),
        ("<a> WITH A <b>", "b", "A <b> WITH a thing"),
        ("<a><b>", "b", "<b>a thing"),
        ("<a> and <b> and <a>", "a", "<a> and <a> and a thing"),
        ("<a> and <b> and <a>", "b", "<b> and a thing and a thing"),
        ("<a> and <b> in rain and <c>", "c", "<a> and <b> in rain and <c>"),
        ("<a> sand <b>", "b", "<a> sand <b>"),
        ("<A> and <b>", "b", "<A> and <b>"),
    ],
)
def test_a_sound_comes_first_of_those_that_are_only_joined(prompt: str, own: str, text: str) -> None:
    assert own_prompt(prompt, own, dict.fromkeys("abc", "a thing")) == text


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("A photo of a <a> and a <b>", "A photo of a <b> and a thing"),
        ("a photo of <a*0> and <b*0>, <b>", "a photo of <b> and <b*0>, a thing"),
        ("<a>, <b>", "<b>, a thing"),
        ("a photo of a big <a> and <b>", None),
        ("two <a> and a <b>", None),
        ("vitamin-a <a>, <b>", None),
    ],
)
def test_words_before_the_first_sound_stay_its_own(prompt: str, text: str | None) -> None:
    learned = Learned("a photo of <sound>", r"^a \w+ of\b")
    assert own_prompt(prompt, "b", {"a": "a thing"}, learned) == (text or prompt)


def test_a_pooled_row_is_the_mean_of_all() -> None:
    one, other = torch.zeros(1, 4, 2), torch.ones(1, 4, 2)
    found = side_by_side([one, other], 3)
    assert found[0, :, 0].tolist() == [0, 0, 0, 1, 1, 1, 0.5]
    assert torch.equal(widened(found, 2, 3), found)
    assert widened(one, 2, 3).shape == (1, 7, 2)


def test_two_sounds_are_painted_in_strips(painter: Painter) -> None:
    found = pixels(painter.generate(both(), TWO))
    assert np.array_equal(found, pixels(painter.generate(both(), TWO)))
    assert np.array_equal(found, pixels(painter.paint(painter.embed(both(), TWO.prompt or ""), [0], TWO)))
    for other in ({"prompt": "<a*0.5> and <b>"}, {"mixing": "words"}):
        assert not np.array_equal(found, pixels(painter.generate(both(), TWO.model_copy(update=other))))
    silent = painter.generate(both(), TWO.model_copy(update={"sound_strength": 0}))
    assert np.array_equal(pixels(silent), pixels(painter.paint(painter.embed_text(["thing and thing"]), [0], TWO)))
    with_negative = TWO.model_copy(update={"prompt": "<a> and <b>", "negative_prompt": "a <c>"})
    assert len(painter.generate({**both(), "c": sound(3)}, with_negative)) == 1
    many = {f"s{i}": sound(i) for i in range(5)}
    with pytest.raises(UserError, match=r"set request\.mixing=words"):
        painter.generate(many, PaintRequest(steps=1))


def test_strips_of_one_prompt_are_the_prompt(painter: Painter) -> None:
    embeds = painter.embed(sound(1), "a photo of <sound>")
    wide = widened(embeds, 3, painter.pipe.tokenizer.model_max_length)
    one, two = (pixels(painter.paint(given, [3], TWO)) for given in (embeds, wide))
    assert np.abs(one - two).max() <= 1


def test_requests_of_two_sounds_share_their_batch(painter: Painter) -> None:
    """One sound beside them is painted as alone, too."""
    asked = [(both(), TWO), ({"a": sound(4), "b": sound(5)}, TWO), (sound(6), PaintRequest(steps=2))]
    alone = [pixels(painter.generate(*one)) for one in asked]
    rows: list[int] = []
    together, turn, gate = Together(painter.pipe.unet, rows.append), threading.Event(), threading.Event()
    with ThreadPoolExecutor(4) as pool:
        pool.submit(together.run, lambda: (turn.set(), gate.wait(60)), threading.Event())
        turn.wait(60)
        run = lambda one: together.run(lambda: view_of(painter).generate(*one), threading.Event())  # noqa: E731
        begun = [pool.submit(run, one) for one in asked]
        while together._came.qsize() < len(asked):
            turn.wait(0.001)
        gate.set()
        found = [pixels(done.result(60)) for done in begun]
    together.close()
    assert max(np.abs(a - b).max() for a, b in zip(alone, found, strict=True)) <= 1
    assert sorted(rows) == [2, 2, 4, 4]
