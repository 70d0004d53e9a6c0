import io
import json

import numpy as np
import pytest
from PIL import Image

from aai import png
from aai.png import encode_png, same_picture
from aai.version import code_version

PICTURE = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))


def test_a_picture_says_what_made_it() -> None:
    image = Image.open(io.BytesIO(encode_png(PICTURE, {"seed": 3})))
    assert image.info["Software"] == f"aai {code_version()}"
    assert json.loads(image.info["aai"]) == {"seed": 3}
    assert image.tobytes() == PICTURE.tobytes()
    assert "aai" not in Image.open(io.BytesIO(encode_png(PICTURE))).info


def test_same_picture_looks_at_pixels_and_settings_not_at_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = encode_png(PICTURE, {"seed": 3})
    monkeypatch.setattr(png, "code_version", lambda: "0.0.9 (commit 0000000)")
    theirs = encode_png(PICTURE, {"seed": 3})
    assert ours != theirs
    assert same_picture(ours, theirs)
    assert not same_picture(ours, encode_png(PICTURE, {"seed": 4}))
    assert not same_picture(ours, encode_png(Image.new("RGB", (4, 4)), {"seed": 3}))
    assert not same_picture(ours, encode_png(PICTURE.resize((2, 8)), {"seed": 3}))
    assert not same_picture(ours, b"no picture")
    assert not same_picture(ours, ours[:60])


def test_what_only_one_release_told_makes_no_other_picture() -> None:
    old, new = {"seed": 3, "bundle": "b"}, {"seed": 3, "bundle": "b", "model": "toy/2", "sounds": {"sound": "a"}}
    assert same_picture(encode_png(PICTURE, new), encode_png(PICTURE, old))
    assert same_picture(encode_png(PICTURE, new), encode_png(PICTURE, {**new, "model": "toy/3"}))
    assert not same_picture(encode_png(PICTURE, new), encode_png(PICTURE, {**new, "sounds": {"sound": "b"}}))
    assert not same_picture(encode_png(PICTURE, new), encode_png(PICTURE, {**old, "bundle": "c"}))
