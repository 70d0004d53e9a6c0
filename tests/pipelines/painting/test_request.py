"""Sounds by name, and what contradicts itself."""

import pytest

from aai.errors import UserError
from pipelines.painting.request import GenerateConfig, PaintConfig, RepaintConfig


@pytest.mark.parametrize(
    ("given", "known"),
    [
        (["a.wav"], {"sound": "a.wav"}),
        (["a.wav", "b.wav"], {"sound": "a.wav", "sound2": "b.wav"}),
        (["dog=a.wav", "b.wav"], {"dog": "a.wav", "sound2": "b.wav"}),
        (["./a=b.wav", "/x/y=z.wav"], {"sound": "./a=b.wav", "sound2": "/x/y=z.wav"}),
        ("dog=a=b.wav", {"dog": "a=b.wav"}),
        (None, {}),
    ],
)
def test_sounds_may_have_names(given: object, known: dict[str, str]) -> None:
    assert PaintConfig.parse({"audio": given}).sounds() == known


def test_a_name_given_twice_is_refused() -> None:
    with pytest.raises(UserError, match=r"audio=dog=b\.wav: is a second sound of the name dog"):
        PaintConfig(audio=("dog=a.wav", "dog=b.wav")).sounds()


@pytest.mark.parametrize("given", [{"audio": "a.wav"}, {"strip": "morph"}])
def test_a_manifest_goes_alone(given: dict[str, str]) -> None:
    with pytest.raises(UserError, match=f"manifest and {next(iter(given))} exclude each other"):
        GenerateConfig.parse({"manifest": "sounds", **given})
    assert GenerateConfig.parse({"manifest": "sounds"}).plan().inputs["manifest"] == "sounds"


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ({"control": "a.png"}, "belong together"),
        ({"addons": {"controlnet": "net"}}, "belong together"),
        ({"control": "a.png", "addons": {"controlnet": "net"}, "strip": "morph"}, "control and strip exclude"),
        ({"control": "a.png", "addons": {"controlnet": "net"}, "manifest": "m"}, "manifest and control exclude"),
    ],
)
def test_a_controlnet_and_its_picture_belong_together(given: dict[str, object], rule: str) -> None:
    with pytest.raises(UserError, match=rule):
        GenerateConfig.parse(given)
    with pytest.raises(UserError, match="guides generate alone"):
        RepaintConfig.parse({"addons": {"controlnet": "net"}})


def test_a_mask_needs_a_way_of_repainting_that_heeds_it() -> None:
    with pytest.raises(UserError, match=r"mask needs request\.repaint=invert"):
        RepaintConfig.parse({"mask": "m.png"})
    assert RepaintConfig.parse({"mask": "m.png", "request": {"repaint": "invert"}}).mask == "m.png"


@pytest.mark.parametrize(
    "given",
    [
        {"strip": "morph"},
        {"audio": ["a.wav", "b.wav"]},
        {"manifest": "m"},
        {"audio": "dog=a.wav"},
        {"request": {"negative_prompt": "<sound>"}},
    ],
)
def test_a_cue_is_for_one_sound(given: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"cue\.features"):
        GenerateConfig.parse({"cue": {"features": "f"}, **given})
