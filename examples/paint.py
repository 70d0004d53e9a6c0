"""A sound becomes pictures: the whole inference side of the project in one page of Python.

    python examples/paint.py runs/demo/adapt/bundle runs/demo/pictures/sound0.wav pictures

The bundle is the folder that `aai adapt` writes (`make demo` makes one). Needs neither Ray nor MLflow, nor a GPU.
"""

import sys
from pathlib import Path

from aai.media.decode import decode_audio
from aai.painter import Painter
from aai.sampling import PaintRequest


def main(bundle: str, sound: str, out: str) -> None:
    """Paints four pictures of a sound: two photos and two sketches."""
    painter = Painter.load(bundle)  # every file is checked by its hash; device="cuda" for a GPU
    # Any sound file, or the sound of a video, as one channel: float32 [S].
    waveform = decode_audio(Path(sound).read_bytes(), 60, 2**25, painter.sample_rate_hz)
    print("A*, the sound as words:", tuple(painter.hear(waveform).shape), "= tokens x width of the text encoder")
    for prompt in ("a photo of <sound>", "a sketch of <sound>"):
        pictures = painter.generate(waveform, PaintRequest(prompt=prompt, num_images=2, seed=7))
        for number, picture in enumerate(pictures):
            file = Path(out) / f"{prompt.split()[1]}{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture.save(file)
            print(file)


if __name__ == "__main__":
    main(*sys.argv[1:])
