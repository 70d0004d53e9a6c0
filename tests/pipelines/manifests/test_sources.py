import pytest

from pipelines.manifests.row import ManifestRow
from pipelines.manifests.sources import names_sound, place_of, source_of

YOUTUBE = r"([\w-]{11})_\d+"


@pytest.mark.parametrize(
    ("uri", "source"),
    [
        ("/a/-_gaZzFfzDQ_517000_527000.mp4", "-_gaZzFfzDQ"),
        ("/b/c/-_gaZzFfzDQ_30.mkv", "-_gaZzFfzDQ"),
        ("/a/long film.mp4", "/a/long film.mp4"),
        ("/t/0001.tar#512,1000,s/-_gaZzFfzDQ_30.mp4", "-_gaZzFfzDQ"),
    ],
)
def test_the_group_of_the_pattern_names_the_video(uri: str, source: str) -> None:
    assert source_of(ManifestRow(uri=uri, split="train"), YOUTUBE) == source


def test_without_a_pattern_a_file_is_a_video() -> None:
    rows = [ManifestRow(uri="/a/film.mp4", start_s=s, end_s=s + 10, split="train") for s in (0.0, 10.0)]
    assert {source_of(row, None) for row in rows} == {"/a/film.mp4"} == {place_of(row) for row in rows}
    inside = ManifestRow(uri="/t/0001.tar#512,1000,s/0001.mp4", split="train")
    assert source_of(inside, None) == place_of(inside) == "/t/0001.tar/s/0001.mp4"


def test_a_name_tells_whether_there_may_be_no_video() -> None:
    for uri, is_sound in (
        ("/a/bell.wav", True), ("/a/BELL.Opus", True), ("/a/bell.mp4", False), ("/a/bell", False),
        ("/t/0001.tar#512,1000,s/bell.flac", True), ("/wav/0001.tar#512,1000,s/bell.webm", False),
    ):  # fmt: skip
        assert names_sound(uri) == is_sound, uri
