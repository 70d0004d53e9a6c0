"""Whether a tracking store can be used is known before long work begins, and said in one line."""

from pathlib import Path

import pytest

from aai.errors import UserError
from pipelines.registry.store import check, database
from pipelines.settings import TrackingConfig


def test_a_new_sqlite_file_has_its_folder_made(tmp_path: Path) -> None:
    file = tmp_path / "new" / "mlflow.db"
    assert database(TrackingConfig(uri=f"sqlite:///{file}?timeout=5")) == file
    assert file.parent.is_dir()


@pytest.mark.parametrize(
    ("uri", "rule"),
    [
        ("ftp://somewhere", "is not supported"),
        ("sqlite:///", "needs a file on this machine"),
        ("sqlite:///s3://bucket/mlflow.db", "needs a file on this machine"),
        ("http://user:secret@127.0.0.1:9", "holds a password"),
        ("http://127.0.0.1:9", "no tracking server answers"),
    ],
)
def test_a_store_that_cannot_be_used_is_named(uri: str, rule: str) -> None:
    with pytest.raises(UserError, match=rule) as error:
        check(TrackingConfig(uri=uri))
    assert "secret" not in str(error.value)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    file.write_text("this is a text of more than a hundred characters, and no database at all; " * 4)
    with pytest.raises(UserError, match="cannot be opened"):
        check(TrackingConfig(uri=f"sqlite:///{file}"))
