"""Traces of requests by OTLP: what each of Serve's processes is given to send its spans with."""

import importlib.util
import os

import pydantic
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from aai.config import Config
from aai.errors import UserError

ENDPOINT = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"


class TracesConfig(Config):
    """Where spans are sent to; needs `aai[traces]`."""

    endpoint: str = ""
    """URL of an OTLP receiver, http://HOST:4318/v1/traces; empty = no traces."""
    share: float = pydantic.Field(1.0, ge=0, le=1)
    """Share of the requests that are traced; one whose `traceparent` says so always or never is."""

    def options(self) -> dict[str, object]:
        """The `tracing_config` of Serve. Tells the endpoint to processes that are started from now on.

        Raises UserError where the package that sends is missing.
        """
        if not self.endpoint:
            return {"enabled": False}
        if importlib.util.find_spec("opentelemetry.exporter.otlp") is None:
            rule = "needs the package opentelemetry-exporter-otlp-proto-http"
            raise UserError("traces.endpoint", self.endpoint, rule, "pip install 'aai[traces]'")
        os.environ[ENDPOINT] = self.endpoint
        os.environ.setdefault("OTEL_SERVICE_NAME", "aai")
        path = f"{exporters.__module__}:{exporters.__name__}"
        return {"enabled": True, "exporter_import_path": path, "sampling_ratio": self.share}


def exporters() -> list[SpanProcessor]:
    """Called by Serve in each process. The endpoint stands in the environment (OTEL_EXPORTER_OTLP_TRACES_ENDPOINT)."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return [BatchSpanProcessor(OTLPSpanExporter(), schedule_delay_millis=1000)]
