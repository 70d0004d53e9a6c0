"""Draws scenes of the toy world with Pillow.

Each object is a list of filled shapes in a unit box (x right, y down, centre 0, half-width about 1), so that one
function places, scales, leans and mirrors them all. Its colour is the scene's; its palette's `a` and `b` are not used.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from aai.toy.grammar import COUNTS, Scene

Point = tuple[float, float]
Shape = tuple[str, tuple[float, ...], str]
"""(kind, coordinates in the unit box, palette key). Kinds: `ellipse` and `rect` (x0 y0 x1 y1), `poly` (x y ...)."""

_DARK = "#2a2320"
_OBJECTS: dict[str, tuple[dict[str, str], list[Shape]]] = {
    "dog": (
        {"a": "#a8692f", "b": "#6e401a", "k": _DARK},
        [
            ("rect", (-0.7, 0.35, -0.45, 0.95), "a"),
            ("rect", (0.25, 0.35, 0.5, 0.95), "a"),
            ("ellipse", (-0.95, -0.15, 0.65, 0.6), "a"),
            ("poly", (-0.85, 0.1, -1.1, -0.55, -0.7, -0.05), "a"),
            ("ellipse", (0.2, -0.85, 1.0, 0.1), "a"),
            ("ellipse", (0.12, -0.85, 0.42, 0.0), "b"),
            ("ellipse", (0.75, -0.45, 1.12, -0.1), "b"),
            ("ellipse", (0.6, -0.6, 0.74, -0.44), "k"),
        ],
    ),
    "bell": (
        {"a": "#f2c21b", "b": "#b07d0a", "k": _DARK},
        [
            ("ellipse", (-0.2, -1.0, 0.2, -0.6), "b"),
            ("ellipse", (-0.5, -0.8, 0.5, 0.2), "a"),
            ("poly", (-0.5, -0.3, 0.5, -0.3, 0.95, 0.62, -0.95, 0.62), "a"),
            ("rect", (-1.0, 0.5, 1.0, 0.72), "b"),
            ("ellipse", (-0.24, 0.6, 0.24, 1.02), "k"),
        ],
    ),
    "car": (
        {"a": "#1f5fd6", "b": "#cfe9ff", "k": _DARK},
        [
            ("poly", (-0.55, -0.1, -0.35, -0.6, 0.35, -0.6, 0.62, -0.1), "a"),
            ("rect", (-1.1, -0.12, 1.1, 0.42), "a"),
            ("poly", (-0.38, -0.12, -0.26, -0.46, 0.0, -0.46, 0.0, -0.12), "b"),
            ("poly", (0.1, -0.12, 0.1, -0.46, 0.28, -0.46, 0.44, -0.12), "b"),
            ("ellipse", (-0.85, 0.12, -0.25, 0.72), "k"),
            ("ellipse", (0.25, 0.12, 0.85, 0.72), "k"),
        ],
    ),
    "bird": (
        {"a": "#f06fb3", "b": "#a92d77", "y": "#ffd23e", "k": _DARK},
        [
            ("rect", (-0.12, 0.4, -0.04, 0.95), "k"),
            ("rect", (0.12, 0.4, 0.2, 0.95), "k"),
            ("poly", (-0.5, 0.15, -1.2, -0.15, -1.1, 0.35), "b"),
            ("ellipse", (-0.7, -0.35, 0.55, 0.6), "a"),
            ("ellipse", (0.12, -0.9, 0.8, -0.15), "a"),
            ("poly", (0.74, -0.68, 1.25, -0.5, 0.74, -0.35), "y"),
            ("poly", (-0.45, -0.1, 0.3, -0.05, -0.25, 0.4), "b"),
            ("ellipse", (0.48, -0.68, 0.62, -0.52), "k"),
        ],
    ),
    "clock": (
        {"a": "#fbfbf2", "b": "#7a4420", "k": _DARK},
        [
            ("ellipse", (-1.0, -1.0, 1.0, 1.0), "b"),
            ("ellipse", (-0.78, -0.78, 0.78, 0.78), "a"),
            ("rect", (-0.07, -0.62, 0.07, 0.06), "k"),
            ("rect", (-0.06, -0.07, 0.5, 0.07), "k"),
            ("ellipse", (-0.13, -0.13, 0.13, 0.13), "k"),
        ],
    ),
    "guitar": (
        {"a": "#e2842b", "b": "#5a2d0c", "k": _DARK},
        [
            ("rect", (-0.1, -1.15, 0.1, 0.1), "b"),
            ("rect", (-0.2, -1.25, 0.2, -0.92), "k"),
            ("ellipse", (-0.46, -0.3, 0.46, 0.5), "a"),
            ("ellipse", (-0.68, 0.1, 0.68, 1.1), "a"),
            ("ellipse", (-0.2, 0.05, 0.2, 0.45), "k"),
            ("rect", (-0.3, 0.72, 0.3, 0.84), "b"),
        ],
    ),
    "siren": (
        {"a": "#e3151a", "b": "#5b6470", "w": "#ffd7d0"},
        [
            ("poly", (-1.25, -0.85, -0.55, -0.35, -0.62, -0.15), "a"),
            ("poly", (1.25, -0.85, 0.55, -0.35, 0.62, -0.15), "a"),
            ("poly", (-0.12, -1.2, 0.12, -1.2, 0.08, -0.75, -0.08, -0.75), "a"),
            ("ellipse", (-0.55, -0.65, 0.55, 0.5), "a"),
            ("rect", (-0.55, 0.0, 0.55, 0.5), "a"),
            ("ellipse", (-0.3, -0.45, 0.0, 0.15), "w"),
            ("rect", (-0.9, 0.45, 0.9, 0.9), "b"),
        ],
    ),
    "frog": (
        {"a": "#3fae2a", "b": "#1d6b14", "w": "#ffffff", "k": _DARK},
        [
            ("ellipse", (-1.15, 0.2, -0.35, 0.85), "b"),
            ("ellipse", (0.35, 0.2, 1.15, 0.85), "b"),
            ("ellipse", (-0.9, -0.4, 0.9, 0.8), "a"),
            ("ellipse", (-0.8, -0.85, -0.15, -0.2), "a"),
            ("ellipse", (0.15, -0.85, 0.8, -0.2), "a"),
            ("ellipse", (-0.65, -0.72, -0.3, -0.37), "w"),
            ("ellipse", (0.3, -0.72, 0.65, -0.37), "w"),
            ("ellipse", (-0.53, -0.62, -0.39, -0.46), "k"),
            ("ellipse", (0.39, -0.62, 0.53, -0.46), "k"),
            ("rect", (-0.5, 0.24, 0.5, 0.34), "k"),
        ],
    ),
    "drum": (
        {"a": "#7d2fbf", "b": "#f4e9d2", "y": "#e9c64a", "k": _DARK},
        [
            ("poly", (-0.7, -1.1, -0.55, -1.15, 0.1, -0.4, -0.02, -0.34), "k"),
            ("poly", (0.7, -1.1, 0.55, -1.15, -0.1, -0.4, 0.02, -0.34), "k"),
            ("ellipse", (-0.9, 0.25, 0.9, 0.95), "a"),
            ("rect", (-0.9, -0.25, 0.9, 0.6), "a"),
            ("poly", (-0.9, -0.2, -0.7, -0.2, -0.3, 0.75, -0.5, 0.75), "y"),
            ("poly", (0.9, -0.2, 0.7, -0.2, 0.3, 0.75, 0.5, 0.75), "y"),
            ("ellipse", (-0.9, -0.6, 0.9, 0.1), "b"),
        ],
    ),
    "train": (
        {"a": "#1d8f8a", "b": "#f3d34a", "r": "#c23b22", "k": _DARK},
        [
            ("rect", (-1.15, -0.1, 0.55, 0.55), "a"),
            ("rect", (0.3, -0.75, 1.1, 0.55), "a"),
            ("rect", (0.2, -0.9, 1.2, -0.7), "r"),
            ("rect", (0.48, -0.5, 0.9, -0.12), "b"),
            ("rect", (-0.95, -0.7, -0.65, -0.1), "k"),
            ("poly", (-1.15, 0.55, -1.4, 0.75, -1.15, 0.75), "r"),
            ("ellipse", (-1.05, 0.35, -0.55, 0.85), "k"),
            ("ellipse", (-0.4, 0.35, 0.1, 0.85), "k"),
            ("ellipse", (0.4, 0.25, 1.0, 0.85), "k"),
        ],
    ),
}

_SKY = {"clear": "#8fcdf5", "rain": "#7b8794", "night": "#10163f", "snow": "#dfe7ee"}
_GROUND = {"clear": "#86c25a", "rain": "#5f6b58", "night": "#1c2b3a", "snow": "#ffffff"}
_COLOURS = {"red": "#d9262e", "yellow": "#f2c318", "green": "#2f9d3c", "blue": "#2b59d8"}
_COLOURED = {"a": 1.0, "b": 0.6}
"""The parts of an object that take its colour, and how bright."""
_PLACES = {
    "one": [(0.5, 0.57, 1.0)],
    "two": [(0.29, 0.6, 0.68), (0.71, 0.6, 0.68)],
    "three": [(0.26, 0.72, 0.58), (0.74, 0.72, 0.58), (0.5, 0.36, 0.58)],
}
"""Where objects stand, by their count: (x, y, size beside a single one)."""


BOUNCE = 0.18
"""How far a sound lifts its object at most, as a share of half its width."""


def _rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)], float)


def _jitter(colour: np.ndarray, rng: np.random.Generator, amount: float) -> tuple[int, int, int]:
    r, g, b = np.clip(colour + rng.uniform(-amount, amount, 3), 0, 255).astype(int)
    return int(r), int(g), int(b)


def _background(draw: ImageDraw.ImageDraw, scene: Scene, rng: np.random.Generator, px: int) -> None:
    """Sky, hills and ground, each clip's own, and the light of the sky (sun or moon and stars)."""
    horizon = px * rng.uniform(0.55, 0.78)
    sky, ground = _rgb(_SKY[scene.ambience]), _rgb(_GROUND[scene.ambience])
    draw.rectangle((0, 0, px, px), fill=_jitter(sky, rng, 12))
    for _ in range(int(rng.integers(0, 4))):
        x, half, height = px * rng.uniform(0, 1), px * rng.uniform(0.15, 0.4), px * rng.uniform(0.08, 0.3)
        hill = _jitter(ground * 0.75 + sky * 0.25, rng, 18)
        draw.polygon([(x - half, horizon), (x, horizon - height), (x + half, horizon)], fill=hill)
    draw.rectangle((0, horizon, px, px), fill=_jitter(ground, rng, 14))
    side, top = px * rng.uniform(0.18, 0.82), px * rng.uniform(0.12, 0.2)
    if scene.ambience == "clear":
        r = px * 0.09
        draw.ellipse((side - r, top - r, side + r, top + r), fill="#ffe24a")
    if scene.ambience == "night":
        r = px * 0.08
        draw.ellipse((side - r, top - r, side + r, top + r), fill="#f5f0c8")
        for x, y in rng.uniform(0, 1, (14, 2)) * (px, horizon):
            draw.ellipse((x - px * 0.01, y - px * 0.01, x + px * 0.01, y + px * 0.01), fill="#ffffff")


def _arch(draw: ImageDraw.ImageDraw, rng: np.random.Generator, px: int, night: bool) -> None:
    """Two pillars and a beam of stone around the scene."""
    stone = _jitter(np.array([92.0, 96.0, 128.0]) if night else np.array([150.0, 132.0, 116.0]), rng, 14)
    joint = tuple(int(0.62 * part) for part in stone)
    width, beam = px * rng.uniform(0.1, 0.14), px * rng.uniform(0.1, 0.13)
    line = max(1, round(px * 0.012))
    for left in (0.0, px - width):
        draw.rectangle((left, 0, left + width, px), fill=stone, outline=joint, width=line)
        for y in np.arange(beam, px, px * 0.16):
            draw.line((left, y, left + width, y), fill=joint, width=line)
    draw.rectangle((0, 0, px, beam), fill=stone, outline=joint, width=line)
    for x in np.arange(px * 0.2, px, px * 0.2):
        draw.line((x, 0, x, beam), fill=joint, width=line)


@functools.lru_cache(maxsize=4)
def _backdrop(scene: Scene, px: int) -> Image.Image:
    """What stands behind the objects in all frames of a scene."""
    image = Image.new("RGB", (px, px))
    draw = ImageDraw.Draw(image)
    _background(draw, scene, np.random.default_rng((scene.seed, 0)), px)
    if scene.place == "arch":
        _arch(draw, np.random.default_rng((scene.seed, 3)), px, scene.ambience == "night")
    return image


def _places(scene: Scene, rng: np.random.Generator) -> list[tuple[str, float, float, float]]:
    """(name, x, y, half of the width) of each object, as shares of the picture's edge."""
    names = [scene.obj, scene.second] if scene.second else [scene.obj] * (1 + COUNTS.index(scene.count))
    found = []
    for name, (x, y, share) in zip(names, _PLACES[COUNTS[len(names) - 1]], strict=True):
        x, y = x + rng.uniform(-1, 1) * 0.07 * share, y + rng.uniform(-1, 1) * 0.05 * share
        found.append((str(name), x, y, (0.21 + 0.17 * scene.size) * share))
    return found


@dataclass(frozen=True)
class _Shape:
    """A polygon of an object at rest."""

    corners: np.ndarray
    """x, y, x, y, ... in pixels; y from the object's centre."""
    centre: float
    """y of the object's centre, as a share of the picture's edge."""
    half: float
    """Half of the object's width, likewise."""
    fill: tuple[int, int, int]
    outline: str
    width: int


@functools.lru_cache(maxsize=4)
def _shapes(scene: Scene, px: int) -> list[_Shape]:
    """The sounding objects of all frames of a scene."""
    rng = np.random.default_rng((scene.seed, 1))
    places = _places(scene, rng)
    colour = _jitter(_rgb(_COLOURS[scene.colour]), rng, 16)
    found = []
    for name, x, y, half in places:
        found += _object(name, (x, y, half), px, colour, scene.ambience == "night", rng)
    return found


def _objects(draw: ImageDraw.ImageDraw, scene: Scene, px: int, bounce: float) -> None:
    """The sounding objects, lifted by `bounce` (a fraction of their size)."""
    for shape in _shapes(scene, px):
        corners = shape.corners.copy()
        corners[1::2] += px * (shape.centre - bounce * shape.half)
        draw.polygon(corners.tolist(), fill=shape.fill, outline=shape.outline, width=shape.width)


def region(scene: Scene) -> tuple[int, int, int, int]:
    """The box (left, top, right, bottom), in percent of the edge, that no object of a scene leaves.

    With room for the bounce, the lean, and the hand that holds the camera.
    """
    boxes = []
    for _, x, y, half in _places(scene, np.random.default_rng((scene.seed, 1))):
        boxes.append((x - 1.45 * half, y - 1.45 * half, x + 1.45 * half, y + 1.2 * half))
    lows = [min(box[i] for box in boxes) - 0.02 for i in (0, 1)]
    highs = [max(box[i] for box in boxes) + 0.02 for i in (2, 3)]
    left, top = (int(100 * max(0.0, low)) for low in lows)
    right, bottom = (math.ceil(100 * min(1.0, high)) for high in highs)
    return left, top, right, bottom


def _object(
    name: str,
    place: tuple[float, float, float],
    px: int,
    colour: tuple[int, int, int],
    night: bool,
    rng: np.random.Generator,
) -> list[_Shape]:
    """One object. place: x and y of its centre, and half of its width, as shares of the edge."""
    palette, shapes = _OBJECTS[name]
    fills = {key: _jitter(_rgb(value), rng, 14) for key, value in palette.items()}
    for key, bright in _COLOURED.items():
        fills[key] = tuple(int(part * bright) for part in colour)  # type: ignore[assignment]
    cx, half = px * place[0], px * place[2]
    mirror = -1.0 if rng.random() < 0.5 else 1.0
    lean = rng.uniform(-0.12, 0.12)  # radians
    line = max(1, round(half * 0.028))
    outline = "#d8d8e8" if night else "#1b1716"
    turn_x, turn_y = np.cos(lean), np.sin(lean)
    found = []
    for kind, unit, key in shapes:
        u, v = _corners(kind, unit)
        x, y = cx + mirror * half * (u * turn_x - v * turn_y), half * (u * turn_y + v * turn_x)
        found.append(_Shape(np.stack([x, y], axis=1).ravel(), *place[1:], fills[key], outline, line))
    return found


@functools.cache
def _corners(kind: str, unit: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """x and y of a shape's corners, or of points on the ellipse within a box."""
    if kind == "poly":
        return np.array(unit[0::2]), np.array(unit[1::2])
    x0, y0, x1, y1 = unit
    if kind == "rect":
        return np.array([x0, x1, x1, x0]), np.array([y0, y0, y1, y1])
    turns = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    return (x0 + x1) / 2 + (x1 - x0) / 2 * np.cos(turns), (y0 + y1) / 2 + (y1 - y0) / 2 * np.sin(turns)


def _weather(draw: ImageDraw.ImageDraw, scene: Scene, px: int, time_s: float) -> None:
    """What falls: rain as slanted streaks, snow as flakes; it moves with time."""
    rng = np.random.default_rng((scene.seed, 2))
    if scene.ambience == "rain":
        for x, y in rng.uniform(0, 1, (26, 2)):
            y = (y + 1.7 * time_s) % 1.0
            a = (px * x, px * y)
            draw.line((*a, a[0] - px * 0.035, a[1] + px * 0.11), fill="#cfe3f5", width=max(1, px // 54))
    if scene.ambience == "snow":
        for x, y in rng.uniform(0, 1, (26, 2)):
            cx, cy, r = px * x, px * ((y + 0.25 * time_s) % 1.0), px * 0.021
            draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill="#ffffff", outline="#9fb2c4")


def _render_medium(image: Image.Image, medium: str) -> Image.Image:
    """Turns the coloured scene into the medium: a photo as it is, a framed painting, a pencil sketch."""
    if medium == "photo":
        return image
    pixels = np.asarray(image, np.float32) / 255
    if medium == "painting":
        warm = np.clip(pixels * np.array([1.08, 0.98, 0.82], np.float32) * 255, 0, 255)
        framed = Image.fromarray(warm.astype(np.uint8))
        draw, px = ImageDraw.Draw(framed), image.width
        draw.rectangle((0, 0, px - 1, px - 1), outline="#8a5a17", width=round(px * 0.07))
        draw.rectangle((0, 0, px - 1, px - 1), outline="#d9a437", width=round(px * 0.04))
        return framed
    grey = image.convert("L")
    edges = np.asarray(grey.filter(ImageFilter.FIND_EDGES), np.float32) / 255
    edges[[0, -1], :] = edges[:, [0, -1]] = 0  # the filter marks the border itself
    tone = np.asarray(grey, np.float32)[..., None] / 255
    paper = np.array([250, 244, 228], np.float32)
    tinted = paper * (0.4 + 0.6 * (0.4 * tone + 0.6 * pixels))
    edges = np.clip(edges * 1.6, 0, 1)[..., None]
    out = tinted * (1 - edges) + np.array([40, 36, 34], np.float32) * edges
    return Image.fromarray(np.clip(out, 0, 255).astype(np.uint8))


def draw_scene(scene: Scene, size_px: int = 128, time_s: float = 0.0, level: float = 0.0) -> Image.Image:
    """Draws one frame of a scene.

    size_px: edge of the square picture; time_s moves the weather; level in [0, 1] is how loud the object sounds at
    this instant and lifts it a little. The same scene and time give the same picture. Returns an RGB image.
    """
    px = size_px * 2  # drawn at twice the size and halved: anti-aliasing
    image = _backdrop(scene, px).copy()
    draw = ImageDraw.Draw(image)
    _objects(draw, scene, px, bounce=BOUNCE * level)
    _weather(draw, scene, px, time_s)
    return _render_medium(image.reduce(2), scene.medium)
