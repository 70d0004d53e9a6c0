"""Ray's doors: whether they let in who has no token, who can reach them, and whether our token is taken.

Ray's own client waits 20 s for a cluster that refuses its token; here one call each tells it in milliseconds.
"""

import ipaddress
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelines.checkup.finding import Finding, failure, ok, ray_token, token_file, warning

GCS = "/ray.rpc.NodeInfoGcsService/CheckAlive"
CLIENT = "/ray.rpc.RayletDriver/ClusterInfo"
DASHBOARD = "/api/v0/nodes"
PORTS = {"gcs": 6379, "dashboard": 8265, "client": 10001}
TIMEOUT_S = 2.0
Answer = Literal["open", "guarded", "closed", "silent", "other"]
"""Lets everybody in; wants a token; nobody listens; listens and says nothing; is something else than was asked."""
GUARD = (
    "start Ray with RAY_AUTH_MODE=token and one RAY_AUTH_TOKEN on every node (docs/clusters.md), or bind it to loopback"
)
GIVE = "set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH, to the token that the cluster was started with"


@dataclass(frozen=True)
class Door:
    """A port of the cluster's head."""

    name: Literal["gcs", "dashboard", "client"]
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.name} {self.host}:{self.port}"


def doors_of(address: str, dashboard: str = "") -> list[Door]:
    """The doors of a cluster at HOST:PORT or ray://HOST:PORT; the others at Ray's usual ports.

    dashboard: its HOST:PORT, where it is known.
    """
    is_client = address.startswith("ray://")
    host, port = split(address.removeprefix("ray://"))
    ports = {**PORTS, "client" if is_client else "gcs": port}
    found = [Door("gcs", host, ports["gcs"]), Door("client", host, ports["client"])]
    seen_at, seen_port = split(dashboard) if dashboard else (host, ports["dashboard"])
    return [*found, Door("dashboard", host if is_loopback(seen_at) else seen_at, seen_port)]


def split(address: str) -> tuple[str, int]:
    """HOST:PORT, also [IPV6]:PORT. Raises ValueError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"{address!r} is not HOST:PORT")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether nobody else can reach an address."""
    try:
        return ipaddress.ip_address(socket.gethostbyname(host)).is_loopback
    except (OSError, ValueError):
        return False


def own_addresses() -> list[str]:
    """This machine's IPv4 addresses that others may reach."""
    import psutil

    every = [one.address for many in psutil.net_if_addrs().values() for one in many if one.family == socket.AF_INET]
    return [address for address in every if not is_loopback(address)]


def listens(host: str, port: int) -> Literal["yes", "no", "silent"]:
    """Whether a connection is taken; silent: what was sent was lost on the way."""
    try:
        with socket.create_connection((host, port), TIMEOUT_S):
            return "yes"
    except TimeoutError:
        return "silent"
    except OSError:
        return "no"


def ask(door: Door, token: str | None = None) -> Answer:
    """How a door answers."""
    heard = listens(door.host, door.port)
    if heard != "yes":
        return "silent" if heard == "silent" else "closed"
    return _ask_http(door, token) if door.name == "dashboard" else _ask_grpc(door, token)


def _ask_http(door: Door, token: str | None) -> Answer:
    import requests

    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        answer = requests.get(f"http://{door.host}:{door.port}{DASHBOARD}", headers=headers, timeout=TIMEOUT_S)
    except requests.Timeout:
        return "silent"
    except requests.RequestException:
        return "other"
    if answer.status_code in (401, 403):
        return "guarded"
    return "open" if answer.ok and '"result"' in answer.text else "other"


def _ask_grpc(door: Door, token: str | None) -> Answer:
    import grpc

    metadata = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(f"{door.host}:{door.port}") as channel:
        try:
            channel.unary_unary(GCS if door.name == "gcs" else CLIENT)(b"", timeout=TIMEOUT_S, metadata=metadata)
        except grpc.RpcError as error:
            known: dict[object, Answer] = {
                grpc.StatusCode.UNAUTHENTICATED: "guarded",
                grpc.StatusCode.DEADLINE_EXCEEDED: "silent",
            }
            return known.get(error.code(), "other")
    return "open"


def check_doors(doors: Sequence[Door]) -> list[Finding]:
    """What somebody without a token gets. Only the door that was named must answer: the first of its kind."""
    found = []
    for door in doors:
        answer = ask(door)
        if answer == "guarded":
            found.append(ok("ray.open", str(door), "wants a token"))
        elif answer == "open":
            seen = reachable_at(door)
            if seen:
                rule = f"lets everybody in who reaches {seen}: whoever does can run any code"
                found.append(failure("ray.open", str(door), rule, GUARD))
            else:
                found.append(warning("ray.open", str(door), "lets in every user of this machine", GUARD))
    return found


def reachable_at(door: Door) -> str | None:
    """An address at which others may reach a door; None where loopback is the only one."""
    if not is_loopback(door.host):
        return f"{door.host}:{door.port}"
    others = (address for address in own_addresses() if listens(address, door.port) == "yes")
    return next((f"{address}:{door.port}" for address in others), None)


def check_token(door: Door) -> list[Finding]:
    """Whether the cluster behind a door can be entered from here."""
    answer, where = ask(door), f"{door.host}:{door.port}"
    if answer in ("closed", "silent", "other"):
        words = {"closed": "nobody listens there", "silent": "takes connections and says nothing, or they get lost"}
        rule = words.get(answer, "what listens there is no Ray")
        remedy = "start the cluster, mend --address, or open the way (firewall, network policy) from here to it"
        return [failure("ray.reachable", where, rule, remedy)]
    found = [ok("ray.reachable", where, "answers"), *check_own_token()]
    if answer == "open":
        return found
    mode = os.environ.get("RAY_AUTH_MODE", "")
    if mode.lower() not in ("", "token"):
        rule, remedy = f"the cluster wants a token, and RAY_AUTH_MODE={mode} sends none", "set RAY_AUTH_MODE=token"
        return [*found, failure("ray.token", where, rule, remedy)]
    token = ray_token()
    if token is None:
        return [*found, failure("ray.token", where, "the cluster wants a token, and there is none here", GIVE)]
    if ask(door, token) != "open":
        return [*found, failure("ray.token", where, "the cluster refuses the token of this machine", GIVE)]
    return [*found, ok("ray.token", where, "is taken")]


def check_own_token() -> list[Finding]:
    """Whether others of this machine can read the token's file."""
    file = token_file()
    if os.environ.get("RAY_AUTH_TOKEN") or not file.is_file():
        return []
    if file.stat().st_mode & 0o044 and _ways_in(file):
        rule = "others on this machine can read the token of Ray"
        return [warning("ray.token_file", str(file), rule, f"chmod 600 {file}")]
    return [ok("ray.token_file", str(file), "is for its owner alone")]


def _ways_in(file: Path) -> bool:
    """Whether the folders above a file let others come to it."""
    return all(folder.stat().st_mode & 0o011 for folder in file.resolve().parents)


def check_local_token() -> list[Finding]:
    """What a Ray that a command starts on this machine would ask for."""
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    if mode.lower() != "token":
        rule = f"RAY_AUTH_MODE={mode}: a Ray that is started here lets everybody in"
        return [failure("ray.token", "this machine", rule, "unset RAY_AUTH_MODE, or set it to token")]
    return [ok("ray.token", "this machine", "a Ray that is started here asks for one"), *check_own_token()]
