"""Settings of generate, edit, stylize and export."""

import re

import pydantic

from aai.addons import AddOns
from aai.cue import CueConfig
from aai.errors import UserError
from aai.inject import names_in
from aai.proof import ProofConfig
from aai.sampling import PaintRequest
from aai.sounds import Window, name_of
from aai.strips import Strip
from pipelines.settings import (
    ClusterConfig,
    DType,
    InputLimits,
    Plan,
    RayVerbConfig,
    SoundLimits,
    StoreConfig,
    VerbConfig,
)

_NAMED = re.compile(r"[a-z][a-z0-9_]*=.")


class SoundsConfig(VerbConfig):
    """Sounds, and the bundle that hears them."""

    bundle: str = "models:/aai@champion"
    """models:/NAME@ALIAS, models:/NAME/VERSION, or a bundle folder."""
    audio: tuple[str, ...] = ()
    """Sound file, anything PyAV reads (wav, mp3, flac, the sound of a video). Several: FILE or NAME=FILE each, for
    <NAME> in the prompt; without names they are <sound>, <sound2>, ..."""
    limits: SoundLimits = SoundLimits()
    tracking: StoreConfig = StoreConfig()

    @pydantic.field_validator("audio", mode="before")
    @classmethod
    def _one_or_many(cls, given: object) -> object:
        return (given,) if isinstance(given, str) else given or ()

    def sounds(self) -> dict[str, str]:
        """The sound files by name. Raises UserError for a name given twice."""
        out: dict[str, str] = {}
        for number, given in enumerate(self.audio):
            name, _, uri = given.partition("=") if _NAMED.match(given) else ("", "", given)
            name = name or name_of(number)
            if name in out:
                raise UserError("audio", given, f"is a second sound of the name {name}", "give it another name")
            out[name] = uri
        return out


class ExportConfig(SoundsConfig):
    """Whose A* is written where."""

    out: str = "${run_dir}/tokens"
    """Folder or s3:// prefix of NAME.safetensors, one for each sound."""
    window: Window = "middle"
    """What is heard of a sound longer than the model's clips: its middle, the loudest part, or the mean of parts."""

    def plan(self) -> Plan:
        """See VerbConfig."""
        heard = ", ".join(self.audio) or "(--audio)"
        inputs, outputs = {"bundle": self.bundle, "audio": heard}, {"tokens": self.out}
        return Plan(inputs=inputs, outputs=outputs, resources={"device": "cpu"})


class PaintConfig(SoundsConfig):
    """One sound, maybe one picture, and how to paint."""

    out: str = "${run_dir}/pictures"
    """Folder of the PNG files."""
    request: PaintRequest = PaintRequest()
    limits: InputLimits = InputLimits()
    addons: AddOns = AddOns()
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: the CPU, but for a manifest the GPU when cluster.gpus_per_worker is not 0."""
    dtype: DType = "float32"
    proof: ProofConfig = ProofConfig()
    """With what the pictures are signed (C2PA); needs `aai[proof]`."""

    def plan(self) -> Plan:
        """See VerbConfig."""
        heard = ", ".join(self.audio) or "(--audio)"
        return Plan(
            inputs={"bundle": self.bundle, "audio": heard, **self.picture_input()},
            outputs={"pictures": self.out},
            resources={"device": f"{self.torch_device}, {self.dtype}"},
        )

    @property
    def torch_device(self) -> str:
        """What `device` stands for."""
        return "cpu" if self.device == "auto" else self.device

    def picture_input(self) -> dict[str, str]:
        """The given picture's row of the plan, for the verbs that take one."""
        return {}


class GenerateConfig(PaintConfig, RayVerbConfig):
    """As PaintConfig; several sounds, strips, and manifests of sounds."""

    cue: CueConfig = CueConfig()
    """AudioCue: before the picture is painted, A* is tuned on pictures that the sound retrieves; one sound only."""
    control: str | None = None
    """Picture that guides the ControlNet of addons.controlnet: PNG, JPEG or WebP."""
    manifest: str | None = None
    """Instead of sounds one by one: a CSV or Parquet file with `uri` (and maybe start_s, end_s), a tar, or a folder.
    All its sounds are painted on Ray; OUT/index.parquet lists the pictures."""
    batch_size: int = pydantic.Field(8, ge=1)
    """Pictures of a manifest that are painted together."""
    cluster: ClusterConfig = ClusterConfig()

    @property
    def torch_device(self) -> str:
        """See PaintConfig."""
        return "cuda" if self.device == "auto" and self.cluster.gpus_per_worker else super().torch_device

    @pydantic.model_validator(mode="after")
    def _one_or_all(self) -> "GenerateConfig":
        if bool(self.control) != bool(self.addons.controlnet):
            raise ValueError("control and addons.controlnet belong together: give both or none")
        if self.control and self.strip:
            raise ValueError("control and strip exclude each other: give one of them")
        if self.cue.features and (self.strip or self.manifest or self.control or len(self.audio) > 1):
            raise ValueError("cue.features is for one sound: leave out strip, manifest, control and further sounds")
        if self.cue.features and (set(self.sounds()) - {"sound"} or names_in(self.request.negative_prompt)):
            raise ValueError("cue.features tunes <sound> alone: give it no other name, and no place in negative_prompt")
        for name in ("audio", "strip", "control"):
            if self.manifest and getattr(self, name):
                raise ValueError(f"manifest and {name} exclude each other: give one of them")
        return self

    def plan(self) -> Plan:
        """See VerbConfig."""
        plan = super().plan()
        if self.manifest is None:
            return plan
        inputs = {"bundle": self.bundle, "manifest": self.manifest}
        return plan.model_copy(update={"inputs": inputs, "resources": {**plan.resources, **self.resources()}})

    strip: Strip | None = None
    """Instead of pictures of several seeds, pictures of one seed in which the sound changes: from the first of two
    sounds to the second (morph), from the neutral word to the sound (strength), from 30 dB softer to as it is
    (loudness)."""
    strip_pictures: int = pydantic.Field(7, ge=2, le=32)
    """Pictures of a strip."""


class RepaintConfig(PaintConfig):
    """As PaintConfig, with the picture to change."""

    image: str | None = None
    """Picture to change: PNG, JPEG or WebP."""
    mask: str | None = None
    """Picture that is white where it may change; empty = the model finds it (with request.repaint=invert):
    the picture's object, or for stylize all but that."""

    @pydantic.model_validator(mode="after")
    def _unguided(self) -> "RepaintConfig":
        if self.mask and self.request.repaint != "invert":
            raise ValueError("img2img changes the whole picture: mask needs request.repaint=invert")
        if self.addons.controlnet:
            raise ValueError("addons.controlnet guides generate alone: leave it out")
        return self

    def picture_input(self) -> dict[str, str]:
        """See PaintConfig."""
        return {"image": self.image or "(--image)"}
