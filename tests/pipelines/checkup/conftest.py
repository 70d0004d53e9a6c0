"""What a check sets for the process that it has to itself (`impatient_s3`) ends with its test here."""

from collections.abc import Iterator

import pytest
import s3fs


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """S3 is as patient after a test as before it."""
    for name in ("retries", "connect_timeout", "read_timeout"):
        monkeypatch.setattr(s3fs.S3FileSystem, name, getattr(s3fs.S3FileSystem, name))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    yield
    s3fs.S3FileSystem.clear_instance_cache()
