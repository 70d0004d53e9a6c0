"""What a page embeds: pictures, spectrograms and plots that say what they are given."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from aai.encoders.audio import AudioEncoderConfig
from pipelines.pages.plots import data_uri, histogram, lines, scatter, spectrogram, thumbnail


def opened(uri: str) -> Image.Image:
    """The picture of a data URI."""
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))


def bars(svg: str) -> int:
    """Filled bars of a plot, without ground and frame."""
    return len(re.findall(r'<path[^>]*style="fill: #(?:1f9e92|e0803c)', svg))


def test_a_thumbnail_keeps_shape_and_colour_and_is_no_larger_than_asked() -> None:
    sink = io.BytesIO()
    Image.new("RGBA", (300, 100), (200, 30, 40, 255)).save(sink, "PNG")
    uri = thumbnail(sink.getvalue(), 60)
    assert uri.startswith("data:image/jpeg;base64,")
    assert opened(uri).size == (60, 20)
    assert np.abs(np.asarray(opened(uri), int)[10, 30] - (200, 30, 40)).max() < 6
    sink = io.BytesIO()
    Image.new("RGB", (20, 10)).save(sink, "PNG")
    assert opened(thumbnail(sink.getvalue())).size == (20, 10)
    assert data_uri(b"\x00", "audio/flac") == "data:audio/flac;base64,AA=="


@pytest.mark.parametrize(("hertz", "rows"), [(150, slice(60, 80)), (7000, slice(0, 20))])
def test_low_notes_are_at_the_bottom(hertz: float, rows: slice) -> None:
    config = AudioEncoderConfig()
    time_s = np.arange(config.sample_rate_hz) / config.sample_rate_hz
    picture = opened(spectrogram(np.sin(2 * np.pi * hertz * time_s).astype(np.float32), config))
    assert picture.size == (240, 80)
    brightness = np.asarray(picture.convert("L"), float).mean(axis=1)
    assert rows.start <= brightness.argmax() < rows.stop


def test_a_plot_names_its_series_and_takes_colour_and_font_from_the_page() -> None:
    svg = lines({"val_a2v_r1": [(0, 0.1), (9, 0.5)], "loss": [(0, 3)]}, "R@1 <b>", "step", "share")
    assert svg.startswith('<figure class="plot"><figcaption>R@1 &lt;b&gt;</figcaption><svg role="img"')
    for text in ("a2v r1", "loss", "step", "share"):
        assert f">{text}<" in svg, text
    assert "currentColor" in svg
    assert "#010203" not in svg
    assert not re.search(r"<metadata|<style|DejaVu|<g id=", svg)


def test_names_within_a_page_do_not_repeat_and_plots_are_the_same_again() -> None:
    points = {"a": [(0.0, 1.0), (1.0, 2.0)]}
    one, other = lines(points, "one"), lines(points, "other")
    ids = [set(re.findall(r'id="([^"]+)"', svg)) for svg in (one, other)]
    assert ids[0]
    assert not ids[0] & ids[1]
    assert lines(points, "one") == one


def test_a_scatter_plot_of_a_few_points_has_its_mean() -> None:
    svg = scatter([(0, 0), (1, 1), (2, 4)], "few", "x", "y")
    assert ">mean of a tenth<" in svg
    assert len(re.findall(r"<use ", svg)) >= 3


def test_a_histogram_draws_no_empty_bars_and_keeps_rare_ones_in_sight() -> None:
    svg = histogram([0, 1, 2, 3], {"kept": [5, 0, 2], "lost": [0, 0, 1]}, "h", "s", marks={"limit": 2.5})
    assert bars(svg) == 3 + 2  # and a square each in the legend
    assert ">limit<" in svg
    assert ">10<" not in svg
    wide = histogram([0, 1, 2], {"kept": [5000, 1]}, "wide", "s")
    assert {">1<", ">10<", ">1000<"} <= set(re.findall(r">[\d.]+<", wide))
    assert bars(histogram([0, 1], {"kept": [0]}, "none", "s")) == 0
