"""Pictures of all sounds of a manifest, on Ray Data: `aai generate --manifest FOLDER`.

OUT/pictures/NUMBER_STEM_seedN.png, and OUT/index.parquet with a row for each picture, or for each sound that has none
and why. A shard's part of the index is written last, so that a run that was killed goes on with the next shard.
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from aai import storage
from aai.addons import absolute, content
from aai.bundle import read_bundle
from aai.digest import digest
from aai.errors import UserError
from aai.inject import names_in, parse
from aai.media.decode import ClipError, decode_audio
from aai.painter import Painter
from aai.png import sha256
from aai.proof import Prover
from aai.regions import joined
from pipelines.engine.cluster import worker_dtype
from pipelines.engine.lock import output_lock
from pipelines.engine.reading import read_file
from pipelines.engine.resume import finished
from pipelines.engine.shards import Result, Shard, run_shards
from pipelines.manifests.table import read_manifest
from pipelines.painting.paint import stem_of
from pipelines.painting.request import GenerateConfig
from pipelines.registry import versions

log = logging.getLogger(__name__)

PARTS, INDEX, PICTURES = "index", "index.parquet", "pictures"
INDEX_TABLE = pa.schema(
    [
        ("row", pa.int64()),  # of the manifest, from 0
        ("uri", pa.string()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("seed", pa.int64()),
        ("picture", pa.string()),  # relative to the folder of the index; empty where there is none
        ("error_code", pa.string()),
        ("error", pa.string()),
        ("sound_sha256", pa.string()),  # of the waveform that was heard
        ("prompt", pa.string()),
        ("bundle", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A sound of the manifest."""

    row: int
    uri: str
    start_s: float | None
    end_s: float | None


@dataclass(frozen=True, kw_only=True)
class SoundShard(Shard):
    """Sounds that are painted together."""

    sounds: list[Wanted]


@dataclass(frozen=True, kw_only=True)
class Painted(Result):
    """What came of a shard: pictures, and sounds that have none by code."""

    pictures: int
    errors: dict[str, int]


class BatchPainter:
    """Paints one shard of sounds (see pipelines.engine.shards.Worker)."""

    def __init__(self, config: dict[str, Any], sha: str) -> None:
        self.config = GenerateConfig.parse(config)
        c = self.config
        storage.be_patient()
        bundle = read_bundle(versions.resolve_bundle(c.bundle, c.tracking))
        if bundle.sha != sha:
            raise UserError("bundle", c.bundle, f"holds {bundle.sha}, the job was started for {sha}", "start it again")
        self.sha, self.painter = sha, Painter.load(bundle, c.torch_device, c.dtype, c.addons)
        self.prover = Prover(c.proof)

    def __call__(self, shard: SoundShard) -> Painted:
        """Paints the shard's sounds -> pictures, and its part of the index."""
        rows: list[dict[str, Any]] = []
        heard: list[tuple[dict[str, Any], np.ndarray]] = []
        prompt = self.painter.prompt_of(self.config.request, ["sound"])
        for sound in shard.sounds:
            row = {**asdict(sound), "uri": _plain(sound.uri), "prompt": prompt, "bundle": self.sha}
            try:
                audio, file_sha256 = self._decoded(sound)
            except ClipError as error:
                rows.append({**row, "error_code": error.code, "error": error.message})
            else:
                sums = {"sound_sha256": sha256(audio.tobytes()), "file_sha256": file_sha256}
                heard.append(({**row, **sums}, audio))
        rows += self._painted(heard)
        rows.sort(key=lambda row: (row["row"], row.get("seed", 0)))
        table = pa.Table.from_pylist(rows, schema=INDEX_TABLE)
        storage.write_table(storage.join(self.config.out, PARTS, f"{shard.name}.parquet"), table)
        errors = Counter(row["error_code"] for row in rows if "error_code" in row)
        made = len(rows) - errors.total()
        return Painted(rows=len(shard.sounds), rejected=errors.total(), pictures=made, errors=dict(errors))

    def _decoded(self, sound: Wanted) -> tuple[np.ndarray, str]:
        """The sound's part of its file, and the file's SHA-256.

        Raises ClipError with the reason, OSError when it may be had another time.
        """
        limits, rate_hz = self.config.limits, self.painter.sample_rate_hz
        data = read_file(sound.uri, limits.max_bytes)
        if isinstance(data, ClipError) and data.transient:
            raise OSError(f"{sound.uri}: {data.message}")
        if isinstance(data, ClipError):
            raise data
        part_s = sound.start_s, sound.end_s
        return decode_audio(data, limits.max_audio_s, limits.max_bytes, rate_hz, part_s=part_s), sha256(data)

    def _painted(self, heard: Sequence[tuple[dict[str, Any], np.ndarray]]) -> list[dict[str, Any]]:
        """Paints all pictures of these sounds in batches and writes them; a row of the index for each."""
        request, out = self.config.request, []
        todo = [(row, audio, request.seed + i) for row, audio in heard for i in range(request.num_images)]
        for at in range(0, len(todo), self.config.batch_size):
            some = todo[at : at + self.config.batch_size]
            rows = [self.painter.embed_request(audio, request) for _, audio, _ in some]
            embeds = joined([row for row, _ in rows], self.painter.injector.tokenizer.model_max_length)
            negative = torch.cat([row for _, row in rows])
            seeds = [seed for _, _, seed in some]
            pictures = self.painter.paint(embeds, seeds, request, negative=negative)
            for (row, _, seed), picture in zip(some, pictures, strict=True):
                stem = stem_of(storage.file_of(row["uri"]))
                name = f"{row['row']:07d}_{stem}_seed{seed}.png"
                made = {"verb": "generate", "audio": stem, "bundle": self.sha, **request.model_dump(), "seed": seed}
                made |= {"sound_sha256": row["sound_sha256"], "sounds": {"sound": row["file_sha256"]}}
                if self.config.bundle.startswith("models:/"):
                    made["model"] = self.config.bundle.removeprefix("models:/")
                storage.write_bytes(storage.join(self.config.out, PICTURES, name), self.prover.encode(picture, made))
                out.append({**row, "seed": seed, "picture": f"{PICTURES}/{name}"})
        return out


def _plain(uri: str) -> str:
    """A URI as text that any table takes: bytes of a file name that are no UTF-8 are replaced."""
    return uri.encode("utf-8", "replace").decode()


def paint_manifest(config: GenerateConfig) -> dict[str, object]:
    """Paints every sound of `config.manifest`; returns the figures. A run that was interrupted goes on.

    Raises UserError for a folder of other pictures, and for a prompt that does not fit, before anything is painted.
    A file that cannot be read for the moment ends the run, and the next one reads it again.
    """
    request = config.request
    for prompt in (request.prompt or "<sound>", request.negative_prompt):
        parse(prompt)
    heard = names_in(request.prompt or "<sound>") | names_in(request.negative_prompt)
    if heard != {"sound"}:
        rule = "names other sounds than <sound>" if heard else "has no placeholder <sound>"
        raise UserError("prompt", repr(request.prompt), rule, "write <sound> where each sound of the manifest belongs")
    uri, name, _, _ = versions.pin_bundle(config.bundle, config.tracking)
    places = {
        "out": storage.absolute(config.out),
        "bundle": uri if name else storage.absolute(uri),
        "tracking": config.tracking.anywhere(),
        "addons": absolute(config.addons),
        "proof": config.proof.anywhere(),
    }
    config = config.model_copy(update=places)
    with output_lock(config.out):
        return _paint_all(config)


def _paint_all(config: GenerateConfig) -> dict[str, object]:
    begin = time.monotonic()
    rows = read_manifest(storage.absolute(config.manifest or ""))
    sounds = [Wanted(row=i, uri=r.uri, start_s=r.start_s, end_s=r.end_s) for i, r in enumerate(rows)]
    bundle = read_bundle(versions.resolve_bundle(config.bundle, config.tracking))
    bundle.adapter()  # of one that was only aligned the reason is told here
    dtype = worker_dtype(config.dtype, config.torch_device, config.cluster, config.out)
    config = config.model_copy(update={"dtype": dtype})
    settings = {
        "bundle": bundle.sha,
        "sounds": digest([asdict(sound) for sound in sounds]),
        "request": config.request.model_dump(mode="json"),
        "addons": {**config.addons.model_dump(mode="json"), "content": content(config.addons)},
        "limits": config.limits.model_dump(mode="json"),
        "dtype": config.dtype,
        "batch_size": config.batch_size,
    }
    if config.proof.certificate:
        settings["proof"] = config.proof.certificate
    if (found := finished(config.out, "generate", settings)) is not None:
        log.info("generate: up to date -> %s", storage.join(config.out, INDEX))
        return dict(found)
    each = max(1, config.batch_size // config.request.num_images)
    shards = []
    for at in range(0, len(sounds), each):
        part = sounds[at : at + each]
        shards.append(SoundShard(name=f"sounds-{at:07d}", rows=len(part), sounds=part))
    parts = storage.join(config.out, PARTS)
    there = storage.shard_names(parts)
    args = {"config": config.model_dump(mode="json"), "sha": bundle.sha}
    done = lambda shard: shard.name in there  # noqa: E731
    try:
        run_shards("generate", shards, BatchPainter, args, config.cluster, done, config.out, unit="sound")
    except UserError:
        if not storage.list_files(storage.join(config.out, PICTURES)):  # a mistake in settings: the folder is free
            for left in (parts, storage.join(config.out, "_generate.json")):
                storage.remove(left)
        raise
    return _finish(config, shards, begin)


def _finish(config: GenerateConfig, shards: Sequence[SoundShard], begin: float) -> dict[str, object]:
    """The parts of the index as one file, and the summary."""
    parts = [storage.join(config.out, PARTS, f"{shard.name}.parquet") for shard in shards]
    index = pa.concat_tables([storage.read_table(part) for part in parts])
    storage.write_table(storage.join(config.out, INDEX), index)
    errors: Mapping[str, int] = Counter(code for code in index["error_code"].to_pylist() if code)
    result = {
        "sounds": sum(shard.rows for shard in shards),
        "pictures": index.num_rows - sum(errors.values()),
        "errors": dict(errors),
        "dtype": config.dtype,
        "seconds": round(time.monotonic() - begin, 1),
    }
    storage.write_json(storage.join(config.out, "generate.json"), result)
    refused = f"; {sum(errors.values())} sounds have none: {json.dumps(errors)}" if errors else ""
    log.info(
        "generate: %d pictures of %d sounds in %s, %.0f s%s -> %s",
        result["pictures"], result["sounds"], config.dtype, result["seconds"], refused, storage.join(config.out, INDEX),
    )  # fmt: skip
    return result
