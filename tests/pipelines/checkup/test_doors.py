"""Ports that answer in every way but Ray's; Ray itself is asked in test_nodes.py."""

import socket
import threading
from collections.abc import Iterator
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import pytest

from pipelines.checkup import doors
from pipelines.checkup.doors import (
    Door,
    ask,
    check_local_token,
    check_own_token,
    check_token,
    doors_of,
    is_loopback,
    own_addresses,
    reachable_at,
    split,
)
from tests.surroundings import free_port, silent


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here needs long to answer."""
    monkeypatch.setattr(doors, "TIMEOUT_S", 0.3)


@pytest.fixture
def page() -> Iterator[int]:
    """The port of a web server that is no Ray."""
    server = HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", ["gcs", "client", "dashboard"])
def test_what_is_no_ray_is_told_apart(name: str, page: int) -> None:
    assert ask(Door(name, "127.0.0.1", free_port())) == "closed"  # type: ignore[arg-type]
    with silent() as port:
        assert ask(Door(name, "127.0.0.1", port)) == "silent"  # type: ignore[arg-type]
    assert ask(Door(name, "127.0.0.1", page)) == "other"  # type: ignore[arg-type]


def test_a_cluster_that_does_not_answer_is_told_with_its_remedy(page: int) -> None:
    for port, words in ((free_port(), "nobody listens"), (page, "is no Ray")):
        (row,) = check_token(Door("gcs", "127.0.0.1", port))
        assert (row.check, row.state) == ("ray.reachable", "failure")
        assert words in row.found
        assert "--address" in row.remedy


def test_addresses_name_their_doors() -> None:
    found = doors_of("10.0.0.1:6380")
    assert list(map(str, found)) == ["gcs 10.0.0.1:6380", "client 10.0.0.1:10001", "dashboard 10.0.0.1:8265"]
    found = doors_of("ray://10.0.0.1:10002", "127.0.0.1:8299")
    assert list(map(str, found)) == ["gcs 10.0.0.1:6379", "client 10.0.0.1:10002", "dashboard 10.0.0.1:8299"]
    assert doors_of("10.0.0.1:6379", "10.0.0.2:8265")[2].host == "10.0.0.2"
    assert split("[::1]:6379") == ("::1", 6379)
    for wrong in ("head", "head:", ":6379", "head:port"):
        with pytest.raises(ValueError, match="is not HOST:PORT"):
            split(wrong)


def test_who_can_reach_a_port() -> None:
    assert is_loopback("127.0.0.1")
    assert not is_loopback("10.0.0.1")
    assert reachable_at(Door("gcs", "10.0.0.1", 6379)) == "10.0.0.1:6379"
    addresses = own_addresses()
    assert "127.0.0.1" not in addresses
    for host, reachable in (("127.0.0.1", False), ("0.0.0.0", True)):
        with socket.socket() as listener:
            listener.bind((host, 0))
            listener.listen()
            found = reachable_at(Door("gcs", "127.0.0.1", listener.getsockname()[1]))
            assert (found is not None) == (reachable and bool(addresses))


def test_a_token_that_others_can_read_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setattr(doors, "_ways_in", lambda file: True)
    file = tmp_path / "token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    assert check_own_token() == []
    file.write_text("0123456789abcdef")
    file.chmod(0o644)
    (row,) = check_own_token()
    assert (row.check, row.state, row.remedy) == ("ray.token_file", "warning", f"chmod 600 {file}")
    file.chmod(0o600)
    assert [row.state for row in check_own_token()] == ["ok"]


def test_a_folder_that_others_cannot_enter_hides_its_files(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o700)
    (tmp_path / "closed" / "token").touch(mode=0o644)
    assert not doors._ways_in(tmp_path / "closed" / "token")
    assert doors._ways_in(Path("/etc/hostname"))


def test_a_local_ray_without_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    (row,) = check_local_token()
    assert (row.check, row.state) == ("ray.token", "failure")
    assert "unset RAY_AUTH_MODE" in row.remedy
    for mode in ("token", "TOKEN"):
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
        assert check_local_token()[0].state == "ok"
