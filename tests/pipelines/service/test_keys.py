"""Keys by name: their file, its mistakes, its changes while the service runs, and the quotas."""

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aai.errors import UserError
from pipelines.service import keys as module
from pipelines.service.keys import ApiKey, Keys, hashed, read_keys

ONE, TWO = "first-secret", "second-secret"
SERVING = Path(__file__).resolve().parents[3] / "docs" / "serving.md"


def row(name: str, key: str, **quota: Any) -> dict[str, Any]:
    return {"name": name, "sha256": hashed(key), **quota}


def write(file: Path, *rows: Any, mode: int = 0o600) -> str:
    """A file of keys, in one step as a secret's is, of another time than the one before."""
    new = file.with_suffix(".new")
    new.write_text(json.dumps(list(rows)))
    new.chmod(mode)
    stamp = file.stat().st_mtime_ns + 10**9 if file.exists() else 10**18
    os.utime(new, ns=(stamp, stamp))
    new.replace(file)
    return str(file)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Moves the time on."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def later(seconds: float) -> None:
        now[0] += seconds

    return later


def test_keys_are_found_by_what_they_hash_to(tmp_path: Path) -> None:
    found = Keys(write(tmp_path / "keys", row("ann", ONE), row("bob", TWO, per_minute=2)), "own")
    assert found.find(ONE) == ApiKey(name="ann", sha256=hashed(ONE))
    bob, own = found.find(TWO), found.find("own")
    assert bob is not None
    assert own is not None
    assert (bob.name, bob.per_minute, bob.at_once, own.name) == ("bob", 2, None, "default")
    for wrong in ("", "nothing", ONE + " ", hashed(ONE), "\xff"):
        assert found.find(wrong) is None
    assert ONE not in repr(found.__dict__)
    assert "own" not in repr(found.__dict__).replace("_own", "")


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "is not a list of keys"),
        ("[]", "is not a list of keys"),
        ("a: 1", "is not a list of keys"),
        ("[1]", "is not a list of keys"),
        ("[{a: ", "cannot be read (ParserError)"),
        ("[{name: a}]", "key 1: sha256: Field required"),
        ("[{name: a, sha256: first-secret}]", "key 1: sha256: String should match pattern"),
        (f"[{{name: 'a b', sha256: {hashed(ONE)}}}]", "key 1: name: String should match pattern"),
        (f"[{{name: a, sha256: {hashed(ONE)}, per_minute: 0}}]", "key 1: per_minute: Input should be greater"),
        (f"[{{name: a, sha256: {hashed(ONE)}, colour: x}}]", "key 1: colour: Extra inputs"),
        (f"[{{name: a, sha256: {hashed(ONE)}}}, {{name: a, sha256: {hashed(TWO)}}}]", "key 2 has the name of another"),
        (f"[{{name: a, sha256: {hashed(ONE)}}}, {{name: b, sha256: {hashed(ONE)}}}]", "key 2 has the sha256 of"),
    ],
)
def test_a_file_that_is_wrong_is_refused_without_its_words(text: str, rule: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(UserError, match=re.escape(f"keys_file={tmp_path}/keys: {rule}")) as caught:
        read_keys(tmp_path / "keys")
    assert ONE not in str(caught.value)


def test_without_its_file_or_with_a_second_default_it_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read \(FileNotFoundError\)"):
        Keys(str(tmp_path / "none"))
    file = write(tmp_path / "keys", row("default", ONE))
    assert Keys(file).find(ONE)
    with pytest.raises(UserError, match="names a key default, which is that of AAI_API_KEY"):
        Keys(file, "own")


def test_a_new_file_is_taken_up_and_a_broken_one_changes_nothing(
    tmp_path: Path, clock: Callable[[float], None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ray.serve")
    logging.getLogger("ray.serve").propagate = True
    file = tmp_path / "keys"
    found = Keys(write(file, row("ann", ONE)))
    write(file, row("ann", TWO))
    assert found.find(ONE), "looked at once a second at most"
    clock(1.1)
    assert (found.find(ONE), bool(found.find(TWO))) == (None, True)
    for breaking in (lambda: write(file, {"name": "ann", "sha256": ONE}), file.unlink):
        breaking()
        clock(1.1)
        assert found.find(TWO)
        assert found.trouble == "UserError: keys_file"
    assert "the keys of before stay" in caplog.text
    assert ONE not in caplog.text
    write(file, row("bob", ONE))
    clock(1.1)
    assert found.find(TWO) is None
    assert found.find(ONE) == ApiKey(name="bob", sha256=hashed(ONE))
    assert found.trouble == ""


def test_a_file_that_goes_while_it_is_read_harms_nothing(
    tmp_path: Path, clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    found, parse = Keys(write(file, row("ann", ONE))), module.yaml.safe_load

    def gone(text: Any) -> Any:
        rows = parse(text)
        file.unlink()
        return rows

    monkeypatch.setattr(module.yaml, "safe_load", gone)
    write(file, row("ann", TWO))
    clock(1.1)
    assert (found.find(ONE), bool(found.find(TWO)), found.trouble) == (None, True, "")
    clock(1.1)
    assert (bool(found.find(TWO)), found.trouble) == (True, "UserError: keys_file")


def test_a_file_that_all_can_read_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("ray.serve").propagate = True
    Keys(write(tmp_path / "private", row("ann", ONE)))
    assert caplog.text == ""
    Keys(write(tmp_path / "open", row("ann", ONE), mode=0o644))
    assert "everybody on the machine can read it" in caplog.text


def test_a_quota_of_a_minute_counts_any_minute(clock: Callable[[float], None]) -> None:
    keys, key = Keys(), ApiKey(name="ann", sha256=hashed(ONE), per_minute=2)
    assert keys.take(key) == 0
    clock(50)
    assert keys.take(key) == 0
    clock(4)
    assert keys.take(key) == pytest.approx(6)
    clock(6.1)
    assert keys.take(key) == 0
    assert keys.take(key) == pytest.approx(60 - 10.1)
    assert keys.take(ApiKey(name="bob", sha256=hashed(TWO), per_minute=1)) == 0, "each key has its own"
    assert keys.take(ApiKey(name="ann", sha256=hashed(ONE), per_minute=1)) == pytest.approx(60), "also a smaller one"


def test_each_of_several_gateways_has_its_share() -> None:
    keys, key = Keys(gateways=2), ApiKey(name="ann", sha256=hashed(ONE), per_minute=3, at_once=5)
    assert [keys.take(key) for _ in range(3)] == [0, 0, pytest.approx(60, abs=5)]
    few = ApiKey(name="bob", sha256=hashed(TWO), at_once=1)
    assert [keys.take(few), keys.take(few)] == [0, 1]


def test_a_quota_at_once_is_free_again_after_each() -> None:
    keys, key = Keys(), ApiKey(name="ann", sha256=hashed(ONE), at_once=2)
    assert [keys.take(key) for _ in range(3)] == [0, 0, 1]
    keys.give_back(key)
    assert [keys.take(key), keys.take(key)] == [0, 1]


def test_what_there_was_no_room_for_is_not_counted(clock: Callable[[float], None]) -> None:
    keys, key = Keys(), ApiKey(name="ann", sha256=hashed(ONE), per_minute=2, at_once=1)
    for _ in range(3):
        assert keys.take(key) == 0
        keys.give_back(key, uncounted=True)
    assert keys.take(key) == 0
    keys.give_back(key)
    clock(1)
    assert keys.take(key) == 0
    keys.give_back(key)
    assert keys.take(key) == pytest.approx(59)
    keys.give_back(ApiKey(name="bob", sha256=hashed(TWO)), uncounted=True)  # without a quota


def test_of_a_minute_the_last_one_is_taken_out(clock: Callable[[float], None]) -> None:
    keys, key = Keys(), ApiKey(name="ann", sha256=hashed(ONE), per_minute=2)
    assert keys.take(key) == 0
    clock(30)
    assert keys.take(key) == 0
    keys.give_back(key, uncounted=True)
    clock(31)
    assert [keys.take(key), keys.take(key)] == [0, 0], "the first one's minute is over, the second was none"


def test_a_file_of_the_same_size_and_time_is_another(tmp_path: Path, clock: Callable[[float], None]) -> None:
    """As two versions of a mounted secret may be."""
    file, new = tmp_path / "keys", tmp_path / "new"
    found = Keys(write(file, row("ann", ONE)))
    new.write_text(json.dumps([row("ann", TWO)]))
    os.utime(new, ns=(file.stat().st_mtime_ns,) * 2)
    new.replace(file)
    clock(1.1)
    assert (found.find(ONE), bool(found.find(TWO))) == (None, True)


@pytest.mark.parametrize(("mode", "is_told"), [(0o640, False), (0o604, True)])
def test_only_a_file_of_everybody_is_told(
    mode: int, is_told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("ray.serve").propagate = True
    read_keys(write(tmp_path / "keys", row("ann", ONE), mode=mode))
    assert bool(caplog.text) == is_told


def test_the_documented_line_makes_a_key_and_its_hash() -> None:
    (line,) = re.findall(r"^python -c \"(import secrets.*)\"$", SERVING.read_text(), re.MULTILINE)
    key, digest = subprocess.run(
        [sys.executable, "-c", line], capture_output=True, text=True, check=True
    ).stdout.split()
    assert len(key) >= 43
    assert digest == hashed(key)
