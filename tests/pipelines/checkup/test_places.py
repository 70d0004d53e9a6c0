"""Real folders and a real S3 server, with one thing wrong at a time."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import s3fs

from aai import storage
from pipelines.checkup.finding import Finding
from pipelines.checkup.places import check_place, clock_finding, disk_finding
from tests.surroundings import free_port, front


def told(uri: str, is_written: bool = True) -> list[Finding]:
    """What a check of a place finds, in this process."""
    s3fs.S3FileSystem.clear_instance_cache()
    return check_place(uri, is_written, max_skew_s=10, min_free_gb=0)


def wrong(rows: list[Finding]) -> list[str]:
    """What is not ok, by name."""
    return [row.check for row in rows if row.state != "ok"]


@contextmanager
def fronted(monkeypatch: pytest.MonkeyPatch, s3_server: dict[str, str], **how: object) -> Iterator[None]:
    """A front before the S3 server."""
    with front(s3_server["AWS_ENDPOINT_URL"], **how) as address:  # type: ignore[arg-type]
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        yield


def test_a_bucket_that_is_fine_is_left_as_it_was(
    s3: str, s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with fronted(monkeypatch, s3_server):
        storage.write_bytes(f"{s3}/input.csv", b"a")
        rows = told(s3)
        assert wrong(rows) == []
        assert {row.check for row in rows} == {"s3.reachable", "s3.write", "s3.conditional", "clock"}
        assert wrong(told(f"{s3}/input.csv", is_written=False)) == []
        assert storage.list_files(s3) == [f"{s3}/input.csv"]


def test_a_server_that_ignores_conditions_is_seen(s3: str) -> None:
    rows = told(s3)
    assert wrong(rows) == ["s3.conditional"]
    assert "If-None-Match and If-Match" in rows[-1].found
    assert wrong(told(f"{s3}/missing.csv", is_written=False)) == ["s3.read"]


@pytest.mark.parametrize(
    ("how", "check", "word"),
    [
        ({"refuse": ("PUT",)}, "s3.write", "s3:PutObject"),
        ({"off_s": -120}, "clock", "chrony"),
        ({"off_s": 120}, "clock", "chrony"),
    ],
)
def test_a_server_that_is_wrong_is_seen(
    how: dict[str, object], check: str, word: str, s3: str, s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with fronted(monkeypatch, s3_server, **how):
        rows = told(s3)
    assert wrong(rows) == [check]
    (row,) = [row for row in rows if row.state != "ok"]
    assert word in row.remedy


@pytest.mark.parametrize(
    ("variable", "value", "check"),
    [
        ("AWS_SECRET_ACCESS_KEY", "another-secret", "s3.keys"),
        ("AWS_ACCESS_KEY_ID", "nobody", "s3.keys"),
        ("AWS_ACCESS_KEY_ID", None, "s3.keys"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:{closed}", "s3.reachable"),
    ],
)
def test_a_wrong_environment_is_seen(
    variable: str, value: str | None, check: str, s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if value is None:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("HOME", str(tmp_path))
    else:
        monkeypatch.setenv(variable, value.format(closed=free_port()))
    rows = told(s3)
    assert wrong(rows) == [check]
    assert rows[0].remedy


def test_a_bucket_that_is_not_there_is_seen(s3: str) -> None:
    rows = told("s3://no-such-bucket/run")
    assert wrong(rows) == ["s3.bucket"]
    assert "make the bucket" in rows[0].remedy


def test_other_schemes_are_refused() -> None:
    assert wrong(told("gs://bucket/run")) == ["folder.read"]


def test_a_folder_that_is_fine_is_not_made(tmp_path: Path) -> None:
    rows = told(str(tmp_path / "runs" / "mine"))
    assert wrong(rows) == []
    assert list(tmp_path.iterdir()) == []
    assert wrong(told(str(tmp_path / "missing.csv"), is_written=False)) == ["folder.read"]
    (tmp_path / "file").touch()
    assert wrong(told(str(tmp_path / "file" / "run"))) == ["folder.write"]


MOUNTED = """
import sys
from pipelines.checkup.places import check_place
print([row.check for row in check_place(sys.argv[1], True, 10, 0.05) if row.state != "ok"])
"""


def in_mounts(commands: str, folder: Path) -> str:
    """What a check finds in a process with mounts of its own."""
    code = f"{commands} && exec {sys.executable} -c '{MOUNTED}' {folder}"
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if "unshare:" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no mounts here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("options", "fill", "found"),
    [
        ("size=16m", "", "['disk']"),
        ("size=1m", "; head -c 2000000 /dev/zero > {0}/full 2>/dev/null || true", "['disk']"),
        ("size=200m,ro", "", "['folder.write']"),
        ("size=200m", "", "[]"),
    ],
    ids=["small", "full", "read-only", "fine"],
)
def test_small_full_and_read_only_disks_are_seen(options: str, fill: str, found: str, tmp_path: Path) -> None:
    assert in_mounts(f"mount -t tmpfs -o {options} tmpfs {tmp_path}{fill.format(tmp_path)}", tmp_path) == found


def test_clocks_and_disks_are_judged_by_their_bounds() -> None:
    assert clock_finding("x", 9, 10).state == "ok"
    assert "60 s behind" in clock_finding("x", 60, 10).found
    assert "60 s ahead" in clock_finding("x", -60, 10).found
    assert disk_finding("x", (10**10, 10**9), 0.5).state == "ok"
    assert "--set min_free_gb" in disk_finding("x", (10**10, 10**9), 2).remedy
