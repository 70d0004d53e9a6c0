"""`aai bench vitl14`: how near FrozenClip comes to the device's limit, with CLIP ViT-L/14 of random weights.

The limit is a large bfloat16 matrix product measured on the same device; the model's operations are counted by formula.
"""

import io
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from aai.foundation.clip import FrozenClip
from aai.foundation.identity import TOY_WEIGHTS, FoundationSpec
from pipelines.benches.options import BenchConfig, ModelConfig

log = logging.getLogger(__name__)

DTYPE = torch.bfloat16
CPU_IMAGES = 2
"""Without a GPU the bench only shows that it works."""
MATMUL_EDGE = {"cuda": 8192, "cpu": 1024}
_TOWERS: dict[str, dict[str, dict[str, int]]] = {
    "vitl14": {
        "vision": {
            "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
            "patch_size": 14, "image_size": 224,
        },
        "text": {
            "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
        },
    },
    "tiny": {
        "vision": {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
            "patch_size": 14, "image_size": 224,
        },
        "text": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
    },
}  # fmt: skip


def write_model(folder: Path, size: str) -> None:
    """A CLIP folder with random weights; `size` as in ModelConfig."""
    towers = _TOWERS[size]
    toy = CLIPConfig.from_pretrained(TOY_WEIGHTS / "clip")
    text = {
        key: getattr(toy.text_config, key) for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
    }
    config = CLIPConfig(vision_config=towers["vision"], text_config={**text, **towers["text"]}, projection_dim=768)
    torch.manual_seed(0)
    edge_px = towers["vision"]["image_size"]
    CLIPModel(config).to(DTYPE).save_pretrained(folder)
    crop = {"height": edge_px, "width": edge_px}
    CLIPImageProcessorPil(size={"shortest_edge": edge_px}, crop_size=crop).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOY_WEIGHTS / "clip" / name, folder / name)


def text_sizes(size: str) -> dict[str, int]:
    """Sizes of the text tower, as of a CLIPTextConfig."""
    return dict(_TOWERS[size]["text"])


def vision_flops(vision: Any, projection_dim: int) -> int:
    """Floating-point operations of one picture in a ViT's matrix products, 2 for each multiply-add.

    Per layer of T tokens of width d: 8 T d^2 (four projections) + 4 T^2 d (attention) + 4 T d m (MLP of width m).
    """
    patches = (vision.image_size // vision.patch_size) ** 2
    tokens, width = patches + 1, vision.hidden_size
    layer = 8 * tokens * width**2 + 4 * tokens**2 * width + 4 * tokens * width * vision.intermediate_size
    ends = 2 * patches * 3 * vision.patch_size**2 * width + 2 * width * projection_dim
    return int(vision.num_hidden_layers * layer + ends)


def _seconds(work: Callable[[], Any], device: str) -> float:
    """The best of three times after one to warm up (of one after none without a GPU); waits for the device."""
    times = []
    for _ in range(4 if device == "cuda" else 1):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - start)
    return min(times[1:] or times)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def matmul_tflops(device: str, seconds: float = 0.5) -> float:
    """The rate of a square bfloat16 matrix product on the device, over at least about `seconds`."""
    edge = MATMUL_EDGE[device]
    left, right = (torch.randn(edge, edge, dtype=DTYPE, device=device) for _ in range(2))
    out = torch.empty_like(left)

    def multiply(times: int) -> None:
        for _ in range(times):
            torch.matmul(left, right, out=out)

    once = _seconds(lambda: multiply(1), device)
    times = max(1, round(seconds / once))
    return 2 * edge**3 * times / _seconds(lambda: multiply(times), device) / 1e12


def measure(config: BenchConfig) -> dict[str, Any]:
    """inputs, figures, ratios: each step alone, then as `aai featurize` runs them, from JPEG to features."""
    cfg, device = config.model, "cuda" if torch.cuda.is_available() else "cpu"
    images = cfg.images if device == "cuda" else min(cfg.images, CPU_IMAGES)
    folder = Path(config.out) / f"model-{cfg.size}"
    if not (folder / "tokenizer_config.json").is_file():  # written last
        write_model(folder, cfg.size)
    spec = FoundationSpec(clip=str(folder), diffusion=str(folder))
    clip = FrozenClip(spec, device, DTYPE, cfg.batch_size, cfg.threads)
    figures, ratios = _measure(clip, cfg, images, device)
    if device == "cpu":
        log.warning("bench: no GPU here: these figures only show that the bench works; they are not the ones asked for")
    inputs = {
        "model": cfg.size,
        "weights": "random",
        "device": device,
        "dtype": "bfloat16",
        "images": images,
        "batch_size": cfg.batch_size,
        "picture_px": cfg.picture_px,
        "threads": cfg.threads,
        "matmul_edge": MATMUL_EDGE[device],
        "gpu_measured": device == "cuda",
    }
    return {"inputs": inputs, "figures": figures, "ratios": ratios}


def _measure(clip: FrozenClip, cfg: ModelConfig, images: int, device: str) -> tuple[dict[str, Any], dict[str, float]]:
    encoded = [jpeg(seed, cfg.picture_px) for seed in range(min(images, 64))]
    files = (encoded * (images // len(encoded) + 1))[:images]
    pictures = [Image.open(io.BytesIO(data)).convert("RGB") for data in encoded] * (images // len(encoded) + 1)
    first = clip.framed(pictures[: min(images, cfg.batch_size)])
    sizes = [min(cfg.batch_size, images - start) for start in range(0, images, cfg.batch_size)]

    def forward() -> None:
        for size in sizes:
            clip.embed(first[:size])

    matmul = matmul_tflops(device)
    gflop = vision_flops(clip.model.config.vision_config, clip.dim) / 1e9
    rates = {
        "forward": images / _seconds(forward, device),
        "framing": images / _seconds(lambda: clip.framed(pictures[:images]), device),
        "framing_and_forward": images / _seconds(lambda: clip.images(pictures[:images]), device),
        "jpeg_to_features": images / _seconds(lambda: clip.images(files), device),
    }
    figures = {f"{name}_images_per_s": float(f"{rate:.4g}") for name, rate in rates.items()}
    figures |= {"gflop_per_image": float(f"{gflop:.4g}"), "matmul_tflops": float(f"{matmul:.4g}")}
    figures["forward_tflops"] = float(f"{rates['forward'] * gflop / 1e3:.4g}")
    ratios = {
        f"{name}/matmul": float(f"{rates[name] * gflop / 1e3 / matmul:.4g}") for name in rates if name != "framing"
    }
    ratios["jpeg_to_features/forward"] = round(rates["jpeg_to_features"] / rates["forward"], 4)
    return figures, ratios


def jpeg(seed: int, edge_px: int) -> bytes:
    """A picture with detail of all sizes, as curate keeps it."""
    noise = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    sink = io.BytesIO()
    picture = Image.fromarray(noise).resize((edge_px, edge_px), Image.Resampling.BICUBIC)
    picture.save(sink, "JPEG", quality=92, subsampling=0)
    return sink.getvalue()
