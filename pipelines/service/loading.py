"""What a painter of the service holds: a version's models, loaded over one foundation for all versions."""

import logging
import tempfile
from dataclasses import dataclass

import numpy as np

from aai.addons import AddOns
from aai.bundle import read_bundle
from aai.config import Config
from aai.errors import UserError
from aai.foundation.identity import identity
from aai.painter import Painter
from aai.proof import ProofConfig
from aai.sampling import PaintRequest
from aai.signatures import TrustConfig, check
from pipelines.registry import versions
from pipelines.service.answers import ServedModel
from pipelines.service.canary import CanaryConfig
from pipelines.service.watching import refuse_other
from pipelines.settings import StoreConfig

logger = logging.getLogger("ray.serve")  # the only one that Serve writes for its replicas


class PainterConfig(Config):
    """What a painter is told at its start."""

    bundle: str
    """URI that cannot move."""
    model: ServedModel
    registry: StoreConfig
    device: str
    dtype: str
    addons: AddOns
    proof: ProofConfig
    trust: TrustConfig
    stuck_s: float
    """Painting for longer than this is a fault."""
    batch_pictures: int = 8
    """Most pictures that are painted together."""
    follow: str = ""
    """Alias that is followed, as models:/NAME@ALIAS; empty = none."""
    follow_s: float = 5
    canary: CanaryConfig = CanaryConfig()
    board: str = ""
    """Name of the actor that is told what is served."""


@dataclass(frozen=True)
class Serving:
    """A painter, what it is called, and the foundation that it was loaded with."""

    painter: Painter
    model: ServedModel
    foundation: dict[str, str]


def first(c: PainterConfig) -> Serving:
    """What the alias names now; where that cannot be had, what it named when the service was started."""
    if c.follow:
        try:
            pinned, _, version, _ = versions.pin_bundle(c.follow, c.registry)
            return loaded(c, pinned, c.model.model_copy(update={"version": version}))
        except Exception as error:
            logger.warning("painter: begins with %s, since %s cannot be had (%s)", c.model.label(), c.follow, error)
    found = loaded(c, c.bundle, c.model)
    if found.model.sha != c.model.sha:
        rule = f"holds {found.model.sha}, the service was started for {c.model.sha}"
        raise UserError("bundle", c.bundle, rule, "deploy again")
    return found


def loaded(c: PainterConfig, uri: str, model: ServedModel, beside: Serving | None = None) -> Serving:
    """A bundle, checked and loaded. Raises UserError for one that cannot take the place of what is served."""
    with tempfile.TemporaryDirectory(prefix="aai-") as scratch:
        bundle = read_bundle(versions.resolve_bundle(uri, c.registry, scratch))
        check(bundle.folder, c.trust, uri)
        foundation = identity(bundle.config.foundation)
        if beside:
            refuse_other("foundation", beside.foundation, foundation)
        painter = Painter.load(bundle, c.device, c.dtype, c.addons, beside.painter if beside else None)
    refuse_other("encoder.sample_rate_hz", c.model.sample_rate_hz, painter.sample_rate_hz)
    return Serving(painter, model.model_copy(update={"sha": bundle.sha}), foundation)


def try_out(painter: Painter) -> None:
    """Paints a tone, so that the first request does not wait. Raises UserError where all pictures are of one colour."""
    tone = np.sin(np.arange(painter.sample_rate_hz) * 0.2).astype(np.float32) / 2
    for seed in range(3):  # a safety checker may black one out
        pixels = np.asarray(painter.generate(tone, PaintRequest(steps=2, seed=seed))[0])
        if pixels.min() < pixels.max():
            return
    raise UserError("bundle", "its first pictures", "are of one colour", "look at `aai generate` with this version")
