"""The painter: a bundle and its frozen diffusion model turn sound into pictures (generate, edit, stylize)."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from aai.adapt import AdapterConfig, AudioAdapter
from aai.addons import AddOns, add_to, with_controlnet
from aai.bundle import Bundle, read_bundle
from aai.concepts import Concepts, Vocabulary
from aai.editing import Change, Repainting, derived_masks, picture_of, repainted, same_dtype, unit_of, white_of
from aai.encoders.aligner import load_aligner
from aai.encoders.audio import AudioEncoder
from aai.errors import UserError
from aai.foundation.clip import shared_clip
from aai.foundation.identity import FoundationSpec
from aai.foundation.loaders import load_diffusion
from aai.inject import Learned, Sound, names_in
from aai.media.still import eight_bit
from aai.memory import in_halves
from aai.parting import in_time
from aai.precision import dtype_of
from aai.regions import block_count, embed_in_regions, in_regions, widened
from aai.reuse import reused
from aai.sampling import DEFAULT_PROMPT, HEAD_PATTERN, Mixing, PaintRequest, SamplingConfig, check_repaint, check_steps
from aai.sdxl import injector_of, prompt_arguments
from aai.sounds import Sounds, Window, named, prompt_for, windows

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

REMEMBERED = 256
"""Sounds whose embedding a painter keeps."""


@torch.no_grad()
def paint(
    pipe: "DiffusionPipeline",
    embeds: Tensor,
    negative: Tensor,
    seeds: Sequence[int],
    sampling: SamplingConfig,
    **given: Any,
) -> list[Image.Image]:
    """One picture per row of prompt embeddings [B, L, D_h], against those of the negative prompt [1 or B, L, D_h].

    Picture b starts from `seeds[b]` and does not depend on the others. given: what else the pipeline takes.
    Embeddings [B, R L, D_h] say what each strip of the picture shows (see aai.regions).
    """
    check_steps(pipe.scheduler, sampling.steps)
    length = pipe.tokenizer.model_max_length
    blocks = block_count(embeds, length)
    negative = widened(negative, blocks, length).expand_as(embeds)
    models = [pipe.unet, *([pipe.controlnet] if hasattr(pipe, "controlnet") else [])]
    pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config)  # a fresh one: it holds the step index
    with in_regions(models, blocks, length), reused(pipe.unet, sampling.reuse_steps), same_dtype(pipe.vae):
        found = pipe(
            **prompt_arguments(pipe.unet, embeds.to(pipe.unet.dtype), negative.to(pipe.unet.dtype)),
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            guidance_scale=sampling.guidance_scale,
            num_inference_steps=sampling.steps,
            **given,
        )
    return list(found.images)


class Painter:
    """Frozen diffusion model + aligner + adapter. Not for use from two threads at once (schedulers hold state)."""

    def __init__(
        self,
        pipe: "DiffusionPipeline",
        aligner: AudioEncoder,
        adapter: AudioAdapter,
        foundation: FoundationSpec,
        vocabulary: Vocabulary | None = None,
        neutral_word: str = "thing",
        prompt: str = DEFAULT_PROMPT,
        head_pattern: str = HEAD_PATTERN,
    ) -> None:
        from diffusers import AutoPipelineForImage2Image

        self.prompt, self.head_pattern, self.foundation = prompt, head_pattern, foundation
        self.pipe, self.aligner, self.adapter, self.vocabulary = pipe, aligner, adapter, vocabulary
        self.image_pipe = AutoPipelineForImage2Image.from_pipe(pipe)
        self.image_pipe.set_progress_bar_config(disable=True)
        self.injector = injector_of(pipe, neutral_word, Learned(prompt, head_pattern))
        self.device = pipe.unet.device
        self._heard: dict[str, Tensor] = {}
        self.guided_pipe: DiffusionPipeline | None = None
        self.controlnet_scale = 1.0

    @classmethod
    def load(
        cls,
        bundle: Bundle | str | Path,
        device: str = "cpu",
        dtype: str = "float32",
        addons: AddOns | None = None,
        beside: "Painter | None" = None,
    ) -> Self:
        """Loads a bundle (with adapter) and the foundation it names; refuses other foundation weights.

        dtype: of the diffusion model; auto: see aai.precision. addons: what comes on top of it. beside: a painter on
        the same foundation, whose diffusion model, add-ons among it, is shared instead of loaded.

        Raises UserError for a bundle without an adapter.
        """
        if not isinstance(bundle, Bundle):
            bundle = read_bundle(str(bundle))
        adapter_state = bundle.adapter()
        if bundle.config.adapter is None or adapter_state is None:
            raise UserError("bundle", bundle.folder, "has no adapter", "run `aai adapt` and use its bundle")
        bundle.verify_foundation()
        spec, addons = bundle.config.foundation, addons or AddOns()
        pipe = beside.pipe if beside else load_diffusion(spec, device, dtype_of(dtype, device))
        if not beside:
            add_to(pipe, addons, spec)
        aligner = load_aligner(bundle)
        adapter = AudioAdapter(AdapterConfig.parse(bundle.config.adapter, "bundle"))
        adapter.load_state_dict(adapter_state)
        for part in (aligner, adapter):
            part.to(device).eval().requires_grad_(False)
        vocabulary = Vocabulary.parse(bundle.config.vocabulary, "bundle") if bundle.config.vocabulary else None
        c = bundle.config
        made = cls(pipe, aligner, adapter, c.foundation, vocabulary, c.neutral_word, c.prompt, c.head_pattern)
        if addons.controlnet:
            made.guided_pipe, made.controlnet_scale = with_controlnet(pipe, addons), addons.controlnet_scale
        return made

    @property
    def sample_rate_hz(self) -> int:
        """Sample rate of the waveforms that `hear` takes."""
        return self.aligner.config.sample_rate_hz

    @property
    def dtype(self) -> str:
        """Arithmetic of the diffusion model: float32, bfloat16 or float16."""
        return str(self.pipe.unet.dtype).removeprefix("torch.")

    @property
    def size_px(self) -> int:
        """Edge of the pictures."""
        return int(self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor)

    @torch.no_grad()
    def listen(self, audio: np.ndarray, window: Window = "middle") -> Tensor:
        """Waveform float32 [S] at `sample_rate_hz` -> aligned embedding [1, D], unit norm; see `parts`."""
        return self._rows(audio, window)[:, 0]

    def parts(self, audio: np.ndarray, window: Window = "middle") -> Tensor:
        """What the adapter is given of a sound: [1, D], or, if it attends to parts, [1, 1 + parts, D].

        The last 256 sounds are remembered by their content. Raises UserError for an empty one.
        """
        rows = self._rows(audio, window)
        return rows if self.adapter.cfg.parts else rows[:, 0]

    @torch.no_grad()
    def _rows(self, audio: np.ndarray, window: Window) -> Tensor:
        if audio.size == 0:
            raise UserError("audio", "0 seconds", "holds no sound", "give at least a fraction of a second")
        audio = np.ascontiguousarray(audio, dtype=np.float32)
        key = f"{window} {hashlib.sha256(audio.tobytes()).hexdigest()}"
        if key not in self._heard:
            parts = torch.from_numpy(windows(audio, self.aligner.config.clip_samples, window)).to(self.device)
            rows = [self.aligner.parts(part, self.adapter.cfg.parts) for part in parts.split(16)]
            mean = torch.cat(rows).mean(0, keepdim=True)
            self._heard[key] = mean if len(parts) == 1 else F.normalize(mean, dim=-1)
            if len(self._heard) > REMEMBERED:
                del self._heard[next(iter(self._heard))]
        return self._heard[key]

    @torch.no_grad()
    def hear(self, audio: np.ndarray, window: Window = "middle") -> Tensor:
        """Waveform float32 [S] -> A* [K, D_t]."""
        return self.adapter(self.parts(audio, window))[0]

    @torch.no_grad()
    def embed(self, sounds: Sounds, prompt: str, strength: float = 1.0, mixing: Mixing = "regions") -> Tensor:
        """Prompt embedding [1, L, D_h] with the sounds at their placeholders, of several in strips [1, R L, D_h]."""
        return self._mixed(prompt, {n: Sound(self.hear(x), strength) for n, x in named(sounds).items()}, mixing)

    def _mixed(self, prompt: str, sounds: Mapping[str, Sound], mixing: Mixing) -> Tensor:
        if mixing == "regions":
            anything = self.vocabulary.any_object if self.vocabulary else f"a {self.injector.neutral_word}"
            return embed_in_regions(self.injector, prompt, sounds, anything)
        return self.injector.embed(prompt, sounds)

    @torch.no_grad()
    def embed_request(self, sounds: Sounds, request: PaintRequest) -> tuple[Tensor, Tensor]:
        """Embeddings [1, L, D_h] of a request's prompt and of its negative prompt; either may name sounds.

        Of several sounds, or parts of one, in strips (`request.mixing`, `sound_parts`) the prompt's is [1, R L, D_h].
        Raises UserError for a sound that neither names, and for a name without a sound.
        """
        given = named(sounds)
        wanted, given = in_time(self.prompt_of(request, list(given)), given, request, self.listen, self.aligner.config)
        heard = {name: Sound(self.hear(x, request.window), request.sound_strength) for name, x in given.items()}
        against = {name: sound for name, sound in heard.items() if name in names_in(request.negative_prompt)}
        within = {name: heard[name] for name in heard if name in names_in(wanted) or name not in against}
        return self._mixed(wanted, within, request.mixing), self.embed_negative(request.negative_prompt, against)

    def prompt_of(self, request: PaintRequest, names: Sequence[str]) -> str:
        """The prompt of a request with sounds of these names: its own, or the bundle's with those not negative."""
        heard = [name for name in names if name not in names_in(request.negative_prompt)]
        return request.prompt or prompt_for(self.prompt, heard)

    @torch.no_grad()
    def embed_negative(self, prompt: str, sounds: Mapping[str, Sound] = MappingProxyType({})) -> Tensor:
        """Embedding [1, L, D_h] of a negative prompt; an empty one is all zeros for models that expect that (XL)."""
        return self.injector.embed(prompt, sounds) if prompt else self._nothing

    @cached_property
    def _nothing(self) -> Tensor:
        """What an empty prompt says, which most are kept away from: encoded once."""
        embeds = self.injector.embed("", {}).detach()
        return torch.zeros_like(embeds) if getattr(self.pipe.config, "force_zeros_for_empty_prompt", False) else embeds

    @torch.no_grad()
    def embed_text(self, prompts: Sequence[str]) -> Tensor:
        """Prompt embeddings [B, L, D_h] of plain text."""
        return self.injector.encode(prompts)[0]

    def paint(
        self,
        embeds: Tensor,
        seeds: Sequence[int],
        request: SamplingConfig,
        images: Sequence[Image.Image] | None = None,
        denoise_strength: float = 0.7,
        negative: Tensor | None = None,
    ) -> list[Image.Image]:
        """Paints one picture per row of prompt embeddings [B, L, D_h]; picture b starts from `seeds[b]`.

        With `images` each picture starts from the given one, noised by `denoise_strength` (SDEdit, Meng et al. 2022).
        A picture does not depend on the others of its batch. negative: [1, L, D_h], else the request's words.
        """
        against = self.embed_negative(request.negative_prompt) if negative is None else negative
        against = against.expand(len(embeds), -1, -1)
        given = None if images is None else [self._fitted(image) for image in images]

        def some(at: slice) -> list[Image.Image]:
            part = embeds[at], against[at], seeds[at], request
            if given is None:
                return paint(self.pipe, *part)
            return paint(self.image_pipe, *part, image=given[at], strength=denoise_strength)

        return in_halves(some, len(seeds))

    def _fitted(self, image: Image.Image) -> Image.Image:
        return eight_bit(image).convert("RGB").resize((self.size_px, self.size_px), Image.Resampling.BICUBIC)

    def generate(self, sounds: Sounds, request: PaintRequest, control: Image.Image | None = None) -> list[Image.Image]:
        """Pictures of a sound (or several) in the prompt. control: the picture that guides a ControlNet."""
        if self.guided_pipe is None and control is not None:
            raise UserError("control", "a picture", "no ControlNet is loaded", "set addons.controlnet")
        if self.guided_pipe is not None and control is None:
            raise UserError("control", "(missing)", "the ControlNet needs the picture that guides it", "give one")
        embeds, negative = self.embed_request(sounds, request)
        seeds = [request.seed + i for i in range(request.num_images)]
        embeds = embeds.expand(len(seeds), -1, -1)
        if control is None:
            return self.paint(embeds, seeds, request, negative=negative)
        guide, scale = self._fitted(control), self.controlnet_scale

        def some(at: slice) -> list[Image.Image]:
            given = {"image": [guide] * len(seeds[at]), "controlnet_conditioning_scale": scale}
            return paint(self.guided_pipe, embeds[at], negative, seeds[at], request, **given)

        return in_halves(some, len(seeds))

    def edit(
        self, sound: np.ndarray, image: Image.Image, request: PaintRequest, mask: Image.Image | None = None
    ) -> list[Image.Image]:
        """Puts the sound's object into a picture and keeps its ambience and medium. mask: white where it may change."""
        return self._repaint("edit", sound, image, request, mask)

    def stylize(
        self, sound: np.ndarray, image: Image.Image, request: PaintRequest, mask: Image.Image | None = None
    ) -> list[Image.Image]:
        """Puts the sound's ambience onto a picture and keeps its object and medium. mask: white where it may change."""
        return self._repaint("stylize", sound, image, request, mask)

    def _repaint(
        self, verb: str, sound: np.ndarray, image: Image.Image, request: PaintRequest, mask: Image.Image | None
    ) -> list[Image.Image]:
        check_repaint(request)
        how = request.prompt, request.sound_strength, request.window
        target, source = self.embed_repaint(verb, [sound], [image], *how)
        seeds = [request.seed + i for i in range(request.num_images)]
        target, source = (part.expand(len(seeds), -1, -1) for part in (target, source))
        masks = None if mask is None else [mask] * len(seeds)
        return self.repaint(verb, target, source, [image] * len(seeds), seeds, request, masks)

    def repaint(
        self,
        verb: str,
        target: Tensor,
        source: Tensor,
        images: Sequence[Image.Image],
        seeds: Sequence[int],
        request: SamplingConfig,
        masks: Sequence[Image.Image] | None = None,
    ) -> list[Image.Image]:
        """Repaints pictures under the prompt embeddings [B, L, D_h] of `embed_repaint`, as `request.repaint` says.

        Raises UserError for a mask that img2img would not heed.
        """
        strength, r = check_repaint(request), request
        if names_in(r.negative_prompt):
            raise UserError("negative_prompt", r.negative_prompt, "names a sound, as only generate's may", "use words")
        if request.repaint == "img2img":
            if masks is not None:
                raise UserError("mask", "a picture", "img2img changes the whole picture", "set request.repaint=invert")
            return self.paint(target, seeds, request, images, strength)
        how = Repainting(r.steps, int(r.steps * strength), r.guidance_scale, r.fresh_noise, r.reuse_steps)
        negative = self.embed_negative(request.negative_prompt).expand_as(target)
        told = [part.to(self.pipe.unet.dtype) for part in (source, target, negative)]
        if masks is None:
            open_ = self._derived_masks(verb, images, request.mask_threshold)
        else:
            open_ = torch.stack([white_of(self._fitted(mask)) for mask in masks])

        def some(at: slice) -> list[Image.Image]:
            pixels = torch.stack([unit_of(self._fitted(image)) for image in images[at]]).to(self.device)
            change = Change(*(part[at] for part in told))
            return self._fit_to_show(repainted(self.pipe, pixels, change, how, seeds[at], open_[at].to(self.device)))

        return in_halves(some, len(seeds))

    def _derived_masks(self, verb: str, images: Sequence[Image.Image], threshold: float) -> Tensor:
        """Masks [B, 1, H, W] of what may change; a picture that is given several times is looked at once."""
        given = list({id(image): image for image in images}.values())

        def some(at: slice) -> list[Tensor]:
            pixels = torch.stack([unit_of(self._fitted(image)) for image in given[at]]).to(self.device)
            texts = self.concepts.described(self.concepts.clip.images(given[at]).to(self.device))
            words = [self.embed_text(rows).to(self.pipe.unet.dtype) for rows in texts]
            return list(derived_masks(self.pipe, pixels, *words, verb, threshold).cpu())

        found = dict(zip(map(id, given), in_halves(some, len(given)), strict=True))
        return torch.stack([found[id(image)] for image in images])

    @torch.no_grad()
    def _fit_to_show(self, pixels: Tensor) -> list[Image.Image]:
        """Pictures [B, 3, H, W] in -1..1; what the safety checker takes for unfit is black, as pipelines do it."""
        unfit = [False] * len(pixels)
        if getattr(self.pipe, "safety_checker", None) is not None:
            _, unfit = self.pipe.run_safety_checker(pixels.clone(), self.device, self.pipe.unet.dtype)
        return [picture_of(torch.full_like(x, -1) if bad else x) for x, bad in zip(pixels, unfit, strict=True)]

    @torch.no_grad()
    def embed_repaint(
        self,
        verb: str,
        sounds: Sequence[np.ndarray],
        images: Sequence[Image.Image],
        prompt: str | None = None,
        sound_strength: float = 1.0,
        window: Window = "middle",
    ) -> tuple[Tensor, Tensor]:
        """Prompt embeddings [B, L, D_h] that repaint pictures by sounds, and those of what the pictures show now.

        `edit` lets the sound's object in: it is what the sound says, moved to the ambience that the picture shows.
        `stylize` lets its ambience in: it is what the picture shows, moved to the ambience that is heard. Without a
        prompt, the head that names the medium is read off each picture, and a style has words for what is heard, too.
        """

        def said(words: str, embed: Tensor, strength: float) -> Tensor:
            return self.injector.embed(words, {"sound": Sound(self.adapter(embed)[0], strength)})

        concepts, target, source = self.concepts, [], []
        for sound, picture in zip(sounds, concepts.clip.images(list(images)), strict=True):
            shown = picture[None].to(self.device)
            wanted, now, around = concepts.repainting(verb, shown, self.parts(sound, window))
            text = prompt or f"{concepts.head_of(shown)} <sound>"
            if prompt or not around:
                target.append(said(text, wanted, sound_strength))
            else:  # as much of the words as of the sound
                plain, full = said(text, wanted, 0.0), said(f"{text} {around}", wanted, 1.0)
                target.append((1 - sound_strength) * plain + sound_strength * full)
            source.append(said(text, now, sound_strength))
        return torch.cat(target), torch.cat(source)

    @cached_property
    def concepts(self) -> Concepts:
        """The bundle's vocabulary in the frozen CLIP, loaded when a picture is first read."""
        if self.vocabulary is None:
            raise UserError("bundle", "vocabulary", "is absent", "give adapt a `vocabulary` and train a new bundle")
        return Concepts(shared_clip(self.foundation, str(self.device)), self.vocabulary)
