"""One row of a manifest: where it lies, what it says, and what is refused."""

from typing import Any

import pytest

from aai.errors import UserError
from pipelines.manifests.row import ManifestRow, RawRow, checked_row

NAN = float("nan")


def row(manifest: str = "/data/clips.csv", **given: Any) -> ManifestRow:
    return checked_row(RawRow(**{"uri": "a.mp4", **given}), manifest, 7, "train")


@pytest.mark.parametrize(
    ("manifest", "uri", "expected"),
    [
        ("/data/clips.csv", " a.mp4 ", "/data/a.mp4"),
        ("/data/clips.parquet", "../b/a.mp4", "/b/a.mp4"),
        ("/data/folder", "a.mp4", "/data/folder/a.mp4"),
        ("/data/clips.csv", "/else/a.mp4", "/else/a.mp4"),
        ("/data/clips.csv", "file:///else/a.mp4", "/else/a.mp4"),
        ("s3://bucket/x/clips.csv", "a.mp4", "s3://bucket/x/a.mp4"),
        ("/data/clips.csv", "s3://bucket/a.mp4", "s3://bucket/a.mp4"),
    ],
)
def test_relative_uris_count_from_the_manifest(manifest: str, uri: str, expected: str) -> None:
    assert row(manifest, uri=uri).uri == expected


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ({"uri": "  "}, "row 7 has an empty uri"),
        ({"uri": None}, "row 7 has an empty uri"),
        ({"uri": NAN}, "row 7 has an empty uri"),
        ({"uri": "http://host/a.mp4"}, "row 7: scheme 'http' is not allowed"),
        ({"uri": "gs://host/a.mp4"}, "row 7: scheme 'gs' is not allowed"),
        ({"start_s": "1:30"}, "row 7: start_s is '1:30'; give seconds"),
        ({"end_s": "soon"}, "row 7: end_s is 'soon'; give seconds"),
    ],
)
def test_what_is_refused_names_manifest_and_row(given: dict[str, Any], rule: str) -> None:
    with pytest.raises(UserError) as caught:
        row(**given)
    assert str(caught.value).startswith("manifest=/data/clips.csv: ")
    assert rule in str(caught.value)


def test_a_picture_is_a_uri_as_any_other() -> None:
    assert row(uri="a.wav", image_uri=" b.jpg ").image_uri == "/data/b.jpg"
    assert row("s3://bucket/x/clips.csv", uri="a.wav", image_uri="b.jpg").image_uri == "s3://bucket/x/b.jpg"
    for empty in ("", "  ", None, NAN):
        assert row(uri="a.wav", image_uri=empty).image_uri is None
    assert "image_uri" not in row(uri="a.wav").content(), "digests of before know none"
    assert row(uri="a.wav", image_uri="b.jpg").content()["image_uri"] == "/data/b.jpg"
    with pytest.raises(UserError, match="row 7: scheme 'http' is not allowed"):
        row(uri="a.wav", image_uri="http://host/b.jpg")


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("dog; rain;;", ("dog", "rain")), (["a;b", 2], ("a;b", "2")), (3, ("3",)), ("", ()), (None, ()), (NAN, ()),
    ],
)  # fmt: skip
def test_labels_are_a_list_or_text_with_semicolons(labels: object, expected: tuple[str, ...]) -> None:
    assert row(labels=labels).labels == expected


def test_empty_cells_are_what_is_not_said() -> None:
    for empty in (None, "", NAN):
        found = row(start_s=empty, end_s=empty, split=empty, caption=empty)
        assert (found.start_s, found.end_s, found.split, found.caption) == (None, None, "train", "")
    given = row(start_s="1.5", end_s=3, split=" test ", caption="a dog", labels="dog")
    assert given.content() == {
        "uri": "/data/a.mp4", "start_s": 1.5, "end_s": 3.0, "caption": "a dog", "labels": ("dog",), "split": "test",
    }  # fmt: skip
    assert row(start_s=0).start_s == 0.0
