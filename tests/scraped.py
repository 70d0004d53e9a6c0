"""What Prometheus finds at an endpoint of Ray, and what the dashboard and the alerts ask for."""

import json
import re
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any, Self

import httpx
import yaml
from prometheus_client.parser import text_string_to_metric_families

MONITORING = Path(__file__).resolve().parents[1] / "infra" / "monitoring"
OURS, RAYS = r"ray_aai_\w+", r"ray_(?:node|object|serve)_\w+"
STAGES = re.compile(r"ray_aai_(?:pipeline|train)_")
NAMED = re.compile(rf"\b({OURS}|{RAYS})(?:\{{([^}}]*)\}})?")
BY = re.compile(r"\bby \(([^)]*)\)")
MATCH = re.compile(r'(\w+)(=~?)"([^"]*)"')
UNSEEN = (("code", "internal"), ("outcome", "failed"))
"""What no test brings about."""
Samples = dict[str, list[tuple[dict[str, str], float]]]


def panels() -> list[dict[str, Any]]:
    """The panels of the dashboard that show something."""
    return [each for each in json.loads((MONITORING / "dashboard.json").read_text())["panels"] if "targets" in each]


def expressions() -> list[str]:
    """The queries of the dashboard and the alerts."""
    rules = yaml.safe_load((MONITORING / "alerts.yml").read_text())
    found = [target["expr"] for panel in panels() for target in panel["targets"]]
    return found + [rule["expr"] for group in rules["groups"] for rule in group["rules"]]


def of_the_stages() -> list[str]:
    """Those that ask for a stage's metrics, or for a node's."""
    return [each for each in expressions() if STAGES.search(each) or re.search("ray_(node|object)_", each)]


def of_the_service() -> list[str]:
    """All others."""
    return [each for each in expressions() if each not in of_the_stages()]


def missing(expression: str, samples: Samples) -> list[str]:
    """Metrics, labels and values (of `=`, or one of `=~`) that a query names and nobody exports."""
    found, known = [], set()
    for name, selector in NAMED.findall(expression):
        matches = [(label, value) for label, _, value in MATCH.findall(selector) if not value.startswith("$")]
        wanted = [match for match in matches if match not in UNSEEN]
        fitting = [row for row, _ in samples.get(name, []) if all(re.fullmatch(v, row.get(k, "")) for k, v in wanted)]
        if not fitting:
            found.append(f"{name} with {matches}")
        known |= {label for row in fitting for label in row}
    labels = {label.strip() for by in BY.findall(expression) for label in by.split(",")}
    return found + [f"by {label}" for label in sorted(labels - known) if not found]


def samples_at(port: int) -> Samples:
    """All samples of our own metrics, and of Ray's that the dashboard shows, as Prometheus reads them."""
    text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=20).text
    samples: Samples = defaultdict(list)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if re.fullmatch(f"{OURS}|{RAYS}", sample.name):
                samples[sample.name].append((sample.labels, sample.value))
    return samples


class Scraper:
    """Scrapes an endpoint each second while the body runs, and keeps the last value of each series it saw."""

    def __init__(self, port: int) -> None:
        self.port, self._values = port, dict[tuple[str, frozenset[tuple[str, str]]], float]()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._scrape, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _scrape(self) -> None:
        while not self._ended.wait(1):
            for name, rows in samples_at(self.port).items():
                self._values |= {(name, frozenset(labels.items())): value for labels, value in rows}

    @property
    def seen(self) -> Samples:
        """All series so far."""
        samples: Samples = defaultdict(list)
        for (name, labels), value in dict(self._values).items():
            samples[name].append((dict(labels), value))
        return samples


def total(samples: Samples, name: str, **labels: str) -> float:
    """The sum of a metric's samples with these labels."""
    return sum(value for row, value in samples[name] if labels.items() <= row.items())
