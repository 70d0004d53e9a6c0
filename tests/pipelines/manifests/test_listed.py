"""Lists of clips in text files."""

import os
from pathlib import Path

import pytest

from aai.errors import UserError
from pipelines.manifests.listed import read_list


def test_lines_are_entries(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(
        "\ufeffc1\r\n# why\n\n  /a b.mp4 \nc1\n" + "AB" * 32 + "\nfile:///c.mp4\ndata/d.mp4\n"
    )
    here = os.path.abspath("data/d.mp4")
    assert read_list("exclude", str(tmp_path / "a.txt")) == {"c1", "/a b.mp4", "ab" * 32, "/c.mp4", here}


@pytest.mark.parametrize(("data", "told"), [(b"", "no clip"), (b"# a\n", "no clip"), (b"\xff\x00", "no text")])
def test_what_says_nothing_is_refused(data: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(UserError, match=told) as error:
        read_list("exclude", str(tmp_path / "a.txt"))
    assert error.value.setting == "exclude"
    with pytest.raises(UserError, match="no such file"):
        read_list("exclude", str(tmp_path / "none"))
    with pytest.raises(UserError):
        read_list("exclude", str(tmp_path))
