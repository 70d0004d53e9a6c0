"""AudioCue: exact retrieval, and A* that fits the retrieved pictures better than before, with random models."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F

from aai import schema, storage
from aai.cue import CueConfig, examples_of, refine, retrieve
from aai.errors import UserError
from aai.features import METADATA_KEY, FeatureManifest
from aai.foundation.identity import identity
from aai.painter import Painter
from tests.aai.numbered import row, write
from tests.aai.test_painter import sound


def write_features(folder: Path, painter: Painter, pictures: torch.Tensor, **changes: object) -> str:
    """A FeatureTable of the painter's foundation: two frames a clip, of which `pictures` [N, D] are the second ones."""
    write(folder)
    manifest = FeatureManifest.read(str(folder)).model_copy(
        update={
            "foundation": identity(painter.foundation),
            "image_dim": 32,
            "text_dim": 3,
            "latent_shape": (8, 8, 8),
            **changes,
        }
    )
    storage.write_json(f"{folder}/manifest.json", manifest.model_dump(mode="json"))
    rng, number = np.random.default_rng(0), 0
    out = schema.feature_table(2, 32, 1, 3, 512).with_metadata({METADATA_KEY: b"d"})
    for shard in range(3):
        data = []
        for _ in range(10):
            features = torch.cat([torch.randn(32), pictures[number]]).tolist()
            own = {"image_features": features, "latents": rng.standard_normal(512).tolist()}
            data.append({**row(number, "val" if number % 3 == 2 else "train"), **own})
            number += 1
        storage.write_table(f"{folder}/shard-{shard:05d}.parquet", pa.Table.from_pylist(data, schema=out), 5)
    return str(folder)


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return F.normalize(torch.randn(30, 32, generator=torch.Generator().manual_seed(1)), dim=-1) * 1.5


@pytest.fixture(scope="module")
def features(painter: Painter, pictures: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_features(tmp_path_factory.mktemp("cue"), painter, pictures)


def test_the_nearest_pictures_of_the_split_are_found(features: str, pictures: torch.Tensor) -> None:
    wanted = F.normalize(torch.randn(32, generator=torch.Generator().manual_seed(2)), dim=-1)
    found = retrieve(features, wanted, "train", 5, 400)
    cosines = F.cosine_similarity(pictures, wanted[None], dim=-1)
    order = [i for i in cosines.argsort(descending=True).tolist() if i % 3 != 2]
    assert found.clip_ids == [f"c{i}" for i in order[:5]]
    assert found.cosines == pytest.approx(cosines[order[:5]].tolist(), abs=2e-3)  # stored in float16
    stored = np.random.default_rng(0).standard_normal((30, 512)).astype(np.float16)
    assert np.array_equal(found.latents.numpy().reshape(5, 512), stored[order[:5]].astype(np.float32))
    loud = [i / 1024 for i in order[:5]]  # each clip's sound is its number
    assert found.audio[:, 150].tolist() == pytest.approx(loud, abs=1e-4)
    assert found.captions == [f"word {i % 3}" for i in order[:5]]
    assert retrieve(features, wanted, "val", 50, 400).latents.shape == (10, 8, 8, 8)
    with pytest.raises(UserError, match="has no clips of the split 'test'"):
        retrieve(features, wanted, "test", 5, 400)


def test_tuning_fits_the_retrieved_pictures(painter: Painter, features: str) -> None:
    cue = CueConfig(features=features, pictures=4, steps=15, learning_rate=0.1)
    found = refine(painter, sound(1), cue)
    assert torch.equal(found.before, painter.hear(sound(1)))
    assert found.loss_after < found.loss_before
    assert (found.after - found.before).norm() > 0.1 * found.before.norm()
    expected = retrieve(features, painter.listen(sound(1))[0], "train", 4, 400)
    assert found.retrieved.clip_ids == expected.clip_ids
    assert list(found.told()["retrieved"]) == found.retrieved.clip_ids
    assert found.told()["loss"] == [found.loss_before, found.loss_after]
    again = refine(painter, sound(1), cue)
    assert torch.equal(again.after, found.after)
    assert torch.equal(painter.hear(sound(1)), found.before)  # the adapter is as it was
    assert not torch.equal(refine(painter, sound(1), cue, seed=1).after, found.after)
    weights = [*painter.pipe.unet.parameters(), *painter.pipe.text_encoder.parameters()]
    assert all(p.grad is None for p in weights)


def test_features_of_another_foundation_are_refused(painter: Painter, pictures: torch.Tensor, tmp_path: Path) -> None:
    other = write_features(tmp_path, painter, pictures, foundation={"clip": "another"})
    with pytest.raises(UserError, match=r"cue.features=.*: was made with .*another.*featurize with the bundle's"):
        refine(painter, sound(1), CueConfig(features=other))


def test_the_part_that_was_asked_for_is_tuned(painter: Painter, features: str) -> None:
    long, cue = np.concatenate([4 * sound(3), sound(4), sound(5)]), CueConfig(features=features, steps=1)
    found = refine(painter, long, cue, window="loudest")
    assert torch.equal(found.before, painter.hear(long, "loudest"))
    assert not torch.equal(found.before, painter.hear(long))


def test_pictures_are_tuned_on_with_the_sounds_and_heads_of_their_own(painter: Painter, features: str) -> None:
    found = retrieve(features, painter.listen(sound(1))[0], "train", 3, painter.aligner.config.clip_samples)
    captions = ["a sketch of a dog", "a painting of a bell", "rain"]
    examples = examples_of(painter, dataclasses.replace(found, captions=captions))
    assert examples.prompts == ["a sketch of <sound>", "a painting of <sound>", painter.prompt]
    own = [painter.hear(waveform) for waveform in found.audio.numpy()]
    assert torch.equal(examples.tokens, torch.stack(own))
    assert not torch.equal(own[0], own[1])


def test_one_shift_is_learned_of_all(painter: Painter, features: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[list[str], torch.Tensor]] = []
    encode = painter.injector.encode

    def seen(prompts: list[str], tokens: torch.Tensor) -> Any:
        given.append((prompts, tokens.detach().clone()))
        return encode(prompts, tokens)

    monkeypatch.setattr(painter.injector, "encode", seen)
    found = refine(painter, sound(1), CueConfig(features=features, pictures=3, steps=4, learning_rate=0.1))
    own = examples_of(painter, found.retrieved)
    assert given[0][0] == own.prompts
    assert torch.equal(given[0][1], own.tokens)
    shifts = given[-1][1] - own.tokens
    assert shifts.abs().max() > 0.01 * painter.injector.median_norm
    for shift in shifts:
        torch.testing.assert_close(shift, found.after - found.before, atol=1e-5, rtol=0)


def test_a_sound_of_another_rate_is_refused(painter: Painter, pictures: torch.Tensor, tmp_path: Path) -> None:
    other = write_features(tmp_path, painter, pictures, sample_rate_hz=8000)
    with pytest.raises(UserError, match=r"cue.features=.*: hears 16000 Hz, the features hold 8000 Hz"):
        refine(painter, sound(1), CueConfig(features=other))


def test_the_noisier_half_of_the_levels_is_tuned_on(
    painter: Painter, features: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []

    def loss(*given: Any) -> torch.Tensor:
        drawn.extend(given[4].tolist())
        return given[3].square().mean(dim=(1, 2))

    monkeypatch.setattr("aai.cue.denoising_loss", loss)
    refine(painter, sound(1), CueConfig(features=features, pictures=4, steps=20))
    assert 500 <= min(drawn) < 550
    assert max(drawn) > 950
