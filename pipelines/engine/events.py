"""OpenLineage: what each command reads and writes, told to whoever collects it while it runs.

AAI_OPENLINEAGE in the environment names a file, which gets a JSON line an event, or the http(s):// address of a
collector (Marquez, DataHub, ...); OPENLINEAGE_API_KEY is its token. A collector that is away stops nothing.
"""

import contextvars
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from aai import storage
from aai.errors import UserError
from aai.version import code_version
from pipelines.settings import StoreConfig, VerbConfig

log = logging.getLogger(__name__)

VARIABLE, KEY_VARIABLE = "AAI_OPENLINEAGE", "OPENLINEAGE_API_KEY"
NAMESPACE = "aai"
PRODUCER = "urn:aai"
READ = ("manifest", "input", "features", "bundle", "evaluation", "audio", "image", "picture")
"""Settings that name what a command reads, in all commands that have them; `out` is what it writes."""
TIMEOUT_S = 5.0

_parent: contextvars.ContextVar[tuple[str, str] | None] = contextvars.ContextVar("parent", default=None)


@dataclass(frozen=True)
class Ran:
    """A run of a command."""

    verb: str
    run_id: str
    parent: tuple[str, str] | None
    """Run id and verb of the command that runs this one."""
    inputs: list[tuple[str, str]]
    outputs: list[tuple[str, str]]


@contextmanager
def told(verb: str, config: VerbConfig) -> Iterator[None]:
    """Tells the start of a command, and its end: COMPLETE, FAIL with the reason, or ABORT."""
    where = os.environ.get(VARIABLE)
    if not where:
        yield
        return
    emit = _emitter(where)
    from openlineage.client.uuid import generate_new_uuid

    ran = Ran(verb, str(generate_new_uuid()), _parent.get(), *datasets(config))
    send = lambda kind, error=None: _send(emit, kind, ran, error)  # noqa: E731
    send("START")
    outer = _parent.set((ran.run_id, verb))
    try:
        yield
    except KeyboardInterrupt:
        send("ABORT")
        raise
    except BaseException as error:
        send("FAIL", f"{type(error).__name__}: {error}"[:2000])
        raise
    finally:
        _parent.reset(outer)
    send("COMPLETE")


def datasets(config: VerbConfig) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """What a command reads and writes, as OpenLineage names data: (namespace, name)."""
    inputs = []
    for name in READ:
        value = getattr(config, name, None) if name in type(config).model_fields else None  # else maybe a method
        for uri in (value,) if isinstance(value, str) else value or ():
            if isinstance(uri, str) and uri:
                inputs.append(_named(uri.partition("=")[2] or uri if name == "audio" else uri, config))
    out = getattr(config, "out", None)
    return inputs, [_named(out, config)] if isinstance(out, str) else []


def _named(uri: str, config: VerbConfig) -> tuple[str, str]:
    if uri.startswith("models:"):
        tracking = getattr(config, "tracking", None) or StoreConfig()
        parts = urlsplit(tracking.uri)
        return f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}", uri
    if uri.startswith("s3://"):
        bucket, _, name = uri.removeprefix("s3://").partition("/")
        return f"s3://{bucket}", name
    return "file", storage.absolute(uri)


def _emitter(where: str) -> Callable[[Any], None]:
    """What takes an event. Raises UserError for an address that is none, or without the library."""
    try:
        from openlineage.client import OpenLineageClient
    except ModuleNotFoundError as error:
        rule = "openlineage-python is not installed"
        raise UserError(VARIABLE, where, rule, "pip install 'aai[openlineage]', or unset the variable") from error

    if "://" not in where:
        file = Path(storage.absolute(where))
        file.parent.mkdir(parents=True, exist_ok=True)
        transport: Mapping[str, Any] = {"type": "file", "log_file_path": str(file), "append": True}
    elif where.startswith(("http://", "https://")):
        transport = {"type": "http", "url": where, "timeout": TIMEOUT_S, "retry": {"total": 1}}
        if key := os.environ.get(KEY_VARIABLE):
            transport = {**transport, "auth": {"type": "api_key", "apiKey": key}}
    else:
        raise UserError(VARIABLE, where, "is neither a file nor an http(s):// address", "give one of the two")
    logging.getLogger("openlineage").setLevel(logging.ERROR)
    emit: Callable[[Any], None] = OpenLineageClient(config={"transport": dict(transport)}).emit
    return emit


def _send(emit: Callable[[Any], None], kind: str, ran: Ran, error: str | None) -> None:
    from openlineage.client import event_v2 as v2
    from openlineage.client import facet_v2

    facets: dict[str, Any] = {
        "processing_engine": facet_v2.processing_engine_run.ProcessingEngineRunFacet(
            version=code_version(), name="aai", producer=PRODUCER
        )
    }
    if error is not None:
        facets["errorMessage"] = facet_v2.error_message_run.ErrorMessageRunFacet(
            message=error, programmingLanguage="python", producer=PRODUCER
        )
    if ran.parent is not None:
        parent = facet_v2.parent_run
        of = parent.Run(runId=ran.parent[0]), parent.Job(namespace=NAMESPACE, name=ran.parent[1])
        facets["parent"] = parent.ParentRunFacet(run=of[0], job=of[1], producer=PRODUCER)
    event = v2.RunEvent(
        eventType=v2.RunState[kind],
        eventTime=datetime.now(UTC).isoformat(),
        run=v2.Run(runId=ran.run_id, facets=facets),
        job=v2.Job(namespace=NAMESPACE, name=ran.verb),
        inputs=[v2.InputDataset(namespace=namespace, name=name) for namespace, name in ran.inputs],
        outputs=[v2.OutputDataset(namespace=namespace, name=name) for namespace, name in ran.outputs],
        producer=PRODUCER,
    )
    try:
        emit(event)
    except Exception as failure:  # of the network, the disk, or the collector: none of it is a reason to stop
        log.warning("OpenLineage was not told that %s is %s (%s)", ran.verb, kind, str(failure).split("\n")[0][:200])
