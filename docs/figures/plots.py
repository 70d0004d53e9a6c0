"""The figures of README.md and docs/results.md, from a finished run.

    python docs/figures/plots.py runs/demo/summary.json

Writes pictures.png and retrieval.png beside this file, and where the run's evaluate/ lies beside
summary.json also examples.png: sounds, and what was painted from them.
"""

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from aai.media.waveform import read_sound
from pipelines.pages.plots import COLOURS
from pipelines.pages.run_files import RunFiles

HERE = Path(__file__).resolve().parent
CONDITIONS = {
    "full_caption": "a caption that names all",
    "ceiling": "the true caption (ceiling)",
    "sound": "the sound (ours)",
    "nearest_caption": "the nearest training caption",
    "closed_form": "closed form, nothing trained",
    "shuffled_audio": "another clip's sound (floor)",
    "random_token": "a random token (floor)",
}
ATTRIBUTES = ("object", "ambience", "colour", "count", "place")
SHOWN = {
    "sound": "the sound",
    "sketch": "“a sketch of\n<sound>”",
    "nearest_caption": "nearest\ncaption",
    "closed_form": "closed form",
    "ceiling": "true caption\n(ceiling)",
    "shuffled_audio": "another sound\n(floor)",
    "random_token": "random token\n(floor)",
}
"""Columns of examples.png after the sound and its true frame."""
DIRECTIONS = {
    "a2v": "sound to picture",
    "v2a": "picture to sound",
    "a2t": "sound to caption",
    "t2a": "caption to sound",
}
EXAMPLES = 5
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.2}


def main(summary_file: str) -> None:
    """Draws every figure that the run has data for."""
    file = Path(summary_file)
    summary = json.loads(file.read_text())
    with matplotlib.rc_context(STYLE):
        draw_pictures(summary["generation"])
        draw_retrieval(summary["retrieval"])
        if (file.parent / "evaluate").is_dir():
            draw_examples(RunFiles(str(file.parent), summary))


def draw_pictures(found: dict[str, Any]) -> None:
    """What the judge reads off the pictures, condition by condition, with chance as a dashed line."""
    names = [name for name in CONDITIONS if name in found]
    attributes = [name for name in ATTRIBUTES if name in found["sound"]]
    figure = Figure(figsize=(2 + 2.1 * len(attributes), 3.2), layout="constrained")
    for axes, attribute in zip(figure.subplots(1, len(attributes), sharey=True), attributes, strict=True):
        values = [found[name][attribute] for name in names]
        colours = [COLOURS[0] if name == "sound" else "#a9b1bd" for name in names]
        _bars(axes, [CONDITIONS[name] for name in names], values, colours)
        axes.axvline(found["chance"][attribute], color="#444a55", linestyle="--", linewidth=1, label="chance")
        axes.set(xlim=(0, 1.25), xlabel=f"share with the sound's {attribute}")
    _save(figure, "pictures.png")


def draw_retrieval(found: dict[str, Any]) -> None:
    """Recall at 1, 5 and 10 in each direction; the interval of R@1, and chance, which is hardly above 0."""
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    axes = figure.subplots()
    for place, k in enumerate((1, 5, 10)):
        x = np.arange(len(DIRECTIONS)) + (place - 1) * 0.26
        values = [found[name][f"r{k}"] for name in DIRECTIONS]
        axes.bar(x, values, 0.24, color=COLOURS[place], label=f"R@{k}")
        axes.bar_label(axes.containers[-1], fmt="%.2f", padding=9 if k == 1 else 2, fontsize=8)
        if k == 1:
            low, high = np.array([found[name]["ci95"] for name in DIRECTIONS]).T
            axes.errorbar(x, values, [values - low, high - values], fmt="none", ecolor="#14181f", capsize=2)
    picture, caption = found["a2v"]["chance"], found["a2t"]["chance"]
    axes.plot([], [], " ", label=f"chance of R@1: {picture:.4f} (pictures), {caption:.4f} (captions)")
    axes.set_xticks(np.arange(len(DIRECTIONS)), list(DIRECTIONS.values()))
    axes.set(ylim=(0, 1.25), yticks=np.arange(0, 1.1, 0.2), ylabel=f"recall among {found['gallery']} clips")
    axes.grid(False, axis="x")
    axes.legend(loc="upper left", ncols=4, frameon=False, fontsize=8)
    _save(figure, "retrieval.png")


def draw_examples(run: RunFiles) -> None:
    """One held-out clip per object: its sound, its frame, and a picture under each condition; ticks are the judge's."""
    clips = sorted(run.samples["objects"].items())[:EXAMPLES]
    noise = np.random.default_rng(0)  # far below hearing: the logarithm of silence would warn
    columns = ["sound, 0 to 8 kHz", "true frame", *SHOWN.values()]
    figure = Figure(figsize=(11, 1.28 * len(clips) + 0.4), layout="constrained")
    grid = figure.subplots(len(clips), len(columns), width_ratios=[1.6] + [1] * (len(columns) - 1))
    for cells, (name, row) in zip(grid, clips, strict=True):
        for axes in cells:
            axes.set(xticks=[], yticks=[])
            axes.grid(False)
        clip = run.clips[row]
        audio = read_sound(clip["audio"])
        cells[0].specgram(
            audio + 1e-5 * noise.standard_normal(len(audio)), Fs=16_000, NFFT=512, noverlap=256, cmap="magma"
        )
        cells[0].set_ylabel(name, fontsize=10)
        _show(cells[1], clip["frame"], None)
        for axes, condition in zip(cells[2:], SHOWN, strict=True):
            pictures = [picture for picture in run.pictures.get(condition, []) if picture["row"] == row]
            if pictures:
                _show(axes, pictures[0]["png"], pictures[0]["object"] == name)
            else:
                axes.axis("off")
    for axes, title in zip(grid[0], columns, strict=True):
        axes.set_title(title, fontsize=8.5)
    _save(figure, "examples.png", dpi=100)


def _show(axes: Axes, picture: bytes, right: bool | None) -> None:
    """A picture in a green frame where the judge reads the sound's object off it, else in a red one."""
    axes.imshow(Image.open(io.BytesIO(picture)).convert("RGB"))
    colour = {True: "#1f9e5a", False: "#cc3d3d", None: "#8d929b"}[right]
    axes.spines[:].set(visible=True, color=colour, linewidth=2)


def _bars(axes: Axes, names: Sequence[str], values: Sequence[float], colours: Sequence[str]) -> None:
    axes.barh(names, values, color=colours)
    axes.bar_label(axes.containers[0], fmt="%.2f", padding=3, fontsize=8.5)
    axes.grid(False, axis="y")
    if not axes.yaxis_inverted():
        axes.invert_yaxis()


def _save(figure: Figure, name: str, dpi: int = 110) -> None:
    """A PNG of 256 colours: a third of the bytes, and nobody sees it."""
    sink = io.BytesIO()
    figure.savefig(sink, dpi=dpi)
    Image.open(sink).convert("RGB").quantize(256).save(HERE / name, optimize=True)
    print(HERE / name)


if __name__ == "__main__":
    main(*sys.argv[1:])
