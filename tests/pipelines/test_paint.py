import json
from pathlib import Path

import pytest
from PIL import Image

from aai.version import code_version
from pipelines.paint import write_picture

PICTURE = Image.new("RGB", (8, 8), "red")


def test_a_picture_that_was_made_otherwise_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write_picture(str(tmp_path), "a", PICTURE, {"seed": 1})
    facts = Image.open(first).info
    assert (facts["Software"], json.loads(facts["aai"])) == (f"aai {code_version()}", {"seed": 1})
    before = Path(first).read_bytes()
    assert write_picture(str(tmp_path), "a", PICTURE, {"seed": 2}) == str(tmp_path / "a_2.png")
    assert write_picture(str(tmp_path), "a", Image.new("RGB", (8, 8)), {"seed": 1}) == str(tmp_path / "a_3.png")
    # The same picture by another commit is the same picture.
    monkeypatch.setattr("aai.png.code_version", lambda: "9.9 (commit fffffff)")
    assert write_picture(str(tmp_path), "a", PICTURE, {"seed": 1}) == first
    assert write_picture(str(tmp_path), "a", PICTURE, {"seed": 2}) == str(tmp_path / "a_2.png")
    assert Path(first).read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 3
