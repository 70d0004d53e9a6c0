"""OpenLineage events of commands, by what the specification asks of them (openlineage.io, 2-0-2)."""

import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from aai.errors import UserError
from pipelines.__main__ import load_config, main
from pipelines.engine.events import KEY_VARIABLE, VARIABLE, datasets, told
from pipelines.export import CONFIG as ExportConfig
from pipelines.models import ModelsConfig
from tests.pipelines.registry.test_versions import make_bundle

TEXT = {"type": "string", "minLength": 1}
URI = {"type": "string", "format": "uri", "pattern": "^[a-z]+:"}
NAMED = {"required": ["namespace", "name"], "properties": {"namespace": TEXT, "name": TEXT}}
FACETS = {
    "additionalProperties": {
        "required": ["_producer", "_schemaURL"],
        "properties": {"_producer": URI, "_schemaURL": URI},
    }
}
UUID = {"type": "string", "pattern": "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"}
EVENT = {
    "type": "object",
    "required": ["eventTime", "producer", "schemaURL", "run", "job"],
    "properties": {
        "eventTime": {"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)$"},
        "eventType": {"enum": ["START", "RUNNING", "COMPLETE", "ABORT", "FAIL", "OTHER"]},
        "producer": URI,
        "schemaURL": {**URI, "pattern": r"^https://openlineage.io/spec/2-0-2/OpenLineage.json#/\$defs/RunEvent$"},
        "run": {"required": ["runId"], "properties": {"runId": UUID, "facets": FACETS}},
        "job": {**NAMED, "properties": {**NAMED["properties"], "facets": FACETS}},
        "inputs": {"type": "array", "items": NAMED},
        "outputs": {"type": "array", "items": NAMED},
    },
}  # fmt: skip


@pytest.fixture
def collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, f"{tmp_path}/told/events.jsonl")
    return tmp_path / "told" / "events.jsonl"


def events(file: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in file.read_text().splitlines()]
    for event in found:
        jsonschema.validate(event, EVENT)
    return found


def test_a_command_is_told_as_it_begins_and_ends(collected: Path, tmp_path: Path) -> None:
    make_bundle(tmp_path, 1)
    assert main(["sign", "--bundle", f"{tmp_path}/bundle", "--key", f"{tmp_path}/k", "--new-key"]) == 0
    assert main(["sign", "--bundle", f"{tmp_path}/none", "--key", f"{tmp_path}/k"]) == 2
    start, end, again, failed = events(collected)
    assert [event["eventType"] for event in (start, end, again, failed)] == ["START", "COMPLETE", "START", "FAIL"]
    assert start["run"]["runId"] == end["run"]["runId"] != again["run"]["runId"]
    assert start["job"]["name"] == "sign"
    assert [(read["namespace"], read["name"]) for read in start["inputs"]] == [("file", f"{tmp_path}/bundle")]
    assert "no such bundle folder" in failed["run"]["facets"]["errorMessage"]["message"]
    assert "parent" not in failed["run"]["facets"]


def test_a_command_within_another_names_it(collected: Path) -> None:
    with pytest.raises(KeyboardInterrupt), told("demo", ModelsConfig()), told("align", ModelsConfig()):
        raise KeyboardInterrupt
    demo, _, align, ended = events(collected)
    assert [event["eventType"] for event in (align, ended)] == ["ABORT", "ABORT"]
    parent = align["run"]["facets"]["parent"]
    assert parent["job"]["name"] == "demo"
    assert parent["run"]["runId"] == demo["run"]["runId"] == ended["run"]["runId"]
    assert "parent" not in ended["run"]["facets"]


def test_data_is_named_by_where_it_lies() -> None:
    given = {"audio": ["dog=/a/b.wav", "/c.wav"], "bundle": "models:/aai/3", "out": "s3://bucket/x/y"}
    config = ExportConfig.parse({**given, "tracking": {"uri": "http://me:secret@mlflow:5000"}})
    inputs, outputs = datasets(config)
    assert inputs == [("http://mlflow:5000", "models:/aai/3"), ("file", "/a/b.wav"), ("file", "/c.wav")]
    assert outputs == [("s3://bucket", "x/y")]


@pytest.mark.parametrize("verb", ["curate", "featurize", "align", "adapt", "tune", "evaluate", "promote", "run"])
def test_every_stage_can_be_told_of(verb: str) -> None:
    config, _ = load_config(verb, [])
    inputs, outputs = datasets(config)
    assert len(outputs) == (verb != "run")
    assert bool(inputs) == (verb not in ("run", "tune"))


def test_nothing_is_told_where_nobody_collects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with told("models", ModelsConfig()):
        pass
    monkeypatch.setenv(VARIABLE, "ftp://x")
    with pytest.raises(UserError, match="neither a file nor"), told("models", ModelsConfig()):
        pytest.fail("it begins nothing that it cannot tell of")


class Collector(BaseHTTPRequestHandler):
    """Keeps what it is sent."""

    seen: list[tuple[str, str | None, dict[str, Any]]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append((self.path, self.headers["Authorization"], body))
        self.send_response(201)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Collector]]:
    handler = type("Handler", (Collector,), {"seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv(VARIABLE, f"http://127.0.0.1:{server.server_port}")
    yield handler
    server.shutdown()
    server.server_close()


def test_a_collector_gets_events_and_the_key(collector: type[Collector], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    with told("models", ModelsConfig()):
        pass
    assert [(path, key) for path, key, _ in collector.seen] == [("/api/v1/lineage", "Bearer secret")] * 2
    for _, _, event in collector.seen:
        jsonschema.validate(event, EVENT)
        assert "secret" not in json.dumps(event)


def test_a_collector_that_is_away_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(VARIABLE, "http://127.0.0.1:9")
    with caplog.at_level(logging.WARNING), told("models", ModelsConfig()):
        reached = True
    assert reached
    assert "OpenLineage was not told that models is START" in caplog.text
