"""What Prometheus finds at a real service: everything that the dashboard and the alerts name."""

import asyncio
import json
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.fernet import Fernet
from mlflow import MlflowClient
from ray.serve.metrics import Counter, Gauge, Histogram

from aai.bundle import read_bundle
from pipelines.registry import versions
from pipelines.service.access import Visit
from pipelines.service.http import Health
from pipelines.service.telemetry import GatewayMetrics, PainterMetrics
from pipelines.service.webhook import AGE_S, MAX_BYTES
from pipelines.settings import TrackingConfig
from tests.e2e.test_rollover import another, registry_of
from tests.hostile import wav
from tests.pipelines.registry.test_versions import serving as mlflow_server
from tests.pipelines.service.test_webhook import BODY, signed
from tests.pipelines.test_serve import HEADERS, KEY, QUICK, WEBHOOK_SECRET, Service, crowd, service  # noqa: F401
from tests.scraped import Samples, missing, of_the_service, samples_at, total

SERVED = {"follow_s": 3600}
"""Nobody looks by himself at what the alias names."""
REQUESTS = "ray_aai_requests_total"


def scrape(running: Service) -> Samples:
    """What Prometheus finds at a service."""
    return samples_at(running.metrics_port)


def until(running: Service, name: str, value: float, **labels: str) -> Samples:
    """Scrapes until a metric has a value."""
    end_s = time.monotonic() + 90
    while total(samples := scrape(running), name, **labels) != value:
        assert time.monotonic() < end_s, (name, labels, samples[name])
        time.sleep(0.5)
    return samples


async def leave(running: Service) -> None:
    """A client that goes while its picture is painted, for seconds."""
    form = {"steps": "100", "num_images": "8", "prompt": "a hidden <sound>"}
    async with httpx.AsyncClient(timeout=60, headers=HEADERS) as client:
        post = client.post(f"{running.url}/v1/generate", files={"audio": wav()}, data=form)
        task = asyncio.create_task(post)
        while (await client.get(f"{running.url}/healthz")).json()["painting"] == 0:
            assert not task.done(), task.result().text
            await asyncio.sleep(0.01)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def told_by_others(running: Service) -> list[httpx.Response]:
    """Deliveries that MLflow did not send, or not now."""
    large = bytes(MAX_BYTES + 1)
    sent = [({}, BODY), (signed(age_s=AGE_S + 60), BODY), (signed(timestamp="now"), BODY), (signed(large), large)]
    return [httpx.post(f"{running.url}/v1/registry", headers=head, content=body, timeout=20) for head, body in sent]


@pytest.fixture(scope="module")
def asked(service: Service, tmp_path_factory: pytest.TempPathFactory) -> list[httpx.Response]:  # noqa: F811
    """Pictures, refusals of several kinds, and one client that leaves; another version is named, and nobody knows."""
    cfg = registry_of(service)
    second = another(service.bundle, tmp_path_factory.mktemp("second") / "bundle")
    versions.set_alias(cfg, "champion", versions.register(cfg, second, {}, {}))
    answers = [service.post("generate", {"steps": "2", "seed": "5"}), service.post("generate", {"steps": "no"})]
    answers.append(httpx.post(f"{service.url}/v1/edit", files={"audio": wav()}, timeout=20))
    answers += told_by_others(service)
    answers += asyncio.run(crowd(service, 30))[0]
    asyncio.run(leave(service))
    return answers


def test_everything_that_is_asked_and_refused_is_counted(asked: list[httpx.Response], service: Service) -> None:  # noqa: F811
    refused = sum(answer.status_code == 429 for answer in asked)
    painted = sum(answer.status_code == 200 for answer in asked)
    assert refused > 5
    samples = until(service, REQUESTS, 1, code="client_left", status="499")  # the last of them
    assert total(samples, REQUESTS, code="queue_full", verb="generate", status="429") == refused
    assert total(samples, REQUESTS, code="ok", verb="generate", status="200") == painted
    assert total(samples, REQUESTS, code="unauthorized", verb="edit") == 1
    assert total(samples, REQUESTS, code="invalid_field", status="422") == 1
    for code in ("bad_signature", "stale_delivery", "bad_delivery", "upload_too_large"):
        assert total(samples, REQUESTS, code=code, verb="registry") == 1
    assert service.health()["serving"] == {"tiny/1@champion": 1}
    assert total(samples, "ray_aai_pictures_total", verb="generate") == painted
    assert total(samples, "ray_aai_request_duration_seconds_count", status="200", verb="generate") == painted
    until(service, "ray_aai_picture_steps", 0)
    for name, value in {"painters_running": 1, "painters_wanted": 1, "capacity_requests": 16}.items():
        assert total(samples, f"ray_aai_{name}") == value
    assert total(samples, "ray_aai_version_painters", version="1") == 1


def test_each_request_has_its_line_in_the_log(asked: list[httpx.Response]) -> None:
    lines, ids = {}, [answer.headers["x-request-id"] for answer in asked]
    logs = [file.read_text() for file in Path("/tmp/ray").glob("session_*/logs/serve/*Gateway*.log")]
    for log in logs:
        for line in log.splitlines() if any(each in log for each in ids) else ():  # other services have written, too
            if found := re.search(r'(\{"time": .*\})$', line):
                told = json.loads(found[1])
                lines[told["request_id"]] = told
    for answer in asked:
        told = lines[answer.headers["x-request-id"]]
        assert told["status"] == answer.status_code
    picture, wrong, unknown, *_ = (lines[answer.headers["x-request-id"]] for answer in asked)
    wanted = {"verb": "generate", "code": "ok", "seed": 5, "steps": 2, "pictures": 1, "model": "tiny/1@champion"}
    assert {**picture, **wanted} == picture
    assert list(picture["stages_s"]) == ["upload", "decode", "painters"]
    assert picture["bytes_in"] > len(wav())
    assert (wrong["code"], unknown["code"], unknown["bytes_in"]) == ("invalid_field", "unauthorized", 0)
    assert [told["steps"] for told in lines.values() if told["code"] == "client_left"].count(100) >= 1
    assert KEY not in json.dumps(lines)
    assert "hidden" not in json.dumps(lines)


@pytest.fixture(scope="module")
def registry(service: Service) -> Iterator[TrackingConfig]:  # noqa: F811
    """A real MLflow server over the service's registry, which tells the service when an alias moves."""
    key = Fernet.generate_key().decode()
    local = {"ALLOWED_SCHEMES": "http", "ALLOW_PRIVATE_IPS": "true", "SECRET_ENCRYPTION_KEY": key}
    store = registry_of(service)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in local.items():
            patch.setenv(f"MLFLOW_WEBHOOK_{name}", value)
        with mlflow_server(service.bundle.parent, store.uri) as address:
            events: list[Any] = ["model_version_alias.created", "model_version_alias.deleted"]
            client = MlflowClient(registry_uri=address)
            client.create_webhook("aai", f"{service.url}/v1/registry", events, secret=WEBHOOK_SECRET)
            yield store.model_copy(update={"uri": address})


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("asked")
def test_what_mlflow_tells_is_served_at_once(service: Service, registry: TrackingConfig) -> None:  # noqa: F811
    begin_s = time.monotonic()
    versions.set_alias(registry, "champion", 2)
    while service.health()["serving"] != {"tiny/2@champion": 1}:
        assert time.monotonic() - begin_s < 60
        time.sleep(0.1)
    print(f"served {time.monotonic() - begin_s:.1f} s after its promotion")
    assert service.post("generate", QUICK).headers["x-aai-model"] == "tiny/2@champion"


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("asked")
def test_dashboard_and_alerts_name_only_what_there_is(
    service: Service,  # noqa: F811
    registry: TrackingConfig,
    tmp_path: Path,
) -> None:
    cfg, encoder = registry_of(service), read_bundle(service.bundle).config.encoder
    slower = another(service.bundle, tmp_path / "bad", encoder={**encoder, "sample_rate_hz": 8_000})
    bad = versions.register(cfg, slower, {}, {})
    tried = versions.register(cfg, another(service.bundle, tmp_path / "tried"), {}, {"gates_passed": "true"})
    versions.set_alias(registry, "candidate", tried)
    until(service, "ray_aai_canary_painters", 1, version=str(tried))
    models = [service.post("generate", {**QUICK, "seed": str(seed)}).headers["x-aai-model"] for seed in range(20)]
    assert set(models) == {"tiny/2@champion", f"tiny/{tried}@candidate"}
    versions.set_alias(registry, "champion", bad)
    until(service, "ray_aai_version_refused", 1, version=str(bad))
    versions.delete_alias(registry, "champion")
    samples = until(service, "ray_aai_registry_trouble", 1)
    assert {e: found for e in of_the_service() if (found := missing(e, samples))} == {}
    versions.set_alias(registry, "champion", 1)
    samples = until(service, "ray_aai_version_refused", 0, version=str(bad))
    assert total(samples, REQUESTS, verb="registry", status="202", code="ok") >= 3


def test_a_name_or_label_that_nobody_exports_is_seen() -> None:
    samples: Samples = {"ray_aai_x_total": [({"code": "ok"}, 1.0)]}
    assert missing('sum by (code) (rate(ray_aai_x_total{code="ok", a=~"$a"}[5m]))', samples) == []
    assert missing('rate(ray_aai_x_total{code=~"no|none"}[5m])', samples) == [
        "ray_aai_x_total with [('code', 'no|none')]"
    ]
    assert missing("sum by (key) (ray_aai_x_total)", samples) == ["by key"]
    assert missing("max(ray_aai_y)", samples) == ["ray_aai_y with []"]


def test_pictures_are_counted_that_were_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics, counted = GatewayMetrics(120, 16), []
    monkeypatch.setattr(metrics._pictures, "inc", lambda value, tags: counted.append((value, tags["verb"])))
    told: list[dict[str, int | str]] = [
        {},
        {"blocked": 1},
        {"code": "internal"},
        {"code": "unsafe_picture", "blocked": 3},
    ]
    for each in told:
        metrics.visit(Visit("edit", "an-id", 0, status=200, told={"pictures": 3, **each}))
    metrics.visit(Visit("health", "an-id", 0, status=200))
    assert counted == [(3, "edit"), (2, "edit")]


Told = list[tuple[str, float, dict[str, str]]]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    """(name, value, labels) of all that is counted."""
    found: Told = []

    def tell(self: Any, value: float = 1.0, tags: dict[str, str] | None = None) -> None:
        found.append((self.info["name"], value, tags or {}))

    for kind, method in ((Counter, "inc"), (Gauge, "set"), (Histogram, "observe")):
        monkeypatch.setattr(kind, method, tell)
    return found


def health(**changes: Any) -> Health:
    return Health(replicas=2, queue_depth=0, painting=0, **changes)


def test_the_painters_are_told_as_they_are(told: Told) -> None:
    metrics = GatewayMetrics(120, 16)
    metrics.queue(5, 3, 90)
    metrics.health(health(refused={"4": "UserError"}, registry="", keys="UserError"), 3, {"2": 1, "3": 1}, {"5": 1})
    assert told == [
        ("aai_queue_requests", 5, {}),
        ("aai_painting_requests", 3, {}),
        ("aai_picture_steps", 90, {}),
        ("aai_painters_running", 2, {}),
        ("aai_painters_wanted", 3, {}),
        *sorted((("aai_version_painters", 1, {"version": version}) for version in "23"), key=told.index),
        ("aai_canary_painters", 1, {"version": "5"}),
        ("aai_version_refused", 1, {"version": "4"}),
        ("aai_registry_trouble", 0, {}),
        ("aai_keys_trouble", 1, {}),
        ("aai_request_timeout_seconds", 120, {}),
        ("aai_capacity_requests", 16, {}),
    ]
    told.clear()
    metrics.health(health(refused={}, registry="OSError", keys=""), 2, {"3": 2}, {})
    assert ("aai_version_painters", 0, {"version": "2"}) in told, "a version that is gone"
    assert ("aai_version_painters", 2, {"version": "3"}) in told
    assert {("aai_canary_painters", 0, "5"), ("aai_version_refused", 0, "4")} <= {
        (name, value, labels.get("version")) for name, value, labels in told
    }
    assert {("aai_registry_trouble", 1), ("aai_keys_trouble", 0)} <= {(name, value) for name, value, _ in told}


def test_a_request_is_told_with_its_key_its_seconds_and_its_stages(told: Told) -> None:
    metrics = GatewayMetrics(120, 16)
    visit = Visit("generate", "id", 0, status=200, told={"key": "ann"}, stages_s={"upload": 0.25})
    visit.begin_s -= 10
    visit.ended_s = visit.begin_s + 0.25  # of the upload
    metrics.visit(visit)
    metrics.visit(Visit("page", "id", 0, status=404, told={"code": "http_404"}, stages_s={"upload": 9.0}))
    seconds = [value for name, value, _ in told if name == "aai_request_duration_seconds"]
    assert seconds == [pytest.approx(10, abs=5), pytest.approx(0, abs=5)]
    assert [row for row in told if row[0] != "aai_request_duration_seconds"] == [
        ("aai_requests_total", 1.0, {"verb": "generate", "status": "200", "code": "ok", "key": "ann"}),
        ("aai_stage_seconds", 0.25, {"stage": "upload"}),
        ("aai_requests_total", 1.0, {"verb": "page", "status": "404", "code": "http_404", "key": "none"}),
    ]


def test_a_painter_tells_seconds_and_rows(told: Told) -> None:
    metrics = PainterMetrics()
    with metrics.stage("paint"):
        time.sleep(0.02)
    metrics.batch(6)
    metrics.version("canary", "4", "ok", 3, 0.5)
    metrics.version("shadow", "4", "failed", 2, 0.7)
    metrics.apart("4", 0.25)
    (paint, rows, *version) = told
    both = {"role": "canary", "version": "4"}
    assert version == [
        ("aai_version_pictures_total", 3, {**both, "outcome": "ok"}),
        ("aai_version_paint_seconds", 0.5, both),
        ("aai_version_pictures_total", 2, {"role": "shadow", "version": "4", "outcome": "failed"}),
        ("aai_shadow_distance", 0.25, {"version": "4"}),
    ]
    assert (paint[0], paint[2], rows) == ("aai_stage_seconds", {"stage": "paint"}, ("aai_unet_rows", 6, {}))
    assert 0.02 <= paint[1] < 10
