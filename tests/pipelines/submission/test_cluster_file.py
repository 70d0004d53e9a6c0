"""Cluster files: what they take, and what they keep back."""

import pytest

from aai.errors import UserError
from pipelines.submission.cluster_file import ClusterFile


@pytest.mark.parametrize(
    "address", ["127.0.0.1:8265", "ray://head:10001", "http://user:pw@head:8265", "http://head:8265/x", "auto", ""]
)
def test_an_address_is_that_of_the_dashboard(address: str) -> None:
    with pytest.raises(UserError, match="HOST:PORT"):
        ClusterFile.parse({"address": address})


@pytest.mark.parametrize("address", ["http://head:8265", "https://ray.example.org", "http://[::1]:8265/"])
def test_addresses_that_are_taken(address: str) -> None:
    assert ClusterFile.parse({"address": address}).address == address.rstrip("/")


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MY_CREDENTIALS"])
def test_a_variable_that_looks_like_a_secret_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="looks like a secret"):
        ClusterFile.parse({"variables": ["AAI_BUCKET", name]})


def test_variables_that_are_set_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AAI_BUCKET", "s3://mine")
    monkeypatch.setenv("OTHER", "x")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert ClusterFile(variables=("AAI_BUCKET", "MLFLOW_TRACKING_URI")).environment() == {"AAI_BUCKET": "s3://mine"}


def test_a_password_in_an_address_is_not_sent_or_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:hunter22@mlflow.example.org")
    with pytest.raises(UserError, match="holds a password") as caught:
        ClusterFile().environment()
    assert "hunter22" not in str(caught.value)
