"""The plan of a toy world: which clips there are, and which defects are planted. A pure function of (number, seed)."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from aai.toy.grammar import MEDIA, NOVELTIES, Scene, random_scene

SPLITS = (("train", 0.6), ("val", 0.1), ("test", 0.3))
MEDIA_SHARES = {"photo": 0.5, "sketch": 0.25, "painting": 0.25}
NOVELTY_SHARES = {"seen": 0.88, "pair": 0.04, "timbre": 0.04, "values": 0.04}
"""Of all clips; what is new is in the test split alone."""
SOUND_FORMATS = ((44100, "stereo"), (16000, "mono"), (22050, "mono"), (24000, "mono"), (32000, "stereo"))
"""(sample rate in Hz, channel layout) of ordinary clips."""


@dataclass(frozen=True)
class Kind:
    """A planted peculiarity: its share of all clips, and the code curation must reject it with (None: accept)."""

    share: float
    code: str | None = None


KINDS = {
    "cut_index": Kind(0.005, "UNREADABLE"),
    "cut_media": Kind(0.005, "UNREADABLE"),
    "text_file": Kind(0.005, "UNREADABLE"),
    "empty_file": Kind(0.005, "EMPTY_FILE"),
    "silent": Kind(0.010, "SILENT"),
    "no_audio": Kind(0.010, "NO_AUDIO"),
    "no_video": Kind(0.0075, "NO_VIDEO"),
    "black_video": Kind(0.010, "BLACK_VIDEO"),
    "frozen_video": Kind(0.010, "FROZEN_VIDEO"),
    "exact_duplicate": Kind(0.0125, "EXACT_DUPLICATE"),
    "near_duplicate": Kind(0.0125, "NEAR_DUPLICATE"),
    "cross_split_duplicate": Kind(0.010, "CROSS_SPLIT_DUPLICATE"),
    "wrong_audio": Kind(0.010, "WRONG_AUDIO"),
    "too_short": Kind(0.0075, "TOO_SHORT"),
    "variable_frame_rate": Kind(0.0075),
    "rate_8khz": Kind(0.006),
    "rate_11khz": Kind(0.006),
    "rate_48khz": Kind(0.006),
    "mono": Kind(0.006),
    "surround_5_1": Kind(0.0075),
    "start_offset": Kind(0.0075),
    "dash_name": Kind(0.006),
    "unicode_name": Kind(0.006),
}
"""Defects (with a code: to be rejected) and oddities (without: to be accepted)."""
DUPLICATES = ("exact_duplicate", "near_duplicate", "cross_split_duplicate")


@dataclass(frozen=True)
class Clip:
    """The plan of one file: everything its bytes depend on."""

    name: str
    scene: Scene
    sound: Scene
    """Whose sound is heard: the scene's own, except where the sound is planted wrong."""
    split: str
    kind: str = "plain"
    duration_s: float = 2.0
    fps: int = 8
    size_px: int = 128
    sample_rate_hz: int = 44100
    layout: str = "stereo"
    gain_db: float = 0.0
    start_s: float = 0.0
    """Presentation time of the first frame and the first sound."""
    quality: int = 24
    """x264's constant rate factor."""
    pair: str | None = None
    """Name of the file this one duplicates."""

    @property
    def uri(self) -> str:
        """Relative to the manifest's folder, so that the world can be moved."""
        return f"clips/{self.name}"


def plan_world(num_clips: int, seed: int, shares: Mapping[str, float] | None = None) -> list[Clip]:
    """What to write: `num_clips` clips, the planted ones among them. From 100 clips on every kind occurs.

    shares: of some kinds, in place of those in KINDS.
    """
    rng = np.random.default_rng((seed, 0))
    clips = [plain_clip(i, seed) for i in range(num_clips)]
    order = [int(i) for i in rng.permutation(num_clips)]
    least = 1 if num_clips >= 100 else 0
    chosen = {}
    for kind, spec in KINDS.items():
        for _ in range(max(least, round((shares or {}).get(kind, spec.share) * num_clips))):
            chosen[order.pop()] = kind
    for i, kind in chosen.items():
        if kind not in DUPLICATES:
            clips[i] = _planted(clips[i], kind, np.random.default_rng((seed, 2, i)))
    originals = sorted(order)
    for i, kind in sorted(chosen.items()):
        if kind in DUPLICATES:
            wanted = [j for j in originals if kind != "cross_split_duplicate" or clips[j].split == "test"]
            if wanted:  # a handful of clips may hold no test clip to copy
                j = wanted[int(rng.integers(len(wanted)))]
                originals.remove(j)
                clips[i] = _duplicate(clips[j], clips[i].name, kind)
    return clips


def plain_clip(index: int, seed: int) -> Clip:
    """An ordinary clip."""
    rng = np.random.default_rng((seed, 1, index))
    novelty = str(rng.choice(NOVELTIES, p=[NOVELTY_SHARES[name] for name in NOVELTIES]))
    scene = _scene_of(novelty, rng)
    scene = replace(scene, medium=str(rng.choice(MEDIA, p=[MEDIA_SHARES[m] for m in MEDIA])))
    rate, layout = SOUND_FORMATS[rng.integers(len(SOUND_FORMATS))]
    return Clip(
        name=f"clip_{index:06d}.mp4",
        scene=scene,
        sound=scene,
        split=split_of(f"{seed}:{index}") if novelty == "seen" else "test",
        sample_rate_hz=rate,
        layout=layout,
        quality=int(rng.integers(20, 27)),
    )


def _scene_of(novelty: str, rng: np.random.Generator) -> Scene:
    scene = random_scene(rng)
    while scene.novelty != novelty:
        scene = random_scene(rng)
    return scene


def split_of(key: str) -> str:
    """The split that a key falls into, by its hash."""
    share = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 2**32
    for name, size in SPLITS:
        if share < size:
            return name
        share -= size
    return SPLITS[-1][0]


def _planted(clip: Clip, kind: str, rng: np.random.Generator) -> Clip:
    """The clip with a defect or an oddity; kinds not named here only differ when they are written."""
    clip = replace(clip, kind=kind)
    scene = clip.scene
    changes: dict[str, dict[str, object]] = {
        "wrong_audio": {"sound": _another(scene, rng)},
        "too_short": {"duration_s": 0.2},
        "rate_8khz": {"sample_rate_hz": 8000, "layout": "mono"},
        "rate_11khz": {"sample_rate_hz": 11025, "layout": "mono"},
        "rate_48khz": {"sample_rate_hz": 48000, "layout": "stereo"},
        "mono": {"sample_rate_hz": 44100, "layout": "mono"},
        "surround_5_1": {"sample_rate_hz": 48000, "layout": "5.1"},
        "start_offset": {"start_s": float(rng.choice([0.5, 1.5, 3.0]))},
        "dash_name": {"name": f"-{clip.name}"},
        "unicode_name": {"name": clip.name.replace("clip_", "Klang ö ♪ ")},
    }
    return replace(clip, **changes.get(kind, {}))  # type: ignore[arg-type]


def _another(scene: Scene, rng: np.random.Generator) -> Scene:
    """A scene with other objects and another ambience, that training clips may have."""
    other = _scene_of("seen", rng)
    while other.ambience == scene.ambience or {other.obj, other.second} & {scene.obj, scene.second} - {None}:
        other = _scene_of("seen", rng)
    return other


def _duplicate(original: Clip, name: str, kind: str) -> Clip:
    """A second file of the original's scene; all but the exact one are encoded differently."""
    copy = replace(original, name=name, kind=kind, pair=original.name)
    if kind == "exact_duplicate":
        return copy
    rate = 32000 if original.sample_rate_hz != 32000 else 48000
    copy = replace(copy, sample_rate_hz=rate, layout="mono", gain_db=-1.5)
    copy = replace(copy, quality=original.quality + 6, size_px=112)
    return replace(copy, split="train") if kind == "cross_split_duplicate" else copy
