"""Traces of a real service (make accept): from the client's trace through proxy and gateway to the painter."""

from pathlib import Path

import httpx
import pytest

from tests.hostile import wav
from tests.pipelines.service.test_traces import PARENT, Receiver, attributes
from tests.pipelines.test_serve import HEADERS, QUICK, serving


@pytest.mark.accept
@pytest.mark.timeout(300)
def test_a_picture_is_one_trace_across_the_processes(tmp_path: Path) -> None:
    receiver = Receiver()
    with serving(tmp_path, traces={"endpoint": receiver.url}) as running:
        files, headers = {"audio": wav()}, HEADERS | PARENT
        answer = httpx.post(f"{running.url}/v1/generate", files=files, data=QUICK, headers=headers, timeout=60)
        assert answer.status_code == 200
        spans = receiver.wait_for("aai generate", "upload", "decode", "painters")
        told = attributes(spans["aai generate"])
        assert told["aai.request_id"] == answer.headers["x-request-id"]
        assert told["aai.model"] == "tiny/1@champion"
        painter = [span for span in receiver.spans if "Painter" in span.name or "Painter" in str(attributes(span))]
        print(sorted({(span.name, span.trace_id.hex()[:8]) for span in receiver.spans}))
        assert {span.trace_id for span in painter if "paint" in span.name} <= {spans["upload"].trace_id}
    receiver.shutdown()
