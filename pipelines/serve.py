"""Serves a bundle over HTTP with Ray Serve: a page, POST /v1/generate|edit|stylize, /healthz and /docs.

Two deployments: the Gateway checks and decodes uploads and always answers; Painters hold the model, one
request at a time each. Between them stands a bounded queue: what does not fit is refused with 429 and Retry-After.
"""

import argparse
import logging
import os
import signal
import socket
import threading
from typing import Any

import pydantic
import ray
from ray import serve
from ray.serve.config import BackpressureConfig, HTTPOptions, RequestRouterConfig

from aai import storage
from aai.addons import AddOns, absolute
from aai.bundle import read_bundle
from aai.encoders.aligner import encoder_config
from aai.errors import UserError
from aai.proof import ProofConfig, Prover
from aai.signatures import TrustConfig, check
from pipelines.engine.cluster import connect
from pipelines.registry import versions
from pipelines.service import proxy
from pipelines.service.gateway import KEY_VARIABLE, Gateway, api_key
from pipelines.service.guard import Limits
from pipelines.service.http import ServedModel
from pipelines.service.painters import PainterConfig, PainterReplica
from pipelines.settings import ClusterConfig, DType, Plan, RayVerbConfig, StoreConfig

logger = logging.getLogger(__name__)

LOOPBACK_HOSTS = ("127.0.0.1", "::1", "localhost")
APP = "aai"
BOARD = "aai-painters"
"""Name of the actor that painters tell what they serve."""


class ServeConfig(RayVerbConfig):
    """What is served, where, and how much it may take. `cluster.num_workers` is the number of painters."""

    cluster: ClusterConfig = ClusterConfig(num_workers=1)
    bundle: str = "models:/aai@champion"
    """models:/NAME@ALIAS, models:/NAME/VERSION, or a bundle folder. An alias is followed (`follow_s`)."""
    follow_s: float = pydantic.Field(5, ge=0)
    """How often each painter looks whether the alias names another version, which it then takes up; 0 = never."""
    tracking: StoreConfig = StoreConfig()
    trust: TrustConfig = TrustConfig()
    """Whose signature the bundle must have."""
    host: str = "127.0.0.1"
    """Address to listen on; any other than loopback needs the environment variable AAI_API_KEY."""
    port: int = pydantic.Field(8000, ge=1, le=65535)
    max_queued_requests: int = pydantic.Field(8, ge=1)
    """Requests that may wait for a painter; one more is refused with 429."""
    limits: Limits = Limits()
    dtype: DType = "float32"
    """Arithmetic of the diffusion model; auto: bfloat16 where the device has it natively. It halves the memory."""

    addons: AddOns = AddOns()
    """What is loaded on top of the diffusion model."""
    proof: ProofConfig = ProofConfig()
    """With what the pictures are signed (C2PA); needs `aai[proof]`. The files must be where the painters run."""

    @pydantic.model_validator(mode="after")
    def _unguided(self) -> "ServeConfig":
        if self.addons.controlnet:
            raise ValueError("addons.controlnet needs a picture that requests do not carry: leave it out")
        return self

    def plan(self) -> Plan:
        """See VerbConfig."""
        key = "required" if api_key() or self.host not in LOOPBACK_HOSTS else "not required on loopback"
        return Plan(
            inputs={"bundle": self.bundle, "registry": self.tracking.uri},
            outputs={"service": self.url(), "API key": key},
            resources={**self.resources(), "queue": f"{self.max_queued_requests} requests"},
        )

    def url(self) -> str:
        """Where the service answers."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


CONFIG = ServeConfig


def add_flags(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Short flags and the settings they stand for."""
    parser.add_argument("--host", help="address to listen on [127.0.0.1]")
    parser.add_argument("--port", type=int, help="port to listen on [8000]")
    parser.add_argument("--bundle", metavar="URI", help="models:/NAME@ALIAS or a bundle folder")
    return {"host": "host", "port": "port", "bundle": "bundle"}


def pin(config: ServeConfig) -> tuple[str, ServedModel]:
    """The bundle as a URI that cannot move, and what it is: an alias becomes the version it names now.

    Raises UserError when there is no such model, version or alias, or no whole bundle with an adapter.
    """
    uri, name, version, alias = versions.pin_bundle(config.bundle, config.tracking)
    bundle = read_bundle(versions.resolve_bundle(uri, config.tracking))
    if bundle.config.adapter is None:
        raise UserError("bundle", config.bundle, "has no adapter", "serve the bundle of `aai adapt`")
    check(bundle.folder, config.trust, config.bundle)
    if not name:
        uri = storage.absolute(uri)
        name, version = uri.rstrip("/").rsplit("/", 1)[-1], bundle.sha
    rate_hz = encoder_config(bundle).sample_rate_hz
    return uri, ServedModel(name=name, version=version, alias=alias, sha=bundle.sha, sample_rate_hz=rate_hz)


def application(config: ServeConfig, uri: str, model: ServedModel, need_key: bool) -> serve.Application:
    """The two deployments, bound."""
    cluster, limits = config.cluster, config.limits
    full = BackpressureConfig(status_code=429, retry_after_s=limits.retry_after_s)
    painter = serve.deployment(
        name="Painter",
        num_replicas=cluster.num_workers,
        max_ongoing_requests=1,
        max_queued_requests=config.max_queued_requests,
        backpressure_config=full,
        request_router_config=RequestRouterConfig(max_backoff_s=0.1),
        ray_actor_options={"num_cpus": cluster.cpus_per_worker, "num_gpus": cluster.gpus_per_worker},
        health_check_period_s=5,
        max_constructor_retry_count=3,
    )(PainterReplica)
    gateway = serve.deployment(
        name="Gateway",
        num_replicas=1,  # one, because the bound of the queue holds for each Gateway
        max_ongoing_requests=256,
        max_queued_requests=256,
        backpressure_config=full,
        ray_actor_options={"num_cpus": 0},
        max_constructor_retry_count=3,
    )(serve.ingress()(Gateway))
    device = "cuda" if cluster.gpus_per_worker else "cpu"
    follow = config.bundle if model.alias and config.follow_s else ""
    told = PainterConfig(
        bundle=uri,
        model=model,
        registry=config.tracking.anywhere(),
        device=device,
        dtype=config.dtype,
        addons=absolute(config.addons),
        proof=config.proof.anywhere(),
        trust=config.trust.anywhere(),
        stuck_s=2 * limits.request_timeout_s,
        follow=follow,
        follow_s=config.follow_s or 1,
        board=BOARD,
    )
    painters = painter.bind(told.model_dump())
    capacity = cluster.num_workers + config.max_queued_requests
    board = BOARD if follow else ""
    return gateway.bind(painters, model.model_dump(), limits.model_dump(), capacity, need_key, board)


def build_app(args: dict[str, Any]) -> serve.Application:
    """What a Serve config or a RayService names as `import_path: pipelines.serve:build_app`.

    args: the settings of ServeConfig, or {"config": FILE, ...} to load a file first. The address is then
    not ours to choose, so AAI_API_KEY must be set in the environment of the cluster's processes.
    """
    settings = dict(args)
    file = settings.pop("config", None)
    config = ServeConfig.load(file, values=settings) if file else ServeConfig.parse(settings, "args")
    return application(config, *pin(config), need_key=True)


def check_address(config: ServeConfig) -> None:
    """Raises UserError when the address needs a key that is not there, or the port is taken."""
    if config.host not in LOOPBACK_HOSTS and not api_key():
        rule = f"others can reach the service, and {KEY_VARIABLE} is not set"
        raise UserError("host", config.host, rule, f"set {KEY_VARIABLE}, or serve on 127.0.0.1")
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            raise UserError(
                "port", config.port, f"cannot listen on {config.host} ({error.strerror})", "pass --port"
            ) from error


def start(config: ServeConfig, uri: str, model: ServedModel) -> None:
    """Deploys a pinned bundle on the Ray that is connected and returns when the service answers."""
    # Our own deadline comes first: the proxy's only ends what hangs beyond it.
    options = HTTPOptions(host=config.host, port=config.port, request_timeout_s=config.limits.request_timeout_s + 10)
    serve.start(http_options=options)
    need_key = bool(api_key()) or config.host not in LOOPBACK_HOSTS
    serve.run(application(config, uri, model, need_key), name=APP, route_prefix="/")


def run(config: ServeConfig) -> dict[str, Any]:
    """Serves until Ctrl-C or SIGTERM, then lets running requests end and shuts down."""
    if not config.cluster.address:
        check_address(config)
        Prover(config.proof)  # on a cluster the painters have the files, not we
    uri, model = pin(config)
    stopped = threading.Event()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    os.environ.setdefault(proxy.VARIABLE, proxy.PLACE)  # a Ray that is started here hands it to Serve's proxies
    connect(config.cluster)
    try:
        start(config, uri, model)
        signal.signal(signal.SIGTERM, lambda *_: stopped.set())  # last: Ray sets a handler of its own, which aborts
        print(f"aai serve: {config.url()} serves {model.label()} (bundle {model.sha}); Ctrl-C stops", flush=True)
        while not stopped.wait(0.5):
            pass
    except KeyboardInterrupt:
        logger.info("aai serve: stopping")
    finally:
        if config.cluster.address:
            serve.delete(APP)
        else:
            serve.shutdown()
        ray.shutdown()
    return {}
