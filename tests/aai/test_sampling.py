"""What a request may ask, and that every refusal names a way out."""

import pytest

from aai.errors import UserError
from aai.sampling import PaintRequest, check_repaint


def test_bounds_and_defaults_of_a_request() -> None:
    """The bounds protect a service, and clients rely on the defaults."""
    assert PaintRequest().model_dump() == {
        "prompt": None,
        "negative_prompt": "",
        "num_images": 1,
        "steps": 20,
        "guidance_scale": 3.0,
        "reuse_steps": 1,
        "seed": 0,
        "sound_strength": 1.0,
        "window": "middle",
        "mixing": "regions",
        "sound_parts": None,
        "denoise_strength": None,
        "repaint": "img2img",
        "mask_threshold": 0.7,
        "fresh_noise": 0.8,
    }
    limits = {
        "num_images": (1, 8),
        "steps": (1, 100),
        "guidance_scale": (0, 30),
        "reuse_steps": (1, 10),
        "seed": (0, 2**63 - 9),
        "sound_strength": (0, 2),
        "sound_parts": (1, 4),
    }
    for name, (low, high) in limits.items():
        PaintRequest.parse({name: low})
        PaintRequest.parse({name: high})
        for bad in (low - 1, high + 1):
            with pytest.raises(UserError, match=name):
                PaintRequest.parse({name: bad})
    PaintRequest(denoise_strength=1, prompt="x" * 500, negative_prompt="x" * 500)
    bad_values = {"denoise_strength": (0, 1.01), "prompt": ("x" * 501,), "negative_prompt": ("x" * 501,)}
    for name, values in bad_values.items():
        for value in values:
            with pytest.raises(UserError, match=name):
                PaintRequest.parse({name: value})


def test_the_remedy_of_a_repaint_of_no_step_is_one() -> None:
    for steps in range(1, 101):  # the remedy is one, also at the smallest strength there is
        with pytest.raises(UserError) as error:
            check_repaint(PaintRequest(steps=steps, denoise_strength=5e-324))
        enough = float(error.value.remedy.split()[3].rstrip(","))
        check_repaint(PaintRequest(steps=steps, denoise_strength=enough))


def test_inversion_needs_two_steps() -> None:
    for steps, strength, remedy in ((4, 0.3, "raise it to 0.5"), (1, 1.0, "give at least 2 steps")):
        with pytest.raises(UserError, match=remedy):
            check_repaint(PaintRequest(steps=steps, denoise_strength=strength, repaint="invert"))
    check_repaint(PaintRequest(steps=4, denoise_strength=0.5, repaint="invert"))
