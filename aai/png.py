"""Painted pictures as PNG files that say which code painted them."""

import hashlib
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


def hashes(sounds: Mapping[str, bytes], pictures: Mapping[str, bytes] | None = None) -> dict[str, Any]:
    """For `made`: the SHA-256 of the files of the sounds by name, and of the given pictures (image, mask, control)."""
    told: dict[str, Any] = {"sounds": {name: sha256(data) for name, data in sounds.items()}}
    for name, data in (pictures or {}).items():
        told[f"{name}_sha256"] = sha256(data)
    return told


def sha256(data: bytes) -> str:
    """What a file is known by in `made`: 64 hex digits, as the command sha256sum prints them."""
    return hashlib.sha256(data).hexdigest()


def same_picture(ours: bytes, theirs: bytes) -> bool:
    """Whether two PNG files hold the same pixels, made the same way, whichever release painted them.

    What only one of them tells says nothing against it: earlier releases told less. A model's name and number may have
    changed; its content is `bundle`.
    """
    if ours == theirs:
        return True
    try:
        a, b = (Image.open(io.BytesIO(data), formats=("PNG",)) for data in (ours, theirs))
        told = [json.loads(picture.info.get(MADE, "{}")) for picture in (a, b)]
        differ = any(told[0][name] != told[1][name] for name in (told[0].keys() & told[1].keys()) - {"model"})
        return not differ and (a.mode, a.size) == (b.mode, b.size) and a.tobytes() == b.tobytes()
    except (OSError, SyntaxError, ValueError, AttributeError, Image.DecompressionBombError):  # no PNG, or a damaged one
        return False
