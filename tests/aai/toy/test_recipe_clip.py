"""The recipe's tokenizer, batches and steps; no model is trained."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from aai.toy.recipe_clip import (
    FoundationConfig,
    TrainSteps,
    _batches,
    build_clip,
    build_tokenizer,
    clip_input,
    image_processor,
    to_unit,
    train_steps,
)

CAPTIONS = ["a photo of a dog", "a photo of a dog", "a sketch of a frog"]


def test_the_commonest_pairs_become_tokens_and_anything_can_be_spelled() -> None:
    tokenizer = build_tokenizer(CAPTIONS, merges=100, max_length=16)
    assert tokenizer.tokenize("a photo of a dog") == ["a</w>", "photo</w>", "of</w>", "a</w>", "dog</w>"]
    few = build_tokenizer(CAPTIONS, merges=1, max_length=16)  # "og</w>", in dog, dog and frog
    assert few.tokenize("frog of") == ["f", "r", "og</w>", "o", "f</w>"]
    assert tokenizer.decode(tokenizer("héllo ♪ dog").input_ids, skip_special_tokens=True).strip() == "héllo ♪ dog"
    ids = tokenizer("a dog").input_ids
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_an_untrained_clip_has_the_sizes_of_its_config_and_tokenizer() -> None:
    tokenizer = build_tokenizer(CAPTIONS, merges=5, max_length=12)
    model = build_clip(FoundationConfig(image_size_px=32, hidden_size=16), tokenizer)
    text = model.get_text_features(**tokenizer(["a dog"], return_tensors="pt")).pooler_output
    image = model.get_image_features(pixel_values=torch.zeros(2, 3, 32, 32)).pooler_output
    assert (text.shape, image.shape) == ((1, 16), (2, 16))
    assert model.config.text_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.text_config.max_position_embeddings == 12


def test_pictures_are_prepared_as_by_the_saved_processor() -> None:
    """Training skips the processor; what it makes itself must be the same, or the folder would not fit its weights."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    expected = image_processor(32)(images=[Image.fromarray(p) for p in pixels], return_tensors="pt")["pixel_values"]
    unit = to_unit(torch.from_numpy(pixels))
    torch.testing.assert_close(clip_input(unit), expected, atol=1e-5, rtol=0)
    assert (to_unit(torch.tensor([[[[0, 255, 255]]]], dtype=torch.uint8)).flatten().tolist()) == [-1, 1, 1]


def test_batches_use_every_row_before_any_comes_again() -> None:
    batches = [b.tolist() for b in _batches(10, TrainSteps(steps=5, batch_size=5), seed=0)]
    assert [sorted(batches[i] + batches[i + 1]) for i in (0, 2)] == [list(range(10))] * 2
    assert sorted(batches[0]) != sorted(batches[2])
    assert batches == [b.tolist() for b in _batches(10, TrainSteps(steps=5, batch_size=5), seed=0)]
    assert batches != [b.tolist() for b in _batches(10, TrainSteps(steps=5, batch_size=5), seed=1)]
    assert {len(b) for b in _batches(7, TrainSteps(steps=4, batch_size=3), seed=0)} == {3}


def test_steps_go_down_with_a_rate_that_rises_and_falls(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    weight = nn.Parameter(torch.tensor(1.0))
    seen = [1.0]
    stage = TrainSteps(steps=100, batch_size=2, learning_rate=0.01)

    def after_step() -> None:
        seen.append(weight.item())

    train_steps("line", [weight], 8, stage, 0, lambda rows: (weight - 9) * len(rows), after_step)
    moves = -np.diff(seen)
    assert len(moves) == 100
    assert moves.min() > 0
    assert moves[0] < moves[4] < moves[10]  # warm-up over the first eleventh
    assert moves[-1] < 0.1 * moves.max()
    assert "line step 100/100 loss -16." in caplog.text
