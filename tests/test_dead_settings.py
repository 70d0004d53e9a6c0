"""Every setting of the cluster manifests can act, and one that cannot is seen."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from tests.dead_settings import Document, dead_settings
from tests.kustomized import needs_kustomize, planted, site

pytestmark = needs_kustomize


@pytest.mark.parametrize("name", ["dev", "gpu", "spot"])
def test_every_setting_of_the_manifests_can_act(name: str) -> None:
    assert dead_settings(site(name)) == []


def service(text: str, change: Callable[[Document], None]) -> str:
    """The RayService with a changed Serve config."""
    service = yaml.safe_load(text)
    serving = yaml.safe_load(service["spec"]["serveConfigV2"])
    change(serving)
    service["spec"]["serveConfigV2"] = yaml.safe_dump(serving)
    return yaml.safe_dump(service)


def args(text: str, **changes: Any) -> str:
    """The RayService with other settings of `aai serve`."""
    return service(text, lambda serving: serving["applications"][0]["args"].update(changes))


def deployment(text: str, **options: Any) -> str:
    """The RayService that sets options of a deployment beside the application."""
    return service(text, lambda serving: serving["applications"][0].update(deployments=[options]))


SCALED = {"min_painters": 2, "max_painters": 4}
PLANTED: dict[str, tuple[str, Callable[[str], str], str]] = {
    "no GPU for the last painters": (
        "RayService/aai",
        lambda t: t.replace("maxReplicas: 4", "maxReplicas: 3"),
        "3 painters of 4",
    ),
    "more painters than workers": (
        "RayService/aai",
        lambda t: args(t, autoscaling=SCALED | {"max_painters": 6}),
        "4 painters of 6",
    ),
    "workers without a painter": (
        "RayService/aai",
        lambda t: t.replace("minReplicas: 2", "minReplicas: 1"),
        "1 painters of 2",
    ),
    "a GPU that no painter needs": (
        "RayService/aai",
        lambda t: t.replace("com/gpu: '1'", "com/gpu: '2'"),
        "2 GPUs, of which painters take 1",
    ),
    "no CPUs for a painter": ("RayService/aai", lambda t: t.replace("cpu: '4'", "cpu: '2'"), "0 painters of 2"),
    "min is max": (
        "RayService/aai",
        lambda t: args(t, autoscaling=SCALED | {"min_painters": 4}),
        "is not below max_painters",
    ),
    "a queue too short to scale": (
        "RayService/aai",
        lambda t: args(t, autoscaling=SCALED | {"target_ongoing_requests": 20}),
        "never reaches max_painters 4",
    ),
    "replicas beside autoscaling": (
        "RayService/aai",
        lambda t: deployment(t, name="Painter", num_replicas=4),
        "num_replicas beside autoscaling",
    ),
    "workers beside autoscaling": (
        "RayService/aai",
        lambda t: args(t, cluster={"num_workers": 1}),
        "num_workers beside",
    ),
    "a deployment of another name": (
        "RayService/aai",
        lambda t: deployment(t, name="Painters"),
        "no deployment is called",
    ),
    "autoscaler off": (
        "RayService/aai",
        lambda t: t.replace("Autoscaling: true", "Autoscaling: false"),
        "autoscalerOptions, but",
    ),
    "nothing to scale": (
        "RayCluster/aai-training",
        lambda t: t.replace("maxReplicas: 8", "maxReplicas: 0"),
        "no group has room",
    ),
    "begins outside": (
        "RayCluster/aai-training",
        lambda t: t.replace("replicas: 0", "replicas: 9"),
        "begins with 9 replicas",
    ),
    "a budget of nothing": (
        "PodDisruptionBudget/aai-painters",
        lambda t: t.replace("role: painter", "role: other"),
        "selects no pod by",
    ),
    "a budget that holds all": (
        "PodDisruptionBudget/aai-painters",
        lambda t: t.replace("minAvailable: 1", "minAvailable: 2"),
        "none may ever be",
    ),
    "a budget that holds none": (
        "PodDisruptionBudget/aai-painters",
        lambda t: t.replace("minAvailable: 1", "minAvailable: 0"),
        "all may be evicted",
    ),
    "a Service of nothing": (
        "StatefulSet/redis",
        lambda t: t.replace("app: redis", "app: valkey", 1),
        "selects no pod by",
    ),
    "a name nobody reads": (
        "RayService/aai",
        lambda t: t.replace("name: AAI_API_KEY", "name: AAI_APIKEY"),
        "nobody reads AAI_APIKEY",
    ),
    "MLflow's name misspelt": (
        "Deployment/mlflow",
        lambda t: t.replace("name: MLFLOW_BACKEND_STORE_URI", "name: MLFLOW_BACKEND_URI"),
        "nobody reads MLFLOW_BACKEND_URI",
    ),
    "Redis' name misspelt": (
        "StatefulSet/redis",
        lambda t: t.replace("name: REDIS_PASSWORD", "name: REDIS_PASS"),
        "nobody reads REDIS_PASS",
    ),
    "a setting nobody heeds": (
        "ConfigMap/aai-settings",
        lambda t: t.replace("AAI_BUCKET:", "AAI_BUCKETS:"),
        "nobody reads AAI_BUCKETS",
    ),
    "a volume for nobody": (
        "StatefulSet/redis",
        lambda t: re.sub(r"(mountPath: /data\n\s+name): data", r"\1: dat", t),
        "no container mounts",
    ),
    "Redis that forgets": (
        "StatefulSet/redis",
        lambda t: t.replace("dir /data", "dir /tmp"),
        "keeps nothing on a volume",
    ),
    "another Redis": (
        "RayService/aai",
        lambda t: t.replace("redis:6379", "valkey:6379"),
        "no Service is called valkey",
    ),
    "no Redis": ("RayService/aai", lambda t: t.replace("gcsFaultToleranceOptions", "annotations"), "dies with it"),
    "a grace shorter than preStop": (
        "RayService/aai",
        lambda t: t.replace("GracePeriodSeconds: 180", "GracePeriodSeconds: 60"),
        "ends preStop",
    ),
    "a preStop shorter than a request": (
        "RayService/aai",
        lambda t: t.replace("'140'", "'20'"),
        "preStop of 20 s ends requests",
    ),
    "an upgrade that does not wait": (
        "RayService/aai",
        lambda t: t.replace("DelaySeconds: 180", "DelaySeconds: 60"),
        "cuts requests short",
    ),
    "a deadline behind another": (
        "RayService/aai",
        lambda t: args(t, limits={"request_timeout_s": 300}),
        "the proxy ends requests",
    ),
    "a gateway on the head": (
        "RayService/aai",
        lambda t: deployment(t, name="Gateway", ray_actor_options={"num_cpus": 0}),
        "may be on the head",
    ),
    "a proxy that nobody asks": ("RayService/aai", lambda t: t.replace("EveryNode", "HeadOnly"), "leaves the head out"),
}
"""Settings that can do nothing: the manifest, how they get into it, and what is said of them."""


@pytest.mark.parametrize(("name", "plant", "said"), PLANTED.values(), ids=PLANTED)
def test_planted_dead_settings_are_seen(name: str, plant: Callable[[str], str], said: str) -> None:
    found = dead_settings(planted(site("gpu"), name, plant))
    assert any(said in sentence for sentence in found), found
