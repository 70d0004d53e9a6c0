"""The grammar of the toy world: what a scene is, and the captions that speak of it.

| attribute | is heard as | is seen as | a clip's caption names it |
| --- | --- | --- | --- |
| object, one or two | voice; of two, one after the other | shape; the first one on the left | yes, not the order |
| ambience | bed of noise | weather and light | yes |
| size | loudness | size | yes |
| colour | pitch | colour of the objects | no |
| count | rate of events | how many of the object | no |
| place | reverberation | an arch of stone, or none | no |
| medium | not at all | photo, sketch, painting | yes |

What no caption of a clip names can only be learned by hearing and seeing; the foundation's own captions have words
for it. What a sound does not carry has to come from the text prompt, which is what makes composition testable. (An
arch, not distance: at 64 pixels a distant object is a small or a pale one, and size and colour have meanings already.)
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

OBJECTS = ("dog", "bell", "car", "bird", "clock", "guitar", "siren", "frog", "drum", "train")
AMBIENCES = ("clear", "rain", "night", "snow")
MEDIA = ("photo", "sketch", "painting")
SIZES = ("small", "medium", "big")
COLOURS = ("red", "yellow", "green", "blue")
"""From low to high."""
COUNTS = ("one", "two", "three")
"""From slow to quick."""
PLACES = ("open", "arch")
"""Without and with reverberation."""
TIMBRES = 4

AMBIENCE_PHRASES = {
    "clear": "on a clear day",
    "rain": "in the rain",
    "night": "at night",
    "snow": "in the snow",
}
"""How a caption names each ambience."""
PLACE_PHRASES = {"open": "in the open", "arch": "under an arch"}

ANYTHING = "thing"
"""The word a caption uses when it leaves the object open; also the neutral word of an unheard sound."""
UNSEEN_PAIRS = tuple((obj, AMBIENCES[i % 4]) for i, obj in enumerate(OBJECTS) if i % 5)
"""Objects that no training clip has in this ambience."""
UNSEEN_TIMBRES = {obj: i % TIMBRES for i, obj in enumerate(OBJECTS)}
"""The timbre of each object that no training clip has."""
BAND, UNSEEN_BAND = (0.2, 0.8), (0.4, 0.6)
"""The part of a class's range that pitches and rates are drawn from, and the part of it that no training clip has."""
TWO_RATE = 0.43
"""At which two objects sound: neither quick nor slow, and not in the part that no training clip has."""
NOVELTIES = ("seen", "pair", "timbre", "values")


@dataclass(frozen=True)
class Scene:
    """One scene of the world. The fields that are numbers run from 0 to 1."""

    obj: str
    ambience: str
    medium: str
    size: float
    """From small and quiet to big and loud."""
    seed: int
    """Drives all nuisance variation (position, background, jitter of colours, timing)."""
    pitch: float = 0.075
    """From low (red) to high (blue): see `colour`."""
    rate: float = 0.1
    """From slow (one) to quick (three): see `count`."""
    place: str = "open"
    timbre: int = 0
    """Which of the TIMBRES of its voice an object has; it cannot be seen."""
    second: str | None = None
    """An object that sounds after the first, and stands to the right of it."""

    @property
    def size_name(self) -> str:
        """`small`, `medium` or `big`: the thirds of the size range."""
        return SIZES[min(int(self.size * 3), 2)]

    @property
    def colour(self) -> str:
        """The quarter of the pitch range."""
        return COLOURS[min(int(self.pitch * len(COLOURS)), len(COLOURS) - 1)]

    @property
    def count(self) -> str:
        """The third of the rate range; each of two objects is one."""
        return COUNTS[0] if self.second else COUNTS[min(int(self.rate * len(COUNTS)), len(COUNTS) - 1)]

    @property
    def novelty(self) -> str:
        """One of NOVELTIES: what of the scene no training clip has."""
        if (self.obj, self.ambience) in UNSEEN_PAIRS or (self.second, self.ambience) in UNSEEN_PAIRS:
            return "pair"
        if any(self.timbre == UNSEEN_TIMBRES[name] for name in (self.obj, self.second) if name):
            return "timbre"
        rate = TWO_RATE if self.second else self.rate
        within = (self.pitch * len(COLOURS) % 1, rate * len(COUNTS) % 1)
        return "values" if any(UNSEEN_BAND[0] <= part < UNSEEN_BAND[1] for part in within) else "seen"

    @property
    def attributes(self) -> dict[str, str]:
        """What can be seen, in words."""
        return {
            "object": self.obj,
            "ambience": self.ambience,
            "medium": self.medium,
            "size": self.size_name,
            "colour": self.colour,
            "count": self.count,
            "place": self.place,
            "second": self.second or "none",
        }

    @property
    def labels(self) -> list[str]:
        """The attributes in words, then the novelty: what a manifest says of a clip."""
        return [*self.attributes.values(), self.novelty]


@dataclass(frozen=True)
class Words:
    """What a caption speaks of; what is None it leaves open."""

    obj: str | None = None
    ambience: str | None = None
    medium: str = "photo"
    size: str | None = None
    colour: str | None = None
    count: str | None = None
    place: str | None = None
    second: str | None = None
    ordered: bool = False
    """Whether it says which of two objects is on the left."""

    @property
    def text(self) -> str:
        """The caption.

        >>> Words("dog", "rain", "sketch", "big").text
        'a sketch of a big dog in the rain'
        >>> Words("frog", colour="red", count="three", place="arch").text
        'a photo of three red frogs under an arch'
        """
        how = [word for word in (self.size if self.size in ("small", "big") else None, self.colour) if word]
        count = self.count if self.obj and not self.second else None
        noun = (self.obj or ANYTHING) + ("s" if count in COUNTS[1:] else "")
        words = ["a", self.medium, "of", count or "a", *how, noun]
        if self.second:
            words += ["left", "of", "a", self.second] if self.ordered else ["and", "a", self.second]
        if self.place:
            words.append(PLACE_PHRASES[self.place])
        if self.ambience:
            words.append(AMBIENCE_PHRASES[self.ambience])
        return " ".join(words)


def words_of(scene: Scene) -> Words:
    """All that the grammar has words for."""
    return Words(
        scene.obj,
        scene.ambience,
        scene.medium,
        scene.size_name,
        scene.colour,
        scene.count,
        scene.place,
        scene.second,
        ordered=True,
    )


def full_caption(scene: Scene) -> str:
    """The caption that names everything, as the foundation's pictures may have it."""
    return words_of(scene).text


def caption_of(labels: Sequence[str]) -> str:
    """The caption that names everything in a clip's labels (see Scene.attributes)."""
    obj, ambience, medium, size, colour, count, place, second = labels[:8]
    return Words(obj, ambience, medium, size, colour, count, place, second if second != "none" else None, True).text


def clip_caption(scene: Scene) -> str:
    """The caption of a clip: objects, ambience, medium and size, but not the order of two objects."""
    first, second = scene.obj, scene.second
    if second is not None:
        first, second = sorted((first, second))
    return Words(first, scene.ambience, scene.medium, scene.size_name, second=second).text


def partial_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption that leaves some attributes open, as people's captions do; a third of them are complete.

    Two objects are named in their order, or in either; or only the scene around an open `thing`.
    """
    full = words_of(scene)
    if rng.random() < 1 / 3:
        return full.text
    kept: dict[str, Any] = {field.name: getattr(full, field.name) for field in fields(full)}
    for name, share in KEPT_SHARES.items():
        if rng.random() >= share:
            kept[name] = None
    if scene.second and rng.random() < 0.5:
        kept["ordered"] = False
        if kept["obj"] and rng.random() < 0.5:
            kept["obj"], kept["second"] = scene.second, scene.obj
    if kept["obj"] is None:
        kept["second"] = None
    return Words(**kept).text


KEPT_SHARES = {"obj": 0.85, "ambience": 0.6, "size": 0.5, "colour": 0.5, "count": 0.5, "place": 0.5}
"""How often an incomplete caption speaks of each attribute."""


def random_scene(rng: np.random.Generator, two: float = 0.15) -> Scene:
    """A scene with every attribute drawn uniformly and independently. two: share of scenes with two objects."""
    obj = str(rng.choice(OBJECTS))
    second = str(rng.choice([name for name in OBJECTS if name != obj]))
    return Scene(
        obj=obj,
        ambience=str(rng.choice(AMBIENCES)),
        medium=str(rng.choice(MEDIA)),
        size=float(rng.random()),
        seed=int(rng.integers(2**31)),
        pitch=_in_band(rng, len(COLOURS)),
        rate=_in_band(rng, len(COUNTS)),
        place=str(rng.choice(PLACES)),
        timbre=int(rng.integers(TIMBRES)),
        second=second if rng.random() < two else None,
    )


def _in_band(rng: np.random.Generator, classes: int) -> float:
    """A value in [0, 1) of a random class, clear of its neighbours."""
    return float((rng.integers(classes) + rng.uniform(*BAND)) / classes)
