import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aai.align import AlignLossConfig, AlignTask, mask, rotate, validate
from aai.encoders.aligner import embed
from aai.encoders.audio import AudioEncoder, AudioEncoderConfig
from aai.errors import UserError
from aai.losses import info_nce

SMALL = AudioEncoderConfig(
    hidden_size=32, num_layers=1, num_heads=2, clip_s=0.5, embed_dim=8, head_size=16, num_mel_bins=32, dropout=0.0
)


def make_task(**settings: object) -> AlignTask:
    torch.manual_seed(0)
    return AlignTask(AudioEncoder(SMALL), AlignLossConfig.parse(settings))


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
    expected = info_nce(task.encoder(batch["audio"]), image, 1 / 0.07)
    torch.testing.assert_close(report["loss_image"], expected.detach())


def test_without_text_weight_there_is_no_text_term() -> None:
    task = make_task(w_text=0)
    assert list(task.log_scale) == ["image"]
    loss, report = task(make_batch())
    loss.backward()
    assert "loss_text" not in report
    assert all(p.grad is not None for p in task.parameters())
    with pytest.raises(UserError, match="both 0"):
        AlignLossConfig.parse({"w_image": 0, "w_text": 0})


def test_equal_captions_and_copies_are_not_negatives() -> None:
    batch = make_batch()
    task = make_task().eval()
    apart = task(batch)[1]
    together = task({**batch, "caption_id": torch.tensor([1, 1, 2, 3, 4, 5])})[1]
    assert together["loss_text"] < apart["loss_text"]
    assert together["loss_image"] < apart["loss_image"]
    copies = task({**batch, "clip_hash": torch.tensor([1, 1, 2, 3, 4, 5])})[1]
    torch.testing.assert_close(copies["loss_image"], together["loss_image"])


def test_a_clip_without_caption_takes_no_part_in_the_text_term() -> None:
    batch = make_batch()
    task = make_task().eval()
    some = task({**batch, "caption_id": torch.tensor([1, 2, 3, 4, 0, 0])})[1]
    fewer = task({name: value[:4] for name, value in batch.items()})[1]
    torch.testing.assert_close(some["loss_text"], fewer["loss_text"])
    loss, none = task({**batch, "caption_id": torch.zeros(6, dtype=torch.int64)})
    assert none["loss_text"] == 0
    assert torch.isfinite(loss)


def test_the_logit_scale_has_a_ceiling() -> None:
    task = make_task(max_logit_scale=20.0).eval()
    with torch.no_grad():
        task.log_scale["image"].fill_(math.log(500.0))
    assert task(make_batch())[1]["temperature_image"] == pytest.approx(1 / 20)


def test_augmentation_keeps_the_gain_and_happens_only_in_training() -> None:
    torch.manual_seed(0)
    sounds = torch.randn(4, 1000)
    turned = rotate(sounds, 0.2)
    torch.testing.assert_close(turned.sort(dim=1).values, sounds.sort(dim=1).values)
    assert not torch.equal(turned, sounds)
    assert torch.equal(rotate(sounds, 0.0), sounds)
    mel = torch.ones(50, 100, 32)
    masked = mask(mel, 0.2)
    assert set(masked.unique().tolist()) == {0.0, 1.0}
    assert (masked == 0).float().mean() < 0.25
    assert torch.equal(mask(mel, 0.0), mel)
    task, batch = make_task().eval(), make_batch()
    assert task(batch)[0] == task(batch)[0]
    task.train()
    assert task(batch)[0] != task(batch)[0]


def test_training_draws_one_of_the_pictures() -> None:
    task, features = make_task().train(), make_batch()["image_features"]
    drawn = {tuple(task._pick(features)[0].tolist()) for _ in range(50)}
    assert drawn == {tuple(row) for row in features[0].tolist()}


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
