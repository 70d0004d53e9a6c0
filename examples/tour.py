"""What a sound can do to a picture, cell by cell (`# %%`: VS Code, PyCharm and Jupytext open it as a notebook).

    python examples/tour.py runs/demo tour

Takes the folder that `make demo` filled (its bundle, two sounds, two pictures) and about a minute; without a GPU.
"""

# %% The bundle, and two sounds with a picture each
import sys
from pathlib import Path

from PIL import Image

from aai.inject import export_textual_inversion
from aai.media.decode import decode_audio
from aai.painter import Painter
from aai.sampling import PaintRequest
from aai.strips import joined, paint_strip

run, out = Path(sys.argv[1]), Path(sys.argv[2])
out.mkdir(parents=True, exist_ok=True)
painter = Painter.load(run / "adapt" / "bundle")
sounds, given = [], []
for number in (0, 1):
    file = run / "pictures" / f"sound{number}.wav"
    sounds.append(decode_audio(file.read_bytes(), 60, 2**25, painter.sample_rate_hz))
    given.append(Image.open(run / "pictures" / f"sound{number}_given.png"))
first, second = sounds


def show(name: str, pictures: list[tuple[str, Image.Image]]) -> None:
    """Saves labelled pictures side by side."""
    joined(pictures).save(out / f"{name}.png")
    print(f"{out / name}.png: {', '.join(label for label, _ in pictures)}")


# %% A sound is a word: it goes into any prompt
words = []
for medium in ("photo", "sketch", "painting"):
    words.append((medium, painter.generate(first, PaintRequest(prompt=f"a {medium} of <sound>", seed=7))[0]))
show("words", words)

# %% Two sounds, each with a strength of its own; and one that the picture shall keep away from
both, mixed = {"a": first, "b": second}, []
for label, mix in (("a, b", "<a> and <b>"), ("a, less b", "<a> and <b*0.4>"), ("less a, b", "<a*0.4> and <b>")):
    mixed.append((label, painter.generate(both, PaintRequest(prompt=f"a photo of {mix}", seed=7))[0]))
away = PaintRequest(prompt="a photo of <a>", negative_prompt="a photo of <b>", seed=7)
show("mixed", [*mixed, ("a, not b", painter.generate(both, away)[0])])

# %% One seed, and only the sound changes: from one to the other, and from soft to loud
show("morph", paint_strip(painter, "morph", sounds, PaintRequest(seed=7)))
show("loudness", paint_strip(painter, "loudness", first, PaintRequest(seed=7)))

# %% Given pictures: all painted anew, or only the object, and all but it
picture = given[0].convert("RGB").resize((painter.size_px, painter.size_px))
for verb in (painter.edit, painter.stylize):
    changed = [("given", picture)]
    for way in ("img2img", "invert"):
        changed.append((way, verb(first, given[0], PaintRequest(repaint=way, seed=7))[0]))
    show(verb.__name__, changed)

# %% The word leaves the house: any diffusers pipeline of this model reads it
export_textual_inversion(painter.injector, painter.hear(first), str(out / "sound.safetensors"))
painter.pipe.load_textual_inversion(str(out / "sound.safetensors"), token="<sound>")
alone = painter.pipe("a photo of <sound>", num_inference_steps=20, guidance_scale=3.0).images[0]
show("diffusers", [("alone", alone)])
