from pathlib import Path
from typing import Any

import pytest

from aai.errors import UserError
from aai.foundation.identity import FoundationSpec
from aai.foundation.sizes import PictureSizes, picture_sizes
from tests.tiny import write_sizes


def test_the_toy_takes_64_px() -> None:
    assert picture_sizes(FoundationSpec()) == PictureSizes(64, 64)


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        ({}, (224, 512)),
        ({"size": {"shortest_edge": 336}, "crop": {"height": 336, "width": 336}}, (336, 512)),
        ({"size": {"height": 256, "width": 384}, "crop": None}, (384, 512)),
        ({"crop": {"height": 240, "width": 240}}, (240, 512)),  # cut out larger than it was scaled: enlarged to it
        ({"latents": 96}, (224, 768)),
        ({"latents": [64, 96]}, (224, 768)),
        ({"blocks": [1, 2, 3]}, (224, 256)),
    ],
)
def test_sizes_are_read_off_json_alone(tmp_path: Path, given: dict[str, Any], sizes: tuple[int, int]) -> None:
    found = picture_sizes(write_sizes(tmp_path, **given))
    assert (found.clip_px, found.diffusion_px) == sizes
    assert found.largest_px == max(sizes)
    assert str(found) == f"foundation.clip takes {sizes[0]} px, foundation.diffusion {sizes[1]} px"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": None}, r"foundation\.clip=.*preprocessor_config\.json does not tell 'size'"),
        ({"latents": None}, r"foundation\.diffusion=.*unet/config\.json does not tell 'sample_size'"),
        ({"blocks": None}, r"foundation\.diffusion=.*vae/config\.json does not tell 'block_out_channels'"),
    ],
)
def test_a_missing_key_is_named(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        picture_sizes(write_sizes(tmp_path, **given))


@pytest.mark.parametrize("content", [None, "no JSON", "[]"])
def test_a_missing_or_broken_file_is_named(tmp_path: Path, content: str | None) -> None:
    spec, file = write_sizes(tmp_path), tmp_path / "sd/unet/config.json"
    file.unlink()
    if content:
        file.write_text(content)
    with pytest.raises(UserError, match=r"foundation\.diffusion=.*unet/config\.json"):
        picture_sizes(spec)
