"""Frozen features of every accepted clip: CLIP features of its pictures and captions, VAE latents of one picture.

Each shard of curate's accepted/ becomes one Parquet file; manifest.json is written last and names the models, shapes
and settings. A re-run after a kill goes on where it stopped; a run with nothing to do says so.
"""

import argparse
import hashlib
import io
import json
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pydantic
import torch
from PIL import Image
from torch import Tensor

from aai import schema, storage
from aai.errors import UserError
from aai.features import MANIFEST, METADATA_KEY, SHAPES_KEY, FeatureManifest
from aai.features import VERSION as FEATURES_VERSION
from aai.foundation.batches import Batches
from aai.foundation.clip import FrozenClip
from aai.foundation.identity import FoundationSpec, identity
from aai.foundation.loaders import load_vae
from aai.foundation.sizes import picture_sizes
from aai.media.waveform import encode_wav, read_samples, sound_rate_hz
from aai.precision import dtype_of
from aai.version import code_version
from pipelines.engine.cluster import worker_dtype
from pipelines.engine.columns import read_columns, read_footers
from pipelines.engine.lock import locked
from pipelines.engine.shards import Result, Shard, run_shards
from pipelines.settings import DType, Plan, RayVerbConfig
from pipelines.tables import enlarging
from pipelines.tables.enlarging import count_enlarged
from pipelines.tables.kinds import kinds_in, picture_counts, shared_count, spread

log = logging.getLogger(__name__)


class FeaturizeConfig(RayVerbConfig):
    """What to featurize, with which frozen models."""

    input: str
    """Folder or s3:// prefix of a ClipTable (curate's accepted/)."""
    out: str
    """Folder or s3:// prefix of the FeatureTable."""
    foundation: FoundationSpec = FoundationSpec()
    prompts: list[str] = pydantic.Field(["{caption}"], min_length=1)
    """Texts made of a caption; each becomes a text feature."""
    latent_frame: int | None = pydantic.Field(None, ge=0)
    """Which picture of a clip the latents are of, from 0; empty = the middle one."""
    sound: Literal["wav", "flac"] = "wav"
    """How sounds are kept: wav takes 32 kB for a second at 16 kHz and nearly no time to read, flac half the room and a
    core for each 120 clips of 10 s that training reads in a second."""
    allow_upsampling: bool = False
    """Take pictures that are smaller than the models want them; what is enlarged is counted in manifest.json."""
    dtype: DType = "float32"
    """Arithmetic of the frozen models; features are stored in float16. auto: decided once for the table, by a worker's
    device; a table that was begun keeps what it was begun with."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU when cluster.gpus_per_worker is not 0."""
    batch_size: int = pydantic.Field(64, ge=1)
    """Pictures or texts per forward pass; halved where the device's memory does not hold it."""

    def plan(self) -> Plan:
        """See VerbConfig."""
        return Plan(inputs={"clips": self.input}, outputs={"features": self.out}, resources=self.resources())

    @pydantic.model_validator(mode="after")
    def _templates(self) -> "FeaturizeConfig":
        for prompt in self.prompts:
            if "{caption}" not in prompt:
                raise ValueError(f"prompt {prompt!r} does not contain {{caption}}")
        return self

    @property
    def on_gpu(self) -> bool:
        """Whether workers use a GPU."""
        return self.device == "cuda" or (self.device == "auto" and self.cluster.gpus_per_worker > 0)

    def content_digest(self) -> str:
        """Of everything that determines a row's content: not where, or how fast, it is made."""
        settings = {
            "version": [FEATURES_VERSION, schema.VERSION],
            "foundation": identity(self.foundation),
            "prompts": self.prompts,
            "latent_frame": self.latent_frame,
            "dtype": self.dtype,
        }
        return _hash(settings)


CONFIG = FeaturizeConfig


def add_flags(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Short flags and the settings they stand for."""
    parser.add_argument("--input", help="ClipTable folder (curate's accepted/)")
    parser.add_argument("--out", help="FeatureTable folder")
    return {"input": "input", "out": "out"}


@dataclass(frozen=True, kw_only=True)
class FeaturizeShard(Shard):
    """One file of clips."""

    input: str
    output: str
    fingerprint: str
    """Of the clips."""
    kinds: frozenset[str] = frozenset()
    """What `picture` says of them; nothing in a table of videos alone."""


class FeaturizeWorker:
    """Holds the frozen models; turns one shard of clips into one Parquet file of features."""

    def __init__(self, config: dict[str, Any], digest: str, shared: int = 0) -> None:
        """shared: see `kinds.shared_count`."""
        self.config, self.digest, self.shared = FeaturizeConfig.parse(config), digest, shared
        c = self.config
        self.device = "cuda" if c.on_gpu else "cpu"
        self.dtype = dtype_of(c.dtype, self.device)
        threads = max(1, int(c.cluster.cpus_per_worker))
        if not c.on_gpu:  # the model itself takes the cores
            torch.set_num_threads(threads)
        self.clip = FrozenClip(c.foundation, self.device, self.dtype, c.batch_size, threads if c.on_gpu else 1)
        self.sizes = picture_sizes(c.foundation)
        self.vae, self.edge_px = load_vae(c.foundation, self.device, self.dtype)
        self.batches = Batches(c.batch_size)
        self.pool = ThreadPoolExecutor(threads)
        self.texts: dict[str, np.ndarray] = {}

    def __call__(self, shard: FeaturizeShard) -> Result:
        """Reads one file of clips and writes its features."""
        names = [*schema.feature_table(1, 1, 1, 1, 1, self.shared > 0).names]
        kept = [n for n in names if n not in ("image_features", "text_features", "latents")]
        clips = storage.read_table(shard.input, columns=[*kept, *enlarging.COLUMNS])
        sounds: list[Future[bytes]] = []
        if self.config.sound == "wav":  # while the models compute
            sounds = [self.pool.submit(_as_wav, data) for data in clips["audio"].to_pylist()]
        frames = clips["frames"].to_pylist()
        counts, num_frames = picture_counts(shard.input, clips, self.shared)
        enlarged = count_enlarged(shard.input, clips, self.sizes, self.config.allow_upsampling)
        chosen = num_frames // 2 if self.config.latent_frame is None else self.config.latent_frame
        if chosen >= num_frames:
            raise UserError("latent_frame", chosen, f"clips have {num_frames} pictures", "choose a smaller one")
        images = spread(self.images([f for row in frames for f in row]), counts, num_frames)
        texts = np.stack([self.text_features(caption) for caption in clips["caption"].to_pylist()])
        latents = self.latents([_decode(row[min(chosen, len(row) - 1)]) for row in frames if row])
        latents = spread(latents, np.minimum(counts, 1), 1)[:, 0]
        shapes = {
            "input": shard.fingerprint,
            "num_frames": num_frames,
            "image_dim": self.clip.dim,
            "num_texts": texts.shape[1],
            "text_dim": texts.shape[2],
            "latent_shape": latents.shape[1:],
            "latent_frame": chosen,
            "sample_rate_hz": _one_rate_hz(shard.input, clips["audio"].to_pylist()),
            "processor": self.clip.describe()["processor"],
            "dtype": self.clip.describe()["dtype"],
            "splits": Counter(clips["split"].to_pylist()),
            "enlarged": asdict(enlarged),
        }
        if self.shared:
            bare = pc.equal(clips[schema.PICTURE], schema.NO_PICTURE)
            shapes["without_picture"] = Counter(clips["split"].filter(bare).to_pylist())
        features = {
            "image_features": images.reshape(len(frames), -1),
            "text_features": texts.reshape(len(frames), -1),
            "latents": latents.reshape(len(frames), -1),
        }
        out_schema = schema.feature_table(
            num_frames, self.clip.dim, texts.shape[1], texts.shape[2], features["latents"].shape[1], self.shared > 0
        ).with_metadata({METADATA_KEY: self.digest.encode(), SHAPES_KEY: json.dumps(shapes).encode()})
        if sounds:
            place = clips.schema.get_field_index("audio")
            clips = clips.set_column(place, "audio", pa.array([sound.result() for sound in sounds], pa.binary()))
        columns = [_fixed_list(features[n]) if n in features else clips[n] for n in out_schema.names]
        storage.write_table(shard.output, pa.table(columns, schema=out_schema), compressed=False)
        return Result(rows=len(frames))

    def text_features(self, caption: str) -> np.ndarray:
        """[T, D] of a caption in each template; captions repeat, so each is embedded once."""
        if caption not in self.texts:
            filled = [prompt.replace("{caption}", caption) for prompt in self.config.prompts]
            self.texts[caption] = self.clip.texts(filled).numpy()
        return self.texts[caption]

    def images(self, frames: list[bytes]) -> np.ndarray:
        """[N, D] of JPEG pictures."""
        return self.clip.images(frames).numpy() if frames else np.zeros((0, self.clip.dim), np.float32)

    @torch.inference_mode()
    def latents(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """[N, C, h, w]: posterior means times the scaling factor, as the UNet expects them."""
        if not pictures:
            return self.latents([Image.new("RGB", (self.edge_px, self.edge_px))])[:0]  # [0, C, h, w]
        return torch.cat(self.batches.map(self._encode, pictures)).numpy()

    def _encode(self, pictures: Sequence[Image.Image]) -> Tensor:
        raw = torch.from_numpy(np.stack([_square(picture, self.edge_px) for picture in pictures])).to(self.device)
        pixels = (raw.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous()
        posterior = self.vae.encode(pixels.to(self.dtype)).latent_dist
        return (posterior.mean * self.vae.config.scaling_factor).float().cpu()


def _as_wav(sound: bytes) -> bytes:
    return encode_wav(read_samples(sound), sound_rate_hz(sound))


def _decode(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def _square(picture: Image.Image, edge_px: int) -> np.ndarray:
    """uint8 [edge, edge, 3]: shorter side scaled, middle cut out, as CLIP's preprocessing frames it."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(picture.resize((edge_px, edge_px), Image.Resampling.BICUBIC, box=box))


def _one_rate_hz(file: str, sounds: list[bytes]) -> int:
    rates_hz = {sound_rate_hz(sound) for sound in sounds}
    if len(rates_hz) != 1:
        rule = f"clips hold sound at {sorted(rates_hz)} Hz, not at one rate"
        raise UserError("input", file, rule, "curate them with one decode.sample_rate_hz")
    return rates_hz.pop()


def _fixed_list(values: np.ndarray) -> pa.Array:
    """float [N, D] as fixed_size_list<float16>[D]. Raises ValueError for what float16 cannot hold."""
    half = values.astype(np.float16)
    if not np.isfinite(half).all():
        raise ValueError("a feature is not finite in float16")
    return pa.FixedSizeListArray.from_arrays(pa.array(half.reshape(-1)), values.shape[1])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


Footers = Mapping[str, Mapping[bytes, bytes]]
"""By file: what it carries about its own making."""


def _footers(out: str) -> Footers:
    files = storage.file_sizes(out, ".parquet")
    return dict(zip(files, (footer.metadata or {} for footer in read_footers(files)), strict=True))


def list_shards(config: FeaturizeConfig) -> list[FeaturizeShard]:
    """One shard for each file of the input that has rows. Raises UserError when there is none."""
    shards = []
    files = storage.file_sizes(config.input, ".parquet")
    accepted = storage.join(config.input, "accepted")
    if any(file.startswith(f"{accepted}/") for file in files):  # beside it lies what was rejected
        raise UserError("input", config.input, "is curate's whole output, rejected clips too", f"give {accepted}")
    tables = read_columns(files, ["clip_id", "caption", "split", schema.PICTURE])
    for (file, size_bytes), table in zip(files.items(), tables, strict=True):
        if table.num_rows:
            name = file.rsplit("/", 1)[1]
            fingerprint = _hash([name, size_bytes, table.to_pylist()])
            output, kinds = storage.join(config.out, name), kinds_in(table)
            made_of = FeaturizeShard(
                name=name, rows=table.num_rows, input=file, output=output, fingerprint=fingerprint, kinds=kinds
            )
            shards.append(made_of)
    if not shards:
        raise UserError("input", config.input, "holds no clips", "run `aai curate` first, or give its accepted/ folder")
    return shards


@locked
def run(config: FeaturizeConfig) -> dict[str, Any]:
    """Featurizes all shards; returns the manifest's figures."""
    begin = time.monotonic()
    config = config.model_copy(update={"input": storage.absolute(config.input), "out": storage.absolute(config.out)})
    shards = list_shards(config)
    made = _footers(config.out)
    config = config.model_copy(update={"dtype": _settled_dtype(config, made)})
    digest = config.content_digest()
    input_fingerprint = _hash([shard.fingerprint for shard in shards])
    if (found := up_to_date(config, made, digest, input_fingerprint)) is not None:
        log.info("featurize: up to date -> %s", config.out)
        return figures(found)
    first = storage.read_rows(shards[0].input, [0], list(enlarging.COLUMNS))  # tells most mistakes before any work
    count_enlarged(shards[0].input, first, picture_sizes(config.foundation), config.allow_upsampling)
    storage.remove(storage.join(config.out, MANIFEST))
    wanted = {shard.output for shard in shards}
    for file in made:
        if storage.absolute(file) not in wanted:
            storage.remove(file)
    shared = shared_count({shard.input: shard.kinds for shard in shards})
    args = {"config": config.model_dump(mode="json"), "digest": digest, "shared": shared}
    is_done = partial(_done, made=made, digest=digest, mixed=shared > 0)
    run_shards("featurize", shards, FeaturizeWorker, args, config.cluster, is_done, config.out)
    manifest = _manifest(config, shards, digest, input_fingerprint, time.monotonic() - begin)
    storage.write_json(storage.join(config.out, MANIFEST), manifest.model_dump(mode="json"))
    rows = sum(manifest.rows.values())
    log.info("featurize: %d clips in %s, %.0f s -> %s", rows, manifest.dtype, manifest.seconds, config.out)
    if bare := sum(manifest.without_picture.values()):
        log.info("featurize: %d of them have sound and text alone: align takes them, adapt leaves them out", bare)
    if any(manifest.enlarged.values()):
        log.warning(
            "featurize: smaller than the models take them, so enlarged: %d clips for the CLIP, %d for latents (%s)",
            manifest.enlarged["clip"],
            manifest.enlarged["latents"],
            picture_sizes(config.foundation),
        )
    return figures(manifest)


def _settled_dtype(config: FeaturizeConfig, made: Footers) -> str:
    """What `dtype` stands for in this table; the digest has it, since features differ by it."""
    if config.dtype == "auto":
        for metadata in made.values():
            if dtype := json.loads(metadata.get(SHAPES_KEY, b"{}")).get("dtype"):
                return str(dtype)
    return worker_dtype(config.dtype, "cuda" if config.on_gpu else "cpu", config.cluster, config.out)


def figures(manifest: FeatureManifest) -> dict[str, Any]:
    """What the summary line shows."""
    return {"rows": manifest.rows, "seconds": manifest.seconds, "fingerprint": manifest.fingerprint}


def up_to_date(config: FeaturizeConfig, made: Footers, digest: str, input_fingerprint: str) -> FeatureManifest | None:
    """The finished table, if it is of these settings and clips. Raises UserError when the settings were others."""
    digests = {metadata.get(METADATA_KEY, b"").decode() for metadata in made.values()}
    if digests - {digest}:
        rule = "holds a table made with other settings"
        raise UserError("out", config.out, rule, "give another folder, or delete it")
    if not digests or not storage.exists(storage.join(config.out, MANIFEST)):
        return None
    manifest = FeatureManifest.read(config.out)
    return manifest if (manifest.settings_digest, manifest.input_fingerprint) == (digest, input_fingerprint) else None


def _done(shard: FeaturizeShard, made: Footers, digest: str, mixed: bool) -> bool:
    """Whether a shard's output is there, with these settings and of these very clips; with their kinds if `mixed`."""
    metadata = made.get(shard.output, {})
    shapes = json.loads(metadata.get(SHAPES_KEY, b"{}"))
    if "sample_rate_hz" not in shapes:  # of a table begun before the rate was read off the clips
        return False
    if mixed != ("without_picture" in shapes):
        return False
    return metadata.get(METADATA_KEY, b"").decode() == digest and shapes.get("input") == shard.fingerprint


def _manifest(
    config: FeaturizeConfig, shards: list[FeaturizeShard], digest: str, input_fingerprint: str, seconds: float
) -> FeatureManifest:
    """The manifest, from what the finished files carry. Raises UserError when their shapes differ."""
    made = _footers(config.out)
    found = [json.loads(made[shard.output][SHAPES_KEY]) for shard in shards]
    rows: Counter[str] = Counter()
    enlarged: Counter[str] = Counter()
    without: Counter[str] = Counter()
    for shapes in found:
        rows.update(shapes.pop("splits"))
        enlarged.update(shapes.pop("enlarged", {}))  # tables of before were not counted
        without.update(shapes.pop("without_picture", {}))
        del shapes["input"]
        shapes.pop("dtype", None)  # the digest has it; tables of before do not name it here
    if any(shapes != found[0] for shapes in found):
        differing = [name for name in found[0] if len({str(shapes.get(name)) for shapes in found}) > 1]
        rule = f"clips of its files differ in {', '.join(differing)}"
        raise UserError("input", config.input, rule, "curate them with one setting")
    return FeatureManifest(
        **found[0],
        settings_digest=digest,
        foundation=identity(config.foundation),
        dtype=config.dtype,
        prompts=config.prompts,
        rows=dict(rows),
        enlarged=dict(enlarged),
        without_picture=dict(without),
        input=storage.absolute(config.input),
        input_fingerprint=input_fingerprint,
        fingerprint=_hash([digest, input_fingerprint]),
        seconds=round(seconds, 1),
        written_by=code_version(),
    )
