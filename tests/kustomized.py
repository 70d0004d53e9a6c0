"""The manifests as Kubernetes gets them: rendered by the real kustomize, and checked against the schemas of both."""

import copy
import functools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
INFRA = ROOT / "infra"
KUBERNETES = INFRA / "kubernetes"
OVERLAYS = ("dev", "gpu", "spot", "dev/jobs", "gpu/jobs")
SCHEMAS = Path(os.environ.get("AAI_KUBERAY_CRDS", ROOT.parent / "shared" / "data" / "kuberay-crds"))
OLDEST, NEWEST = "1.32", "1.37"
"""The versions of Kubernetes for which the manifests are checked."""
Document = dict[str, Any]
POD_MONITOR = {
    "type": "object",
    "properties": {
        "apiVersion": {"const": "monitoring.coreos.com/v1"},
        "kind": {},
        "metadata": {"type": "object", "additionalProperties": True},
        "spec": {
            "type": "object",
            "required": ["selector", "podMetricsEndpoints"],
            "properties": {
                "selector": {
                    "type": "object",
                    "properties": {
                        "matchLabels": {
                            "type": "object",
                            "minProperties": 1,
                            "additionalProperties": {"type": "string"},
                        }
                    },
                },
                "podMetricsEndpoints": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {
                            "port": {"type": "string"},
                            "interval": {"type": "string", "pattern": "^[0-9]+(ms|s|m|h)$"},
                            "relabelings": {
                                "type": "array",
                                "items": {
                                    "type": "object",
                                    "properties": {
                                        "sourceLabels": {"type": "array", "items": {"pattern": "^[a-zA-Z_]\\w*$"}},
                                        "targetLabel": {"type": "string"},
                                    },
                                },
                            },
                        },
                    },
                },
            },
        },
    },
}
"""What we use of the PodMonitor of Prometheus' operator, of which neither Kubernetes nor KubeRay has a schema."""


def command() -> list[str] | None:
    """What renders here: kustomize itself, or the one within kubectl."""
    return ["kustomize", "build"] if shutil.which("kustomize") else _within_kubectl()


def _within_kubectl() -> list[str] | None:
    return ["kubectl", "kustomize"] if shutil.which("kubectl") else None


needs_kustomize = pytest.mark.skipif(
    command() is None, reason="neither kustomize nor kubectl is installed: the manifests are not rendered, nor checked"
)
needs_schemas = pytest.mark.skipif(
    not SCHEMAS.is_dir(), reason=f"no KubeRay schemas at {SCHEMAS}: set AAI_KUBERAY_CRDS to check manifests"
)


def text_of(folder: Path) -> str:
    """The manifests of a kustomization. Raises AssertionError with what kustomize says."""
    done = subprocess.run([*(command() or []), str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def _rendered(overlay: str) -> list[Document]:
    return documents(text_of(KUBERNETES / "overlays" / overlay))


def documents(text: str) -> list[Document]:
    """The Kubernetes objects of a text."""
    return [document for document in yaml.safe_load_all(text) if document]


def rendered(overlay: str) -> list[Document]:
    """The objects of an overlay; a copy, to be changed at will."""
    return copy.deepcopy(_rendered(overlay))


def site(name: str) -> list[Document]:
    """All that one site has: what stands, and its jobs."""
    jobs = "dev/jobs" if name == "dev" else "gpu/jobs"
    have = rendered(name)
    return [*have, *(job for job in rendered(jobs) if job not in have)]


def planted(documents: list[Document], name: str, plant: Callable[[str], str]) -> list[Document]:
    """The objects with a mistake in the text of one, KIND/NAME, whose last letters (a hash) may be left out."""
    found = []
    for document in documents:
        if f"{document['kind']}/{document['metadata']['name']}".startswith(name):
            text = yaml.safe_dump(document, width=1000)
            assert plant(text) != text, f"{name}: nothing is changed in\n{text}"
            document = yaml.safe_load(plant(text))
        found.append(document)
    assert found != documents, f"there is no {name}"
    return found


def strict(schema: Any) -> Any:
    """The schema with unknown names refused: Kubernetes drops them silently, a test should not."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    out = {name: strict(value) for name, value in schema.items()}
    loose = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not loose:
        out["additionalProperties"] = False
    return out


@functools.cache
def _kuberay(kind: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(strict(json.loads((SCHEMAS / f"{kind}.v1.schema.json").read_text())))


def schema_errors(document: Document) -> list[str]:
    """What KubeRay's schema, or those of Kubernetes, say against an object."""
    return _schema_errors(json.dumps(document))


@functools.cache
def _schema_errors(text: str) -> list[str]:
    document = json.loads(text)
    name = f"{document['kind']} {document['metadata']['name']}"
    own = jsonschema.Draft202012Validator(strict(POD_MONITOR)) if document["kind"] == "PodMonitor" else None
    if own or document["apiVersion"] == "ray.io/v1":
        found = (own or _kuberay(document["kind"])).iter_errors(document)
        return [f"{name}: {'.'.join(map(str, error.absolute_path))}: {error.message}" for error in found]
    try:
        for version in (OLDEST, NEWEST):
            kubernetes_validate.validate(document, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{name}: {'.'.join(map(str, error.path))}: {error.message}"]
    except kubernetes_validate.SchemaNotFoundError:
        return [f"{name}: Kubernetes has no {document['kind']} of {document['apiVersion']}"]
    return []


def pinned(package: str) -> str:
    """A package's version in constraints.txt."""
    match = re.search(rf"^{package}==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert match, package
    return match[1]
