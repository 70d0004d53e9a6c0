"""The cluster manifests are valid, name only what exists, hold no secret, and say each thing once."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.dead_settings import image_of, pods, walk
from tests.kustomized import (
    INFRA,
    KUBERNETES,
    OVERLAYS,
    ROOT,
    Document,
    documents,
    needs_kustomize,
    needs_schemas,
    pinned,
    planted,
    rendered,
    schema_errors,
    site,
    text_of,
)
from tests.manifest_checks import check_entrypoint, mistakes

KEY = re.compile(r"KEY|SECRET|TOKEN|PASSWORD|USERNAME", re.IGNORECASE)
SITES = ("dev", "gpu", "spot")
PAGE = (ROOT / "docs" / "kubernetes.md").read_text()
CLUSTERS = (ROOT / "docs" / "clusters.md").read_text().partition("## On a Ray cluster that is already there")[2]


def documented(text: str, program: str) -> list[str]:
    """The lines of a page's code blocks that call a program."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith(f"{program} ")]


def jobs(overlay: str) -> dict[str, str]:
    """The commands of an overlay's jobs, by what `-l aai/job=` calls them."""
    found = [
        document for document in rendered(f"{overlay}/jobs") if "aai/job" in document["metadata"].get("labels", {})
    ]
    return {job["metadata"]["labels"]["aai/job"]: job["spec"].get("entrypoint", "") for job in found}


@needs_kustomize
@needs_schemas
@pytest.mark.parametrize("name", SITES)
def test_a_site_has_no_mistakes(name: str) -> None:
    assert mistakes(site(name)) == []


@needs_kustomize
@needs_schemas
def test_an_upgrade_by_steps_has_no_mistakes(tmp_path: Path) -> None:
    changed = copied(tmp_path) / "overlays" / "gpu" / "kustomization.yaml"
    ingress = "  - ../../components/ingress\n"
    changed.write_text(changed.read_text().replace(ingress, f"{ingress}  - ../../components/incremental-upgrade\n"))
    found = [*documents(text_of(changed.parent)), *rendered("gpu/jobs")]
    assert mistakes(found) == []
    (service,) = [document for document in found if document["kind"] == "RayService"]
    assert service["spec"]["upgradeStrategy"]["type"] == "NewClusterWithIncrementalUpgrade"
    assert "aai-gateway-istio" in yaml.safe_dump([each for each in found if each["kind"] == "Ingress"])


def monitored(tmp_path: Path) -> list[Document]:
    """The site gpu with the component monitoring."""
    changed = copied(tmp_path) / "overlays" / "gpu" / "kustomization.yaml"
    ingress = "  - ../../components/ingress\n"
    changed.write_text(changed.read_text().replace(ingress, f"{ingress}  - ../../components/monitoring\n"))
    return [*documents(text_of(changed.parent)), *rendered("gpu/jobs")]


@needs_kustomize
@needs_schemas
def test_monitors_find_every_ray_pod_and_mistakes_in_them_are_found(tmp_path: Path) -> None:
    found = monitored(tmp_path)
    assert mistakes(found) == []
    assert {each["metadata"]["name"] for each in found if each["kind"] == "PodMonitor"} == {
        "aai-training",
        "aai-service",
    }
    for name, old, new, said in (
        ("PodMonitor/aai-training", "port: metrics", "port: metric", "has a port metric"),
        ("PodMonitor/aai-training", "app: aai-training", "app: aai-trainings", "selects no Ray pod"),
        ("PodMonitor/aai-service", "podMetricsEndpoints:", "endpoints:", "endpoints"),
        ("PodMonitor/aai-service", "interval: 15s", "interval: 15", "15"),
        ("NetworkPolicy/aai-service", "name: monitoring", "name: monitor", "lets Prometheus in"),
    ):
        wrong = mistakes(planted(found, name, lambda text, old=old, new=new: text.replace(old, new, 1)))
        assert any(said in sentence for sentence in wrong), (name, new, wrong)


@needs_kustomize
@needs_schemas
def test_the_schema_check_sees_a_typo_and_a_wrong_type() -> None:
    cluster = next(document for document in rendered("gpu") if document["kind"] == "RayCluster")
    cluster["spec"]["headGroupSpec"]["rayStartParam"] = {}
    cluster["spec"]["workerGroupSpecs"][0]["replicas"] = "two"
    found = schema_errors(cluster)
    assert any("rayStartParam" in error for error in found)
    assert any("two" in error for error in found)
    policy = next(document for document in rendered("gpu") if document["kind"] == "NetworkPolicy")
    policy["spec"]["ingres"] = []
    assert "ingres" in str(schema_errors(policy))


def test_every_file_belongs_to_an_overlay() -> None:
    """Every kustomization is reached from an overlay, or documented; every file stands in its kustomization."""
    for folder in {path.parent for path in KUBERNETES.rglob("*.yaml")}:
        said = (folder / "kustomization.yaml").read_text()
        names = {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml"}
        assert [name for name in sorted(names) if not re.search(rf"(- |path: ){name}$", said, re.MULTILINE)] == []
    text = PAGE + "".join(path.read_text() for path in KUBERNETES.rglob("kustomization.yaml"))
    parts = [path.parent.name for path in KUBERNETES.rglob("kustomization.yaml")]
    assert [part for part in parts if part not in text] == []


@needs_kustomize
@pytest.mark.parametrize("overlay", ["dev", "gpu"])
def test_there_is_a_job_for_every_batch_stage(overlay: str) -> None:
    known = {"curate", "featurize", "align", "adapt", "tune", "evaluate", "promote", "run"}
    found = jobs(overlay)
    assert found.keys() == known | {"world" if overlay == "dev" else "weights"}
    assert [name for name, entrypoint in found.items() if entrypoint and entrypoint.split()[1] != name] == []


@pytest.mark.parametrize("command", documented(CLUSTERS, "aai"))
def test_documented_cluster_commands_work_as_they_stand(command: str) -> None:
    check_entrypoint(command)


@needs_kustomize
def test_documented_commands_are_those_of_the_jobs_and_name_every_overlay() -> None:
    shown = {" ".join(shlex.split(command, comments=True)) for command in documented(CLUSTERS, "aai")}
    assert shown == {entrypoint for name, entrypoint in jobs("gpu").items() if name not in ("weights", "tune")}
    applied = [shlex.split(line, comments=True) for line in documented(PAGE, "kubectl") if " -k " in line]
    assert {line[3] for line in applied} == {f"infra/kubernetes/overlays/{name}" for name in ("gpu", "gpu/jobs")}
    assert [name for name in OVERLAYS if f"infra/kubernetes/overlays/{name}" not in PAGE] == []
    asked = [line[-1].partition("=")[2] for line in applied if line[-1].startswith("aai/job=")]
    shown_there = [shlex.split(line)[1] for line in documented(CLUSTERS, "aai")]
    assert [*asked, "run"] == ["weights", *shown_there]
    labels = [each["metadata"]["labels"].get("app.kubernetes.io/component") for each in rendered("gpu")[1:]]
    assert {"service", "training", "registry"} <= set(labels)


@needs_kustomize
def test_serve_config_is_one_that_ray_reads() -> None:
    from ray.serve.schema import ServeDeploySchema

    for name in SITES:
        service = next(document for document in rendered(name) if document["kind"] == "RayService")
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
    with pytest.raises((AssertionError, ValueError)):
        check_entrypoint(command)


@needs_kustomize
@pytest.mark.parametrize("name", SITES)
def test_ray_clusters_are_of_the_pinned_version_and_ask_for_a_token(name: str) -> None:
    clusters = [node for document in rendered(name) for node in walk(document) if "headGroupSpec" in node]
    assert [cluster["rayVersion"] for cluster in clusters] == [pinned("ray")] * 2
    assert [cluster["authOptions"]["mode"] for cluster in clusters] == ["token"] * 2


@needs_kustomize
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_secrets_come_by_reference_only(overlay: str) -> None:
    for document in rendered(overlay):
        assert document["kind"] != "Secret"
        for node in walk(document):
            if KEY.search(str(node.get("name", ""))) and ("value" in node or "valueFrom" in node):
                # What is put together of variables holds none of their values.
                assert "valueFrom" in node or re.fullmatch(r'"?(\$\(\w+\),?)+"?', node["value"]), node["name"]
        if document["kind"] == "ConfigMap":
            assert [name for name in document["data"] if KEY.search(name)] == []


@needs_kustomize
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_containers_run_as_an_ordinary_user_with_bounded_memory(overlay: str) -> None:
    """As Kubernetes' level `restricted` demands of a namespace."""
    for pod in pods(rendered(overlay)):
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert pod["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["spec"].get("automountServiceAccountToken") is ("ray-head" in str(pod))
        for container in [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert "memory" in container["resources"]["limits"]
            assert overlay.startswith("dev") or re.search("@sha256:[0-9a-f]{64}$", container["image"])


@needs_kustomize
def test_cpu_and_gpu_nodes_come_from_zero_and_spot_nodes_are_for_training_alone() -> None:
    for name, pools in (("gpu", ["cpu", "gpu"]), ("spot", ["cpu-spot", "gpu-spot"])):
        cluster = next(document for document in rendered(name) if document["kind"] == "RayCluster")
        groups = cluster["spec"]["workerGroupSpecs"]
        assert [(group["groupName"], group["minReplicas"]) for group in groups] == [("cpu", 0), ("gpu", 0)]
        assert [group["template"]["spec"]["nodeSelector"]["aai/pool"] for group in groups] == pools
        service = next(document for document in rendered(name) if document["kind"] == "RayService")
        assert "spot" not in yaml.safe_dump(service)


@needs_kustomize
def test_weights_are_fetched_by_one_job_and_read_by_the_others() -> None:
    for pod in pods([*rendered("gpu"), *rendered("gpu/jobs")]):
        claims = [volume for volume in pod["spec"].get("volumes", []) if "persistentVolumeClaim" in volume]
        fetches = "hf download" in str(pod)
        for container in pod["spec"]["containers"]:
            told = {each["name"]: each.get("value") for each in container.get("env", [])}
            if claims and not fetches:
                assert claims[0]["persistentVolumeClaim"]["readOnly"] is True
                assert (told["HF_HUB_CACHE"], told["HF_HUB_OFFLINE"]) == ("/weights/hub", "1")
            assert not fetches or "HF_HUB_OFFLINE" not in told
        if "nvidia.com/gpu" in str(pod["spec"]["containers"]):
            assert "test -f /weights/complete" in str(pod["spec"]["initContainers"])


@pytest.mark.parametrize("path", sorted(INFRA.rglob("*Dockerfile")), ids=lambda path: path.name)
def test_images_are_pinned_rootless_and_copy_what_exists(path: Path) -> None:
    text = path.read_text()
    stages = re.split(r"^(?=FROM )", text, flags=re.MULTILINE)[1:]
    assert re.match(r"FROM python:3\.11-slim@sha256:[0-9a-f]{64}\b", stages[0])
    assert [
        stage for stage in stages if "CMD" in stage and not re.search(r"^USER (?!0|root)", stage, re.MULTILINE)
    ] == []
    for install in re.findall(r"pip install [^\n]*", text):
        assert re.search(r" -c \S*constraints\.txt", install)
    assert not re.search(r"^(ENV|ARG) \S*(KEY|SECRET|TOKEN|PASSWORD)", text, re.MULTILINE)
    for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE):
        assert [source for source in line.split()[:-1] if not (ROOT / source).exists()] == []


def test_images_install_extras_that_exist() -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = re.findall(r"\.\[([\w,]+)\]", (INFRA / "docker" / "Dockerfile").read_text())
    assert len(asked) == 2
    assert [name for names in asked for name in names.split(",") if name not in extras] == []
    heavy = {"mlflow", "matplotlib", "ray[data,train]"}
    assert not heavy & {package for name in asked[0].split(",") for package in extras[name]}


def copied(tmp_path: Path) -> Path:
    """The manifests, to be changed."""
    shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    return tmp_path / "kubernetes"


ONCE: dict[str, tuple[str, str, str, int]] = {
    "bucket": ("overlays/gpu/site", "s3://my-bucket/aai", "s3://team/sound", 0),
    "registry": ("overlays/gpu/site", "registry.example.com/aai\n", "images.team.example/aai\n", 4),
    "digest": ("overlays/gpu/site", "aai-serve\n    digest: sha256:00", "aai-serve\n    digest: sha256:aa", 4),
}
"""What is written once: its file, how it stands there, what it becomes, and how many images change."""


@needs_kustomize
@pytest.mark.parametrize(("folder", "old", "new", "images"), ONCE.values(), ids=ONCE)
def test_what_differs_from_site_to_site_is_written_once(
    folder: str, old: str, new: str, images: int, tmp_path: Path
) -> None:
    """One line changed changes exactly what depends on it; unchanged, every rendering is the same."""
    place = copied(tmp_path)
    file, before = place / folder / "kustomization.yaml", text_of(place / "overlays" / "spot")
    assert before == text_of(KUBERNETES / "overlays" / "spot")
    assert file.read_text().count(old) == 1
    file.write_text(file.read_text().replace(old, new))
    after = text_of(place / "overlays" / "spot")
    pairs = list(zip(before.splitlines(), after.splitlines(), strict=True))
    changed = [(was, now) for was, now in pairs if was != now]
    assert sum("image:" in was for was, _ in changed) == images
    others = [now for _, now in changed if "image:" not in now]
    assert [line for line in others if "aai-settings-" not in line and new not in line] == []
    assert bool(others) == (images == 0)


@needs_kustomize
@pytest.mark.parametrize("name", SITES)
def test_every_pod_reads_the_settings_by_their_hash(name: str) -> None:
    """A changed setting is a new name, so that the pods that read it are made anew."""
    found = {
        node["configMapRef"]["name"] for document in rendered(name) for node in walk(document) if "configMapRef" in node
    }
    (settings,) = found
    assert re.fullmatch(r"aai-settings-\w{10}", settings)
    reads = [pod for pod in pods(rendered(name)) if "configMapRef" in str(pod)]
    assert len(reads) >= 5


def metrics_of_the_code() -> set[str]:
    """The names under which Ray's endpoint has the metrics of our code."""
    sources = "".join(path.read_text() for path in (ROOT / "pipelines").rglob("*.py"))
    return {f"ray_{name}" for name in re.findall(r'"(aai_\w+)"', sources)}


def unknown_metrics(text: str) -> set[str]:
    """The metrics that a text names and our code does not have; histograms have three of them each."""
    named = {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"\bray_aai_\w+", text)}
    return named - metrics_of_the_code()


@pytest.mark.parametrize("path", sorted((INFRA / "monitoring").iterdir()), ids=lambda path: path.name)
def test_monitoring_names_metrics_that_the_code_has(path: Path) -> None:
    assert unknown_metrics(path.read_text()) == set()
    assert unknown_metrics("sum(rate(ray_aai_request_total[5m]))") == {"ray_aai_request_total"}


def listed(documents: list[Document], kind: str) -> list[Any]:
    return [document for document in documents if document["kind"] == kind]


@needs_kustomize
@pytest.mark.parametrize("name", SITES)
def test_mlflow_keeps_its_accounts_and_its_password_comes_from_the_environment(name: str) -> None:
    (mlflow,) = [each for each in listed(rendered(name), "Deployment") if each["metadata"]["name"] == "mlflow"]
    (container,) = mlflow["spec"]["template"]["spec"]["containers"]
    assert image_of(container) == "aai-mlflow"
    arguments = container["args"]
    assert "--app-name=basic-auth" in arguments
    assert any(argument.startswith("--allowed-hosts=") and "*" not in argument for argument in arguments)
    assert not any("://" in argument and "@" in argument for argument in arguments)
    assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys()


def test_the_driver_of_the_database_is_in_the_image() -> None:
    from sqlalchemy import make_url

    texts = [(INFRA / "docker" / "basic_auth.ini").read_text(), (KUBERNETES / "base/registry/mlflow.yaml").read_text()]
    for uri in (re.search(r"postgresql\S+", text) for text in texts):
        assert uri
        driver = make_url(uri[0]).get_dialect().driver
        assert f"{driver}-binary" in (INFRA / "docker" / "mlflow.Dockerfile").read_text()
        assert pinned(f"{driver}-binary")


@needs_kustomize
def test_labels_choose_one_job() -> None:
    """`kubectl apply -k ... -l aai/job=curate`: each label is of one object."""
    labels = [each["metadata"].get("labels", {}).get("aai/job") for each in rendered("gpu/jobs")]
    assert len([label for label in labels if label]) == len({label for label in labels if label}) == 9


def test_hf_takes_the_flags_of_the_weights_job() -> None:
    flags = re.findall(r"(--\w+) ", (KUBERNETES / "overlays/gpu/jobs/weights.yaml").read_text())
    command = [str(Path(sys.executable).parent / "hf"), "download", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert flags
    assert [flag for flag in flags if flag not in done.stdout] == []
