"""Trains the audio adapter: an aligned sound becomes words A* for the frozen diffusion model.

Reads a FeatureTable and the bundle of `aai align`, embeds all sounds once, trains with Ray Train through the frozen
text encoder and UNet, and writes OUT/bundle (aligner and adapter), OUT/history.jsonl and, last, OUT/adapt.json.
The same command goes on after a kill.
"""

import argparse
import logging
from collections import defaultdict
from typing import Any, ClassVar

import pydantic
import torch
from torch import Tensor, nn

from aai import aligned
from aai.adapt import AdapterConfig, AdaptLossConfig, AdaptTask, AudioAdapter, prompt_of
from aai.aligned import AlignedCache
from aai.bundle import read_bundle, sign_bundle, write_bundle
from aai.concepts import Vocabulary
from aai.config import Config
from aai.encoders.aligner import encoder_config
from aai.errors import UserError
from aai.features import FeatureManifest
from aai.foundation.identity import FoundationSpec
from aai.foundation.loaders import diffusion_skeleton, load_clip, load_diffusion
from aai.memory import StepCost, step_cost
from aai.painter import paint
from aai.png import encode_png
from aai.sampling import SamplingConfig
from aai.sdxl import injector_of
from aai.signatures import SigningConfig, rehearse
from pipelines.settings import Plan
from pipelines.training.embedding import embed_table
from pipelines.training.lengths import check_cut, clip_lengths_s
from pipelines.training.recipe import (
    StageConfig,
    Trained,
    TrainRecipe,
    bundle_dir,
    check_foundation,
    prepare_network,
    refuse_given,
)

log = logging.getLogger(__name__)


class AdaptConfig(StageConfig):
    """The adapt stage."""

    stage: ClassVar[str] = "adapt"
    places: ClassVar[tuple[str, ...]] = ("features", "bundle", "aligned", "out")
    looked_at: ClassVar[tuple[str, ...]] = (*StageConfig.looked_at, "sample_clips", "sample_steps", "signing")

    bundle: str
    """The bundle of `aai align`; it names the foundation."""
    aligned: str = "${features}-aligned"
    """Folder or s3:// prefix of the sounds' embeddings, made once for an aligner and shared by all runs."""
    adapter: AdapterConfig = AdapterConfig()
    """embed_dim and token_dim are taken from the bundle and the diffusion model, and refused here."""
    loss: AdaptLossConfig = AdaptLossConfig()
    vocabulary: Vocabulary | None = None
    """Words for what pictures show; edit and stylize need it."""
    neutral_word: str = "thing"
    """The word that stands in a prompt where a sound has no say."""
    max_val_clips: int = pydantic.Field(128, ge=2)
    """Validation takes at most this many clips of the val split."""
    sample_clips: int = pydantic.Field(4, ge=0, le=16)
    """Of so many clips of the val split the sound is painted at each validation, beside the clip's own picture, into
    OUT/samples and MLflow; 0 = none."""
    sample_steps: int = pydantic.Field(20, ge=1, le=100)
    """Denoising steps of these pictures."""
    signing: SigningConfig = SigningConfig()
    """With what the bundle is signed."""

    @pydantic.model_validator(mode="after")
    def _beside_the_features(self) -> "AdaptConfig":
        if f"{self.aligned.rstrip('/')}/".startswith(f"{self.features.rstrip('/')}/"):
            raise ValueError("aligned lies in the folder of the features, whose files would then be mixed")
        return self

    @property
    def pictures_only(self) -> bool:
        """See StageConfig: words for sounds are learned from what is seen."""
        return True

    def step_cost(self) -> StepCost | str:
        """See StageConfig."""
        manifest = self.manifest()
        if manifest is None:
            return "told when the features are there"
        clips, dim = self.clips_of_worker, manifest.image_dim
        batch: dict[str, tuple[int, ...] | list[str]] = {
            "aligned": (clips, 1 + self.adapter.parts, dim),
            "image_features": (clips, manifest.num_frames, dim),
            "latents": (clips, *manifest.latent_shape),
            "caption": [f"caption {row}" for row in range(clips)],
            "clip_hash": (clips,),
        }
        own = -(-self.loss.denoise_rows * clips // self.fit.batch_size)  # of the step's, this worker's
        loss = self.loss.model_copy(update={"denoise_rows": own})
        spec = FoundationSpec.parse(manifest.foundation)  # the bundle's too, or training refuses it
        try:
            return step_cost(lambda: self._skeleton_task(spec, dim, loss), batch, self.half)
        except UserError as error:
            return f"told when the diffusion model is on this machine ({error})"

    def _skeleton_task(self, spec: FoundationSpec, dim: int, loss: AdaptLossConfig) -> AdaptTask:
        """The task without a weight that means anything."""
        parts = diffusion_skeleton(spec)
        shape = self.adapter.model_copy(update={"embed_dim": dim, "token_dim": injector_of(parts).token_dim})
        prepare_network(parts.unet, self.fit)
        projection = nn.Linear(parts.text_encoder.config.hidden_size, dim, bias=False)
        return AdaptTask(AudioAdapter(shape), parts, projection, loss, self.neutral_word, self.fit.chunk_size)

    def plan(self) -> Plan:
        """See VerbConfig."""
        plan = super().plan()
        inputs = {name: place for name, place in plan.inputs.items() if name != "aligned"}
        return plan.model_copy(update={"inputs": inputs, "outputs": {"embeddings": self.aligned, **plan.outputs}})


CONFIG = AdaptConfig
VALIDATED_AT_ONCE = 8
"""Clips of the val split in one pass; another number draws other noise."""


def add_flags(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Short flags and the settings they stand for."""
    parser.add_argument("--features", help="FeatureTable folder")
    parser.add_argument("--bundle", help="bundle of `aai align`")
    parser.add_argument("--out", help="folder for the bundle and figures")
    parser.add_argument("--workers", type=int, help="training workers")
    return {"features": "features", "bundle": "bundle", "out": "out", "workers": "cluster.num_workers"}


def run(config: AdaptConfig) -> dict[str, Any]:
    """Trains, writes the bundle and signs it if there is a key; returns what adapt.json holds."""
    from pipelines.training.stage import run_stage  # with Ray Train: not for --help and --dry-run

    rehearse(config.signing)  # before hours of training
    result = run_stage(AdaptRecipe, config)
    if config.signing.private_key:
        log.info("adapt: the bundle is signed by %s", sign_bundle(bundle_dir(config.out), config.signing))
    return result


class AdaptRecipe(TrainRecipe[AdaptConfig]):
    """The adapter with everything frozen around it; the bundle holds the parent's aligner and the adapter."""

    config_class = AdaptConfig
    columns = (aligned.COLUMN, "image_features", "latents")

    def __init__(self, config: AdaptConfig) -> None:
        super().__init__(config)
        self.parent = read_bundle(config.bundle)
        self.parents = (self.parent.sha,)
        self.encoder = encoder_config(self.parent)
        self.cache = AlignedCache.of(self.parent, config.aligned, config.adapter.parts)

    def prepare(self, manifest: FeatureManifest) -> AdaptConfig:
        """See TrainRecipe; the token's width is known only where the diffusion model is."""
        check_foundation(self.parent.config.foundation, manifest)
        refuse_given("adapter", self.config.adapter, ("embed_dim", "token_dim"))
        remedy = "give the features that it was aligned on"
        manifest.check_sample_rate("bundle", self.config.bundle, self.encoder.sample_rate_hz, remedy)
        if self.config.adapter.parts and self.encoder.backbone == "pe_audio":
            rule = "pe_audio's head has learned one state for the whole sound, and none of its parts"
            raise UserError("adapter.parts", self.config.adapter.parts, rule, "set it to 0")
        denoised, workers = self.config.loss.denoise_rows, self.config.cluster.most_workers
        if denoised % workers:
            rule = f"is not a multiple of the {workers} workers"
            raise UserError("loss.denoise_rows", denoised, rule, "choose a multiple of cluster.num_workers, or 0")
        if left_out := manifest.without_picture.get("train", 0):
            said = "adapt: %d of %d clips of train have no picture and are left out"
            log.info(said, left_out, manifest.rows["train"])
        lengths_s = clip_lengths_s(self.config.features)
        check_cut("adapt", lengths_s, self.encoder.clip_s, self.config.max_cut_share)
        return self.config

    def precompute(self) -> None:
        """Embeds the sounds."""
        config = self.config
        places = config.bundle, config.features, config.aligned
        embed_table(*places, config.cluster, config.out, config.adapter.parts)

    def build(self) -> AdaptTask:
        """Loads the foundation."""
        spec, neutral_word = self.parent.config.foundation, self.config.neutral_word
        self.pipe = pipe = load_diffusion(spec)
        injector = injector_of(pipe, neutral_word)
        dims = {"embed_dim": self.encoder.embed_dim, "token_dim": injector.token_dim}
        adapter = AudioAdapter(self.config.adapter.model_copy(update=dims), injector.median_norm)
        projection = text_projection(spec, pipe.text_encoder)
        prepare_network(pipe.unet, self.config.fit)
        return AdaptTask(adapter, pipe, projection, self.config.loss, neutral_word, self.config.fit.chunk_size)

    def validate(self, task: AdaptTask, held_out: dict[str, Any]) -> dict[str, float]:
        """The loss and its terms, with the same noise every time, however many workers there are.

        The contrast is among the clips of one pass, VALIDATED_AT_ONCE: smaller than in training, by log of the shares.
        """
        device, size = next(task.adapter.parameters()).device, VALIDATED_AT_ONCE
        rows, totals = len(held_out["caption"]), defaultdict[str, float](float)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for first in range(0, rows, size):
                part = {name: values[first : first + size] for name, values in held_out.items()}
                batch = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in part.items()}
                terms = task.terms(batch)  # this process alone: the others wait
                for name, value in {"loss": task.total(terms), **terms}.items():
                    totals[name] += float(value) * len(batch["caption"])
        return {name: total / rows for name, total in totals.items()}

    def sample(self, task: AdaptTask, held_out: dict[str, Any]) -> bytes | None:
        """See TrainRecipe; a GPU that has no room for it trains on."""
        try:
            return self._painted(task, held_out)
        except torch.OutOfMemoryError:
            log.warning(
                "adapt: no room on the GPU to paint what is learned: set sample_clips=0, or lower fit.chunk_size"
            )
            return None
        finally:
            self.pipe.vae.to("cpu")  # it is not part of the task, and takes no room between two validations

    @torch.no_grad()
    def _painted(self, task: AdaptTask, held_out: dict[str, Any]) -> bytes | None:
        """Two rows of pictures: the clips' own, as the VAE gives them, and what their sounds are now painted as."""
        rows, count = len(held_out["caption"]), min(self.config.sample_clips, len(held_out["caption"]))
        if not count:
            return None
        from diffusers.utils import make_image_grid

        chosen = [i * rows // count for i in range(count)]
        device, vae = next(task.adapter.parameters()).device, self.pipe.vae
        vae.to(device)
        latents = held_out["latents"][chosen].to(device).float() / vae.config.scaling_factor
        own = self.pipe.image_processor.postprocess(torch.cat([vae.decode(x[None]).sample for x in latents]))
        prompts = [prompt_of(held_out["caption"][i], self.config.loss) for i in chosen]
        embeds, _ = task.injector.encode(prompts, task.adapter(held_out["aligned"][chosen].to(device)))
        negative, _ = task.injector.encode([""])
        sampling, painted = SamplingConfig(steps=self.config.sample_steps), []
        for seed, embed in enumerate(embeds):  # one at a time: the memory is the training's
            painted += paint(self.pipe, embed[None], negative, [seed], sampling)
        return encode_png(make_image_grid([*own, *painted], rows=2, cols=count))

    def export(self, task: AdaptTask) -> tuple[nn.Module, Config]:
        """See TrainRecipe."""
        return task.adapter, task.adapter.cfg

    def write(self, folder: str, trained: Trained, meta: dict[str, Any]) -> str:
        """Writes aligner and adapter as one bundle, with the prompts that the adapter was trained in."""
        config = self.config
        bundle = self.parent.config.model_copy(
            update={
                "adapter": trained.settings,
                "vocabulary": config.vocabulary.model_dump(mode="json") if config.vocabulary else None,
                "neutral_word": config.neutral_word,
                "prompt": config.loss.prompt,
                "head_pattern": config.loss.head_pattern,
            }
        )
        return write_bundle(folder, bundle, self.parent.aligner(), trained.weights, meta).sha


def text_projection(spec: FoundationSpec, text_encoder: nn.Module) -> nn.Linear | None:
    """CLIP's projection of a pooled text state; None when the diffusion model's text encoder is not this CLIP's."""
    clip, _, _ = load_clip(spec)
    ours = clip.text_model.get_input_embeddings().weight
    theirs = text_encoder.get_input_embeddings().weight
    same = ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-3)
    if not same:
        log.warning("adapt: the diffusion model's text encoder is not the CLIP's; w_clip and w_contrast are left out")
    return clip.text_projection if same else None
