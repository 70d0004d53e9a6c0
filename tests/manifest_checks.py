"""What manifests name and is not there: commands, configs, ports, images, secrets, paths, volumes, ways of a network.

Kubernetes takes it all without a word. What is there and can have no effect: tests/dead_settings.py.
"""

import functools
import importlib
import inspect
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from aai.errors import UserError
from pipelines.__main__ import VERBS, build_parser, module_of
from tests.dead_settings import Document, dead_settings, image_of, pods, walk
from tests.kustomized import ROOT, schema_errors
from tests.manifest_ways import ways

WITHOUT_RAY = ("promote", "world")
PAGE = ROOT / "docs" / "kubernetes.md"
OURS = {"aai": "train", "aai-serve": "serve", "aai-mlflow": ""}
"""Images of ours, and the targets of the Dockerfile that they are built by."""
PROGRAMS = {
    "aai": {"sh", "aai", "hf", "python", "sleep"},
    "aai-serve": {"sh", "aai", "hf", "python", "sleep"},
    "aai-mlflow": {"mlflow", "python"},
    "postgres": {"sh", "pg_dump", "pg_isready"},
    "redis": {"sh", "redis-server", "redis-cli"},
    "rclone": {"sh", "rclone"},
}
"""What an image has of what we call."""
SHELL = {"exec", "test", "touch", "mkdir", "grep", "sleep", "until", "do", "done", "for", "}", "requirepass", "dir"} | {
    "appendonly", "maxmemory-policy", "END", "fetch", "fetch()", "--exclude", "echo"
}  # fmt: skip
"""What begins a line of our scripts and is no program of an image: the shell's own, and what is handed to a program."""
PATHS = {"aai-mlflow": {"/health"}, "aai-serve": {"/-/healthz"}}
"""What may be asked of an image whether it lives: MLflow's route, and that of Serve's proxies."""
POOLS = {"cpu", "gpu", "cpu-spot", "gpu-spot"}


def mistakes(documents: list[Document]) -> list[str]:
    """Sentences about all that is wrong with the objects of one site."""
    checks: list[Callable[[list[Document]], Iterator[str]]] = [
        commands, scripts, images, secrets, mounted, settings, probes, models, pools, ways,
    ]  # fmt: skip
    found = [sentence for document in documents for sentence in schema_errors(document)]
    # The other checks may take it that each field is there and of its type.
    return found or [*(said for check in checks for said in check(documents)), *dead_settings(documents)]


@functools.cache
def check_entrypoint(command: str) -> None:
    """A cluster command of ours: a verb, its own flags, a config that its class reads, an address if it uses Ray."""
    program, verb, *arguments = shlex.split(command, comments=True)
    assert program == "aai", command
    assert verb in VERBS, f"{verb} is no command"
    try:
        parsed = build_parser(verb)[0].parse_args(arguments)
    except SystemExit as error:
        raise AssertionError(f"{command}: flags that {verb} does not have") from error
    given = Path(parsed.config)
    file = given if given.is_absolute() else ROOT / given
    assert file.is_file(), f"{given} does not exist"
    config_of(verb, given, parsed)
    # Without an address a Ray of its own would be started on the head, which has no worker's GPU.
    assert getattr(parsed, "address", None) == (None if verb in WITHOUT_RAY else "auto"), (
        f"{command}: no --address auto"
    )


def config_of(verb: str, given: Path, parsed: Any) -> Any:
    """The config as the command would read it, its flags among it."""
    return module_of(verb).CONFIG.load(ROOT / given, parsed.set)


def check_application(application: Document) -> None:
    """A Serve application: its builder can be called, and the config it is given is one it reads."""
    module, attribute = application["import_path"].split(":")
    builder = getattr(importlib.import_module(module), attribute)
    assert callable(builder)
    assert len(inspect.signature(builder).parameters) == 1, "Serve hands a builder its args as one dict"
    settings = dict(application["args"])
    file = ROOT / Path(settings.pop("config")).relative_to("/app")
    assert file.is_file(), f"{file} does not exist"
    module_of("serve").CONFIG.load(file, values=settings)


def commands(documents: list[Document]) -> Iterator[str]:
    """Jobs and applications of ours that cannot start, and clusters that they do not find."""
    clusters = {document["metadata"]["name"] for document in documents if document["kind"] == "RayCluster"}
    for document in documents:
        spec, name = document.get("spec", {}), document["metadata"]["name"]
        try:
            if document["kind"] == "RayJob":
                check_entrypoint(spec["entrypoint"])
                assert spec["clusterSelector"]["ray.io/cluster"] in clusters, "there is no such cluster"
            if document["kind"] == "RayService":
                for application in yaml.safe_load(spec["serveConfigV2"])["applications"]:
                    check_application(application)
        except (AssertionError, UserError, AttributeError, ImportError, KeyError, ValueError) as error:
            yield f"{document['kind']} {name}: {error}"


def scripts(documents: list[Document]) -> Iterator[str]:
    """Programs that an image does not have, scripts that do not parse, flags that a server does not know."""
    for container in containers(documents):
        image = image_of(container)
        for command in commands_of(container):
            for program in programs(*command):
                if program not in PROGRAMS.get(image, set()):
                    yield f"{container['name']}: {image} has no {program}"
            if command[:2] == ["mlflow", "server"]:
                yield from unknown_flags(command[2:])
            if command[0] == "python":
                compile(command[-1], container["name"], "exec")


def containers(documents: list[Document]) -> Iterator[Document]:
    """Every container, those that begin and those that stay."""
    for pod in pods(documents):
        yield from [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def commands_of(container: Document) -> list[list[str]]:
    """What a container runs: itself, in its probes and hooks."""
    own = [*container.get("command", []), *container.get("args", [])]
    inner = [node["exec"]["command"] for node in walk(container) if "exec" in node]
    return [command for command in (own, *inner) if command]


@functools.cache
def programs(*command: str) -> list[str]:
    """The programs that a command calls, those of its script among them."""
    if command[0] != "sh":
        return [command[0]]
    script = command[-1]
    done = subprocess.run(["sh", "-n", "-c", script], capture_output=True, text=True)
    if done.returncode:
        return [f"way to read {script!r}: {done.stderr.strip()}"]
    text = re.sub(r"\\\n", " ", script)
    before, word = r"(?:^|&&|\||;|\bexec\b|\bdo\b|\buntil\b|\{)", r'([^\s"$;&|]+)'
    first = re.findall(rf'{before}\s*(?:\w+="[^"]*"\s+)?{word}', text, re.MULTILINE)
    return ["sh", *(word for word in first if word not in SHELL)]


@functools.cache
def _server_flags() -> frozenset[str]:
    from mlflow.cli import server

    return frozenset(flag for parameter in server.params for flag in parameter.opts)


def unknown_flags(arguments: list[str]) -> Iterator[str]:
    """Flags that the pinned MLflow's own command line does not have."""
    for flag in (argument.split("=")[0] for argument in arguments):
        if flag not in _server_flags():
            yield f"mlflow server has no {flag}"


def images(documents: list[Document]) -> Iterator[str]:
    """Images that nothing builds, that are not pinned, or that lack what the pod runs."""
    dockerfile = (ROOT / "infra" / "docker" / "Dockerfile").read_text()
    for container in containers(documents):
        image, name = image_of(container), container["name"]
        if image not in PROGRAMS:
            yield f"{name}: nothing builds the image {container['image']}"
        if OURS.get(image) and f" AS {OURS[image]}\n" not in dockerfile:
            yield f"{name}: the Dockerfile has no target {OURS[image]}"
        if not re.search(r"@sha256:[0-9a-f]{64}$|:\d+\.\d+(\.\d+)?$", container["image"]):
            yield f"{name}: the image {container['image']} is not pinned"
    for document in documents:
        for pod in pods([document]) if document["kind"] in ("RayCluster", "RayJob") else []:
            for container in pod["spec"]["containers"]:
                if image_of(container) == "aai-serve":
                    yield f"{document['metadata']['name']}: aai-serve has no Ray Data and no Ray Train"


def secrets(documents: list[Document]) -> Iterator[str]:
    """Secrets that the documented command does not make."""
    (made,) = re.findall(r"kubectl create secret generic (aai-secrets .*?)\n\n", PAGE.read_text(), re.DOTALL)
    keys = set(re.findall(r"--from-literal=(\w+)=", made))
    for node in walk(documents):
        if "secretKeyRef" in node:
            wanted = node["secretKeyRef"]
            if wanted["name"] != "aai-secrets":
                yield f"nobody makes the secret {wanted['name']}"
            elif wanted["key"] not in keys and not wanted.get("optional"):
                yield f"aai-secrets has no {wanted['key']}"


def mounted(documents: list[Document]) -> Iterator[str]:
    """ConfigMaps, claims and volumes that are not there."""
    have = {(document["kind"], document["metadata"]["name"]) for document in documents}
    for node in walk(documents):
        for key, kind, field in (
            ("configMapRef", "ConfigMap", "name"),
            ("configMap", "ConfigMap", "name"),
            ("persistentVolumeClaim", "PersistentVolumeClaim", "claimName"),
        ):
            if isinstance(node.get(key), dict) and (kind, node[key][field]) not in have:
                yield f"there is no {kind} {node[key][field]}"
    for node in (node for document in documents for node in walk(document) if "template" in node):
        pod = node["template"]["spec"]
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        volumes |= {claim["metadata"]["name"] for claim in node.get("volumeClaimTemplates", [])}
        for container in [*pod.get("initContainers", []), *pod.get("containers", [])]:
            for mount in container.get("volumeMounts", []):
                if mount["name"] not in volumes:
                    yield f"{container['name']}: there is no volume {mount['name']}"


def settings(documents: list[Document]) -> Iterator[str]:
    """Schedules that are none, deadlines at the ingress that the service's are longer than, hosts without a key."""
    serving = [yaml.safe_load(doc["spec"]["serveConfigV2"]) for doc in documents if doc["kind"] == "RayService"]
    longest_s = max((each["http_options"]["request_timeout_s"] for each in serving), default=0)
    for document in documents:
        spec, notes = document.get("spec", {}), document["metadata"].get("annotations", {})
        if document["kind"] == "CronJob" and not re.fullmatch(r"(\S+ ){4}\S+", spec["schedule"]):
            yield f"{spec['schedule']!r} is no schedule"
        if document["kind"] == "Ingress":
            hosts = {rule["host"] for rule in spec["rules"]}
            if hosts - {host for tls in spec.get("tls", []) for host in tls["hosts"]}:
                yield f"Ingress: {', '.join(hosts)} without TLS"
            if float(notes.get("nginx.ingress.kubernetes.io/proxy-read-timeout", 60)) <= longest_s:
                yield f"Ingress: ends requests before {longest_s} s"


def probes(documents: list[Document]) -> Iterator[str]:
    """Paths and ports that a container does not answer at."""
    for container in containers(documents):
        ports = {port["containerPort"] for port in container.get("ports", [])}
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            probe = container.get(kind, {})
            asked = probe.get("httpGet") or probe.get("tcpSocket") or {}
            if asked and asked["port"] not in ports:
                yield f"{container['name']}: {kind} asks the port {asked['port']}, which it does not have"
            if "httpGet" in probe and asked["path"] not in PATHS.get(image_of(container), set()):
                yield f"{container['name']}: {kind} asks {asked['path']}, which {image_of(container)} does not answer"


def models(documents: list[Document]) -> Iterator[str]:
    """Models of the configs that no job fetches, and pods that look for them where none is."""
    scripts = [" ".join(container.get("args", [])) for container in containers(documents)]
    fetched = {tuple(pair) for script in scripts for pair in re.findall(r"^fetch (\S+/\S+) (\w{40})$", script, re.M)}
    for document in documents:
        entrypoint = document.get("spec", {}).get("entrypoint", "")
        for file in re.findall(r"--config (\S+)", entrypoint):
            for missing in sorted(named(ROOT / file) - fetched) if (ROOT / file).is_file() else []:
                yield f"{document['metadata']['name']}: no job fetches {' at '.join(missing)}"
    for pod in pods(documents):
        for container in pod["spec"]["containers"]:
            cache = {each["name"]: each.get("value", "") for each in container.get("env", [])}.get("HF_HUB_CACHE")
            places = [mount["mountPath"] for mount in container.get("volumeMounts", []) if mount["name"] == "weights"]
            needs = "aai-weights" in str(pod) or "nvidia.com/gpu" in str(container)
            if cache and needs and not any(cache.startswith(f"{place}/") for place in places):
                yield f"{container['name']}: no volume at {cache}"


@functools.cache
def named(file: Path) -> frozenset[tuple[str, str]]:
    """The hub ids of a config, with their commits; of a file that it begins from, too."""
    config = yaml.safe_load(file.read_text())
    found = named(ROOT / config["base"]) if "base" in config else frozenset()
    for node in walk(config):
        for key, pin in (("clip", "clip_revision"), ("diffusion", "diffusion_revision"), ("pretrained", "revision")):
            if pin in node:
                found |= {(node[key], node[pin])}
    return found


def pools(documents: list[Document]) -> Iterator[str]:
    """Pods that no node takes: a pool that is not documented, a GPU's taint that is not borne."""
    for pod in pods(documents):
        selector, tolerated = pod["spec"].get("nodeSelector", {}), pod["spec"].get("tolerations", [])
        name, pool = pod["spec"]["containers"][0]["name"], selector.get("aai/pool")
        asks = any("nvidia.com/gpu" in each["resources"]["requests"] for each in pod["spec"]["containers"])
        if selector.keys() - {"aai/pool"} or (pool and pool not in POOLS):
            yield f"{name}: no node is labelled {selector}"
        if asks and not any(each["key"] == "nvidia.com/gpu" for each in tolerated):
            yield f"{name}: asks a GPU and does not tolerate the taint of its node"
        if pool and asks != ("gpu" in pool):
            yield f"{name}: {'asks a GPU of' if asks else 'takes a GPU node,'} {pool}"
        if pool and pool.endswith("-spot") and not any("spot" in each["key"] for each in tolerated):
            yield f"{name}: does not tolerate the taint of {pool}"
