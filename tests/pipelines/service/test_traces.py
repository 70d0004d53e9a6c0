"""Spans of a request, as an OTLP receiver gets them."""

import importlib.util
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.sdk.trace import TracerProvider

from aai.errors import UserError
from pipelines.service.traces import ENDPOINT, TracesConfig, exporters
from tests.pipelines.service.test_access import access, painted
from tests.pipelines.service.test_guard import asked

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = {"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}


class Receiver(ThreadingHTTPServer):
    """Takes spans at http://127.0.0.1:PORT/v1/traces."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        spans = self.spans

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    raise AssertionError("not asked for")
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    for scope in resource.scope_spans:
                        spans.extend(scope.spans)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1/traces"

    def wait_for(self, *names: str) -> dict[str, Span]:
        """The spans of the trace, by name, when all of these are there."""
        end_s = time.monotonic() + 40
        while True:
            found = {span.name: span for span in self.spans if span.trace_id.hex() == TRACE}
            if found.keys() >= set(names):
                return found
            assert time.monotonic() < end_s, [(span.name, span.trace_id.hex()) for span in self.spans]
            time.sleep(0.2)


def attributes(span: Span) -> dict[str, str]:
    return {each.key: each.value.string_value or str(each.value.int_value) for each in span.attributes}


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    found = Receiver()
    yield found
    found.shutdown()
    found.server_close()


def test_a_request_is_a_span_of_the_clients_trace_with_its_stages(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENDPOINT, "")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "aai")
    options = TracesConfig(endpoint=receiver.url).options()
    assert options["exporter_import_path"] == "pipelines.service.traces:exporters"
    assert os.environ[ENDPOINT] == receiver.url
    provider = TracerProvider()
    (processor,) = exporters()
    provider.add_span_processor(processor)
    trace.set_tracer_provider(provider)
    try:
        app, visits = access(painted)
        asked(app, [b"x"], headers=PARENT)
        asked(app, [b"x"])
        spans = receiver.wait_for("aai generate", "upload", "decode", "painters")
    finally:
        provider.shutdown()
    request = spans["aai generate"]
    assert request.parent_span_id.hex() == "00f067aa0ba902b7"
    told = attributes(request)
    assert told["aai.request_id"] == visits[0].request_id
    assert (told["aai.model"], told["aai.status"], told["aai.code"]) == ("toy/3@champion", "200", "ok")
    for name in ("upload", "decode", "painters"):
        assert spans[name].parent_span_id == request.span_id
        assert request.start_time_unix_nano - 10**7 <= spans[name].start_time_unix_nano
        assert spans[name].end_time_unix_nano <= request.end_time_unix_nano + 10**7
    assert spans["decode"].end_time_unix_nano <= spans["painters"].start_time_unix_nano + 10**7
    assert len({span.trace_id for span in receiver.spans}) == 2, "who begins no trace gets one"


def test_without_an_endpoint_nothing_is_traced() -> None:
    assert TracesConfig().options() == {"enabled": False}


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"traces\.endpoint=http://x: needs the package .*pip install 'aai\[traces\]'"):
        TracesConfig(endpoint="http://x").options()


def test_as_many_are_traced_as_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENDPOINT, "http://before")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "ours")
    options = TracesConfig(endpoint="http://127.0.0.1:4318/v1/traces", share=0.25).options()
    assert (options["enabled"], options["sampling_ratio"]) == (True, 0.25)
    assert (os.environ[ENDPOINT], os.environ["OTEL_SERVICE_NAME"]) == ("http://127.0.0.1:4318/v1/traces", "ours")
