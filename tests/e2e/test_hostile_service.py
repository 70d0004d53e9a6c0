"""The running service under hostile requests, and held against its own OpenAPI document (make accept)."""

import importlib.util
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.hostile_heads import cases
from tests.hostile_requests import Case, attack, wrong
from tests.pipelines.test_serve import HEADERS, KEY, QUICK, Service, service  # noqa: F401

pytestmark = [pytest.mark.accept, pytest.mark.timeout(1200)]

KINDS = {"Gateway": ":Gateway", "Painter": ":Painter", "Proxy": "ProxyActor", "decoder": "aai.media.child"}
"""Processes of the service, and what their command lines hold."""


@pytest.fixture(scope="module", autouse=True)
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for the temporary files of the service alone; it is there before the service starts."""
    folder = tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        yield folder


def processes(service: Service) -> dict[str, list[int]]:  # noqa: F811
    """Process ids of this service by kind: Gateway, Painter, Proxy, decoders."""
    home = str(service.bundle.parent / "serve.yaml")
    root = next(p for p in psutil.process_iter(["cmdline"]) if home in (p.info["cmdline"] or []))
    found: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for process in root.children(recursive=True):
        words = " ".join(process.cmdline())
        for kind in (kind for kind, mark in KINDS.items() if mark in words):
            found[kind].append(process.pid)
    return found


def private_mb(pids: list[int]) -> float:
    """Memory of processes that is theirs alone, without the object store's."""
    kb = 0
    for pid in pids:
        text = Path(f"/proc/{pid}/status").read_text()
        kb += int(text.split("RssAnon:")[1].split()[0])
    return kb / 1024


def held_mb(service: Service) -> dict[str, float]:  # noqa: F811
    """Private memory by kind of process."""
    return {kind: round(private_mb(pids), 1) for kind, pids in processes(service).items()}


def sent(service: Service, given: list[Case]) -> Counter[int]:  # noqa: F811
    """Sends them; asserts that each answer is one that may be, and tells no path of this machine."""
    url = httpx.URL(service.url)
    outcomes = attack((url.host, int(url.port or 80)), given)
    assert wrong(outcomes) == []
    assert str(Path(__file__).parents[2]).encode() not in b"".join(o.body for o in outcomes if o.status >= 400)
    return Counter(o.status for o in outcomes)


def test_m5_the_gateway_has_no_torch(service: Service) -> None:  # noqa: F811
    assert service.post("generate", QUICK).status_code == 200
    found = processes(service)
    assert {kind: len(pids) for kind, pids in found.items()} == {"Gateway": 1, "Painter": 1, "Proxy": 1, "decoder": 2}
    for kind, pids in found.items():
        loaded = "libtorch" in Path(f"/proc/{pids[0]}/maps").read_text()
        print(f"{kind}: {private_mb(pids):.0f} MB, torch {loaded}")
        assert loaded == (kind == "Painter"), kind


def test_m5_hostile_requests_harm_nothing(service: Service, temporary: Path) -> None:  # noqa: F811
    first = sent(service, cases(KEY, mutated=60, seed=7))  # warms up: caches, pools, arenas
    before, files, begin = held_mb(service), sorted(temporary.rglob("*")), time.monotonic()
    given = cases(KEY)
    assert len(given) >= 1000
    counts = sent(service, given)
    seconds = time.monotonic() - begin
    assert service.post("generate", QUICK).status_code == 200, "right after"
    after = held_mb(service)
    print(f"{first.total()} to warm up, then {len(given)} hostile requests in {seconds:.0f} s: {dict(counts)}")
    print(f"private memory in MB before {before}, after {after}")
    assert sorted(temporary.rglob("*")) == files
    for kind, mb in after.items():
        assert mb < before[kind] + 60, kind
    assert 1 <= len(processes(service)["decoder"]) <= 2


def test_m5_the_service_keeps_to_its_document(service: Service, tmp_path: Path) -> None:  # noqa: F811
    """schemathesis (make accept installs it) makes requests out of /openapi.json, right and wrong ones."""
    if importlib.util.find_spec("schemathesis") is None:
        pytest.skip("needs schemathesis: make accept")
    checks = (
        "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
        "response_schema_conformance,unsupported_method,negative_data_rejection,ignored_auth,missing_required_header"
    )
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{service.url}/openapi.json", "--checks", checks]
    command += ["-H", f"X-API-Key: {HEADERS['X-API-Key']}", "--max-examples", "60", "--seed", "1", "--no-color"]
    command += ["--continue-on-failure", "--generation-database", "none"]
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    told = os.environ | {"SCHEMATHESIS_HOOKS": "tests.openapi_hooks", "PYTHONPATH": paths}
    done = subprocess.run(command, env=told, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    print(done.stdout[-1500:])
    assert done.returncode == 0, done.stdout[-6000:]
