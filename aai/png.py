"""Painted pictures as PNG files that say which code painted them."""

import io
import json
from collections.abc import Mapping
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from aai.version import code_version

MADE = "aai"
"""PNG text: how the picture was made, as JSON."""
SOFTWARE = "Software"
"""PNG text of that standard name: which code painted it."""


def encode_png(image: Image.Image, made: Mapping[str, Any] | None = None) -> bytes:
    """The file of a painted picture; `made`, how it was made, goes into it as JSON."""
    text = PngInfo()
    text.add_text(SOFTWARE, f"aai {code_version()}")
    if made is not None:
        text.add_text(MADE, json.dumps(made))
    sink = io.BytesIO()
    image.save(sink, "PNG", pnginfo=text)
    return sink.getvalue()


def same_picture(ours: bytes, theirs: bytes) -> bool:
    """Whether two PNG files hold the same pixels, made the same way, whichever code painted them."""
    if ours == theirs:
        return True
    try:
        a, b = (Image.open(io.BytesIO(data), formats=("PNG",)) for data in (ours, theirs))
        return (a.info.get(MADE), a.mode, a.size) == (b.info.get(MADE), b.mode, b.size) and a.tobytes() == b.tobytes()
    except (OSError, SyntaxError, Image.DecompressionBombError):  # no PNG, or a damaged one
        return False
