"""Injection: positions, strength, gradients, the portable token file."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from aai.errors import UserError
from aai.inject import Injector, Learned, Mention, Sound, export_textual_inversion, parse, with_head


@pytest.fixture(scope="module")
def injector(pipe: StableDiffusionPipeline) -> Injector:
    return Injector(pipe.text_encoder, pipe.tokenizer)


def tokens(injector: Injector, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, injector.embedding.weight.shape[1], generator=generator)


def plain(pipe: StableDiffusionPipeline, prompt: str) -> torch.Tensor:
    return pipe.encode_prompt(prompt, "cpu", 1, False)[0]


def test_strength_zero_is_exactly_plain_diffusion(pipe: StableDiffusionPipeline, injector: Injector) -> None:
    silent = injector.embed("a photo of <sound> at night", {"sound": Sound(tokens(injector), 0.0)})
    assert torch.equal(silent, plain(pipe, "a photo of thing at night"))


def test_sound_changes_the_prompt_and_strength_grades_it(pipe: StableDiffusionPipeline, injector: Injector) -> None:
    one = tokens(injector, 1)
    neutral = plain(pipe, "a photo of thing")
    distances = [
        (injector.embed("a photo of <sound>", {"sound": Sound(one, s)}) - neutral).norm() for s in (0.0, 0.5, 1.0)
    ]
    assert distances[0] == 0
    assert 0 < distances[1] < distances[2]


def by_hand(injector: Injector, words: list[str | torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """States [1, L, D_h] and pooled state [1, D_h] of words and vectors [D_t] in this order.

    The vectors are put into the embedding table itself, in rows that no word of these prompts uses.
    """
    tokenizer, table = injector.tokenizer, injector.embedding.weight.data
    text = " ".join(word for word in words if isinstance(word, str))
    used = {*tokenizer(text).input_ids, tokenizer.pad_token_id}
    free, saved = (i for i in range(len(table)) if i not in used), table.clone()
    ids = [tokenizer.bos_token_id]
    for word in words:
        if isinstance(word, str):
            ids += tokenizer(word, add_special_tokens=False).input_ids
        else:
            ids.append(next(free))
            table[ids[-1]] = word
    end = len(ids)
    ids += [tokenizer.eos_token_id] + [tokenizer.pad_token_id] * (tokenizer.model_max_length - end - 1)
    try:
        states = injector.text_encoder(input_ids=torch.tensor([ids])).last_hidden_state
    finally:
        table.copy_(saved)
    return states, states[:, end]


def test_each_vector_stands_in_its_own_place(injector: Injector) -> None:
    """Several sounds, a repeated one, and the order of a sound's own vectors."""
    a, b = tokens(injector, 2), tokens(injector, 3)
    expected, _ = by_hand(injector, ["a photo of", *a, "in", *b, "and", *a, "at night"])
    sounds = {"dog": Sound(a), "rain": Sound(b)}
    ours = injector.embed("a photo of <dog> in <rain> and <dog> at night", sounds)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(
        injector.embed("a photo of <dog> in <rain> and <dog> at night", dict(reversed(sounds.items()))), expected
    )


@pytest.mark.parametrize(
    ("before", "place"),
    [
        ("", "a photo of <b>"),
        ("a photo of ", None),
        (" a photo of", None),
        ("a sketch of", None),
        ("a photo of a ", "a photo of <b>"),
        ("a sketch of a house and", "a sketch of <b>"),
        ("a nice photo of", "a photo of <b>"),
        ("A Sketch  of", None),
        (" A sketch of a house, ", "a sketch of <b>"),
        ("a photo of <a> and", "a photo of <b>"),
    ],
)
def test_where_a_sound_was_learned(before: str, place: str | None) -> None:
    assert Learned("a photo of <sound> there", r"^a \w+ of\b").place_of("b", before) == place


def test_a_sound_that_was_learned_alone_has_nothing_before_it() -> None:
    assert Learned("<sound> there", "").place_of("b", "") is None
    assert Learned("<sound> there", "").place_of("b", "a photo of") == " <b>"
    assert Learned("<sound>", "^The Noise of").place_of("b", "the noise of") is None, "a pattern of any case"
    assert Learned("a photo of <sound>", "^a photo").place_of("b", "a photo of") is None, "more than a head"


def test_other_sounds_are_no_part_of_a_head(pipe: StableDiffusionPipeline) -> None:
    injector = Injector(pipe.text_encoder, pipe.tokenizer)
    injector.learned = Learned("a photo of <sound>", "^.* of")
    sounds = {"a": Sound(tokens(injector, 1)), "b": Sound(tokens(injector, 2))}
    assert injector.learned.place_of("b", "a photo of <a> made of old") == "a photo of <b>"
    assert injector.embed("a photo of <a> made of old <b> on top of <a>", sounds).shape[0] == 1


def test_a_place_of_learning_is_encoded_once_for_all_strengths(pipe: StableDiffusionPipeline) -> None:
    injector, runs = Injector(pipe.text_encoder, pipe.tokenizer), []
    injector.learned = Learned("a photo of <sound>", r"^a \w+ of")
    hook = pipe.text_encoder.register_forward_hook(lambda *_: runs.append(1))
    injector.embed(
        "<a*0.2> <a*0.4> <b*0.6> <a*0.8>", {"a": Sound(tokens(injector, 1)), "b": Sound(tokens(injector, 1))}
    )
    hook.remove()
    assert len(runs) == 5 + 2, "one for each strength and the plain prompt, one for each sound"


def test_a_sound_says_what_it_learned_wherever_it_stands(pipe: StableDiffusionPipeline) -> None:
    """Its own states are those of its place of learning; words hear it where it stands."""
    free, bound = Injector(pipe.text_encoder, pipe.tokenizer), Injector(pipe.text_encoder, pipe.tokenizer)
    bound.learned = Learned("a photo of <sound>", r"^a \w+ of\b")
    a, b = Sound(tokens(free, 2)), Sound(tokens(free, 3), 0.5)
    sounds = {"a": a, "b": b}
    prompt = "a sketch of a dog and <a> in rain beside <b>"
    row = free.slots(prompt, {"a": 2, "b": 3})
    (_, first), (_, second) = row.places
    expected = free.said(prompt, sounds, 0.5)
    expected[:, first.start : first.stop] = free.embed("a sketch of <a>", {"a": a})[:, 4:6]
    expected[:, second.start : second.stop] = free.embed("a sketch of <b>", {"b": Sound(b.tokens)})[:, 4:7]
    assert torch.equal(bound.said(prompt, sounds, 0.5), expected)
    assert not torch.allclose(expected, free.said(prompt, sounds, 0.5))
    weaker = bound.embed(prompt, sounds)
    torch.testing.assert_close(weaker, (expected + bound.said(prompt, sounds, 1.0)) / 2)
    silent = {name: Sound(sound.tokens, 0.0) for name, sound in sounds.items()}
    assert torch.equal(bound.embed(prompt, silent), plain(pipe, "a sketch of a dog and thing in rain beside thing"))
    for usual in ("a photo of <a> in rain", "a sketch of <a>"):
        assert torch.equal(bound.embed(usual, {"a": a}), free.embed(usual, {"a": a}))


def test_a_batch_writes_each_rows_vectors_and_pools_at_its_end(injector: Injector) -> None:
    rows = torch.stack([tokens(injector, 3), tokens(injector, 3) * -2])
    states, pooled = injector.encode(["<sound> at night", "a photo of <sound> and <sound>"], rows)
    words: list[list[str | torch.Tensor]] = [[*rows[0], "at night"], ["a photo of", *rows[1], "and", *rows[1]]]
    for b, row in enumerate(words):
        expected, end = by_hand(injector, row)
        torch.testing.assert_close(states[b : b + 1], expected)
        torch.testing.assert_close(pooled[b : b + 1], end)
    named, _ = injector.encode(["<bell> at night"], rows[:1], name="bell")
    torch.testing.assert_close(named, states[:1])


def test_the_pooled_state_is_the_text_encoders_own(pipe: StableDiffusionPipeline, injector: Injector) -> None:
    prompts = ["a photo of a big dog in the rain", "a clock", ""]
    _, pooled = injector.encode(prompts)
    batch = pipe.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
    torch.testing.assert_close(pooled, pipe.text_encoder(input_ids=batch.input_ids).pooler_output)


def test_slots(injector: Injector) -> None:
    def count(text: str) -> int:
        return len(injector.tokenizer(text, add_special_tokens=False).input_ids)

    tokenizer, limit = injector.tokenizer, injector.tokenizer.model_max_length
    lengths: Mapping[str, int] = {"dog": 3, "rain": 1}
    row = injector.slots("a photo of <dog> in <rain> at night", lengths)
    first = 1 + count("a photo of")
    second = first + 3 + count("in")
    assert row.places == [
        (Mention("dog"), range(first, first + 3)),
        (Mention("rain"), range(second, second + 1)),
    ]
    assert row.end == second + 1 + count("at night")
    assert len(row.ids) == limit
    assert row.ids[0] == tokenizer.bos_token_id
    assert row.ids[row.end :] == [tokenizer.eos_token_id] + [tokenizer.pad_token_id] * (limit - row.end - 1)


def test_text_is_cut_at_the_context_and_a_sound_may_be_its_last_word(injector: Injector) -> None:
    tokenizer, limit = injector.tokenizer, injector.tokenizer.model_max_length
    assert len(tokenizer("a a a", add_special_tokens=False).input_ids) == 3
    long = injector.slots("a " * 100, {})
    assert len(long.ids) == limit
    assert long.end == limit - 1
    assert long.ids[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in long.ids[:-1]
    assert long.ids == tokenizer("a " * 100, truncation=True).input_ids
    last = injector.slots("a " * (limit - 4) + "<sound> a a a", {"sound": 2})
    assert last.places == [(Mention("sound"), range(limit - 3, limit - 1))]
    assert last.ids[-1] == tokenizer.eos_token_id
    with pytest.raises(UserError, match=rf"{limit + 1} tokens: a sound falls off the {limit} tokens"):
        injector.slots("a " * (limit - 3) + "<sound>", {"sound": 2})


def test_what_the_vocabulary_says_of_words(pipe: StableDiffusionPipeline) -> None:
    injector = Injector(pipe.text_encoder, pipe.tokenizer, "big dog")
    table = pipe.text_encoder.get_input_embeddings().weight
    ids = pipe.tokenizer("big dog", add_special_tokens=False).input_ids
    assert len(ids) > 1
    assert injector.token_dim == table.shape[1] == 32
    lengths = sorted(float(row.norm()) for row in table)
    assert injector.median_norm == pytest.approx(lengths[(len(lengths) - 1) // 2])


def test_half_a_strength_is_half_way_from_the_neutral_word(injector: Injector) -> None:
    sound = tokens(injector, 2)
    without, whole = by_hand(injector, ["a photo of thing"])[0], by_hand(injector, ["a photo of", *sound])[0]
    for strength in (0.25, 1.0, 2.0):
        expected = without + strength * (whole - without)
        found = injector.embed("a photo of <sound>", {"sound": Sound(sound, strength)})
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_of_two_strengths_the_stronger_sound_comes_first(injector: Injector) -> None:
    a, b = tokens(injector, 1), tokens(injector, 3)
    neither, one, both = (
        injector.embed("<dog> in <rain>", {"dog": Sound(a, s), "rain": Sound(b, t)})
        for s, t in ((0, 0), (0, 1), (1, 1))
    )
    mixed = injector.embed("<dog> in <rain>", {"dog": Sound(a, 0.3), "rain": Sound(b, 0.8)})
    torch.testing.assert_close(mixed, 0.2 * neither + 0.5 * one + 0.3 * both)


def test_several_sounds_each_at_its_own_strength(injector: Injector) -> None:
    a, b = tokens(injector, 1), tokens(injector, 3)
    both = {"dog": Sound(a), "rain": Sound(b)}
    full = injector.embed("a photo of <dog> in <rain>", both)
    swapped = injector.embed("a photo of <dog> in <rain>", {"dog": Sound(a), "rain": Sound(b, 0.3)})
    assert not torch.allclose(full, swapped)
    muted = injector.embed("a photo of <dog> in <rain>", {"dog": Sound(a), "rain": Sound(b, 0)})
    assert torch.equal(muted, injector.embed("a photo of <dog> in thing", {"dog": Sound(a)}))


def test_a_placeholder_may_carry_its_own_strength(injector: Injector) -> None:
    assert parse("<dog*.5> and <rain>") == ["", Mention("dog", 0.5), " and ", Mention("rain"), ""]
    a, b = tokens(injector, 1), tokens(injector, 3)
    both = {"dog": Sound(a), "rain": Sound(b)}
    weaker = injector.embed("a photo of <dog*0.6> in <rain*1.5>", both)
    torch.testing.assert_close(
        weaker, injector.embed("a photo of <dog> in <rain>", {"dog": Sound(a, 0.6), "rain": Sound(b, 1.5)})
    )
    halved = injector.embed("a photo of <dog*0.6> in <rain*1.5>", {"dog": Sound(a, 0.5), "rain": Sound(b)})
    torch.testing.assert_close(halved, injector.embed("a photo of <dog*0.3> in <rain*1.5>", both))
    expected = [by_hand(injector, words)[0] for words in ([*a, "and", *a], ["thing and", *a])]
    torch.testing.assert_close(injector.embed("<dog*0.5> and <dog>", {"dog": Sound(a)}), sum(expected) / 2)
    faint = injector.embed("<dog*0.0000001>", {"dog": Sound(a)})
    torch.testing.assert_close(faint, injector.embed("<dog*0>", {"dog": Sound(a)}), atol=1e-4, rtol=0)
    muted = injector.embed("a photo of <dog*0> in <rain>", both)
    assert torch.equal(muted, injector.embed("a photo of thing in <rain>", {"rain": Sound(b)}))


@pytest.mark.parametrize("text", ["<dog*>", "<dog*-1>", "<dog*x>", "<Dog>", "<dog *0.5>"])
def test_what_is_no_placeholder_stays_text(text: str) -> None:
    assert parse(text) == [text]


def test_the_hook_is_gone_afterwards(pipe: StableDiffusionPipeline, injector: Injector) -> None:
    before = plain(pipe, "a photo of thing")
    injector.embed("a photo of <sound>", {"sound": Sound(tokens(injector))})
    assert torch.equal(plain(pipe, "a photo of thing"), before)


def test_batch_rows_equal_single_prompts_and_gradients_reach_the_tokens(injector: Injector) -> None:
    batch = torch.stack([tokens(injector, 2), tokens(injector, 2) * 2]).requires_grad_(True)
    states, pooled = injector.encode(["a photo of <sound>", "a sketch of <sound> at night"], batch)
    alone = injector.embed("a sketch of <sound> at night", {"sound": Sound(batch[1].detach())})
    assert torch.allclose(states[1:], alone, atol=1e-5)
    (pooled * torch.linspace(-1, 1, pooled.shape[-1])).sum().backward()
    assert batch.grad is not None
    assert batch.grad.abs().amin(dim=-1).gt(0).all()


@pytest.mark.parametrize(
    ("prompt", "rule"),
    [
        ("a photo of a dog", "no placeholder"),
        ("a photo of <sound> and <other>", "has no sound"),
        ("a photo of <sound> and <other*0>", "has no sound"),
        ("a photo of <sound*2.5>", r"<sound\*2.5>: a strength is 0 to 2"),
        ("a photo of " + "thing " * 400 + "<sound>", "falls off"),
    ],
)
def test_bad_prompts_are_refused(injector: Injector, prompt: str, rule: str) -> None:
    with pytest.raises(UserError, match=rule):
        injector.embed(prompt, {"sound": Sound(tokens(injector))})


def test_a_batch_with_a_prompt_without_its_sound_is_refused(injector: Injector) -> None:
    batch = torch.stack([tokens(injector), tokens(injector)])
    with pytest.raises(UserError, match="'a dog': has no placeholder <sound>"):
        injector.encode(["a <sound>", "a dog"], batch)
    with pytest.raises(UserError, match=r"<other> has no sound \(given: <sound>\)"):
        injector.encode(["a <sound>", "<sound> and <other>"], batch)
    with pytest.raises(UserError, match=r"<sound> has no sound \(given: none\)"):
        injector.encode(["a <sound>"])


def test_exported_token_is_read_by_diffusers(pipe: StableDiffusionPipeline, injector: Injector, tmp_path: Path) -> None:
    sound = tokens(injector, 2)
    ours = injector.embed("a photo of <sound>", {"sound": Sound(sound)})
    export_textual_inversion(injector, sound, str(tmp_path / "sound.safetensors"))
    assert list(load_file(tmp_path / "sound.safetensors")) == ["<sound>"]
    pipe.load_textual_inversion(str(tmp_path / "sound.safetensors"), token="<sound>")
    try:
        assert torch.allclose(plain(pipe, "a photo of <sound>"), ours, atol=1e-5)
    finally:
        pipe.unload_textual_inversion()
        pipe.text_encoder.requires_grad_(False)  # diffusers puts a new embedding in, which asks for gradients


def test_a_caption_without_a_head_gets_the_prompts() -> None:
    pattern = r"^a \w+ of\b"
    assert with_head("a sketch of a dog", pattern, "a photo of <sound>") == "a sketch of a dog"
    assert with_head("dog barking", pattern, "a photo of <sound>") == "a photo of dog barking"
    assert with_head("dog barking", pattern, "<sound> at night") == "dog barking at night"
