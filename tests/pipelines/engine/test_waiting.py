from pathlib import Path

import pytest

from aai import storage
from pipelines.engine import waiting
from pipelines.engine.waiting import WaitingTexts, text_at


@pytest.fixture(params=["local", "s3"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder of either kind."""
    return str(tmp_path) if request.param == "local" else str(request.getfixturevalue("s3"))


def test_texts_are_found_by_their_places(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "PART_CHARS", 50)
    folder = storage.join(base, "_waiting")
    storage.write_bytes(storage.join(folder, "part-00009.parquet"), b"left over by a killed run")
    texts, given = WaitingTexts(folder), [f'{{"text": "{number} ♪"}}' for number in range(10)]
    for text in given:
        texts.add(text)
    places = texts.places()
    assert len(texts) == 10
    assert max(map(len, places)) < 60 + len(folder)
    assert [text_at(place) for place in places] == given
    assert len(storage.list_files(folder)) == 3
    texts.remove()
    assert storage.list_files(folder) == []


def test_without_a_folder_they_are_their_own_places() -> None:
    texts = WaitingTexts(None)
    texts.add('{"name": "waiting"}')
    assert (len(texts), texts.places()) == (1, ['{"name": "waiting"}'])
    assert text_at('{"name": "waiting"}') == '{"name": "waiting"}'
