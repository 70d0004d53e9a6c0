"""Guards: asked before each change of a file, and what they refuse does not happen."""

from pathlib import Path

import pytest

from aai import fencing, storage


def test_guards_are_asked_right_before_a_change(tmp_path: Path) -> None:
    file, asked = str(tmp_path / "a"), list[str]()

    def refuse(uri: str) -> None:
        asked.append(uri)
        raise PermissionError(uri)

    storage.write_bytes(file, b"before")
    with fencing.guarded(refuse):
        assert fencing.guards() == (refuse,)
        for change in (lambda: storage.write_bytes(file, b"after"), lambda: storage.remove(file)):
            with pytest.raises(PermissionError):
                change()
        with pytest.raises(PermissionError), storage.writing(file) as local:
            local.write_bytes(b"after")
    assert (asked, fencing.guards()) == ([file] * 3, ())
    assert storage.read_bytes(file) == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
