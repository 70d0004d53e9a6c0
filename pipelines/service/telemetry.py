"""Metrics of the service, on Ray's Prometheus endpoint of each node: there their names begin with `ray_aai_`.

Labels hold what is bounded: verbs, codes, versions, names of keys.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Literal

from ray.serve.metrics import Counter, Gauge, Histogram

from pipelines.service.access import Visit
from pipelines.service.http import Health

SECONDS = [0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 45.0, 60.0, 90.0, 120.0, 180.0, 300.0]
Role = Literal["served", "canary", "shadow"]
APART = [0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0]
ROWS = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]


class _Named:
    """Gauges of one name, one for each value of a label; what is no longer there is 0."""

    def __init__(self, name: str, description: str, label: str) -> None:
        self._gauge, self._label = Gauge(name, description, (label,)), label
        self._known: set[str] = set()

    def set(self, values: dict[str, int]) -> None:
        """The values of now."""
        self._known |= values.keys()
        for label in self._known:
            self._gauge.set(values.get(label, 0), {self._label: label})


class GatewayMetrics:
    """What the gateway counts."""

    def __init__(self, deadline_s: float, capacity: int) -> None:
        self._requests = Counter(
            "aai_requests_total",
            "Requests by verb, status, code (ok, or that of the refusal) and name of the key",
            ("verb", "status", "code", "key"),
        )
        self._seconds = Histogram(
            "aai_request_duration_seconds", "From the first byte to the last", SECONDS, ("verb", "status")
        )
        self._stages = stages()
        self._pictures = Counter("aai_pictures_total", "Pictures that were painted and shown", ("verb",))
        self._waiting = Gauge("aai_queue_requests", "Requests that wait for a painter")
        self._painting = Gauge("aai_painting_requests", "Requests that are painted")
        self._weight = Gauge("aai_picture_steps", "Pictures x steps of the requests that are painted or wait")
        self._running = Gauge("aai_painters_running", "Painters that can paint")
        self._wanted = Gauge("aai_painters_wanted", "Painters that there should be")
        self._versions = _Named("aai_version_painters", "Painters by the version that they serve", "version")
        self._canary = _Named("aai_canary_painters", "Painters by the version that they have on trial", "version")
        self._refused = _Named("aai_version_refused", "1 for a version that is named and not taken up", "version")
        self._registry = Gauge("aai_registry_trouble", "1 while the registry cannot be followed")
        self._trouble_of_keys = Gauge("aai_keys_trouble", "1 while a new file of keys cannot be used")
        self._bounds = (
            (Gauge("aai_request_timeout_seconds", "The deadline of a request"), deadline_s),
            (Gauge("aai_capacity_requests", "Requests that may be painted or wait"), capacity),
        )

    def visit(self, visit: Visit) -> None:
        """Counts a request that is over."""
        key, status = str(visit.told.get("key", "")) or "none", str(visit.status)
        self._requests.inc(tags={"verb": visit.verb, "status": status, "code": visit.code, "key": key})
        self._seconds.observe(visit.duration_s, {"verb": visit.verb, "status": status})
        for name, seconds in visit.stages_s.items() if visit.verb in ("generate", "edit", "stylize") else ():
            self._stages.observe(seconds, {"stage": name})
        if visit.code == "ok" and "pictures" in visit.told:  # a stream that failed is a 200, too
            self._pictures.inc(visit.told["pictures"] - visit.told.get("blocked", 0), {"verb": visit.verb})

    def queue(self, waiting: int, painting: int, picture_steps: int) -> None:
        """The queue as it is now."""
        self._waiting.set(waiting)
        self._painting.set(painting)
        self._weight.set(picture_steps)

    def health(self, health: Health, wanted: int, versions: dict[str, int], canary: dict[str, int]) -> None:
        """The painters as they are now, told every few seconds: Ray forgets gauges.

        versions, canary: painters by the version that they serve, and have on trial.
        """
        self._running.set(health.replicas)
        self._wanted.set(wanted)
        self._versions.set(versions)
        self._canary.set(canary)
        self._refused.set(dict.fromkeys(health.refused, 1))
        self._registry.set(int(bool(health.registry)))
        self._trouble_of_keys.set(int(bool(health.keys)))
        for gauge, bound in self._bounds:
            gauge.set(bound)


class PainterMetrics:
    """What a painter measures."""

    def __init__(self) -> None:
        self._stages, self._rows = stages(), Histogram("aai_unet_rows", "Rows of one step of the UNet", ROWS)
        labels = ("role", "version")
        self._pictures = Counter(
            "aai_version_pictures_total",
            "Pictures by role (served, canary, shadow), version and what became of them: ok, failed, refused, stopped, "
            "skipped",
            (*labels, "outcome"),
        )
        self._seconds = Histogram("aai_version_paint_seconds", "Painting of a request", SECONDS, labels)
        self._apart = Histogram(
            "aai_shadow_distance",
            "Mean absolute difference, 0 to 1, of what the version on trial painted unseen from what was answered",
            APART,
            ("version",),
        )

    def batch(self, rows: int) -> None:
        """One step of the UNet; with guidance each picture has two rows."""
        self._rows.observe(rows)

    def version(self, role: Role, version: str, outcome: str, pictures: int, duration_s: float = 0) -> None:
        """A request that a version painted, or not."""
        labels = {"role": role, "version": version}
        self._pictures.inc(pictures, {**labels, "outcome": outcome})
        if outcome == "ok":
            self._seconds.observe(duration_s, labels)

    def apart(self, version: str, distance: float) -> None:
        """How far pictures that nobody saw are from those that were answered."""
        self._apart.observe(distance, {"version": version})

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a stage of a request: paint, encode."""
        begin_s = monotonic()
        yield
        self._stages.observe(monotonic() - begin_s, {"stage": name})


def stages() -> Histogram:
    """Gateway: upload, decode, painters (queue, paint and encode); painters: paint, encode."""
    return Histogram("aai_stage_seconds", "Stages of a request", SECONDS, ("stage",))
