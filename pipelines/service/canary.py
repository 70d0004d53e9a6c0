"""A version on trial: it answers a share of the requests, or paints unseen beside the one that is served."""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence

import numpy as np
import pydantic
from PIL import Image

from aai.config import Config
from pipelines.registry import versions
from pipelines.service.answers import ServedModel
from pipelines.service.http import PaintJob
from pipelines.service.watching import Watcher
from pipelines.settings import StoreConfig

logger = logging.getLogger("ray.serve")  # the only one that Serve writes for its replicas


class CanaryConfig(Config):
    """How a version is tried with the users' requests before it is promoted."""

    alias: str = "candidate"
    """Alias of the same model; while it is missing, or names the version that is served, nothing is on trial."""
    share: float = pydantic.Field(0, ge=0, le=1)
    """Part of the requests that it answers. Only a version whose gates have passed, or were forced, answers."""
    shadow: float = pydantic.Field(0, ge=0, le=1)
    """Part of the requests that it paints besides, when the painter has places free; nobody sees the pictures, they
    are compared with those that were answered."""

    @pydantic.model_validator(mode="after")
    def _apart(self) -> "CanaryConfig":
        if self.share + self.shadow > 1:
            raise ValueError(f"share {self.share:g} and shadow {self.shadow:g} are more than all requests")
        return self

    @property
    def is_on(self) -> bool:
        """Whether a version is tried at all."""
        return self.share + self.shadow > 0

    def answers(self, job: PaintJob) -> bool:
        """Whether a request belongs to the share."""
        return part_of(job) < self.share

    def shadows(self, job: PaintJob) -> bool:
        """Whether a request is one that is painted besides."""
        return part_of(job) >= 1 - self.shadow


def part_of(job: PaintJob) -> float:
    """Where a request falls in [0, 1): by what it asks, so that the same is always painted by the same version."""
    asked = json.dumps([job.verb, dict(job.given), job.request.model_dump(mode="json")], sort_keys=True)
    return int.from_bytes(hashlib.sha256(asked.encode()).digest()[:6]) / 2**48


def distance(pairs: Sequence[tuple[Image.Image, Image.Image]]) -> float:
    """Mean absolute difference of pairs of pictures of equal size, 0 to 1."""
    apart = [np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).mean() for a, b in pairs]
    return float(np.mean(apart)) / 255


class Trial(Watcher):
    """Follows the alias of the version on trial. end: called when the alias is missing."""

    def __init__(
        self,
        config: CanaryConfig,
        registry: StoreConfig,
        served: ServedModel,
        take: Callable[[str, ServedModel], None],
        end: Callable[[], None],
    ) -> None:
        self._none = served.model_copy(update={"version": "none", "alias": config.alias})
        super().__init__(f"models:/{served.name}@{config.alias}", registry, self._none, take)
        self._end, self._asks = end, config.share > 0
        self.may_answer = False
        """Whether its gates let users see what it paints."""

    def look(self) -> None:
        """As Watcher; a version's gates are looked at each time, since they are judged after it got the alias."""
        super().look()
        if not self._asks or self.served == self._none:
            return
        try:
            uri = f"models:/{self.served.name}/{self.served.version}"
            self.may_answer = versions.may_be_used(uri, self.store)
        except Exception as error:
            self._note(error)

    def _try(self, pinned: str, version: str) -> None:
        """As Watcher, but where a version cannot be used none is on trial: the one before was not asked for."""
        self.may_answer = False
        super()._try(pinned, version)
        if version in self.refused:
            self._end()
            self.served = self._none

    def _lacking(self) -> bool:
        self._end()
        self.may_answer, self.served, self.refused = False, self._none, {}
        return True
