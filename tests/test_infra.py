"""The cluster manifests are valid, name only what exists, and hold no secret."""

import importlib
import inspect
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from pipelines.__main__ import VERBS, build_parser, module_of
from tests.dead_settings import walk

ROOT = Path(__file__).resolve().parent.parent
INFRA = ROOT / "infra"
MANIFESTS = sorted(INFRA.rglob("*.yaml"))
SCHEMAS = Path(os.environ.get("AAI_KUBERAY_CRDS", ROOT.parent / "shared" / "data" / "kuberay-crds"))
KEY = re.compile(r"KEY|SECRET|TOKEN|PASSWORD|USERNAME", re.IGNORECASE)
WITHOUT_RAY = ("promote",)
Document = dict[str, Any]


def documents(path: Path) -> list[Document]:
    """The Kubernetes objects of a file."""
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


ALL = [(path, document) for path in MANIFESTS for document in documents(path)]
RAY = [(path, document) for path, document in ALL if document["apiVersion"] == "ray.io/v1"]
NAMES = [f"{path.stem}:{document['kind']}" for path, document in ALL]
RAY_NAMES = [f"{path.stem}:{document['kind']}" for path, document in RAY]


def pinned(package: str) -> str:
    """A package's version in constraints.txt."""
    match = re.search(rf"^{package}==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert match, package
    return match[1]


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


def kuberay_errors(document: Document) -> list[str]:
    """What KubeRay's own schema says against an object."""
    schema = json.loads((SCHEMAS / f"{document['kind']}.v1.schema.json").read_text())
    found = jsonschema.Draft202012Validator(strict(schema)).iter_errors(document)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in found]


needs_schemas = pytest.mark.skipif(
    not SCHEMAS.is_dir(), reason=f"no KubeRay schemas at {SCHEMAS}: set AAI_KUBERAY_CRDS to check manifests"
)


def check_entrypoint(command: str) -> None:
    """A cluster command of ours: a verb, its own flags, a config that its class reads, an address if it uses Ray."""
    program, verb, *arguments = shlex.split(command, comments=True)
    assert program == "aai"
    assert verb in VERBS, verb
    parsed = build_parser(verb)[0].parse_args(arguments)
    given = Path(parsed.config)
    file = given if given.is_absolute() else ROOT / given
    assert file.is_file(), file
    module_of(verb).CONFIG.load(file, parsed.set)
    # Without an address a Ray of its own would be started on the head, which has no worker's GPU.
    assert getattr(parsed, "address", None) == (None if verb in WITHOUT_RAY else "auto"), command


def documented(text: str, program: str) -> list[str]:
    """The lines of a page's code blocks that call a program."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith(f"{program} ")]


def check_application(application: Document) -> None:
    """A Serve application: its builder can be called, and the config it is given is one it reads."""
    module, attribute = application["import_path"].split(":")
    builder = getattr(importlib.import_module(module), attribute)
    assert callable(builder)
    assert len(inspect.signature(builder).parameters) == 1, "Serve hands a builder its args as one dict"
    settings = dict(application["args"])
    file = ROOT / Path(settings.pop("config")).relative_to("/app")
    assert file.is_file(), file
    module_of("serve").CONFIG.load(file, values=settings)


@needs_schemas
@pytest.mark.parametrize(("path", "document"), RAY, ids=RAY_NAMES)
def test_ray_objects_fit_kuberays_schemas(path: Path, document: Document) -> None:
    assert kuberay_errors(document) == []


@needs_schemas
def test_the_schema_check_sees_a_typo_and_a_wrong_type() -> None:
    cluster = next(document for _, document in RAY if document["kind"] == "RayCluster")
    typo = json.loads(json.dumps(cluster))
    typo["spec"]["headGroupSpec"]["rayStartParam"] = {}
    assert any("rayStartParam" in error for error in kuberay_errors(typo))
    wrong = json.loads(json.dumps(cluster))
    wrong["spec"]["workerGroupSpecs"][0]["replicas"] = "two"
    assert any("two" in error for error in kuberay_errors(wrong))


def test_there_is_a_job_for_every_batch_stage() -> None:
    jobs = {document["spec"]["entrypoint"].split()[1] for _, document in RAY if document["kind"] == "RayJob"}
    assert jobs == {"curate", "featurize", "align", "adapt", "evaluate", "promote"}


CLUSTERS = (ROOT / "docs" / "clusters.md").read_text()


@pytest.mark.parametrize("command", documented(CLUSTERS, "aai"))
def test_documented_cluster_commands_work_as_they_stand(command: str) -> None:
    check_entrypoint(command)


def test_documented_commands_are_those_of_the_jobs_and_name_every_manifest() -> None:
    jobs = {document["spec"]["entrypoint"] for _, document in RAY if document["kind"] == "RayJob"}
    assert {" ".join(shlex.split(command, comments=True)) for command in documented(CLUSTERS, "aai")} == jobs
    applied = {ROOT / shlex.split(line, comments=True)[3] for line in documented(CLUSTERS, "kubectl") if " -f " in line}
    assert applied == set(MANIFESTS)


@pytest.mark.parametrize(("path", "document"), RAY, ids=RAY_NAMES)
def test_entrypoints_and_import_paths_exist(path: Path, document: Document) -> None:
    spec = document["spec"]
    if document["kind"] == "RayJob":
        check_entrypoint(spec["entrypoint"])
        clusters = {other["metadata"]["name"] for _, other in RAY if other["kind"] == "RayCluster"}
        assert spec["clusterSelector"]["ray.io/cluster"] in clusters
    if document["kind"] == "RayService":
        for application in yaml.safe_load(spec["serveConfigV2"])["applications"]:
            check_application(application)


def test_serve_config_is_one_that_ray_reads() -> None:
    from ray.serve.schema import ServeDeploySchema

    service = next(document for _, document in RAY if document["kind"] == "RayService")
    parsed = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    assert parsed.applications[0].import_path == "pipelines.serve:build_app"


@pytest.mark.parametrize(
    "command",
    [
        "aai cruate --address auto",
        "aai curate --config configs/curate/absent.yaml",
        "aai curate --no-such-flag",
        "aai curate --config configs/serve/vggsound_vitl14_gpu1.yaml",
        "aai evaluate --config configs/evaluate/vggsound_vitl14_gpu8.yaml",
        "aai promote --config configs/promote/vggsound_vitl14_cpu1.yaml --address auto",
    ],
)
def test_the_entrypoint_check_sees_what_is_wrong(command: str) -> None:
    with pytest.raises((AssertionError, SystemExit, ValueError)):
        check_entrypoint(command)


def test_ray_version_is_the_pinned_one() -> None:
    versions = {node["rayVersion"] for _, document in RAY for node in walk(document) if "rayVersion" in node}
    assert versions == {pinned("ray")}


@pytest.mark.parametrize(("path", "document"), RAY, ids=RAY_NAMES)
def test_ray_clusters_ask_for_a_token(path: Path, document: Document) -> None:
    for node in walk(document):
        if "headGroupSpec" in node:
            assert node["authOptions"]["mode"] == "token"


@pytest.mark.parametrize(("path", "document"), ALL, ids=NAMES)
def test_secrets_come_by_reference_only(path: Path, document: Document) -> None:
    assert document["kind"] != "Secret"
    for node in walk(document):
        if KEY.search(str(node.get("name", ""))) and ("value" in node or "valueFrom" in node):
            assert "value" not in node, node["name"]
            assert node["valueFrom"]["secretKeyRef"]["name"] == "aai-secrets"
    if document["kind"] == "ConfigMap":
        assert [name for name in document["data"] if KEY.search(name)] == []


@pytest.mark.parametrize(("path", "document"), ALL, ids=NAMES)
def test_containers_run_as_an_ordinary_user_with_bounded_memory(path: Path, document: Document) -> None:
    for pod in [node for node in walk(document) if "containers" in node]:
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert "memory" in container["resources"]["limits"]
            assert re.fullmatch(r"aai(-mlflow)?:0\.1\.0|redis:\d+\.\d+-alpine", container["image"])


def test_settings_and_secrets_that_pods_refer_to_are_documented() -> None:
    text = (ROOT / "docs" / "clusters.md").read_text()
    keys = {node["secretKeyRef"]["key"] for _, document in ALL for node in walk(document) if "secretKeyRef" in node}
    assert [key for key in sorted(keys) if key not in text] == []
    maps = {node["configMapRef"]["name"] for _, doc in ALL for node in walk(doc) if "configMapRef" in node}
    assert maps == {document["metadata"]["name"] for _, document in ALL if document["kind"] == "ConfigMap"}


@pytest.mark.parametrize("path", sorted(INFRA.rglob("*Dockerfile")), ids=lambda path: path.name)
def test_images_are_pinned_rootless_and_copy_what_exists(path: Path) -> None:
    text = path.read_text()
    assert "FROM python:3.11-slim" in text
    assert re.search(r"^USER (?!0|root)", text, re.MULTILINE)
    assert re.search(r"pip install [^\n]*-c \S*constraints\.txt", text)
    assert not re.search(r"^(ENV|ARG) \S*(KEY|SECRET|TOKEN|PASSWORD)", text, re.MULTILINE)
    for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE):
        assert [source for source in line.split()[:-1] if not (ROOT / source).exists()] == []


def test_the_driver_of_the_documented_database_is_in_the_image() -> None:
    from sqlalchemy import make_url

    (uri,) = re.findall(r"MLFLOW_BACKEND_STORE_URI=(\S+)", CLUSTERS)
    driver = make_url(uri).get_dialect().driver
    assert f"{driver}-binary" in (INFRA / "docker" / "mlflow.Dockerfile").read_text()
    assert pinned(f"{driver}-binary")


MLFLOW = [(path.stem, document) for path, document in ALL if document["kind"] == "Deployment"]


@pytest.mark.parametrize("deployment", [document for _, document in MLFLOW], ids=[name for name, _ in MLFLOW])
def test_mlflow_server_flags_exist(deployment: Document) -> None:
    """The arguments of the deployments, read by the pinned MLflow's own command line."""
    from mlflow.cli import server

    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    program, command, *arguments = container["args"]
    assert (program, command) == ("mlflow", "server")
    known = {flag for parameter in server.params for flag in parameter.opts}
    assert [flag for flag in (argument.split("=")[0] for argument in arguments) if flag not in known] == []
    assert "--app-name=basic-auth" in arguments
    assert any(argument.startswith("--allowed-hosts=") and "*" not in argument for argument in arguments)
    store = next(parameter for parameter in server.params if "--backend-store-uri" in parameter.opts)
    given = {argument.split("=")[0] for argument in arguments} | {each["name"] for each in container["env"]}
    assert given & {"--backend-store-uri", store.envvar}, "else a file in the container"
