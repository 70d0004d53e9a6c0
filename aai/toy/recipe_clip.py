"""The foundation recipe: sizes, training, and the small CLIP (recipe_diffusion has the diffusion model).

The result is two folders in Hugging Face layout (a `transformers.CLIPModel` and a diffusers Stable Diffusion
pipeline), the same classes as the real weights, only smaller. Nothing here knows the toy world's grammar. Every model
trains in `aai.fit`; what was killed goes on from its last checkpoint.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import count
from pathlib import Path

import pydantic
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from aai.config import Config
from aai.digest import digest
from aai.fit import Batch, FitConfig, State, fit

log = logging.getLogger(__name__)

BOS, EOS = "<|startoftext|>", "<|endoftext|>"


class TrainSteps(Config):
    """How long and how fast one model trains."""

    steps: int = pydantic.Field(1000, ge=1)
    batch_size: int = pydantic.Field(64, ge=1)
    learning_rate: float = pydantic.Field(1e-3, gt=0)

    def fit(self, seed: int, ema_decay: float = 0.0) -> FitConfig:
        """All settings of the loop."""
        return FitConfig(
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            weight_decay=0.01,
            warmup_steps=min(100, self.steps // 10),
            ema_decay=ema_decay,
            checkpoint_every=250,
            seed=seed,
        )


class FoundationConfig(Config):
    """Sizes and training lengths of the small foundation models."""

    image_size_px: int = 64
    hidden_size: int = 128
    latent_channels: int = 8
    unet_channels: tuple[int, int] = (96, 144)
    vocab_size: int = 1000
    """Of the tokenizer: 512 spelled bytes, and the commonest pieces of the captions."""
    context_length: int = 32
    """Tokens of a prompt, start and end included (77 in the published models)."""
    clip: TrainSteps = TrainSteps(steps=2000, batch_size=128, learning_rate=1e-3)
    image_tower: TrainSteps = TrainSteps(steps=6000, batch_size=128, learning_rate=7e-4)
    """CLIP's image tower once more, against its own captions (LiT, arXiv 2111.07991): see `similar`."""
    vae: TrainSteps = TrainSteps(steps=2500, batch_size=16, learning_rate=2e-3)
    decoder: TrainSteps = TrainSteps(steps=2000, batch_size=16, learning_rate=1e-3)
    """The VAE's decoder alone, on latents with noise; it leaves the latents, and so the UNet, as they are."""
    unet: TrainSteps = TrainSteps(steps=16000, batch_size=64, learning_rate=7e-4)
    lcm: TrainSteps = TrainSteps(steps=1500, batch_size=32, learning_rate=5e-4)
    """A LoRA for four steps; see recipe_consistency."""
    lcm_rank: int = pydantic.Field(32, ge=1)
    lcm_guidance_scale: float = pydantic.Field(3.0, ge=1)
    """The guidance that is distilled, and that cannot be chosen any more afterwards."""
    judge: TrainSteps = TrainSteps(steps=5000, batch_size=64, learning_rate=2e-3)
    seed: int = 0


# ---------------------------------------------------------------- shared


def shuffled(data: dict[str, Tensor], config: FitConfig, first_step: int) -> Iterator[Batch]:
    """Batches of equally many rows of `data`, from a step (from 0) on; all rows once before any comes again."""
    rows = len(next(iter(data.values())))
    size = min(rows, config.batch_size)
    for step in count(first_step):
        epoch, at = divmod(step, rows // size)
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(config.seed * 100_003 + epoch))
        chosen = order[at * size : (at + 1) * size]
        yield {name: values[chosen] for name, values in data.items()}


def train_model(
    name: str,
    task: nn.Module,
    data: dict[str, Tensor],
    config: FitConfig,
    folder: Path,
    batches: Callable[[dict[str, Tensor], FitConfig, int], Iterator[Batch]] = shuffled,
) -> None:
    """Trains the parameters of `task` that require a gradient, in place, on the GPU where there is one.

    The checkpoint is FOLDER/NAME-*.training, to be deleted when its model is written; a call with the same task, data
    and settings goes on from there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}-{_identity(task, data, config)}.training"
    resume, buffers = None, {key: x for key, x in task.state_dict().items() if key not in dict(task.named_parameters())}
    if file.exists():
        resume = State.load(file)
        task.load_state_dict(load_file(file.with_suffix(f".{resume.step}")), strict=False)
    task.to("cuda" if torch.cuda.is_available() else "cpu")

    def on_checkpoint(state: State) -> None:
        now = {key: x.cpu().contiguous() for key, x in task.state_dict().items() if key in buffers}
        save_file(now, file.with_suffix(f".{state.step}"))  # running means, of layers that have them
        part = file.with_suffix(".part")
        state.save(part)
        part.replace(file)
        for old in file.parent.glob(f"{file.stem}.[0-9]*"):
            if old.suffix != f".{state.step}":
                old.unlink()

    with tqdm(total=config.steps, desc=name, unit="step", mininterval=1.0) as bar:

        def on_log(step: int, figures: dict[str, float]) -> None:
            bar.n = step
            bar.set_postfix(loss=f"{figures['loss']:.4f}")

        with nullcontext() if torch.cuda.is_available() else sdpa_kernel(SDPBackend.MATH):
            # torch 2.11's fused attention goes back four times as slowly in bfloat16 over 65 states on a CPU
            fit(task, partial(batches, data, config), config, on_log, on_checkpoint, resume=resume)
    task.cpu().eval()


def _identity(task: nn.Module, data: dict[str, Tensor], config: FitConfig) -> str:
    """Of all that a training depends on: settings, data, start weights, frozen weights and constants."""
    content = hashlib.sha256(json.dumps(config.model_dump(mode="json"), sort_keys=True).encode())
    for tensor in (*data.values(), *task.parameters(), *task.buffers()):
        content.update(str(tuple(tensor.shape)).encode())
        content.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return content.hexdigest()[:8]


def remove_checkpoints(folder: Path) -> None:
    """Removes what `train_model` and the tokenizer left in a folder whose model is written."""
    for left in folder.iterdir():
        if re.fullmatch(r"\w+-[0-9a-f]{8}\.(training|part|\d+)", left.name):
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 [N, H, W, 3] -> float [N, 3, H, W] in [-1, 1]."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def clip_input(x: Tensor) -> Tensor:
    """Pictures [N, 3, H, W] in [-1, 1] -> what CLIP's preprocessing makes of them at that size."""
    mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return ((x + 1) / 2 - mean) / std


# ---------------------------------------------------------------- tokenizer and CLIP


def build_tokenizer(captions: list[str], vocab_size: int, max_length: int) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte pairs are learned from captions (Sennrich et al. 2016), of any script.

    It can spell every byte, within a word and at its end, also those that no caption has.
    """
    bytes_ = sorted(ByteLevel.alphabet())
    blank = CLIPTokenizer(vocab={BOS: 0, EOS: 1}, merges=[])
    learned = blank.train_new_from_iterator([captions], vocab_size, initial_alphabet=bytes_)
    pairs = [tuple(pair) for pair in json.loads(learned.backend_tokenizer.to_str())["model"]["merges"]]
    pairs = pairs[: vocab_size - 2 * len(bytes_) - 2]
    tokens = [*bytes_, *(byte + "</w>" for byte in bytes_), *dict.fromkeys(a + b for a, b in pairs), BOS, EOS]
    vocab = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=pairs, model_max_length=max_length)


def _kept_tokenizer(cfg: FoundationConfig, captions: list[str], out: Path) -> CLIPTokenizer:
    """The tokenizer of an interrupted call, or a new one: the library's trainer breaks ties by chance."""
    folder = out / f"tokenizer-{digest([cfg.vocab_size, cfg.context_length, captions])[:8]}.training"
    if not (folder / "tokenizer.json").exists():
        build_tokenizer(captions, cfg.vocab_size, cfg.context_length).save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def build_clip(cfg: FoundationConfig, tokenizer: CLIPTokenizer) -> CLIPModel:
    """A small CLIP with random weights."""
    width = cfg.hidden_size
    shared = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": 4, "hidden_act": "gelu"}
    config = CLIPConfig(
        text_config={
            **shared,
            "num_hidden_layers": 4,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": tokenizer.model_max_length,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**shared, "num_hidden_layers": 4, "image_size": cfg.image_size_px, "patch_size": 8},
        projection_dim=width,
    )
    return CLIPModel(config)


def image_processor(size_px: int) -> CLIPImageProcessorPil:
    """CLIP's own preprocessing at another picture size."""
    edge = {"height": size_px, "width": size_px}
    return CLIPImageProcessorPil(size={"shortest_edge": size_px}, crop_size=edge)


class ClipTask(nn.Module):
    """A CLIP under the contrastive loss; equal captions in a batch are positives of one another."""

    def __init__(self, model: CLIPModel, input_ids: Tensor, attention_mask: Tensor) -> None:
        """input_ids, attention_mask: [U, L] of the different captions."""
        super().__init__()
        self.model = model
        self.register_buffer("input_ids", input_ids, persistent=False)
        self.register_buffer("attention_mask", attention_mask, persistent=False)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """See `contrast`; batch: pixels [B, H, W, 3], text [B]."""
        model = self.model
        uniq, inverse = batch["text"].unique(return_inverse=True)
        image = model.get_image_features(pixel_values=clip_input(to_unit(batch["pixels"]))).pooler_output
        text = model.get_text_features(
            input_ids=self.input_ids[uniq], attention_mask=self.attention_mask[uniq]
        ).pooler_output
        return contrast(image, text, inverse, model.logit_scale), {}


class ImageTowerTask(nn.Module):
    """CLIP's image tower and the text's projection, against the states of the frozen text tower, on pictures that are
    moved and disturbed. The text tower itself must stay what the diffusion model reads.

    Beside the contrastive loss, a linear head names the caption's words (SuperClass, arXiv 2411.03313): a batch's
    captions can be told apart by some of their words, and what the others say would be learned slowly.
    """

    def __init__(self, model: CLIPModel, states: Tensor, words: tuple[Tensor, Tensor], shift_px: int = 4) -> None:
        """states: pooled, [U, D_h], of the different captions. words: see `words_of`. shift_px: how far to move."""
        super().__init__()
        owner, word = words
        named = torch.zeros(len(states), int(word.max()) + 1)
        named[owner, word] = 1
        named *= (len(states) / named.sum(0)).log()  # a word that every caption has says nothing
        self.register_buffer("named", F.normalize(named, p=1, dim=1), persistent=False)
        self.head = nn.Linear(model.config.projection_dim, named.shape[1])
        self.model = model.requires_grad_(False)
        self.register_buffer("shift_px", torch.tensor(shift_px), persistent=False)
        for part in (model.vision_model, model.visual_projection, model.text_projection):
            part.requires_grad_(True)
        self.log_scale = nn.Parameter(model.logit_scale.detach().clone())
        self.register_buffer("states", states, persistent=False)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """See `contrast`; batch: pixels [B, H, W, 3], text [B]."""
        uniq, inverse = batch["text"].unique(return_inverse=True)
        x = self._disturbed(to_unit(batch["pixels"]))
        image = self.model.get_image_features(pixel_values=clip_input(x)).pooler_output
        told = F.normalize(image.float(), dim=-1) * len(image.T) ** 0.5
        words = F.cross_entropy(self.head(told), self.named[batch["text"]])
        text = self.model.text_projection(self.states[uniq])
        return contrast(image, text, inverse, self.log_scale) + words, {}

    def _disturbed(self, x: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] at another place, of other contrast and light, with noise. No mirror: order is told."""
        rows, _, height, width = x.shape
        most = int(self.shift_px)
        top, left = torch.randint(0, 2 * most + 1, (2, rows, 1), device=x.device)
        padded = F.pad(x, (most,) * 4, mode="replicate")
        row, column = top + torch.arange(height, device=x.device), left + torch.arange(width, device=x.device)
        each = torch.arange(rows, device=x.device)[:, None, None]
        moved = padded[each, :, row[:, :, None], column[:, None, :]].permute(0, 3, 1, 2)
        gain, light = torch.randn(2, rows, 1, 1, 1, device=x.device)
        return moved * (1 + 0.1 * gain) + 0.05 * light + 0.03 * torch.randn_like(moved)


def contrast(image: Tensor, text: Tensor, inverse: Tensor, log_scale: Tensor) -> Tensor:
    """Mean of picture -> caption and caption -> picture cross-entropy; equal captions are positives of one another.

    image [B, D]; text [U, D] of the batch's different captions, inverse [B] into them.
    """
    image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
    logits = log_scale.exp().clamp(max=100) * (image[:, None] * text).sum(-1)  # [B, U], exact in float32
    share = F.one_hot(inverse, len(text)).float()
    to_image = share.T / share.sum(0)[:, None]
    return (F.cross_entropy(logits, inverse) + F.cross_entropy(logits.T, to_image)) / 2


def similar(
    words: tuple[Tensor, Tensor], data: dict[str, Tensor], config: FitConfig, first_step: int
) -> Iterator[Batch]:
    """Two batches of three hold pictures of captions that are alike; the third is drawn from all.

    In a batch of any pictures a few easy words tell nearly all of them apart (weather, medium), and what a picture is
    of is hardly asked for. So the captions are lined up by a sum of their words' random weights, of which a few are
    large, and neighbours are taken, with one picture each: they share those large words.

    words: see `words_of`. data: `text` [N] and what else belongs to a row.
    """
    rows, counts = len(data["text"]), data["text"].bincount()
    size, texts, in_order = min(rows, config.batch_size), len(counts), data["text"].argsort(stable=True)
    first, near_size = counts.cumsum(0) - counts, min(size, texts)
    owner, word = words
    for step in count(first_step):
        draw = torch.Generator().manual_seed(config.seed * 100_003 + step)
        if step % 3 == 2:
            chosen = torch.randperm(rows, generator=draw)[:size]
        else:
            tall, small = torch.randn(2, int(word.max()) + 1, generator=draw)
            weights = small * torch.exp(1.5 * tall)
            place = torch.zeros(texts).index_add_(0, owner, weights[word]) + 1e-3 * torch.randn(texts, generator=draw)
            at = int(torch.randint(texts - near_size + 1, (1,), generator=draw))
            near = place.argsort()[at : at + near_size]
            which = (torch.rand(near_size, generator=draw) * counts[near]).long()
            chosen = in_order[first[near] + which]
        yield {name: values[chosen] for name, values in data.items()}


def words_of(texts: list[str]) -> tuple[Tensor, Tensor]:
    """The different words of each text, as pairs: number of the text [M], number of the word [M]."""
    number: dict[str, int] = {}
    pairs = []
    for row, text in enumerate(texts):
        for word in sorted(set(text.split())):
            pairs.append((row, number.setdefault(word, len(number))))
    owner, words = torch.tensor(pairs or [(0, 0)]).T
    return owner, words


def train_clip(cfg: FoundationConfig, pixels: Tensor, captions: list[str], out: Path) -> None:
    """Trains both towers, then the image tower alone, and saves model, tokenizer and image processor to `out`.

    pixels: uint8 [N, H, W, 3] at `image_size_px`. Captions are cut at the context's length.
    """
    torch.manual_seed(cfg.seed)
    tokenizer = _kept_tokenizer(cfg, captions, out)
    model = build_clip(cfg, tokenizer)
    texts = sorted(set(captions))
    number = {text: i for i, text in enumerate(texts)}
    which = torch.tensor([number[text] for text in captions])
    tokens = tokenizer(texts, padding="longest", truncation=True, return_tensors="pt")
    task = ClipTask(model, tokens.input_ids, tokens.attention_mask)
    train_model("clip", task, {"pixels": pixels, "text": which}, cfg.clip.fit(cfg.seed), out)
    with torch.no_grad():
        inputs = zip(tokens.input_ids.split(256), tokens.attention_mask.split(256), strict=True)
        parts = [model.text_model(input_ids=ids, attention_mask=mask).pooler_output for ids, mask in inputs]
    words = words_of(texts)
    torch.manual_seed(cfg.seed)  # however much of the first training this call had to do
    tower = ImageTowerTask(model, torch.cat(parts), words)
    batches = partial(similar, words)
    data = {"pixels": pixels, "text": which}
    train_model("image_tower", tower, data, cfg.image_tower.fit(cfg.seed), out, batches)
    with torch.no_grad():
        model.logit_scale.copy_(tower.log_scale)
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    image_processor(cfg.image_size_px).save_pretrained(out)
