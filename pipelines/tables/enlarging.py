"""Pictures that a model would see enlarged: refused where better ones can be had, counted where they cannot."""

import io
from dataclasses import dataclass

import pyarrow as pa
from PIL import Image

from aai.errors import UserError
from aai.foundation.sizes import PictureSizes

COLUMNS = ("frames", "width", "height")
"""Of a ClipTable; width and height are the source's."""
REMEDY = "to let featurize enlarge them, set allow_upsampling=true"


@dataclass(frozen=True)
class Enlarged:
    """Clips whose pictures a model sees enlarged."""

    clip: int
    latents: int


def count_enlarged(file: str, clips: pa.Table, sizes: PictureSizes, allowed: bool) -> Enlarged:
    """How many clips of a ClipTable (its COLUMNS) are smaller than the models take them.

    The latents of a small source cannot be made better by curating it again, so these are counted only. Unless
    allowed, raises UserError for what can: pictures that were kept smaller than their source and the models are (or
    were enlarged by curate), and sources that even the CLIP would see enlarged, which a filter drops.
    """
    clip = latents = 0
    for frames, *source in zip(*(clips[name].to_pylist() for name in COLUMNS), strict=True):
        if not frames:
            continue  # a clip of sound and text
        kept_px = min(_shorter_px(frame) for frame in frames)
        source_px = kept_px if None in source else min(source)  # tables from elsewhere need not tell it
        if not allowed and kept_px < min(source_px, sizes.largest_px):
            rule = f"keeps pictures of {kept_px} px of a source of {source_px} px; {sizes}"
            remedy = f"curate into another folder with decode.frame_size_px={sizes.largest_px} or the same foundation"
            raise UserError("input", file, rule, f"{remedy}; {REMEDY}")
        if not allowed and source_px < sizes.clip_px:
            rule = f"has a source of {source_px} px; {sizes}"
            remedy = f"drop such clips by aai curate --rejudge --set filters.min_size_px={sizes.clip_px}"
            raise UserError("input", file, rule, f"{remedy}; {REMEDY}")
        true_px = min(kept_px, source_px)
        clip += true_px < sizes.clip_px
        latents += true_px < sizes.diffusion_px
    return Enlarged(clip, latents)


def _shorter_px(frame: bytes) -> int:
    return min(Image.open(io.BytesIO(frame)).size)  # reads the header alone
