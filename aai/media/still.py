"""A still picture from bytes that anybody may have sent: upright RGB, or an error that says why not."""

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from aai.media.limits import ClipError, reason

STILL_FORMATS = ("PNG", "JPEG", "WEBP")
MAX_ASPECT = 32  # longer side by shorter: scaling the shorter one up to a model's input makes the other one huge


def eight_bit(image: Image.Image) -> Image.Image:
    """The picture itself, or of greys of 16 bits one of 8: what Pillow makes of these is white from 255 on."""
    if not image.mode.startswith("I;16"):
        return image
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def decode_still(
    data: bytes, max_pixels: int, formats: tuple[str, ...] = STILL_FORMATS, backdrop: str | None = None
) -> Image.Image:
    """A picture file as RGB, turned upright. Its size is checked before any pixel is decoded.

    backdrop: colour behind what is transparent, as of a mask; else transparency is passed over.

    Raises ClipError: TOO_LARGE (width x height, or a strip), else UNREADABLE; MemoryError.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
        width, height = image.size
        if width * height > max_pixels:
            raise ClipError("TOO_LARGE", f"{width}x{height} px is over the limit of {max_pixels} px")
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise ClipError("TOO_LARGE", f"{width}x{height} px is a strip: at most {MAX_ASPECT} to 1")
        upright = eight_bit(ImageOps.exif_transpose(image))
        if backdrop is not None and upright.has_transparency_data:
            behind = Image.new("RGBA", upright.size, backdrop)
            upright = Image.alpha_composite(behind, upright.convert("RGBA"))
        return upright.convert("RGB")
    except (ClipError, MemoryError):
        raise
    except UnidentifiedImageError as error:  # its own text tells an address of this process
        raise ClipError("UNREADABLE", f"is none of {', '.join(formats)}") from error
    except Exception as error:  # a broken file raises what its parser stumbles over: struct.error, TypeError, ...
        raise ClipError("UNREADABLE", f"cannot be decoded ({reason(error)})") from error
