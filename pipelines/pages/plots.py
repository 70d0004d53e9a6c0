"""Pictures, sounds and plots as they stand inside a self-contained HTML page: data URIs and inline SVG."""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from cycler import cycler
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from PIL import Image

if TYPE_CHECKING:
    from aai.encoders.audio import AudioEncoderConfig

INK = "#010203"
"""Stands for the page's text colour: the page may be light or dark."""
COLOURS = ("#1f9e92", "#e0803c", "#5b8def", "#b06fc9", "#98a03a", "#d9607a")
"""Line colours that are readable on light and on dark ground."""
STYLE = {
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), INK),
    "grid.color": INK,
    **dict.fromkeys(("axes.linewidth", "xtick.major.width", "ytick.major.width", "grid.linewidth"), 0.5),
    **dict.fromkeys(("axes.labelsize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 8.5),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.grid": True,
    "grid.alpha": 0.12,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
}
Points = Sequence[tuple[float, float]]


def data_uri(data: bytes, kind: str) -> str:
    """A file's bytes as a data URI of the given media type."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def thumbnail(data: bytes, size_px: int = 128) -> str:
    """A stored picture as the data URI of a JPEG, its longer edge at most `size_px`."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    image.thumbnail((size_px, size_px))
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=90, subsampling=0)
    return data_uri(sink.getvalue(), "image/jpeg")


def spectrogram(audio: np.ndarray, config: "AudioEncoderConfig", width_px: int = 240, height_px: int = 80) -> str:
    """The log-mel of a waveform float32 [S] as the audio encoder hears it: a PNG data URI, low notes at the bottom."""
    import torch  # only here: most pages need no torch, which takes seconds to import

    from aai.encoders.audio import log_mel

    mel = log_mel(config)(torch.from_numpy(audio)[None])[0].numpy().T[::-1]  # [M, T]
    low, high = np.percentile(mel, [5, 99.5])
    shade = np.clip((mel - low) / max(1e-6, float(high - low)), 0, 1)
    image = Image.fromarray((shade * 255).astype(np.uint8)).resize((width_px, height_px), Image.Resampling.BICUBIC)
    image.putpalette((matplotlib.colormaps["magma"](np.arange(256))[:, :3] * 255).astype(np.uint8).tobytes())
    sink = io.BytesIO()
    image.save(sink, "PNG", optimize=True)
    return data_uri(sink.getvalue(), "image/png")


def lines(
    series: Mapping[str, Points],
    title: str,
    x_label: str = "step",
    y_label: str = "",
    log_y: bool = False,
    floor_zero: bool = False,
    dots: bool = False,
) -> Markup:
    """A line plot of {name: [(x, y), ...]}, as an HTML figure with inline SVG."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(x_label, y_label)
        for name, points in series.items():
            x, y = zip(*points, strict=True)
            axes.plot(
                x, y, label=name.removeprefix("val_").replace("_", " "), marker="o" if dots else None, markersize=4
            )
        if log_y:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        if floor_zero:
            axes.set_ylim(bottom=0)
        if len(series) > 1:
            figure.legend(loc="outside upper left", ncols=3, handlelength=1.2)
        return _svg(figure, title)


def scatter(points: Points, title: str, x_label: str, y_label: str) -> Markup:
    """A scatter plot with the mean of y in ten bins of equally many points, as `lines` returns it."""
    x, y = np.array(points, float).T
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(x_label, y_label)
        axes.scatter(x, y, s=12, alpha=0.4, linewidths=0)
        bins = np.array_split(np.argsort(x), min(10, len(x)))
        axes.plot([x[b].mean() for b in bins], [y[b].mean() for b in bins], color=COLOURS[1], label="mean of a tenth")
        axes.legend()
        return _svg(figure, title)


def histogram(
    edges: Sequence[float],
    stacks: Mapping[str, Sequence[float]],
    title: str,
    x_label: str,
    y_label: str = "rows",
    marks: Mapping[str, float] | None = None,
    colours: Sequence[str] = COLOURS,
    beside: bool = False,
) -> Markup:
    """Bars of {name: [count per bin]} over B + 1 edges, as `lines` returns it; marks: named vertical lines.

    The bars are stacked, or with `beside` drawn over each other, half transparent. Counts that span more than two
    orders of magnitude get a logarithmic axis: rare bins must not vanish.
    """
    x, width = np.array(edges[:-1]), np.diff(edges)
    counts = {name: np.array(part, float) for name, part in stacks.items()}
    top = np.sum(list(counts.values()), axis=0) if not beside else np.max(list(counts.values()), axis=0)
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(x_label, y_label)
        axes.grid(False, axis="x")
        base = np.zeros(len(x))
        for (name, part), colour in zip(counts.items(), colours, strict=False):
            shown = part > 0
            axes.bar(
                x[shown], part[shown], width[shown], base[shown], align="edge", color=colour, label=name,
                alpha=0.6 if beside else 1, linewidth=0,
            )  # fmt: skip
            base = base if beside else base + part
        if len(counts) > 1:
            figure.legend(loc="outside upper left", ncols=3, handlelength=1.0, handleheight=0.8)
        if not beside and top.max(initial=0) > 100 * top[top > 0].min(initial=np.inf):
            axes.set_yscale("log")
            axes.set_ylim(bottom=0.7)
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        for name, place in (marks or {}).items():
            axes.axvline(place, color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
            right = place > (edges[0] + edges[-1]) / 2
            axes.annotate(
                name, (place, 1), (4 if right else -4, 2), xycoords=("data", "axes fraction"), fontsize=8.5,
                textcoords="offset points", ha="right" if right else "left", va="bottom",
            )  # fmt: skip
        return _svg(figure, title)


def _axes(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.6, 3.0), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x_label, ylabel=y_label)
    return figure, axes


def _svg(figure: Figure, title: str) -> Markup:
    """A <figure> of caption and inline SVG that takes colour and font from the page around it."""
    sink = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": title}):  # names within a page must not repeat
        figure.savefig(sink, format="svg", transparent=True)
    text = sink.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", text)
    label = Markup.escape(title)
    svg = text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    return Markup(f'<figure class="plot"><figcaption>{label}</figcaption>{svg}</figure>')
