import io
import json

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from aai import png
from aai.png import encode_png, hashes, same_picture, sha256
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


def test_what_was_handed_in_is_told_by_its_hash() -> None:
    told = hashes({"dog": b"sound"}, {"image": b"picture", "mask": b""})
    assert told == {"sounds": {"dog": sha256(b"sound")}, "image_sha256": sha256(b"picture"), "mask_sha256": sha256(b"")}
    assert hashes({}) == {"sounds": {}}
    assert sha256(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_equal_bytes_are_no_equal_pixels_and_foreign_words_no_failure() -> None:
    grey = Image.new("L", (4, 4), 7)
    palette = Image.frombytes("P", (4, 4), grey.tobytes())
    palette.putpalette([0, 255, 0] * 256)
    assert not same_picture(encode_png(grey, {}), encode_png(palette, {}))
    foreign = PngInfo()
    foreign.add_text("aai", "[1, 2]")
    sink = io.BytesIO()
    PICTURE.save(sink, "PNG", pnginfo=foreign)
    assert not same_picture(encode_png(PICTURE, {"seed": 3}), sink.getvalue())
    assert "aai" in Image.open(io.BytesIO(encode_png(PICTURE, {}))).info, "made, though nothing more is known"
