"""What a sound does to a picture, judged on held-out clips of the demo (make accept): mixing, strips, cues, few steps.

AAI_DEMO names the run folder of a finished demo; without it one is made in runs/accept. Each test prints its figures
and leaves them in RUN/figures. Seeds of pictures differ; intervals are the 95 % of a bootstrap over pictures.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from aai.addons import AddOns
from aai.cue import CueConfig, refine
from aai.features import load_split
from aai.foundation.clip import FrozenClip
from aai.foundation.identity import TOY_WEIGHTS
from aai.inject import Sound
from aai.keeping import as_pixels, colours, contours, given_nearer
from aai.metrics import bootstrap_ci, paired_difference
from aai.painter import Painter
from aai.regions import joined, side_by_side
from aai.sampling import PaintRequest
from aai.strips import along
from aai.toy.grammar import Scene, caption_of
from aai.toy.judge import ToyJudge
from aai.toy.roster import Clip
from aai.toy.writer import draw_frames
from pipelines.evaluation.cases import REPAINTED
from pipelines.evaluation.grades import KEPT
from pipelines.evaluation.judges import ATTRIBUTES, UNCAPTIONED

pytestmark = [pytest.mark.accept, pytest.mark.timeout(7200)]
ROOT = Path(__file__).resolve().parents[2]
RUN = Path(os.environ.get("AAI_DEMO", ROOT / "runs" / "accept"))
COUNT, AT_ONCE, SEEDS = 320, 32, 4
ASKED = PaintRequest(steps=10)


class World:
    """Held-out clips of the demo, its painter and its readers."""

    def __init__(self) -> None:
        if not (RUN / "adapt" / "bundle").exists():
            subprocess.run([sys.executable, "-m", "pipelines", "demo", "--out", str(RUN)], cwd=ROOT, check=True)
        self.painter = Painter.load(str(RUN / "adapt" / "bundle"))
        samples = self.painter.aligner.config.clip_samples
        self.clips = load_split(str(RUN / "features"), "test", samples, columns=("audio", "image_features", "latents"))
        self.judge = ToyJudge.load()
        self.single = [i for i, labels in enumerate(self.clips["labels"]) if labels[7] == "none"]
        self.double = [i for i, labels in enumerate(self.clips["labels"]) if labels[7] != "none"]

    @cached_property
    def clip(self) -> FrozenClip:
        """The frozen CLIP."""
        return FrozenClip(self.painter.foundation)

    def label(self, row: int, place: int) -> str:
        """A label of a clip."""
        return str(self.clips["labels"][row][place])

    def sound(self, row: int) -> np.ndarray:
        """A clip's waveform."""
        return np.asarray(self.clips["audio"][row])

    def pairs(self, count: int, one_ambience: bool = True) -> list[tuple[int, int]]:
        """Clips of one object each, of two objects and one ambience, or of two."""
        rng = np.random.default_rng(0)
        found: list[tuple[int, int]] = []
        while len(found) < count:
            a, b = (int(row) for row in rng.choice(self.single, 2, replace=False))
            if self.label(a, 0) != self.label(b, 0) and (self.label(a, 1) == self.label(b, 1)) == one_ambience:
                found.append((a, b))
        return found

    def paint(self, embeds: Sequence[Tensor], request: PaintRequest = ASKED, painter: Painter | None = None) -> Any:
        """Pictures of prompt embeddings [1, L, D], each from a seed of its own."""
        done: list[Image.Image] = []
        for at in range(0, len(embeds), AT_ONCE):
            some = joined(embeds[at : at + AT_ONCE], (painter or self.painter).injector.tokenizer.model_max_length)
            done += (painter or self.painter).paint(some, range(at, at + len(some)), request)
        return done

    def asked(self, row: int, **request: Any) -> Tensor:
        """Prompt embedding of a clip's sound, as a request of generate has it."""
        return self.painter.embed_request(self.sound(row), PaintRequest.parse(request))[0]

    def captions_in_strips(self, *captions: str) -> Tensor:
        """Prompt embedding of captions where sounds would be: what mixing makes of what is known exactly."""
        painter, anything = self.painter, self.painter.vocabulary.any_object
        texts = [re.sub(painter.head_pattern, "a photo of", caption) for caption in captions]
        texts.append(f"a photo of {' and '.join([anything] * len(captions))}")
        return side_by_side(painter.embed_text(texts).split(1), painter.injector.tokenizer.model_max_length)

    def write(self, rows: Sequence[int]) -> list[Tensor]:
        """Prompt embeddings of clips' sounds."""
        return [self.painter.embed(self.sound(row), self.painter.prompt) for row in rows]


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def told(name: str, figures: dict[str, Any]) -> dict[str, Any]:
    (RUN / "figures").mkdir(exist_ok=True)
    (RUN / "figures" / f"{name}.json").write_text(json.dumps(figures, indent=1))
    print(name, json.dumps(figures))
    return figures


def share(hits: Sequence[bool]) -> dict[str, Any]:
    values = np.array(hits, float)
    return {"share": float(values.mean()), "ci95": list(bootstrap_ci(values)), "pictures": len(values)}


@pytest.mark.parametrize("one_ambience", [True, False])
def test_l6_two_sounds_of_one_prompt_are_both_painted(world: World, one_ambience: bool) -> None:
    pairs, painter, prompt = world.pairs(COUNT, one_ambience), world.painter, "a photo of <a> and <b>"
    wanted = [{world.label(a, 0), world.label(b, 0)} for a, b in pairs]
    sounds = [{"a": world.sound(a), "b": world.sound(b)} for a, b in pairs]
    texts = [f"a photo of a {' and a '.join(sorted(both))}" for both in wanted]
    own, full = world.clips["caption"], [caption_of(labels) for labels in world.clips["labels"]]
    kinds = {
        "regions": [painter.embed(both, prompt) for both in sounds],
        "words": [painter.embed(both, prompt, mixing="words") for both in sounds],
        "two-object caption": painter.embed_text(texts).split(1),
        "their captions in strips": [world.captions_in_strips(own[a], own[b]) for a, b in pairs],
        "their full captions in strips": [world.captions_in_strips(full[a], full[b]) for a, b in pairs],
        "first sound alone": world.write([a for a, _ in pairs]),
    }
    figures: dict[str, Any] = {}
    hits: dict[str, np.ndarray] = {}
    for name, embeds in kinds.items():
        begin = time.process_time()
        pictures = world.paint(embeds)
        cpu_s, read = time.process_time() - begin, world.judge.read(pictures)
        seen = [{row["object"], row["second"]} for row in read]
        hits[name] = np.array([one == both for one, both in zip(seen, wanted, strict=True)], float)
        either = np.mean([bool(one & both) for one, both in zip(seen, wanted, strict=True)])
        ambience = np.mean([row["ambience"] in {world.label(i, 1) for i in pair}
                            for row, pair in zip(read, pairs, strict=True)])  # fmt: skip
        figures[name] = {**share(hits[name].tolist()), "either": either, "ambience": ambience, "cpu_s": cpu_s}
    figures["regions above words"] = paired_difference(hits["regions"], hits["words"])
    told("mixing" if one_ambience else "mixing_two_ambiences", figures)
    assert figures["regions"]["share"] >= 0.6 * figures["two-object caption"]["share"]


def test_l3_the_halves_of_a_clip_of_two_objects_are_both_painted(world: World) -> None:
    """A clip says one object after the other: painted as everyone's sounds are, or whole by one A*."""
    painter, rows = world.painter, world.double
    wanted = [{world.label(row, 0), world.label(row, 7)} for row in rows]
    captions = [re.sub(painter.head_pattern, "a photo of", world.clips["caption"][row]) for row in rows]
    full = [re.sub(painter.head_pattern, "a photo of", caption_of(world.clips["labels"][row])) for row in rows]
    kinds = {name: list(painter.embed_text(texts).split(1)) for name, texts in
             (("caption", captions), ("full caption", full))}  # fmt: skip
    for name, parts in (("whole", 1), ("by itself", None), ("in halves", 2)):
        kinds[name] = [world.asked(row, sound_parts=parts) for row in rows]
    figures: dict[str, Any] = {}
    for name, embeds in kinds.items():
        read = world.judge.read(world.paint(embeds))
        figures[name] = share([{row["object"], row["second"]} == both for row, both in zip(read, wanted, strict=True)])
    told("halves", figures)
    assert figures["by itself"]["share"] >= 0.6 * figures["caption"]["share"]


def test_l3_clips_of_one_object_lose_little_by_being_cut_where_their_halves_differ(world: World) -> None:
    cut, hits = {}, {}
    for name, rows in (("one object", world.single), ("two objects", world.double)):
        cut[name] = [world.asked(row).shape[1] > world.asked(row, sound_parts=1).shape[1] for row in rows]
    for name, parts in (("whole", 1), ("by itself", None)):
        embeds = [world.asked(row, sound_parts=parts) for row in world.single]
        hits[name] = graded(world, world.single, world.paint(embeds))
    figures = {"cut": {name: share(rows) for name, rows in cut.items()}, "clips": len(world.single)}
    for kind in hits["whole"]:
        means = {name: float(found[kind].mean()) for name, found in hits.items()}
        figures[kind] = means | {"difference": paired_difference(hits["by itself"][kind], hits["whole"][kind])}
    told("cut", figures)
    assert figures["object"]["difference"]["ci95"][0] > -0.03


def test_l6_more_strength_shows_more_of_the_sound(world: World) -> None:
    """Seen by the CLIP: the cosine of a picture's feature to that of the sound's own picture; mean of four seeds."""
    rows = world.single[:COUNT]
    own = F.normalize(world.clips["image_features"][rows].float().mean(1), dim=-1)
    near = []
    for strength in (0.0, 0.5, 1.0):
        embeds = [world.painter.embed(world.sound(row), world.painter.prompt, strength) for row in rows]
        seen = world.clip.images(world.paint([row for row in embeds for _ in range(SEEDS)]))
        near.append((seen.view(len(rows), SEEDS, -1) * own[:, None]).sum(-1))

    def rising(parts: Sequence[Tensor]) -> list[bool]:
        found: list[bool] = ((parts[0] <= parts[1] + 1e-6) & (parts[1] <= parts[2] + 1e-6)).flatten().tolist()
        return found

    means = [part.mean(1) for part in near]
    figures = told("strength", {"monotone": share(rising(means)), "monotone, each seed alone": share(rising(near)),
                                "1 nearer than 0": share((near[0] < near[2]).flatten().tolist()),
                                "cosines": [float(part.mean()) for part in near]})  # fmt: skip
    assert figures["monotone"]["share"] >= 0.9


def test_l6_a_morph_goes_from_one_object_to_the_other(world: World) -> None:
    """Three pictures of a strip; nearness to the second sound's picture less that to the first's must rise."""
    pairs, painter = world.pairs(COUNT), world.painter
    pictures = F.normalize(world.clips["image_features"].float().mean(1), dim=-1)
    leaning = []
    for part in (0.0, 0.5, 1.0):
        embeds = []
        for a, b in pairs:
            heard = along(painter.parts(world.sound(a))[0], painter.parts(world.sound(b))[0], part)
            tokens = painter.adapter(heard[None])[0]
            embeds.append(painter.injector.embed(painter.prompt, {"sound": Sound(tokens, 1.0)}))
        seen = world.clip.images(world.paint(embeds))
        towards = pictures[[b for _, b in pairs]] - pictures[[a for a, _ in pairs]]
        leaning.append((seen * towards).sum(-1))
    rising = (leaning[0] <= leaning[1]) & (leaning[1] <= leaning[2])
    figures = told("morph", {"monotone": share(rising.tolist()), "leaning": [float(x.mean()) for x in leaning]})
    assert figures["monotone"]["share"] >= 0.8


def graded(world: World, rows: Sequence[int], pictures: Sequence[Image.Image]) -> dict[str, np.ndarray]:
    """What of each picture is right, 0 or 1, and its cosine to the clip's own frames."""
    read = world.judge.read(list(pictures))
    places = {"object": 0, "ambience": 1, "colour": 4, "count": 5, "place": 6}
    hits = {name: np.array([r[name] == world.label(row, place) for r, row in zip(read, rows, strict=True)], float)
            for name, place in places.items()}  # fmt: skip
    hits["uncaptioned"] = np.mean([hits[name] for name in UNCAPTIONED], axis=0)
    own = F.normalize(world.clips["image_features"][list(rows)].float().mean(1), dim=-1)
    hits["cosine"] = (world.clip.images(list(pictures)) * own).sum(-1).numpy()
    return hits


def test_a_sound_says_as_much_behind_other_words(world: World) -> None:
    """Beside it A* as the encoder makes it there, and the clip's caption in the sound's place."""
    rows, injector = world.single[:COUNT], world.painter.injector
    bodies = [re.sub(world.painter.head_pattern, "", world.clips["caption"][row]).strip() for row in rows]
    figures: dict[str, Any] = {}
    for prompt in ("a nice old photo of <sound>", "a photo of a big <sound>", "a painting of the snow and <sound>"):
        learned = injector.learned
        kinds = {"sound": [world.asked(row, prompt=prompt, sound_parts=1) for row in rows]}
        injector.learned = None
        kinds["sound, as it stands"] = [world.asked(row, prompt=prompt, sound_parts=1) for row in rows]
        injector.learned = learned
        kinds["caption"] = [world.painter.embed_text([prompt.replace("<sound>", body)]) for body in bodies]
        hits = {name: graded(world, rows, world.paint(embeds)) for name, embeds in kinds.items()}
        figures[prompt] = {name: {kind: share(found[kind].tolist()) for kind in ("object", "uncaptioned")}
                           for name, found in hits.items()}  # fmt: skip
        for kind in ("object", "uncaptioned"):
            figures[prompt][f"{kind} gained"] = paired_difference(
                hits["sound"][kind], hits["sound, as it stands"][kind]
            )
    told("elsewhere", figures)
    for found in figures.values():
        assert found["object gained"]["ci95"][0] > -0.03
        assert found["sound"]["object"]["share"] >= 0.9 * found["caption"]["object"]["share"]


def test_l5_a_cue_brings_the_picture_nearer_to_the_true_one(world: World) -> None:
    """By the mean of four seeds of each sound; nothing else may fall."""
    rows = world.single[:COUNT]
    cue = CueConfig(features=str(RUN / "features"))
    before, after, seconds = [], [], []
    for row in rows:
        found = refine(world.painter, world.sound(row), cue)
        seconds.append(found.seconds)
        for tokens, into in ((found.before, before), (found.after, after)):
            into.append(world.painter.injector.embed(world.painter.prompt, {"sound": Sound(tokens, 1.0)}))
    graded_of = []
    for embeds in (before, after):
        pictures = world.paint([row for row in embeds for _ in range(SEEDS)])
        hits = graded(world, np.repeat(rows, SEEDS).tolist(), pictures)
        graded_of.append({name: values.reshape(-1, SEEDS).mean(1) for name, values in hits.items()})
    was, now = graded_of
    figures: dict[str, Any] = {"seconds a sound": float(np.mean(seconds))}
    for name in was:
        figures[name] = {"before": float(was[name].mean()), **paired_difference(now[name], was[name])}
    told("cue", figures)
    assert min(figures[name]["ci95"][1] for name in was) >= 0
    assert figures["cosine"]["ci95"][0] > 0 or figures["uncaptioned"]["ci95"][0] > 0


def test_l8_four_steps_with_the_distilled_weights(world: World) -> None:
    """A* as trained with the whole model; beside four steps of the same sampler without the distilled weights."""
    rows, bundle = world.single[:COUNT], str(RUN / "adapt" / "bundle")
    lora = str(TOY_WEIGHTS / "lcm" / "pytorch_lora_weights.safetensors")
    if not Path(lora).exists():
        pytest.skip("no distilled weights: aai foundation --set models=[lcm]")
    fast, bare = (
        Painter.load(bundle, addons=AddOns(lora=file, scheduler="lcm")) for file in (lora, None)
    )  # fmt: skip
    four = PaintRequest(steps=4, guidance_scale=1)
    kinds: dict[str, tuple[Painter, PaintRequest]] = {
        "20 steps": (world.painter, PaintRequest(steps=20)),
        "4 distilled": (fast, four),
        "4 of lcm, not distilled": (bare, four),
        "4 steps": (world.painter, PaintRequest(steps=4)),
    }
    embeds, figures = world.write(rows), {}
    for name, (painter, request) in kinds.items():
        begin = time.process_time()
        pictures = world.paint(embeds, request, painter)
        cpu_s = time.process_time() - begin
        hits = graded(world, rows, pictures)
        figures[name] = {"cpu_s": cpu_s, **{key: float(values.mean()) for key, values in hits.items()}}
    told("few_steps", figures)
    whole, quick = figures["20 steps"], figures["4 distilled"]
    assert quick["object"] >= 0.95 * whole["object"]
    assert whole["cpu_s"] / quick["cpu_s"] >= 4


def drawn(scenes: Sequence[Scene]) -> np.ndarray:
    """The world's own pictures of scenes, as `aai.keeping` compares them."""
    shots = [draw_frames(Clip("", scene, scene, "test"), [1.0])[0] for scene in scenes]
    return np.stack([as_pixels(Image.fromarray(shot)) for shot in shots])


@pytest.mark.parametrize("verb", ["edit", "stylize"])
def test_l4_what_a_perfect_change_reaches(world: World, verb: str) -> None:
    """The given scene, drawn anew by the world with what the sound would have: the ceiling of given-nearer."""
    planned = json.loads((RUN / "world" / "scenes.json").read_text())
    scenes = [Scene(**planned[f"clips/{Path(uri).name}"]) for uri in world.clips["uri"]]
    place, rng = REPAINTED[verb], np.random.default_rng(0)
    values = np.array([row[place] for row in world.clips["labels"]])
    heard = [int(row) for row in rng.choice(world.single, COUNT)]
    given = [int(rng.choice([row for row in world.single if values[row] != values[own]])) for own in heard]
    pairs = [(scenes[row], scenes[own]) for row, own in zip(given, heard, strict=True)]
    if verb == "edit":
        kinds = {"the object alone": [replace(a, obj=b.obj) for a, b in pairs]}
        heard_too = [replace(a, obj=b.obj, pitch=b.pitch, rate=b.rate, size=b.size) for a, b in pairs]
        kinds["and its colour, count, size"] = heard_too
    else:
        kinds = {"the ambience": [replace(a, ambience=b.ambience) for a, b in pairs]}
    kinds["the same labels elsewhere"] = [replace(scene, seed=scene.seed + 1) for scene in [*kinds.values()][-1]]
    places = [ATTRIBUTES.index(name) for name in KEPT[verb]]
    kept = [tuple(world.label(row, at) for at in places) for row in given]
    labels = given, kept, values[given].tolist(), values[heard].tolist()
    shown = drawn([own for own, _ in pairs])
    figures = {name: {by.__name__: given_nearer(drawn(made), shown, *labels, by=by) for by in (colours, contours)}
               for name, made in kinds.items()}  # fmt: skip
    told(f"perfect_{verb}", figures)
    best, elsewhere = next(iter(figures.values())), figures["the same labels elsewhere"]
    name = "colours" if verb == "edit" else "contours"
    assert best[name] > 0.95 > elsewhere[name]


def evaluated(name: str, **settings: Any) -> dict[str, Any]:
    """The figures of `aai evaluate`, of 10 steps, on the demo's bundle; of the finished one in RUN/figures."""
    out = RUN / "figures" / name
    changed = {"request__steps": 10} | settings  # more than the demo's: inversion needs them
    sets = [part for key, value in changed.items() for part in ("--set", f"{key.replace('__', '.')}={value}")]
    words = [sys.executable, "-m", "pipelines", "evaluate", "--out", str(out), "--set", f"run_dir={RUN}", *sets]
    subprocess.run(words, cwd=ROOT, check=True, timeout=7200)
    return dict(json.loads((out / "evaluate.json").read_text())["generation"])


@pytest.mark.parametrize("repaint", ["img2img", "invert"])
def test_l4_what_edits_and_stylizations_change_and_keep(repaint: str) -> None:
    pictures = "{edit: 320, edit_from_noise: 320, stylize: 320, stylize_from_noise: 320}"
    rows = []
    for seed in (0, 1, 2):
        found = evaluated(f"{repaint}-{seed}", pictures=pictures, request__repaint=repaint, seed=seed)
        rows.append({verb: found[verb] for verb in ("edit", "stylize")})
    mean: Callable[..., float] = lambda *path: float(np.mean([_at(row, path) for row in rows]))  # noqa: E731
    figures = {
        "edit": {key: mean("edit", key) for key in ("object", "given_nearer", "outside_distance", "kept")},
        "edit from noise": {key: mean("edit", "from_noise", key) for key in ("object", "given_nearer")},
        "stylize": {key: mean("stylize", key) for key in ("ambience", "given_nearer", "kept_object", "kept_medium")},
        "stylize from noise": {key: mean("stylize", "from_noise", key) for key in ("ambience", "given_nearer")},
    }
    told(f"repaint_{repaint}", figures)
    edit, style = figures["edit"], figures["stylize"]
    assert edit["given_nearer"] > figures["edit from noise"]["given_nearer"]
    if repaint == "invert":
        assert min(style["kept_medium"], edit["kept"]) >= 0.9
        assert min(style["ambience"], edit["object"]) >= 0.85
        assert min(style["given_nearer"], edit["given_nearer"]) >= 0.95
        assert style["kept_object"] >= 0.9


def _at(values: Any, path: Sequence[str]) -> float:
    for key in path:
        values = values[key]
    return float(values)
