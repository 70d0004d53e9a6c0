"""Serves a bundle over HTTP with Ray Serve: a page, POST /v1/generate|edit|stylize, /healthz and /docs.

Two deployments: the Gateway checks and decodes uploads and always answers; Painters hold the model, and paint
several requests together. Between them stands a bounded queue: what does not fit is refused with 429 and Retry-After.
"""

import argparse
import gc
import logging
import os
import signal
import socket
import threading
import time
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
from pipelines.service.answers import ServedModel
from pipelines.service.canary import CanaryConfig
from pipelines.service.gateway import Gateway
from pipelines.service.guard import MAX_HELD_BACK, Limits
from pipelines.service.keys import KEY_VARIABLE, Keys, api_key
from pipelines.service.loading import PainterConfig
from pipelines.service.painters import PainterReplica
from pipelines.service.traces import TracesConfig
from pipelines.settings import Autoscaling, ClusterConfig, DType, Plan, RayVerbConfig, StoreConfig

logger = logging.getLogger(__name__)

LOOPBACK_HOSTS = ("127.0.0.1", "::1", "localhost")
APP = "aai"
BOARD = "aai-painters"
"""Name of the actor that painters tell what they serve."""


class ServeConfig(RayVerbConfig):
    """What is served, where, and how much it may take. `cluster.num_workers` is the number of painters."""

    cluster: ClusterConfig = ClusterConfig(num_workers=1)
    autoscaling: Autoscaling | None = None
    """Painters that come and go with what is asked, instead of `cluster.num_workers`."""
    gateways: int = pydantic.Field(1, ge=1)
    """Processes that take requests, on as many nodes as there are; each has its share of the queue and its steps."""
    bundle: str = "models:/aai@champion"
    """models:/NAME@ALIAS, models:/NAME/VERSION, or a bundle folder. An alias is followed (`follow_s`)."""
    follow_s: float = pydantic.Field(5, ge=0)
    """How often each painter looks whether the alias names another version, which it then takes up; 0 = never."""
    canary: CanaryConfig = CanaryConfig()
    """A version that is tried with part of the requests."""
    tracking: StoreConfig = StoreConfig()
    trust: TrustConfig = TrustConfig()
    """Whose signature the bundle must have."""
    host: str = "127.0.0.1"
    """Address to listen on; any other than loopback needs the environment variable AAI_API_KEY, or keys_file."""
    port: int = pydantic.Field(8000, ge=1, le=65535)
    keys_file: str = ""
    """YAML or JSON list of {name, sha256, per_minute, at_once}: who may paint, and how much. It is read again when it
    changes, and must be where the Gateway runs."""
    metrics_port: int = pydantic.Field(0, ge=0, le=65535)
    """Port of Ray's Prometheus endpoint on this machine; 0 = one that is free, which the log tells."""
    max_queued_requests: int = pydantic.Field(8, ge=1)
    """Requests that may wait for a painter, in all gateways; one more is refused with 429."""
    batch_pictures: int = pydantic.Field(8, ge=1, le=256)
    """Most pictures that one painter paints together, of several requests; 1 = one request after the other. A request
    of more pictures is painted by itself."""
    limits: Limits = Limits()
    traces: TracesConfig = TracesConfig()
    """Spans of each request by OTLP. On a cluster that runs, its processes' environment says where to."""
    stop_s: float = pydantic.Field(2, ge=0.1)
    """How long a replica that is stopped or replaced may take to end what it paints."""
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

    @pydantic.model_validator(mode="after")
    def _tries(self) -> "ServeConfig":
        if self.canary.is_on and not (self.bundle.startswith("models:/") and self.follow_s):
            raise ValueError("canary: goes with a bundle of the registry (models:/NAME...) and follow_s above 0")
        if self.canary.is_on and self.bundle.endswith(f"@{self.canary.alias}"):
            raise ValueError(f"canary.alias {self.canary.alias}: is what the service serves")
        return self

    @pydantic.model_validator(mode="after")
    def _scales(self) -> "ServeConfig":
        if self.gateways > self.max_queued_requests:
            raise ValueError(f"gateways {self.gateways}: no share in max_queued_requests {self.max_queued_requests}")
        if (scaling := self.autoscaling) is None:
            return self
        if self.cluster.num_workers > 1:
            raise ValueError(f"autoscaling, and cluster.num_workers {self.cluster.num_workers}: leave one out")
        before = scaling.max_painters - 1
        painted = before * self.batch_pictures
        if painted + self.max_queued_requests <= scaling.target_ongoing_requests * before:
            most = f"{before} painters have {painted} requests, and max_queued_requests is {self.max_queued_requests}"
            raise ValueError(f"autoscaling never reaches max_painters {scaling.max_painters}: {most}")
        return self

    @property
    def most_painters(self) -> int:
        """Painters when all are there."""
        return self.autoscaling.max_painters if self.autoscaling else self.cluster.num_workers

    @property
    def grace_s(self) -> float:
        """How long a replica that goes may paint on: where they come and go by demand, until its pictures are done."""
        return self.limits.request_timeout_s + 10 if self.autoscaling else self.stop_s

    def painters(self) -> dict[str, Any]:
        """How many painters there are, in the words of Ray Serve's deployments."""
        if self.autoscaling is None:
            return {"num_replicas": self.cluster.num_workers}
        return {"autoscaling_config": self.autoscaling.describe()}

    def share(self, of: int) -> int:
        """A gateway's part of a number, rounded up."""
        return -(-of // self.gateways)

    def resources(self) -> dict[str, str]:
        """See RayVerbConfig."""
        told = self.cluster.model_copy(update={"num_workers": self.most_painters}).describe()
        fewest = f"{self.autoscaling.min_painters} to " if self.autoscaling else ""
        return {**told, "workers": fewest + told["workers"]}

    def plan(self) -> Plan:
        """See VerbConfig."""
        key = "required" if self.needs_key() else "not required on loopback"
        return Plan(
            inputs={"bundle": self.bundle, "registry": self.tracking.uri},
            outputs={"service": self.url(), "API key": key},
            resources={**self.resources(), "queue": f"{self.max_queued_requests} requests"},
        )

    def needs_key(self) -> bool:
        """Whether requests must have a key."""
        return bool(api_key() or self.keys_file) or self.host not in LOOPBACK_HOSTS

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
        **config.painters(),
        max_ongoing_requests=config.batch_pictures,
        max_queued_requests=config.share(config.max_queued_requests),
        backpressure_config=full,
        request_router_config=RequestRouterConfig(max_backoff_s=0.1),
        graceful_shutdown_timeout_s=config.grace_s,
        graceful_shutdown_wait_loop_s=0.1,
        ray_actor_options={"num_cpus": cluster.cpus_per_worker, "num_gpus": cluster.gpus_per_worker},
        health_check_period_s=1,
        max_constructor_retry_count=3,
    )(PainterReplica)
    gateway = serve.deployment(
        name="Gateway",
        num_replicas=config.gateways,  # Serve bounds the queue of each: their shares make up the whole
        max_ongoing_requests=2 * MAX_HELD_BACK,
        max_queued_requests=256,
        backpressure_config=full,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=config.grace_s,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=1,
        logging_config={"enable_access_log": False},  # the gateway writes its own line
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
        batch_pictures=config.batch_pictures,
        follow=follow,
        follow_s=config.follow_s or 1,
        canary=config.canary,
        board=BOARD if follow or config.canary.is_on else "",
    )
    painters = painter.bind(told.model_dump())
    together = config.batch_pictures
    capacity = config.share(config.most_painters * together + config.max_queued_requests)
    shared = limits.model_copy(update={"max_queued_steps": config.share(limits.max_queued_steps)})
    keys = storage.absolute(config.keys_file) if config.keys_file else ""
    sizes, doors = (capacity, config.share(together)), (need_key, told.board, keys, config.gateways)
    return gateway.bind(painters, model.model_dump(), shared.model_dump(), *sizes, *doors)


def build_app(args: dict[str, Any]) -> serve.Application:
    """What a Serve config or a RayService names as `import_path: pipelines.serve:build_app`.

    args: the settings of ServeConfig, or {"config": FILE, ...} to load a file first. The address is then
    not ours to choose, so there must be `keys_file`, or AAI_API_KEY in the environment of the cluster's processes.
    """
    settings = dict(args)
    file = settings.pop("config", None)
    config = ServeConfig.load(file, values=settings) if file else ServeConfig.parse(settings, "args")
    return application(config, *pin(config), need_key=True)


def check_address(config: ServeConfig) -> None:
    """Raises UserError when the address needs a key that is not there, the keys are unusable, or the port is taken."""
    if config.host not in LOOPBACK_HOSTS and not api_key() and not config.keys_file:
        rule = f"others can reach the service, and {KEY_VARIABLE} is not set"
        raise UserError("host", config.host, rule, f"set {KEY_VARIABLE} or keys_file, or serve on 127.0.0.1")
    Keys(config.keys_file, api_key())
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
    serve.start(http_options=options, tracing_config=config.traces.options())
    serve.run(application(config, uri, model, config.needs_key()), name=APP, route_prefix="/")


def metrics_url() -> str:
    """Ray's Prometheus endpoint on this node, or on the first of a cluster."""
    node = ray.nodes()[0]
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"


def drain(stop_s: float) -> None:
    """Ends the application: no new requests; what is painted may end. What is not answered then is for nobody."""
    serve.delete(APP, _blocking=False)
    end_s = time.monotonic() + stop_s + 1
    while time.monotonic() < end_s:
        application = serve.status().applications.get(APP)
        if application is None or "Gateway" not in application.deployments:
            return
        time.sleep(0.1)


def run(config: ServeConfig) -> dict[str, Any]:
    """Serves until Ctrl-C or SIGTERM, then gives running requests `stop_s` to end and shuts down."""
    if not config.cluster.address:
        check_address(config)
        Prover(config.proof)  # on a cluster the painters have the files, not we
    begin_s = time.monotonic()
    logger.info("aai serve: fetching %s", config.bundle)
    uri, model = pin(config)
    stopped = threading.Event()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    config.traces.options()  # before Ray starts, which hands the environment on
    os.environ.setdefault(proxy.VARIABLE, proxy.PLACE)  # a Ray that is started here hands it to Serve's proxies
    connect(config.cluster, metrics_port=config.metrics_port)
    try:
        logger.info("aai serve: loading %s, painters: %d", model.label(), config.cluster.num_workers)
        start(config, uri, model)
        logger.info("aai serve: ready after %.1f s; metrics at %s", time.monotonic() - begin_s, metrics_url())
        signal.signal(signal.SIGTERM, lambda *_: stopped.set())  # last: Ray sets a handler of its own, which aborts
        print(f"aai serve: {config.url()} serves {model.label()} (bundle {model.sha}); Ctrl-C stops", flush=True)
        while not stopped.wait(0.5):
            pass
    except KeyboardInterrupt:
        pass
    finally:
        logger.info("aai serve: stopping; what is painted has %g s to end", config.stop_s)
        drain(config.stop_s)
        ray.shutdown()  # a Ray of our own ends with all that runs on it
        gc.freeze()  # else Python looks through all that torch and MLflow have loaded, for seconds, before it ends
    return {}
