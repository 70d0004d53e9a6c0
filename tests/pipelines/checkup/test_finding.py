"""Rows of the table hold no secret, wherever it came from."""

import json
from pathlib import Path

import pytest

from pipelines.checkup.finding import as_json, as_table, failure, ok, ray_token, warning, without_secrets

PLANTED = "s3cr3t-planted-value"


@pytest.mark.parametrize(
    "variable", ["AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "RAY_AUTH_TOKEN", "AAI_API_KEY", "HF_TOKEN"]
)
def test_what_the_environment_hides_is_masked(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, PLANTED)
    row = failure("a.b", f"x {PLANTED}", f"said {PLANTED}!", f"do {PLANTED}")
    assert PLANTED not in row.model_dump_json()
    assert row.found == "said ***!"


def test_the_token_of_the_file_is_masked_and_its_path_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text(f"{PLANTED}\n")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert ray_token() == PLANTED
    assert without_secrets(f"{tmp_path}/token has {PLANTED}") == f"{tmp_path}/token has ***"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "absent"))
    assert ray_token() is None


def test_passwords_in_addresses_and_headers_are_masked() -> None:
    assert without_secrets("at https://me:pw123@host/x, Bearer abc.def") == "at https://***host/x, Bearer ***"
    assert without_secrets("postgresql://host/db a@b") == "postgresql://host/db a@b"


def test_short_values_do_not_mask_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "a")
    assert without_secrets("a cat") == "a cat"


def test_table_and_json_tell_the_same() -> None:
    rows = [failure("x.y", "here", "broke", "mend it"), ok("a", "there", "fine"), warning("w", "there", "odd", "see")]
    text = as_table(rows).splitlines()
    assert [line.split()[0] for line in text] == ["OK", "WARNING", "->", "FAILURE", "->"]
    assert text[-1].endswith("-> mend it")
    found = json.loads(as_json(rows, 1.23))
    assert (found["failures"], found["warnings"], found["seconds"]) == (1, 1, 1.2)
    assert [row["check"] for row in found["findings"]] == ["x.y", "a", "w"]
    assert as_table([]) == ""
