"""The grammar of the toy world: object x ambience x medium x size, and the captions that speak of them.

Object and ambience can be heard and seen, size is heard as loudness, the medium can only be seen: what a sound
does not carry has to come from the text prompt, which is what makes composition testable.
"""

from dataclasses import dataclass

import numpy as np

OBJECTS = ("dog", "bell", "car", "bird", "clock", "guitar", "siren", "frog", "drum", "train")
AMBIENCES = ("clear", "rain", "night", "snow")
MEDIA = ("photo", "sketch", "painting")
SIZES = ("small", "medium", "big")

AMBIENCE_PHRASES = {
    "clear": "on a clear day",
    "rain": "in the rain",
    "night": "at night",
    "snow": "in the snow",
}
"""How a caption names each ambience."""

ANYTHING = "thing"
"""The word a caption uses when it leaves the object open; also the neutral word of an unheard sound."""


@dataclass(frozen=True)
class Scene:
    """One scene of the world; `size` runs from 0 (small, quiet) to 1 (big, loud)."""

    obj: str
    ambience: str
    medium: str
    size: float
    seed: int
    """Drives all nuisance variation (position, colours, pitch, timing)."""

    @property
    def size_name(self) -> str:
        """`small`, `medium` or `big`: the thirds of the size range."""
        return SIZES[min(int(self.size * 3), 2)]

    @property
    def labels(self) -> list[str]:
        """The four attributes as words: object, ambience, medium, size."""
        return [self.obj, self.ambience, self.medium, self.size_name]


def caption(obj: str | None = None, ambience: str | None = None, medium: str = "photo", size: str | None = None) -> str:
    """The caption of a scene; an attribute left as None is not spoken of.

    >>> caption("dog", "rain", "sketch", "big")
    'a sketch of a big dog in the rain'
    """
    words = ["a", medium, "of", "a"]
    if size in ("small", "big"):
        words.append(str(size))
    words.append(obj or ANYTHING)
    if ambience:
        words.append(AMBIENCE_PHRASES[ambience])
    return " ".join(words)


def full_caption(scene: Scene) -> str:
    """The caption that names everything the grammar knows of a scene."""
    return caption(scene.obj, scene.ambience, scene.medium, scene.size_name)


def partial_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption that leaves some attributes open, as people's captions do; half of them are complete."""
    if rng.random() < 0.5:
        return full_caption(scene)
    return caption(
        scene.obj if rng.random() < 0.8 else None,
        scene.ambience if rng.random() < 0.6 else None,
        scene.medium,
        scene.size_name if rng.random() < 0.5 else None,
    )


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene with every attribute drawn uniformly and independently."""
    return Scene(
        obj=OBJECTS[rng.integers(len(OBJECTS))],
        ambience=AMBIENCES[rng.integers(len(AMBIENCES))],
        medium=MEDIA[rng.integers(len(MEDIA))],
        size=float(rng.random()),
        seed=int(rng.integers(2**31)),
    )
