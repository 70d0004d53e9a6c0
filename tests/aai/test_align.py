import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aai.align import AlignLossConfig, AlignTask, validate
from aai.augment import AugmentConfig
from aai.encoders.aligner import embed
from aai.encoders.audio import AudioEncoder, AudioEncoderConfig
from aai.errors import UserError
from aai.losses import info_nce, sigmoid_loss
from aai.memory import in_chunks
from tests.ranks import on_ranks

SMALL = AudioEncoderConfig(
    hidden_size=32, num_layers=1, num_heads=2, clip_s=0.5, embed_dim=8, head_size=16, num_mel_bins=32, dropout=0.0
)


OFF = {f"{name}_probability": 0.0 for name in ("mix", "reverb", "lowpass", "noise", "gain")}
STILL = AugmentConfig.parse({**OFF, "time_shift": 0.0, "mask_share": 0.0})
"""No augmentation."""


def make_task(augment: AugmentConfig = STILL, **settings: object) -> AlignTask:
    torch.manual_seed(0)
    return AlignTask(AudioEncoder(SMALL), AlignLossConfig.parse(settings), augment)


def make_batch(size: int = 6) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    return {
        "audio": 0.1 * torch.randn(size, 8_000, generator=g),
        "image_features": F.normalize(torch.randn(size, 3, 8, generator=g), dim=-1),
        "text_features": F.normalize(torch.randn(size, 1, 8, generator=g), dim=-1),
        "caption_id": torch.arange(1, size + 1),
        "clip_hash": torch.arange(11, size + 11),
    }


def test_the_loss_is_the_weighted_sum_of_both_terms() -> None:
    batch = make_batch()
    task = make_task(w_image=0.5, w_text=2.0).eval()
    loss, report = task(batch)
    torch.testing.assert_close(loss.detach(), 0.5 * report["loss_image"] + 2.0 * report["loss_text"])
    image = F.normalize(batch["image_features"].mean(1), dim=-1)
    expected = info_nce(task.encoder(batch["audio"]), image, 1 / 0.07).mean()
    torch.testing.assert_close(report["loss_image"], expected.detach())


def test_every_figure_by_hand_with_copies_and_equal_captions() -> None:
    batch = {
        **make_batch(),
        "caption_id": torch.tensor([3, 3, 0, 5, 0, 6]),
        "clip_hash": torch.tensor([1, 2, 3, 3, 4, 5]),
    }
    task = make_task(w_image=0.5, w_text=2.0, temperature=0.2).eval()
    with torch.no_grad():
        task.log_scale["text"].fill_(math.log(8.0))
    loss, report = task(batch)
    audio = task.encoder(batch["audio"])
    image, text = (F.normalize(batch[f"{name}_features"].mean(1), dim=-1) for name in ("image", "text"))
    copies = torch.eye(6, dtype=torch.bool)
    copies[2, 3] = copies[3, 2] = True
    same = copies.clone()
    same[0, 1] = same[1, 0] = True  # an equal caption; two clips without a caption are not alike
    heard = torch.tensor([0, 1, 3, 5])
    expected = {
        "loss_image": info_nce(audio, image, 5.0, copies).mean(),
        "loss_text": info_nce(audio[heard], text[heard], 8.0, same[heard][:, heard]).mean(),
        "temperature_image": torch.tensor(0.2),
        "temperature_text": torch.tensor(1 / 8),
    }
    expected["loss"] = 0.5 * expected["loss_image"] + 2 * expected["loss_text"]
    assert report.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(report[name], value.detach())
        assert not report[name].requires_grad
    torch.testing.assert_close(loss, expected["loss"])


def test_without_text_weight_there_is_no_text_term() -> None:
    task = make_task(w_text=0)
    assert list(task.log_scale) == ["image"]
    loss, report = task(make_batch())
    loss.backward()
    assert "loss_text" not in report
    assert all(p.grad is not None for p in task.parameters())
    with pytest.raises(UserError, match="both 0"):
        AlignLossConfig.parse({"w_image": 0, "w_text": 0})


@pytest.mark.parametrize("kind", ["info_nce", "sigmoid"])
def test_copies_are_no_negatives_and_equal_captions_are_none_in_the_text_term(kind: str) -> None:
    batch, task = make_batch(), make_task(kind=kind).eval()
    if kind == "sigmoid":
        for bias in task.bias.values():
            bias.data.zero_()  # at -10 a negative costs next to nothing
    apart = task(batch)[1]
    together = task({**batch, "caption_id": torch.tensor([1, 1, 2, 3, 4, 5])})[1]
    assert together["loss_text"] < apart["loss_text"]
    # A data set of 309 labels has thousands of clips for each: their pictures must still be told apart.
    assert together["loss_image"] == apart["loss_image"]
    copies = task({**batch, "clip_hash": torch.tensor([1, 1, 2, 3, 4, 5])})[1]
    assert copies["loss_image"] < apart["loss_image"]
    torch.testing.assert_close(copies["loss_text"], together["loss_text"])


def test_the_sigmoid_loss_learns_a_bias_for_each_term() -> None:
    batch, task = make_batch(), make_task(kind="sigmoid", temperature=0.1).eval()
    assert {name: bias.item() for name, bias in task.bias.items()} == {"image": -10.0, "text": -10.0}
    loss, report = task(batch)
    image = F.normalize(batch["image_features"].mean(1), dim=-1)
    expected = sigmoid_loss(task.encoder(batch["audio"]), image, 10.0, -10.0).mean()
    torch.testing.assert_close(report["loss_image"], expected.detach())
    loss.backward()
    assert all(p.grad is not None for p in task.parameters())
    assert not hasattr(make_task(), "bias")


def test_sounds_with_a_text_alone_teach_what_nothing_was_seen_of() -> None:
    """Tones of eight pitches, four of which are heard in clips without a picture only: a sample of the 500 rows of
    tests/e2e/test_sounds_with_texts.py."""
    g = torch.Generator().manual_seed(0)
    names = torch.eye(8)

    def clips(pitches: Tensor, seen: Tensor) -> dict[str, Tensor]:
        time_s = torch.arange(8_000) / 16_000
        hz = 300 * 1.4 ** pitches[:, None]
        audio = 0.2 * torch.sin(2 * math.pi * (hz * time_s + torch.rand(len(pitches), 1, generator=g)))
        pictures = torch.where(seen[:, None], names[pitches], 0.0)
        told = {"text_features": names[pitches][:, None], "image_features": pictures[:, None], "has_picture": seen}
        return {"audio": audio, **told, "caption_id": pitches + 1, "clip_hash": torch.arange(len(pitches))}

    held_out = clips(torch.arange(4, 8).repeat(4), torch.zeros(16, dtype=torch.bool))
    found = {}
    for known in (4, 8):
        task = make_task().train()
        optimizer = torch.optim.AdamW(task.parameters(), lr=0.003)
        for _ in range(60):
            pitches = torch.randint(0, known, (16,), generator=g)
            loss, _ = task(clips(pitches, pitches < 4))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found[known] = validate(task.encoder.eval(), {**held_out, "labels": [[]] * 16})
    assert found[8].keys() == {"a2t_r1"}
    assert found[8]["a2t_r1"] > 0.9
    assert found[4]["a2t_r1"] <= 0.5, "by chance a quarter"


# ---------------------------------------------------------------- one process, or many, or chunks

VARIANTS = [(kind, chunk) for kind in ("info_nce", "sigmoid") for chunk in (0, 1)]


def shared_task(kind: str, chunk_size: int) -> AlignTask:
    """In training mode, with nothing drawn at random: what is drawn differs between ranks."""
    torch.manual_seed(0)
    config = AlignLossConfig.parse({"kind": kind, "frames": "mean", "w_text": 0.5})
    task = AlignTask(AudioEncoder(SMALL), config, STILL, chunk_size).train()
    for parameter in task.encoder.backbone.parameters():
        if not parameter.any():
            nn.init.normal_(parameter)  # tokens and positions of zeros: the first norm would magnify every rounding
    return task


def shared_batch() -> dict[str, Tensor]:
    """Eight clips; a copy, equal captions, absent ones and absent pictures lie across the ranks, unevenly."""
    caption_id, clip_hash = torch.tensor([3, 3, 0, 0, 5, 3, 7, 0]), torch.tensor([1, 2, 3, 4, 5, 6, 7, 1])
    has_picture = torch.tensor([1, 0, 1, 1, 0, 1, 0, 1], dtype=torch.bool)
    return {**make_batch(8), "caption_id": caption_id, "clip_hash": clip_hash, "has_picture": has_picture}


def outcome(task: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss over all processes, and every gradient."""
    loss, report = task(batch)
    loss.backward()
    gradients = {name.removeprefix("module."): p.grad for name, p in task.named_parameters()}
    return {"loss": report["loss"], **{name: g for name, g in gradients.items() if g is not None}}


SHARES = {2: [4, 4], 3: [4, 1, 3], 4: [2, 2, 2, 2]}
"""Clips of each of so many processes: unequal ones where workers are missing."""


def _rank(rank: int, folder: str) -> None:
    shares = SHARES[torch.distributed.get_world_size()]
    part = {name: x.split(shares)[rank] for name, x in shared_batch().items()}
    for kind, chunk in VARIANTS:
        task = nn.parallel.DistributedDataParallel(shared_task(kind, chunk))
        torch.save(outcome(task, part), f"{folder}/{kind}-{chunk}-{rank}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("count", SHARES)
def test_k1_many_processes_have_the_loss_and_gradients_of_one(count: int, tmp_path: Path) -> None:
    on_ranks(count, _rank, str(tmp_path))
    for kind, chunk in VARIANTS:
        expected = outcome(shared_task(kind, 0), shared_batch())
        assert len(expected) > 20
        largest = 0.0
        for rank in range(count):
            found = torch.load(tmp_path / f"{kind}-{chunk}-{rank}.pt", weights_only=True)
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5, msg=f"{kind} {chunk} {name}")
                largest = max(largest, float((found[name] - value).abs().max()))
        print(f"{count} processes, {kind}, chunks of {chunk or 'all'}: largest difference {largest:.1e}")


@pytest.mark.parametrize("kind", ["info_nce", "sigmoid"])
@pytest.mark.parametrize("chunk", [1, 3, 8, 100])
def test_chunks_have_the_loss_and_gradients_of_the_whole(kind: str, chunk: int) -> None:
    expected, found = (outcome(shared_task(kind, size), shared_batch()) for size in (0, chunk))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5, msg=name)


def test_a_clip_without_caption_takes_no_part_in_the_text_term() -> None:
    batch = make_batch()
    task = make_task().eval()
    some = task({**batch, "caption_id": torch.tensor([1, 2, 3, 4, 0, 0])})[1]
    fewer = task({name: value[:4] for name, value in batch.items()})[1]
    torch.testing.assert_close(some["loss_text"], fewer["loss_text"])
    loss, none = task({**batch, "caption_id": torch.zeros(6, dtype=torch.int64)})
    assert none["loss_text"] == 0
    assert torch.isfinite(loss)


@pytest.mark.parametrize("kind", ["info_nce", "sigmoid"])
def test_a_clip_without_picture_takes_no_part_in_the_image_term(kind: str) -> None:
    """Neither as a row nor as a negative: whatever stands in its place, loss and gradients are those without it."""
    batch = make_batch()
    seen = torch.tensor([True, True, False, True, True, False])

    def image_term(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return outcome(make_task(kind=kind, w_text=0).eval(), batch)

    expected = image_term({name: value[seen] for name, value in batch.items()})
    for stands_there in (0.0, 5.0):
        features = torch.where(seen[:, None, None], batch["image_features"], stands_there)
        found = image_term({**batch, "image_features": features, "has_picture": seen})
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5, msg=name)
    task = make_task(kind=kind).eval()
    whole, some = task(batch)[1], task({**batch, "has_picture": seen})[1]
    assert some["loss_text"] == whole["loss_text"], "the text term takes them all"
    loss, none = task({**batch, "has_picture": torch.zeros(6, dtype=torch.bool)})
    assert none["loss_image"] == 0
    torch.testing.assert_close(loss.detach(), none["loss_text"])
    torch.testing.assert_close(task({**batch, "has_picture": torch.ones(6, dtype=torch.bool)})[0], task(batch)[0])


def test_the_logit_scale_has_a_ceiling() -> None:
    task = make_task(max_logit_scale=20.0).eval()
    with torch.no_grad():
        task.log_scale["image"].fill_(math.log(500.0))
    assert task(make_batch())[1]["temperature_image"] == pytest.approx(1 / 20)


def test_training_draws_one_of_the_pictures() -> None:
    task, features = make_task().train(), make_batch()["image_features"]
    drawn = {tuple(task._pick(features)[0].tolist()) for _ in range(50)}
    assert drawn == {tuple(row) for row in features[0].tolist()}


def test_the_mean_of_the_pictures_where_it_is_asked_for() -> None:
    features = make_batch()["image_features"]
    mean = F.normalize(features.mean(1), dim=-1)
    torch.testing.assert_close(make_task(frames="mean").train()._pick(features), mean)
    torch.testing.assert_close(make_task().eval()._pick(features), mean)
    rows = [tuple(row) for row in make_task().train()._pick(features.repeat(20, 1, 1)).tolist()]
    assert len(set(rows)) == 18  # each clip draws for itself: all three pictures of all six


def test_training_alone_augments_and_by_each_setting() -> None:
    batch, still = make_batch()["audio"], make_task().train()
    torch.testing.assert_close(still.encode(batch), still.encoder(batch))
    for settings in ({"time_shift": 0.1}, {"mask_share": 0.1}, *({name: 1.0} for name in OFF)):
        task = make_task(STILL.model_copy(update=settings)).train()
        assert not torch.allclose(task.encode(batch), task.encoder(batch)), settings
        assert not torch.equal(task.encode(batch), task.encode(batch)), settings
        task.eval()
        assert torch.equal(task.encode(batch), task.encoder(batch))


def test_augmented_chunks_have_the_gradients_of_the_same_augmented_sounds() -> None:
    """A chunk is augmented once more when it is computed again: by the same numbers, or the gradient is another's."""
    everything = AugmentConfig.parse(dict.fromkeys(OFF, 0.7))
    task, sounds, goal = make_task(everything).train(), make_batch()["audio"], torch.randn(6, 8)

    def gradients(chunked: bool) -> list[Tensor]:
        torch.manual_seed(3)
        task.zero_grad()
        parts = in_chunks(task.encode, 3, sounds) if chunked else torch.cat([task.encode(x) for x in sounds.split(3)])
        (parts * goal).sum().backward()
        return [p.grad.clone() for p in task.parameters() if p.grad is not None]

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_validate_scores_a_perfect_encoder() -> None:
    encoder = make_task().encoder
    audio = make_batch(8)["audio"]
    target = embed(encoder, audio, batch_size=3)[:, None]
    clips = {
        "audio": audio,
        "image_features": target,
        "text_features": target,
        "caption_id": torch.arange(8),
        "labels": [["dog" if i % 2 else "bell", str(i)] for i in range(8)],
    }
    assert validate(encoder, clips) == {"a2v_r1": 1.0, "a2t_r1": 1.0, "label0_r1": 1.0}
    clips["image_features"] = target.roll(1, 0)
    assert validate(encoder, clips)["a2v_r1"] == 0.0


class Given(nn.Module):
    """In the encoder's place: the "waveforms" are the embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, waveforms: Tensor) -> Tensor:
        return waveforms * self.weight


def test_validate_by_hand() -> None:
    """Pictures by the clip itself, texts by equal captions, labels by position; the means of several features."""
    axes = torch.eye(6)
    clips = {
        "audio": axes,
        # The two views average to an axis: the own one of clips 0 to 2, the next clip's of 3 to 5.
        "image_features": torch.stack(
            [axes[[0, 1, 2, 4, 5, 3]] + axes.roll(2, 1), axes[[0, 1, 2, 4, 5, 3]] - axes.roll(2, 1)], dim=1
        ),
        "text_features": axes[[1, 0, 3, 2, 5, 4]][:, None],
        "caption_id": torch.tensor([7, 7, 8, 8, 9, 10]),
        "labels": [
            ["dog", "a", "x"],
            ["dog", "b", "x"],
            ["dog", "c", "y"],
            ["bell", "d", "y"],
            ["bell", "e", "y"],
            ["cat", "f"],
        ],
    }
    encoder: Any = Given()
    found = validate(encoder, clips)
    assert found == {"a2v_r1": 0.5, "a2t_r1": pytest.approx(4 / 6), "label0_r1": pytest.approx(4 / 6)}
    clips["has_picture"] = torch.tensor([True, True, False, True, True, True])
    clips["image_features"][2] = 0
    assert validate(encoder, clips) == {"a2v_r1": pytest.approx(2 / 5), "a2t_r1": found["a2t_r1"]}
    clips["has_picture"] = torch.zeros(6, dtype=torch.bool)
    assert validate(encoder, clips) == {"a2t_r1": found["a2t_r1"]}
    del clips["has_picture"]
    clips["labels"] = [[] for _ in range(6)]
    assert validate(encoder, clips).keys() == {"a2v_r1", "a2t_r1"}
    empty = {**clips, "labels": []}
    assert validate(encoder, empty).keys() == {"a2v_r1", "a2t_r1"}


def test_bounds_and_defaults_of_the_settings() -> None:
    assert AlignLossConfig().model_dump() == {
        "kind": "info_nce",
        "w_image": 1.0,
        "w_text": 1.0,
        "frames": "random",
        "temperature": 0.07,
        "max_logit_scale": 100.0,
    }
    AlignLossConfig.parse({"w_image": 0})
    AlignLossConfig.parse({"w_text": 0, "temperature": 0.01, "max_logit_scale": 0.1})
    outside = {"w_image": -0.5, "w_text": -0.5, "temperature": 0, "max_logit_scale": 0}
    for name, value in outside.items():
        with pytest.raises(UserError, match=name):
            AlignLossConfig.parse({name: value})
