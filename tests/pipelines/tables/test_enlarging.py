import io

import pyarrow as pa
import pytest
from PIL import Image

from aai.errors import UserError
from aai.foundation.sizes import PictureSizes
from pipelines.tables.enlarging import Enlarged, count_enlarged

SIZES = PictureSizes(clip_px=224, diffusion_px=512)


def clips(*rows: tuple[int, int | None]) -> pa.Table:
    """Clips by the shorter sides of (the kept picture, its source)."""
    columns: dict[str, list[object]] = {"frames": [], "width": [], "height": []}
    for kept_px, source_px in rows:
        sink = io.BytesIO()
        Image.new("RGB", (kept_px * 4 // 3, kept_px)).save(sink, "JPEG")
        columns["frames"].append([sink.getvalue()])
        columns["width"].append(source_px and source_px * 4 // 3)
        columns["height"].append(source_px)
    return pa.table(columns)


def test_large_pictures_and_small_sources_are_told_apart() -> None:
    table = clips((512, 1080), (600, 600), (240, 240), (224, 224), (511, 511), (512, 300))
    assert count_enlarged("t", table, SIZES, allowed=False) == Enlarged(clip=0, latents=4)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((64, 480), r"input=t: keeps pictures of 64 px of a source of 480 px;.*decode\.frame_size_px=512"),
        ((224, 480), "keeps pictures of 224 px"),  # enough for the CLIP, not for the latents
        ((511, 720), "keeps pictures of 511 px"),
        ((200, 200), r"has a source of 200 px;.*--rejudge --set filters\.min_size_px=224;.*allow_upsampling=true"),
        ((512, 200), "has a source of 200 px"),  # as curate once enlarged it
        ((223, None), "has a source of 223 px"),
    ],
)
def test_what_can_be_mended_is_refused_unless_allowed(row: tuple[int, int | None], message: str) -> None:
    table = clips((512, 512), row)
    with pytest.raises(UserError, match=message):
        count_enlarged("t", table, SIZES, allowed=False)
    clip = int(min(value for value in row if value) < 224)
    assert count_enlarged("t", table, SIZES, allowed=True) == Enlarged(clip=clip, latents=1)
