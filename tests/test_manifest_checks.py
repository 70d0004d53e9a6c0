"""Mistakes of every kind, planted into the rendered manifests one by one, are all found."""

from collections.abc import Callable

import pytest

from tests.kustomized import needs_kustomize, needs_schemas, planted, site
from tests.manifest_checks import mistakes

pytestmark = [needs_kustomize, needs_schemas]


def swap(old: str, new: str) -> Callable[[str], str]:
    """Another word for the first of its kind."""
    return lambda text: text.replace(old, new, 1)


WORKERS, PAINTERS, MLFLOW = "RayCluster/aai-training", "RayService/aai", "Deployment/mlflow"
PLANTED: dict[str, tuple[str, Callable[[str], str], str]] = {
    "a command that does not exist": ("RayJob/aai-curate", swap("aai curate", "aai cruate"), "cruate is no command"),
    "a flag that does not exist": ("RayJob/aai-align", swap("--address", "--adress"), "flags that align does not have"),
    "a config that does not exist": ("RayJob/aai-adapt", swap("gpu8.yaml", "gpu4.yaml"), "gpu4.yaml does not exist"),
    "another command's config": ("RayJob/aai-evaluate", swap("configs/evaluate", "configs/adapt"), "unknown key"),
    "a job that finds no cluster": ("RayJob/aai-promote", swap("aai-training", "aai-gpu"), "there is no such cluster"),
    "a job without its cluster": ("RayJob/aai-evaluate", swap(" --address auto", ""), "no --address auto"),
    "a config of the service that does not exist": (PAINTERS, swap("gpu1.yaml", "gpu2.yaml"), "does not exist"),
    "a setting of the service that does not exist": (PAINTERS, swap("gateways:", "gateway:"), "unknown key"),
    "a program that the image lacks": (
        "CronJob/mlflow-backup",
        swap("pg_dump ", "pg_dumpall "),
        "postgres has no pg_dumpall",
    ),
    "a script that does not parse": ("CronJob/mlflow-backup", swap("done", "od"), "no way to read"),
    "a flag that MLflow does not have": (MLFLOW, swap("--workers=2", "--processes=2"), "has no --processes"),
    "a Service's port that nobody listens on": (
        "Service/mlflow",
        swap("port: 5000", "port: 5001"),
        "do not listen on 5001",
    ),
    "a policy's port that nobody listens on": ("NetworkPolicy/redis", swap("6379", "6380"), "do not listen on 6380"),
    "an address of nobody": ("ConfigMap/aai-settings", swap("mlflow:5000", "mlfow:5000"), "no Service is called mlfow"),
    "a database of nobody": (
        "ConfigMap/aai-settings",
        swap("PGHOST: postgresql", "PGHOST: postgres"),
        "called postgres ",
    ),
    "an image that nothing builds": (MLFLOW, swap("aai-mlflow@", "aai-mlfow@"), "nothing builds the image"),
    "an image that is not pinned": (WORKERS, swap(f"aai@sha256:{'0' * 64}", "aai:latest"), "is not pinned"),
    "training on the service's image": (WORKERS, swap("/aai@", "/aai-serve@"), "has no Ray Data"),
    "a secret that does not exist": (
        PAINTERS,
        swap("name: aai-secrets", "name: aai-secret"),
        "nobody makes the secret",
    ),
    "a key that the secret lacks": (WORKERS, swap("key: AWS_ACCESS", "key: AWS_ACCES"), "aai-secrets has no AWS_ACCES"),
    "settings that do not exist": (WORKERS, swap("name: aai-settings-", "name: settings-"), "there is no ConfigMap"),
    "a claim that does not exist": (
        PAINTERS,
        swap("claimName: aai-weights", "claimName: weights"),
        "there is no Persistent",
    ),
    "a volume that does not exist": (PAINTERS, swap("name: weights", "name: weight"), "there is no volume weight"),
    "a model that no job fetches": ("Job/aai-weights", swap("32bd6428", "32bd6429"), "no job fetches openai/clip"),
    "weights where nobody looks": (WORKERS, swap("/weights/hub", "/hub"), "no volume at /hub"),
    "a probe on a wrong path": (MLFLOW, swap("path: /health", "path: /healthz"), "does not answer"),
    "a probe that asks the head": (PAINTERS, swap("path: /-/healthz", "path: /-/routes"), "does not answer"),
    "a probe on a wrong port": (MLFLOW, swap("port: 5000", "port: 5050"), "asks the port 5050"),
    "autoscaling that is off": (
        WORKERS,
        swap("Autoscaling: true", "Autoscaling: false"),
        "enableInTreeAutoscaling is off",
    ),
    "autoscaling without room": (WORKERS, lambda t: t.replace("maxReplicas: 8", "maxReplicas: 0"), "no group has room"),
    "workers that never get a GPU": (
        WORKERS,
        lambda t: t.replace("maxReplicas: 8", "maxReplicas: 7"),
        "7 workers of 8",
    ),
    "a taint that is not borne": (WORKERS, swap("key: nvidia.com/gpu", "key: nvidia.com/gpus"), "does not tolerate"),
    "a pool that does not exist": (PAINTERS, swap("aai/pool: gpu", "aai/pool: gpus"), "no node is labelled"),
    "curation on GPU nodes": (WORKERS, swap("aai/pool: cpu", "aai/pool: gpu"), "takes a GPU node"),
    "a way that is barred": (
        "NetworkPolicy/mlflow",
        swap("app: aai-service", "app: aai-job"),
        "lets aai-service reach mlflow",
    ),
    "a door that is open": ("NetworkPolicy/postgresql", swap("app: mlflow\n", "app: aai-job\n"), "aai-job may reach"),
    "a policy for nobody": ("NetworkPolicy/redis", swap("app: redis", "app: valkey"), "selects no pod"),
    "an ingress to nobody": ("Ingress/aai", swap("aai-serve-svc", "aai-serve"), "no Service is called aai-serve "),
    "an ingress without TLS": ("Ingress/aai", swap("- host: aai.", "- host: www."), "without TLS"),
    "an ingress that ends requests": ("Ingress/aai", swap("'140'", "'60'"), "ends requests before"),
    "a schedule that is none": ("CronJob/mlflow-backup", swap("17 2 * * *", "17 2 * *"), "is no schedule"),
    "an upgrade that does not exist": (PAINTERS, swap("type: NewCluster", "type: Rolling"), "no upgrade by Rolling"),
    "steps without a gateway": (
        PAINTERS,
        swap("type: NewCluster", "type: NewClusterWithIncrementalUpgrade"),
        "needs clusterUpgradeOptions",
    ),
    "a field that Kubernetes drops": (MLFLOW, swap("livenessProbe", "liveProbe"), "liveProbe"),
    "a field that KubeRay drops": (WORKERS, swap("idleTimeoutSeconds", "idleTimeoutS"), "idleTimeoutS"),
    "a number that is none": (MLFLOW, swap("replicas: 2", "replicas: two"), "two"),
    "a kind of an old version": (
        "CronJob/mlflow-backup",
        swap("batch/v1", "batch/v1beta1"),
        "Kubernetes has no CronJob",
    ),
}
"""What is wrong: the object, how it gets into it, and what is said of it."""


@pytest.mark.parametrize(("name", "plant", "said"), PLANTED.values(), ids=PLANTED)
def test_planted_mistakes_are_found(name: str, plant: Callable[[str], str], said: str) -> None:
    found = mistakes(planted(site("gpu"), name, plant))
    assert any(said in sentence for sentence in found), found


def test_each_is_told_apart() -> None:
    """One mistake is told of in few sentences: a page of them would hide it."""
    found = mistakes(planted(site("gpu"), "Service/mlflow", swap("port: 5000", "port: 5001")))
    assert 1 <= len(found) <= 3, found
