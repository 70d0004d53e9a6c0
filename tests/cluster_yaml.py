"""What is wrong with a cluster's YAML for `ray up`: Ray's own code reads and schedules it, without a cloud."""

import ipaddress
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import click
import jsonschema
import yaml
from googleapiclient.discovery_cache import get_static_doc
from ray.autoscaler._private import resource_demand_scheduler
from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilitySummary
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

ROOT = Path(__file__).resolve().parent.parent
SECRET = re.compile(r"\w*(?:TOKEN|SECRET|PASSWORD|ACCESS_KEY|API_KEY)\w*\s*[=:]\s*(\S+)", re.IGNORECASE)
LOOKS_SECRET = re.compile(r"\bAKIA[0-9A-Z]{16}\b|-----BEGIN |\b[0-9a-f]{64}\b|://[^/\s:@]+:[^@\s]+@")
TOKEN = "~/.ray/auth_token"
STARTS = ("head_start_ray_commands", "worker_start_ray_commands")
COMMANDS = ("initialization_commands", "head_setup_commands", *STARTS)  # Ray has put setup_commands into the head's
DEMANDS = {"gpu": {"CPU": 6, "GPU": 1}, "cpu": {"CPU": 1}}
"""What a worker of featurize, align and adapt, and one of curate, asks for (configs/*/vggsound_*)."""


def mistakes(text: str) -> list[str]:
    """What is wrong with a cluster's YAML, nothing if it is right."""
    config = yaml.safe_load(text)
    try:
        filled = prepare_config(config)
        validate_config(filled)
    except (jsonschema.ValidationError, ValueError, RuntimeError, KeyError, AssertionError) as error:
        return [f"Ray refuses it: {str(error).splitlines()[0]}"]
    found = [*_sizes(filled), *_exposed(filled), *_token(filled), *_commands(filled)]
    found += [f"a secret: {line.strip()}" for line in text.splitlines() if _holds_secret(line)]
    if not found and config["provider"]["type"] == "gcp":
        for name, node in config["available_node_types"].items():
            found += [f"{name}: {wrong}" for wrong in against_compute_api(node["node_config"])]
    return found


def _sizes(config: Mapping[str, Any]) -> Iterator[str]:
    """Numbers that Ray takes and that cannot act."""
    types = config["available_node_types"]
    for name, node in types.items():
        if node["min_workers"] > node["max_workers"]:
            yield f"{name}: min_workers is above max_workers"
        if node["max_workers"] > config["max_workers"]:
            yield f"{name}: max_workers is above that of the cluster"
        if node["min_workers"]:
            yield f"{name}: does not start from zero"
    if sum(types[config["head_node_type"]]["resources"].values()):
        yield "the head takes work"
    for name, demand in DEMANDS.items():
        nodes = launched(config, [demand] * 8)
        if [node.removesuffix("-spot") for node in nodes] != [name]:
            yield f"8 workers that ask for {demand} get {nodes}"


def launched(config: Mapping[str, Any], demands: list[dict[str, int]]) -> dict[str, int]:
    """The nodes that Ray's autoscaler adds to a head for these demands, by type; {} where some are not met."""
    score = partial(
        resource_demand_scheduler._default_utilization_scorer,
        node_availability_summary=NodeAvailabilitySummary(node_availabilities={}),
    )
    head = config["head_node_type"]
    nodes, left = resource_demand_scheduler.get_nodes_for(
        config["available_node_types"], {head: 1}, head, config["max_workers"], demands, utilization_scorer=score
    )
    return {} if left else dict(nodes)


def _open_to_all(value: Any) -> bool:
    try:
        return ipaddress.ip_network(str(value)).prefixlen == 0
    except ValueError:
        return False


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of everything in a tree that is neither a mapping nor a list."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, f"{path}.{key}")
    else:
        yield path.removeprefix("."), value


def _exposed(config: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"open to everybody: {path}" for path, value in leaves(config) if _open_to_all(value))
    if not config["provider"].get("use_internal_ips"):
        yield "nodes get public addresses: provider.use_internal_ips"
    for name, node in config["available_node_types"].items():
        text = json.dumps(node["node_config"])
        if config["provider"]["type"] == "aws" and not node["node_config"].get("SecurityGroupIds"):
            yield f"{name}: without SecurityGroupIds Ray opens ssh to everybody"
        if config["provider"]["type"] == "gcp" and not node["node_config"].get("networkInterfaces"):
            yield f"{name}: without networkInterfaces Ray gives it a public address"
        if "accessConfigs" in text or '"AssociatePublicIpAddress": true' in text:
            yield f"{name}: has a public address"


def _token(config: Mapping[str, Any]) -> Iterator[str]:
    if config["file_mounts"].get(TOKEN) is None:
        yield f"no node gets the token: file_mounts[{TOKEN}]"
    for key in STARTS:
        if not re.search(r"RAY_AUTH_MODE=token \S*ray start", " ".join(config[key])):
            yield f"{key}: asks for no token"


def _holds_secret(line: str) -> bool:
    given = SECRET.search(line)
    return bool(LOOKS_SECRET.search(line)) or bool(given and given[1] not in (TOKEN, "required}"))


def _commands(config: Mapping[str, Any]) -> Iterator[str]:
    script = "\n".join(command for key in COMMANDS for command in config[key])
    yield from shellcheck(f"#!/bin/bash\nexport RAY_HEAD_IP\n{script}\n", "SC1090", "SC2016")
    for key in STARTS:
        words = [shlex.split(command.split("ray start ")[1]) for command in config[key] if "ray start " in command]
        if len(words) != 1:
            yield f"{key}: starts no Ray"
            continue
        try:
            options = start.make_context("ray start", words[0]).params
        except click.UsageError as error:
            yield f"{key}: {error.message}"
            continue
        if options["head"] and options["dashboard_host"] not in ("127.0.0.1", "localhost"):
            yield f"{key}: the dashboard is open: --dashboard-host"
        if options["head"] and not options["autoscaling_config"]:
            yield f"{key}: nothing scales: --autoscaling-config"


def shellcheck(script: str, *leave: str) -> list[str]:
    """What shellcheck finds in a shell script; `leave`: codes of what is meant."""
    command = [
        str(Path(sys.executable).with_name("shellcheck")),
        "--format=gcc",
        *(f"--exclude={c}" for c in leave),
        "-",
    ]
    return subprocess.run(command, input=script, capture_output=True, text=True, timeout=60).stdout.splitlines()


@cache
def _compute_schemas() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(get_static_doc("compute", "v1"))
    return dict(document["schemas"])


def against_compute_api(value: Any, schema: Mapping[str, Any] | None = None, path: str = "node_config") -> list[str]:
    """Where a node_config departs from what Google's Compute API says of an instance."""
    schema = schema or {"$ref": "Instance"}
    if "$ref" in schema:
        schema = _compute_schemas()[schema["$ref"]]
    kind = {"object": dict, "array": list, "boolean": bool, "integer": int, "string": str | int}[schema["type"]]
    if not isinstance(value, kind):
        return [f"{path}: is no {schema['type']}"]
    if "enum" in schema and value not in schema["enum"]:
        return [f"{path}: {value} is none of {', '.join(schema['enum'])}"]
    found = []
    if isinstance(value, list):
        for index, inner in enumerate(value):
            found += against_compute_api(inner, schema["items"], f"{path}[{index}]")
    elif isinstance(value, dict):
        for key, inner in value.items():
            known = schema.get("properties", {}).get(key, schema.get("additionalProperties"))
            found += against_compute_api(inner, known, f"{path}.{key}") if known else [f"{path}: no such key: {key}"]
    return found
