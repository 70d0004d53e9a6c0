import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from aai.errors import UserError
from aai.foundation.clip import FrozenClip
from aai.foundation.identity import FoundationSpec
from tests.tiny import write_clip


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> FrozenClip:
    folder = str(write_clip(tmp_path_factory.mktemp("clip")))
    return FrozenClip(FoundationSpec(clip=folder, diffusion=folder), batch_size=3)


def test_features_are_unit_norm_and_do_not_depend_on_the_batch(clip: FrozenClip) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 70, 90, 3), dtype=np.uint8)
    features = clip.images(pixels)
    assert features.shape == (5, clip.dim)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(5))
    pictures = [Image.fromarray(p) for p in pixels]
    torch.testing.assert_close(clip.images(pictures[3:4])[0], features[3], atol=1e-5, rtol=0)
    assert (features[0] - features[1]).abs().max() > 1e-4
    sink = io.BytesIO()
    pictures[2].save(sink, "PNG")
    torch.testing.assert_close(clip.images([sink.getvalue()])[0], features[2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("size", [(64, 64), (90, 70), (50, 61), (64, 131), (201, 64)])
def test_pictures_are_prepared_exactly_as_by_the_processor(
    clip: FrozenClip, size: tuple[int, int], threads: int
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, *size, 3), dtype=np.uint8)
    clip = FrozenClip(clip.spec, batch_size=3, threads=threads)
    expected = clip.processor(images=list(pixels), return_tensors="pt", input_data_format="channels_last")
    framed = torch.from_numpy(clip.framed(pixels)).permute(0, 3, 1, 2)
    normal = (framed * clip.processor.rescale_factor - clip.mean) / clip.std
    torch.testing.assert_close(normal, expected["pixel_values"], atol=1e-6, rtol=0)
    output = clip.model.get_image_features(pixel_values=expected["pixel_values"]).pooler_output
    cosine = torch.cosine_similarity(clip.images(pixels), output)
    assert cosine.min() > 0.9999


def test_another_way_of_cutting_is_left_to_the_processor(clip: FrozenClip) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 70, 90, 3), dtype=np.uint8)
    other = FrozenClip(clip.spec)
    other.processor.size = type(clip.processor.size)(height=64, width=64)
    assert other.framed(pixels).shape == (2, 64, 64, 3)
    assert (other.framed(pixels) != clip.framed(pixels)).any()
    assert clip.images([]).shape == (0, clip.dim)


def test_texts_of_other_lengths_do_not_disturb_one_another(clip: FrozenClip) -> None:
    texts = ["a clock", "a sketch of a small bell at night in the rain", "thing", "dog " * 200]
    together = clip.texts(texts)
    assert together.shape == (4, clip.dim)
    for text, feature in zip(texts, together, strict=True):
        torch.testing.assert_close(clip.texts([text])[0], feature, atol=1e-5, rtol=0)
    assert (together[0] - together[2]).abs().max() > 1e-4
    assert clip.texts([]).shape == (0, clip.dim)


def test_describe_names_what_pins_the_features(clip: FrozenClip) -> None:
    known = clip.describe()
    assert known["processor"] == "CLIPImageProcessorPil"
    assert known["dtype"] == "float32"
    assert len(known["clip_revision"]) == 16


def test_a_missing_model_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"foundation\.clip"):
        FrozenClip(FoundationSpec(clip=str(tmp_path / "nothing")))
