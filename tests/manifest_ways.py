"""The ways between pods, as manifests tell them: Services, ports, policies of the network, the ingress."""

import re
from collections.abc import Iterator
from urllib.parse import urlsplit

import yaml

from tests.dead_settings import Document, pods

WAYS = (
    ("aai-training", "mlflow", 5000),
    ("aai-service", "mlflow", 5000),
    ("mlflow", "aai-service", 8000),
    ("aai-service", "redis", 6379),
    ("mlflow", "postgresql", 5432),
    ("mlflow-backup", "postgresql", 5432),
    ("aai-job", "aai-training", 8265),
    ("aai-training", "aai-training", 6379),
    ("aai-service", "aai-service", 6379),
)
"""Who must reach whom: the labels `app` of both, and a port."""
STRANGERS = (("aai-job", "postgresql", 5432), ("aai-training", "redis", 6379), ("aai-job", "aai-service", 8000))
"""Who must not."""
IMPLICIT = {8080, 8265, 10001, 6379}
"""Ports of every Ray pod: KubeRay's metrics, dashboard, client, GCS."""


def ways(documents: list[Document]) -> Iterator[str]:
    """All that does not lead where it should."""
    for check in (unserved, addresses, unadmitted, entrance, upgrades, monitors):
        yield from check(documents)


def of(documents: list[Document], kind: str) -> list[Document]:
    """The objects of a kind."""
    return [document for document in documents if document["kind"] == kind]


def labels(pod: Document) -> dict[str, str]:
    """Those of a pod template."""
    found: dict[str, str] = pod.get("metadata", {}).get("labels", {})
    return found


def ports(pod: Document) -> set[int]:
    """All that a pod listens on, as far as it is told."""
    each = [port["containerPort"] for container in pod["spec"]["containers"] for port in container.get("ports", [])]
    ray = any(container["name"].startswith("ray-") for container in pod["spec"]["containers"])
    return {*each, *(IMPLICIT if ray else ())}


def unserved(documents: list[Document]) -> Iterator[str]:
    """Services whose pods do not listen on the port, and policies for pods or ports that are not there."""
    for service in of(documents, "Service"):
        for pod in pods(documents):
            if service["spec"]["selector"].items() <= labels(pod).items():
                for port in service["spec"]["ports"]:
                    if port.get("targetPort", port["port"]) not in ports(pod):
                        yield f"Service {service['metadata']['name']}: its pods do not listen on {port['port']}"
    for policy in of(documents, "NetworkPolicy"):
        name, wanted = policy["metadata"]["name"], policy["spec"]["podSelector"].get("matchLabels", {})
        chosen = [pod for pod in pods(documents) if wanted.items() <= labels(pod).items()]
        if not chosen:
            yield f"NetworkPolicy {name}: selects no pod by {wanted}"
        for rule in policy["spec"].get("ingress", []):
            for port in rule.get("ports", []):
                if not any(port["port"] in ports(pod) for pod in chosen):
                    yield f"NetworkPolicy {name}: its pods do not listen on {port['port']}"
            yield from _nobody(name, rule, documents)


def _nobody(name: str, rule: Document, documents: list[Document]) -> Iterator[str]:
    for peer in rule.get("from", []):
        wanted = peer.get("podSelector", {}).get("matchLabels", {})
        known = any(wanted.items() <= labels(pod).items() for pod in pods(documents))
        if not known and "gateway.networking.k8s.io/gateway-name" not in wanted:
            yield f"NetworkPolicy {name}: admits pods of {wanted}, which there are not"


def reachable(documents: list[Document]) -> set[tuple[str, int]]:
    """Names and ports that lead to a pod: the Services, and those that KubeRay makes."""
    found = {
        (doc["metadata"]["name"], port["port"]) for doc in of(documents, "Service") for port in doc["spec"]["ports"]
    }
    for service in of(documents, "RayService"):
        found.add((f"{service['metadata']['name']}-serve-svc", 8000))
        options = service["spec"]["upgradeStrategy"].get("clusterUpgradeOptions")
        if options:
            found.add((f"{service['metadata']['name']}-gateway-{options['gatewayClassName']}", 80))
    return found


def addresses(documents: list[Document]) -> Iterator[str]:
    """Addresses in the settings at which there is no Service; names with a dot are elsewhere."""
    asked = [doc["spec"]["rayClusterConfig"].get("gcsFaultToleranceOptions", {}) for doc in of(documents, "RayService")]
    wanted = {urlsplit(f"//{each['redisAddress']}") for each in asked if "redisAddress" in each}
    for document in of(documents, "ConfigMap"):
        data = document["data"]
        wanted |= {urlsplit(value) for value in data.values() if value.startswith("http")}
        wanted |= {urlsplit(f"//{data['PGHOST']}:5432")} if "PGHOST" in data else set()
    for found in wanted:
        if "." not in str(found.hostname) and (found.hostname, found.port) not in reachable(documents):
            yield f"no Service is called {found.hostname} with the port {found.port}"


def admitted(documents: list[Document], client: str, server: str, port: int) -> bool:
    """Whether the policies let one reach another; without a policy for it all may."""
    policies = []
    for policy in of(documents, "NetworkPolicy"):
        wanted = policy["spec"]["podSelector"].get("matchLabels", {})
        if wanted.items() <= {"app": server}.items() and "Ingress" in policy["spec"]["policyTypes"]:
            policies.append(policy["spec"])
    if not policies:
        return True
    for rule in (rule for spec in policies for rule in spec.get("ingress", [])):
        named = [
            peer["podSelector"] for peer in rule["from"] if "podSelector" in peer and "namespaceSelector" not in peer
        ]
        at = {each["port"] for each in rule.get("ports", [])}
        if any(each.get("matchLabels", {}).items() <= {"app": client}.items() for each in named) and (
            not at or port in at
        ):
            return True
    return False


def unadmitted(documents: list[Document]) -> Iterator[str]:
    """Ways that a policy bars, and doors that it leaves open."""
    there = {labels(pod).get("app") for pod in pods(documents)}
    for client, server, port in WAYS:
        if {client, server} <= there and not admitted(documents, client, server, port):
            yield f"no NetworkPolicy lets {client} reach {server} at {port}"
    for client, server, port in STRANGERS:
        if server in there and admitted(documents, client, server, port):
            yield f"{client} may reach {server} at {port}"


def entrance(documents: list[Document]) -> Iterator[str]:
    """Backends of the ingress that are not there."""
    for ingress in of(documents, "Ingress"):
        for rule in ingress["spec"]["rules"]:
            for path in rule["http"]["paths"]:
                backend = path["backend"]["service"]
                if (backend["name"], backend["port"]["number"]) not in reachable(documents):
                    yield f"Ingress: no Service is called {backend['name']} with the port {backend['port']['number']}"


def upgrades(documents: list[Document]) -> Iterator[str]:
    """Upgrades by steps that KubeRay refuses, or that the ingress goes past."""
    for service in of(documents, "RayService"):
        strategy, name = service["spec"]["upgradeStrategy"], service["metadata"]["name"]
        if strategy["type"] not in ("NewCluster", "NewClusterWithIncrementalUpgrade", "None"):
            yield f"{name}: there is no upgrade by {strategy['type']}"
        if strategy["type"] != "NewClusterWithIncrementalUpgrade":
            continue
        if not service["spec"]["rayClusterConfig"].get("enableInTreeAutoscaling"):
            yield f"{name}: an upgrade by steps needs enableInTreeAutoscaling"
        if "clusterUpgradeOptions" not in strategy:
            yield f"{name}: an upgrade by steps needs clusterUpgradeOptions"
        if re.search(rf"\b{name}-serve-svc\b", yaml.safe_dump_all(of(documents, "Ingress"))):
            yield f"{name}: the ingress goes past the gateway that shares out the requests"


def monitors(documents: list[Document]) -> Iterator[str]:
    """PodMonitors of pods that there are not, of a port that KubeRay does not name, or to which no policy lets in."""
    for monitor in of(documents, "PodMonitor"):
        name, wanted = monitor["metadata"]["name"], monitor["spec"]["selector"]["matchLabels"]
        chosen = [pod for pod in pods(documents) if wanted.items() <= labels(pod).items()]
        if not any(8080 in ports(pod) for pod in chosen):
            yield f"PodMonitor {name}: selects no Ray pod by {wanted}"
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            if endpoint["port"] != "metrics":
                yield f"PodMonitor {name}: no Ray pod has a port {endpoint['port']}"
        policies = [each["spec"] for each in of(documents, "NetworkPolicy")]
        own = [each for each in policies if each["podSelector"].get("matchLabels", {}).items() <= wanted.items()]
        rules = [rule for each in own for rule in each.get("ingress", []) if {"port": 8080} in rule.get("ports", [])]
        if own and "kubernetes.io/metadata.name: monitoring" not in yaml.safe_dump(rules):
            yield f"PodMonitor {name}: no NetworkPolicy lets Prometheus in"
