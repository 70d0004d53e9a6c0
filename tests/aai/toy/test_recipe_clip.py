"""The recipe's tokenizer, batches, and trainings of a few steps."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from aai.fit import FitConfig
from aai.foundation.clip import FrozenClip
from aai.foundation.identity import FoundationSpec
from aai.toy.recipe_clip import (
    FoundationConfig,
    ImageTowerTask,
    TrainSteps,
    build_clip,
    build_tokenizer,
    clip_input,
    image_processor,
    remove_checkpoints,
    shuffled,
    similar,
    to_unit,
    train_clip,
    train_model,
    words_of,
)

CAPTIONS = ["a photo of a dog", "a photo of a dog", "a sketch of a frog"]


def test_the_commonest_pairs_become_tokens_and_anything_can_be_spelled() -> None:
    tokenizer = build_tokenizer(CAPTIONS, vocab_size=700, max_length=16)
    assert tokenizer.tokenize("a photo of a dog") == ["a</w>", "photo</w>", "of</w>", "a</w>", "dog</w>"]
    few = build_tokenizer([*CAPTIONS, "hog"], vocab_size=515, max_length=16)  # one pair: og</w>
    assert len(few) == 515
    assert len(few.tokenize("a dog")) == 3 < len(few.tokenize("frog of"))
    for text in ("héllo ♪ dog", "犬の写真", "صورة كلب", "собака под дождём", "zebra"):
        spelled = tokenizer(text).input_ids
        assert tokenizer.decode(spelled, skip_special_tokens=True).strip() == text, "of no script that it has seen"
    ids = tokenizer("a dog").input_ids
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_an_untrained_clip_has_the_sizes_of_its_config_and_tokenizer() -> None:
    tokenizer = build_tokenizer(CAPTIONS, vocab_size=520, max_length=12)
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
    def first(steps: int, size: int, rows: int = 10, seed: int = 0, at: int = 0) -> list[list[int]]:
        config = FitConfig(batch_size=size, seed=seed)
        batches = shuffled({"row": torch.arange(rows)}, config, at)
        return [next(batches)["row"].tolist() for _ in range(steps)]

    batches = first(5, 5)
    assert [sorted(batches[i] + batches[i + 1]) for i in (0, 2)] == [list(range(10))] * 2
    assert sorted(batches[0]) != sorted(batches[2])
    assert batches == first(5, 5) != first(5, 5, seed=1)
    assert first(2, 5, at=3) == batches[3:], "where a run goes on"
    assert {len(batch) for batch in first(4, 3, rows=7)} == {3}
    assert {len(batch) for batch in first(2, 64)} == {10}, "a batch of all when there are fewer"


class Line(nn.Module):
    """One weight that is pulled to the rows' mean."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 1))
        self.mean = nn.BatchNorm1d(1, affine=False)
        self.steps = 0

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self.steps += 1
        if self.steps > 30:
            raise KeyboardInterrupt
        self.mean(batch["x"][:, None])
        return (self.weight - batch["x"].mean()).square().mean(), {}


def test_a_killed_training_goes_on_and_ends_where_it_would_have(tmp_path: Path) -> None:
    data = {"x": torch.arange(8.0)}
    config = FitConfig(steps=50, batch_size=2, learning_rate=0.1, warmup_steps=5, checkpoint_every=10, ema_decay=0.9)
    whole = Line()
    whole.steps = -100
    train_model("line", whole, data, config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_model("line", Line(), data, config, tmp_path / "killed")
    again = Line()
    train_model("line", again, data, config, tmp_path / "killed")
    assert again.steps == 20
    assert again.weight.item() == whole.weight.item() != 0
    assert again.mean.running_mean.item() == whole.mean.running_mean.item() != 0
    known = Line()
    train_model("line", known, data, config, tmp_path / "killed")
    assert (known.steps, known.weight.item()) == (0, whole.weight.item()), "what is finished is not trained again"
    assert known.mean.running_mean.item() == whole.mean.running_mean.item()
    other = {"x": torch.arange(8.0) + 1}
    for given, settings in ((data, config.model_copy(update={"seed": 1})), (other, config)):  # another training
        with pytest.raises(KeyboardInterrupt):
            train_model("line", Line(), given, settings, tmp_path / "killed")
    (tmp_path / "killed" / "model-00001-of-00002.safetensors").touch()
    remove_checkpoints(tmp_path / "killed")
    assert [file.name for file in (tmp_path / "killed").iterdir()] == ["model-00001-of-00002.safetensors"]


def test_captions_of_several_scripts_and_any_length_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captions = ["a dog " * 50, "犬の写真", "صورة كلب", "собака под дождём ♪"]
    pixels = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    fit = TrainSteps(steps=2, batch_size=4)
    sizes = FoundationConfig(
        image_size_px=32, hidden_size=16, vocab_size=600, context_length=8, clip=fit, image_tower=fit
    )
    train_clip(sizes, pixels, captions, tmp_path)
    clip = FrozenClip(FoundationSpec(clip=str(tmp_path)))
    assert clip.texts(captions).isfinite().all()
    written = (tmp_path / "model.safetensors").read_bytes()
    monkeypatch.setattr(
        "aai.toy.recipe_clip.build_tokenizer", None
    )  # the trainer of another call may break ties otherwise
    train_clip(sizes, pixels, captions, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == written, "by the tokenizer that it began with"


def test_batches_of_alike_captions_share_more_words_than_drawn_ones() -> None:
    heads, nouns = ("photo", "sketch"), ("dog", "frog", "bell", "car", "train", "clock", "drum", "bird")
    places, colours = ("at night", "in snow", "in rain"), ("red", "green", "blue")
    texts = [f"a {h} of a {c} {n} {p}" for h, c, n, p in product(heads, colours, nouns, places)]
    owner, word = words_of(texts)
    words = torch.zeros(len(texts), int(word.max()) + 1)
    words[owner, word] = 1
    assert set(words.sum(1).tolist()) == {7}  # "a" counts once
    shuffled_texts = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
    data = {"text": shuffled_texts.repeat(3), "row": torch.arange(3 * len(texts))}
    batches = similar((owner, word), data, FitConfig(batch_size=16, seed=1), 0)

    def shared(batch: dict[str, torch.Tensor]) -> float:
        have = words[batch["text"]]
        return float((have @ have.T).mean())

    found = [next(batches) for _ in range(60)]
    for batch in found:
        assert torch.equal(data["text"][batch["row"]], batch["text"])
    near = [batch for step, batch in enumerate(found) if step % 3 != 2]
    drawn = [batch for step, batch in enumerate(found) if step % 3 == 2]
    assert all(len(set(batch["text"].tolist())) == 16 for batch in near), "no caption twice: it could not be told apart"
    assert np.mean(list(map(shared, near))) > np.mean(list(map(shared, drawn))) + 0.5
    assert {int(row) // len(texts) for batch in near for row in batch["row"]} == {0, 1, 2}, "all pictures of a caption"
    again = similar((owner, word), data, FitConfig(batch_size=16, seed=1), 7)
    assert torch.equal(next(again)["row"], found[7]["row"]), "where a run goes on"


def test_the_image_tower_alone_learns_from_moved_pictures() -> None:
    torch.manual_seed(0)
    tokenizer = build_tokenizer(CAPTIONS, vocab_size=520, max_length=12)
    model = build_clip(FoundationConfig(image_size_px=32, hidden_size=16), tokenizer)
    words = words_of(["a photo of a dog", "a photo of a red dog", "a photo of"])
    task = ImageTowerTask(model, torch.randn(3, 16), words, shift_px=3)
    for told, row in zip(task.named, [{"dog": 1.0}, {"red": 0.73, "dog": 0.27}, {}], strict=True):
        assert sorted(told[told > 0].tolist()) == pytest.approx(sorted(row.values()), abs=0.01)
    pixels = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    loss, _ = task({"pixels": pixels, "text": torch.tensor([0, 1, 2, 2])})
    loss.backward()
    learning = {name for name, p in task.named_parameters() if p.grad is not None}
    assert all(
        name.startswith(("model.vision_model", "model.visual_projection", "model.text_projection", "log_scale", "head"))
        for name in learning
    )
    assert len(learning) > 20
    ramp = torch.arange(32.0).expand(2, 3, 32, 32) / 10
    moved = task._disturbed(ramp)
    assert moved.shape == ramp.shape
    steps = moved[:, :, :, 5:25].diff(dim=-1).mean(dim=(1, 2, 3))
    torch.testing.assert_close(steps, torch.full((2,), 0.1), atol=0.05, rtol=0)
    assert not torch.allclose(moved[0], moved[1], atol=0.05)
