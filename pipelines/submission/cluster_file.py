"""What a cluster file says: where its jobs API is, whose code runs there, and from which folder."""

import argparse
import os
import re
from typing import Literal

import pydantic

from aai.errors import UserError
from pipelines.settings import Plan, VerbConfig

SECRET_NAME = re.compile(r"(?i)key|secret|token|password|credential")
PASSWORD = re.compile(r"://[^/\s@]+@")
"""User and password within an address."""
PASSED = ("AAI_BUCKET", "AAI_LOG", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "MLFLOW_TRACKING_URI", "HF_HUB_OFFLINE")


class ClusterFile(VerbConfig):
    """Settings of a cluster, as `aai submit` and `aai jobs` need them."""

    address: str = "http://127.0.0.1:8265"
    """Its jobs API: the address of Ray's dashboard, http(s)://HOST:PORT. The token is RAY_AUTH_TOKEN, or stands in the
    file that RAY_AUTH_TOKEN_PATH names, else in ~/.ray/auth_token."""
    ca_file: str | None = None
    """PEM file of the private authority that vouches for an https address."""
    code: Literal["image", "package"] = "image"
    """image: `aai` is installed on all nodes; package: this code is packed and sent along with each job."""
    folder: str | None = None
    """Folder that all nodes and this machine share, from which jobs start: relative paths are meant from there.
    Empty = a job starts in a folder of its own that ends with it, with the config files it was given."""
    variables: tuple[str, ...] = PASSED
    """Variables of this environment that jobs get, where they are set; everybody who sees the dashboard sees them, so
    keys and tokens belong into the nodes' environment."""
    driver_cpus: float = pydantic.Field(1.0, ge=0)
    """CPUs that the command itself occupies, beside its workers."""
    driver_gpus: float = pydantic.Field(0.0, ge=0)
    """GPUs of a command that works without workers: generate, edit, stylize."""

    @pydantic.field_validator("address")
    @classmethod
    def _is_http(cls, value: str) -> str:
        if not re.fullmatch(r"https?://[^/@\s]+/?", value):
            raise ValueError("is not http(s)://HOST:PORT, the address of Ray's dashboard (no user, no path)")
        return value.rstrip("/")

    @pydantic.field_validator("variables")
    @classmethod
    def _are_no_secrets(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if SECRET_NAME.search(name):
                raise ValueError(f"{name} looks like a secret, which the dashboard would show: set it on the nodes")
        return value

    def environment(self) -> dict[str, str]:
        """The variables that jobs get. Raises UserError where one holds a password."""
        found = {name: os.environ[name] for name in self.variables if os.environ.get(name)}
        for name, value in found.items():
            if PASSWORD.search(value):
                remedy = "give the address without, and user and password on the nodes (docs/clusters.md)"
                raise UserError(name, "(not shown)", "holds a password, which the dashboard would show", remedy)
        return found

    def plan(self) -> Plan:
        """See VerbConfig."""
        return Plan(inputs={}, outputs={}, resources={"cluster": self.address})


def add_cluster_flag(parser: argparse.ArgumentParser) -> None:
    """`--cluster FILE`, which is what these commands call their config file."""
    parser.add_argument(
        "--cluster", dest="config", metavar="FILE", default=argparse.SUPPRESS, help="the same as --config"
    )
