"""Still pictures: upright RGB, refused before they cost anything."""

import io

import numpy as np
import pytest
from PIL import Image

from aai.media.limits import ClipError
from aai.media.still import MAX_ASPECT, decode_still
from tests import hostile

LIMIT = 128 * 128


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "1", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = decode_still(saved(Image.new(mode, (60, 40)), "PNG"), LIMIT)
    assert (image.mode, image.size) == ("RGB", (60, 40))


@pytest.mark.parametrize("backdrop", [None, "black"])
def test_greys_of_sixteen_bits_stay_grey(backdrop: str | None) -> None:
    """As scanners have them: Pillow alone makes all above 255 of 65,535 white, and a mask opens everything."""
    greys = np.array([[0, 300, 9000, 32768, 65535]], np.uint16)
    seen = np.asarray(decode_still(saved(Image.fromarray(greys), "PNG"), LIMIT, backdrop=backdrop))
    np.testing.assert_array_equal(seen, np.array([0, 1, 35, 128, 255])[None, :, None].repeat(3, axis=2))


def test_a_picture_taken_upright_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    assert decode_still(saved(Image.new("RGB", (60, 40)), "JPEG", exif=exif), LIMIT).size == (40, 60)


def test_other_formats_on_request_only() -> None:
    data = saved(Image.new("RGB", (8, 8)), "BMP")
    with pytest.raises(ClipError, match=r"^UNREADABLE: is none of PNG, JPEG, WEBP$"):
        decode_still(data, LIMIT)
    assert decode_still(data, LIMIT, ("BMP",)).size == (8, 8)


@pytest.mark.parametrize("name", hostile.PICTURES)
def test_hostile_pictures_are_clip_errors(name: str) -> None:
    with pytest.raises(ClipError):
        decode_still(hostile.PICTURES[name][0], LIMIT)


def test_strips_are_refused_because_scaling_them_costs_gigabytes() -> None:
    assert decode_still(hostile.png(MAX_ASPECT * 2, 2), LIMIT).size == (64, 2)
    with pytest.raises(ClipError, match="TOO_LARGE: 66x2 px is a strip"):
        decode_still(hostile.png(MAX_ASPECT * 2 + 2, 2), LIMIT)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_in_a_mask_has_its_backdrop(mode: str) -> None:
    """White on transparent white, as drawing programs save a mask."""
    image = Image.new("RGBA", (8, 4), (255, 255, 255, 0))
    image.paste((255, 255, 255, 255), (0, 0, 4, 4))
    sink = io.BytesIO()
    (image.quantize() if mode == "P" else image.convert(mode)).save(sink, "PNG")
    mask = decode_still(sink.getvalue(), 10_000, backdrop="black")
    assert mask.crop((0, 0, 4, 4)).getextrema() == ((255, 255),) * 3
    assert mask.crop((4, 0, 8, 4)).getextrema() == ((0, 0),) * 3
