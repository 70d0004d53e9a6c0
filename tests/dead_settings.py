"""What stands in the cluster manifests and can have no effect: Kubernetes takes it all without a word."""

import functools
import importlib.util
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from aai.errors import UserError
from pipelines.__main__ import build_parser, module_of
from pipelines.serve import ServeConfig

ROOT = Path(__file__).resolve().parent.parent
Document = dict[str, Any]
SOURCES = [*(ROOT / "aai").rglob("*.py"), *(ROOT / "pipelines").rglob("*.py"), *(ROOT / "configs").rglob("*.yaml")]
ASKED_BY = {
    "mlflow": ("environment_variables.py", "cli/__init__.py", "server/auth/__init__.py"),
    "botocore": ("*.py",),
    "huggingface_hub": ("constants.py",),
}


def _library(name: str) -> Path:
    found = importlib.util.find_spec(name)
    assert found, name
    return Path(str(found.origin)).parent


LIBRARIES = [path for name, globs in ASKED_BY.items() for pattern in globs for path in _library(name).glob(pattern)]
READERS = "\n".join(path.read_text() for path in [*SOURCES, *LIBRARIES])
"""All that runs in our images and asks for variables of ours, MLflow's, AWS's and the hub's."""
LIBPQ = "PGHOST PGUSER PGPASSWORD"
ELSEWHERE = {
    "aai-mlflow": LIBPQ,
    "postgres": f"{LIBPQ} POSTGRES_USER POSTGRES_DB POSTGRES_PASSWORD PGDATA",
    "rclone": "RCLONE_AUTH_KEY",
}
"""Variables that programs without Python ask for, as their documentation has them."""
CLUSTERS = ("RayCluster", "RayService")


def walk(node: Any) -> Iterator[Document]:
    """Every mapping of a document."""
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from walk(child)


def pods(documents: list[Document]) -> list[Document]:
    """Every pod template."""
    return [node for document in documents for node in walk(document) if "containers" in node.get("spec", {})]


def image_of(container: Document) -> str:
    """An image's name, without registry, tag and digest."""
    return re.split("[:@]", container["image"].rpartition("/")[2])[0]


def dead_settings(documents: list[Document]) -> list[str]:
    """Sentences about settings of one site that cannot act."""
    checks: list[Callable[[list[Document]], Iterator[str]]] = [
        unread, unheeded, unmatched, undrainable, unmounted, forgetful, homeless,
    ]  # fmt: skip
    found = [sentence for check in checks for sentence in check(documents)]
    for document in documents:
        if document["kind"] in CLUSTERS:
            found += unscalable(document)
        if document["kind"] == "RayService":
            found += [*painters_without_place(document), *cut_short(document), *forgotten(document, documents)]
            found += on_the_head(document)
    return found


def unread(documents: list[Document]) -> Iterator[str]:
    """Variables that nobody asks for: neither the code in the image, nor the container's own command."""
    for container in (
        each for pod in pods(documents) for each in [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]
    ):
        words = " ".join([*container.get("command", []), *container.get("args", []), *_values(container)])
        words += ELSEWHERE.get(image_of(container), "")
        ours = image_of(container).startswith("aai")
        for name in [variable["name"] for variable in container.get("env", [])]:
            if not re.search(rf"\b{name}\b", words) and not (ours and asked_for(name)):
                yield f"{container['name']}: nobody reads {name}"


@functools.cache
def asked_for(name: str) -> bool:
    """Whether what runs in our images asks for a variable."""
    return re.search(rf"\b{name}\b", READERS) is not None


def _values(container: Document) -> list[str]:
    return [variable.get("value", "") for variable in container.get("env", [])]


def unheeded(documents: list[Document]) -> Iterator[str]:
    """Settings of the environment that no container's code or command asks for."""
    everywhere = pods(documents)
    words = " ".join([str([pod["spec"] for pod in everywhere]), *ELSEWHERE.values()])
    into = {node["configMapRef"]["name"] for pod in everywhere for node in walk(pod) if "configMapRef" in node}
    for settings in (document for document in documents if document["kind"] == "ConfigMap"):
        for name in settings["data"] if settings["metadata"]["name"] in into else []:
            if not re.search(rf"\b{name}\b", words) and not asked_for(name):
                yield f"{settings['metadata']['name']}: nobody reads {name}"


def unmatched(documents: list[Document]) -> Iterator[str]:
    """Selectors that select no pod."""
    labels = [pod.get("metadata", {}).get("labels", {}).items() for pod in pods(documents)]
    for document in documents:
        selector = document["spec"].get("selector", {}) if "spec" in document else {}
        wanted = selector.get("matchLabels", selector)
        if wanted and not any(wanted.items() <= found for found in labels):
            yield f"{document['kind']} {document['metadata']['name']}: selects no pod by {wanted}"


def undrainable(documents: list[Document]) -> Iterator[str]:
    """Budgets that no drain can ever keep, or that keep nothing."""
    for budget in (document for document in documents if document["kind"] == "PodDisruptionBudget"):
        spec, name = budget["spec"], budget["metadata"]["name"]
        fewest = min(_fewest(documents, spec["selector"]["matchLabels"]), default=0)
        if spec.get("maxUnavailable") == 0 or spec.get("minAvailable", 0) >= fewest:
            yield f"PodDisruptionBudget {name}: of {fewest} pods none may ever be evicted"
        if spec.get("minAvailable") == 0 or spec.get("maxUnavailable", 0) >= fewest > 0:
            yield f"PodDisruptionBudget {name}: of {fewest} pods all may be evicted"


def _fewest(documents: list[Document], labels: dict[str, str]) -> Iterator[int]:
    """How many pods of these labels there are at least, of each template."""
    for node in (node for document in documents for node in walk(document) if "template" in node):
        if labels.items() <= node["template"].get("metadata", {}).get("labels", {}).items():
            yield node.get("minReplicas", node.get("replicas", 1))


def unmounted(documents: list[Document]) -> Iterator[str]:
    """Volumes that no container mounts."""
    for node in (node for document in documents for node in walk(document) if "template" in node):
        pod = node["template"]["spec"]
        claimed = [claim["metadata"]["name"] for claim in node.get("volumeClaimTemplates", [])]
        all_of_it = [*pod.get("initContainers", []), *pod["containers"]]
        mounts = {mount["name"] for container in all_of_it for mount in container.get("volumeMounts", [])}
        for name in {*claimed, *(volume["name"] for volume in pod.get("volumes", []))} - mounts:
            yield f"volume {name}: no container mounts it"


def _cluster(document: Document) -> Document:
    spec: Document = document["spec"]
    return spec["rayClusterConfig"] if document["kind"] == "RayService" else spec


def unscalable(document: Document) -> Iterator[str]:
    """Bounds of worker groups that nobody moves between."""
    cluster, name = _cluster(document), document["metadata"]["name"]
    autoscaled = cluster.get("enableInTreeAutoscaling", False)
    bounds = {
        group["groupName"]: (group["minReplicas"], group["replicas"], group["maxReplicas"])
        for group in cluster["workerGroupSpecs"]
    }
    for group, (fewest, first, most) in bounds.items():
        if not fewest <= first <= most:
            yield f"{name}: {group} begins with {first} replicas, outside of {fewest} to {most}"
        if fewest < most and not autoscaled:
            yield f"{name}: {group} has room for {most} replicas, but enableInTreeAutoscaling is off"
    if autoscaled and all(fewest == most for fewest, _, most in bounds.values()):
        yield f"{name}: enableInTreeAutoscaling, but no group has room"
    if not autoscaled and "autoscalerOptions" in cluster:
        yield f"{name}: autoscalerOptions, but enableInTreeAutoscaling is off"


def homeless(documents: list[Document]) -> Iterator[str]:
    """Workers of a stage that its cluster never has the room for: the job would wait for ever."""
    clusters = {doc["metadata"]["name"]: doc for doc in documents if doc["kind"] == "RayCluster"}
    for job in (document for document in documents if document["kind"] == "RayJob"):
        words = job["spec"]["entrypoint"].split()
        cluster = clusters.get(job["spec"]["clusterSelector"]["ray.io/cluster"])
        if cluster is None or "--address" not in words:
            continue
        share = _share(job["spec"]["entrypoint"])
        if share is None:
            continue
        groups = cluster["spec"]["workerGroupSpecs"]
        room = sum(
            group["maxReplicas"] * _places(group, share.cpus_per_worker, share.gpus_per_worker) for group in groups
        )
        fewest = getattr(share, "fewest_workers", 1)  # others share out their work among those that there are
        if room < fewest:
            yield f"{job['metadata']['name']}: {cluster['metadata']['name']} has room for {room} workers of {fewest}"


@functools.cache
def _share(entrypoint: str) -> Any:
    """What a command takes of its cluster; nothing for tune, which takes what its stage does, and for what is wrong."""
    _, verb, *words = shlex.split(entrypoint)
    try:
        wanted = build_parser(verb)[0].parse_args(words)
        return getattr(module_of(verb).CONFIG.load(ROOT / wanted.config, wanted.set), "cluster", None)
    except (KeyError, ModuleNotFoundError, SystemExit, UserError):
        return None  # tests/manifest_checks.py tells of it


def _places(group: Document, cpus_each: float, gpus_each: float) -> int:
    """Workers that a pod of a group has the GPUs and the CPUs for."""
    gpus, cpus = _capacity(group)
    by_cpu = int(cpus // cpus_each)
    return min(by_cpu, int(gpus // gpus_each)) if gpus_each else by_cpu


def painters_without_place(document: Document) -> Iterator[str]:
    """Painters that no worker has a GPU for, workers that never get a painter, and two numbers for one thing."""
    serving = yaml.safe_load(document["spec"]["serveConfigV2"])
    for application in serving["applications"]:
        try:
            config, args = _config(application)
        except UserError as error:  # such as a minimum that is the maximum
            yield str(error)
            continue
        fewest = config.autoscaling.min_painters if config.autoscaling else config.cluster.num_workers
        for bound, painters in (("minReplicas", fewest), ("maxReplicas", config.most_painters)):
            room = sum(group[bound] * _room(group, config) for group in _cluster(document)["workerGroupSpecs"])
            if room != painters:
                yield f"{application['name']}: {bound} of the workers has room for {room} painters of {painters}"
        for group in _cluster(document)["workerGroupSpecs"]:
            taken, gpus = _room(group, config) * config.cluster.gpus_per_worker, _capacity(group)[0]
            if taken < gpus:
                yield f"{group['groupName']}: a pod has {gpus:g} GPUs, of which painters take {taken:g}"
        if config.autoscaling and "num_workers" in args.get("cluster", {}):
            yield f"{application['name']}: cluster.num_workers beside autoscaling"
        for deployment in application.get("deployments", []):
            if deployment["name"] not in ("Painter", "Gateway"):
                yield f"{application['name']}: no deployment is called {deployment['name']}"
            if deployment["name"] == "Painter" and config.autoscaling and "num_replicas" in deployment:
                yield f"{application['name']}: num_replicas beside autoscaling"
    if serving["proxy_location"] == "HeadOnly" and document["spec"].get("excludeHeadPodFromServeSvc"):
        yield "proxy_location HeadOnly: the Service leaves the head out"


def _config(application: Document) -> tuple[ServeConfig, Document]:
    args = dict(application["args"])
    file = ROOT / Path(args.pop("config")).relative_to("/app")
    return ServeConfig.load(file, values=args), args


def _room(group: Document, config: ServeConfig) -> int:
    return _places(group, config.cluster.cpus_per_worker, config.cluster.gpus_per_worker)


def _capacity(group: Document) -> tuple[float, float]:
    wanted = group["template"]["spec"]["containers"][0]["resources"]["requests"]
    cpus = wanted["cpu"]
    return float(wanted.get("nvidia.com/gpu", 0)), int(cpus[:-1]) / 1000 if cpus.endswith("m") else float(cpus)


def cut_short(document: Document) -> Iterator[str]:
    """Deadlines that another one ends before."""
    serving = yaml.safe_load(document["spec"]["serveConfigV2"])
    longest_s = serving["http_options"]["request_timeout_s"]
    for application in serving["applications"]:
        try:
            limit_s = _config(application)[0].limits.request_timeout_s
        except UserError:
            continue
        if limit_s >= longest_s:
            yield f"limits.request_timeout_s {limit_s:g}: the proxy ends requests after {longest_s} s"
    if document["spec"].get("rayClusterDeletionDelaySeconds", 60) <= longest_s:
        yield "rayClusterDeletionDelaySeconds: an upgrade cuts requests short"
    for group in _cluster(document)["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        stop = (
            pod["containers"][0].get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["sleep", "0"])
        )
        if int(stop[-1]) <= longest_s:
            yield f"{group['groupName']}: preStop of {stop[-1]} s ends requests of {longest_s} s"
        if pod.get("terminationGracePeriodSeconds", 30) <= int(stop[-1]):
            yield f"{group['groupName']}: terminationGracePeriodSeconds ends preStop"


def on_the_head(document: Document) -> Iterator[str]:
    """Gateways that are there to outlive one another, of which one may be where the head is: a head has room for those
    that ask for no CPU."""
    head = float(_cluster(document)["headGroupSpec"]["rayStartParams"].get("num-cpus", "inf"))
    for application in yaml.safe_load(document["spec"]["serveConfigV2"])["applications"]:
        deployments = {each["name"]: each for each in application.get("deployments", [])}
        cpus = deployments.get("Gateway", {}).get("ray_actor_options", {}).get("num_cpus", 0)
        if application["args"].get("gateways", 1) > 1 and cpus <= head:
            yield f"{application['name']}: a gateway of {cpus:g} CPUs may be on the head, and goes with it"


def forgotten(document: Document, everything: list[Document]) -> Iterator[str]:
    """A head that nothing remembers, or a store of its state that is not there."""
    options = _cluster(document).get("gcsFaultToleranceOptions")
    if options is None:
        yield f"{document['metadata']['name']}: what the head knows dies with it"
        return
    host = options["redisAddress"].partition(":")[0]
    if not any(doc["kind"] == "Service" and doc["metadata"]["name"] == host for doc in everything):
        yield f"redisAddress: no Service is called {host}"


def forgetful(documents: list[Document]) -> Iterator[str]:
    """A Redis whose files go with its pod."""
    for node in (node for document in documents for node in walk(document) if "template" in node):
        lasting = {claim["metadata"]["name"] for claim in node.get("volumeClaimTemplates", [])}
        for container in node["template"]["spec"]["containers"]:
            told = " ".join(container.get("args", []))
            mounts = {mount["mountPath"]: mount["name"] for mount in container.get("volumeMounts", [])}
            folder = re.search(r"^dir (\S+)$", told, re.MULTILINE)
            kept = folder and mounts.get(folder[1]) in lasting and "appendonly yes" in told
            if "redis-server" in told and not kept:
                yield f"{container['name']}: keeps nothing on a volume"
