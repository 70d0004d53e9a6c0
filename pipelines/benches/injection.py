"""What the sound adds to a generation: audio encoder, adapter and injected prompt beside the steps of the UNet.

Stable Diffusion 1.5, CLIP's text encoder and AST-base in their own sizes, with random weights; one picture of 25 steps
with guidance. The parts are timed by turns and added up: a whole generation takes minutes without a GPU.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from aai.inject import Injector, Sound
from pipelines.benches.options import BenchConfig
from pipelines.benches.random_models import adapt_task, ast_encoder, build_pipeline, clip_folder

STEPS = 25
PROMPT = "a photo of <sound> at night"


def measure(config: BenchConfig) -> dict[str, Any]:
    """inputs, figures and ratios."""
    device, size = "cuda" if torch.cuda.is_available() else "cpu", config.model.size
    pipe = build_pipeline(size, clip_folder(config.out, size)).to(device)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.eval().requires_grad_(False)
    adapter = adapt_task(size, pipe).adapter.to(device).eval().requires_grad_(False)
    encoder = ast_encoder(size).to(device).eval().requires_grad_(False)
    seconds = _timed(_parts(pipe, encoder, adapter, device), config.repeats, device)
    painted = STEPS * seconds["unet_step"] + seconds["vae_decode"] + 2 * seconds["plain_prompt"]
    injected = seconds["adapter"] + seconds["injected_prompt"] - seconds["plain_prompt"]
    figures = {f"{name}_ms": float(f"{1e3 * value:.4g}") for name, value in seconds.items()}
    figures["generation_s"] = float(f"{painted:.4g}")
    ratios = {
        "injection_and_adapter/generation": float(f"{injected / painted:.4g}"),
        "with_audio_encoder/generation": float(f"{(injected + seconds['audio_encoder']) / painted:.4g}"),
    }
    inputs = {"models": size, "weights": "random", "device": device, "steps": STEPS, "repeats": config.repeats}
    return {"inputs": inputs, "figures": figures, "ratios": ratios}


@torch.no_grad()
def _parts(pipe: Any, encoder: Any, adapter: Any, device: str) -> dict[str, Callable[[], Any]]:
    """Each part of a generation as a call."""
    injector = Injector(pipe.text_encoder, pipe.tokenizer)
    sound = torch.randn(1, encoder.config.clip_samples, device=device)
    heard = encoder(sound)
    tokens = adapter(heard)[0]
    edge = pipe.unet.config.sample_size
    latents = torch.randn(2, pipe.unet.config.in_channels, edge, edge, device=device)  # with guidance: two rows
    states = injector.embed(PROMPT, {"sound": Sound(tokens)}).expand(2, -1, -1)
    return {
        "audio_encoder": lambda: encoder(sound),
        "adapter": lambda: adapter(heard),
        "injected_prompt": lambda: injector.embed(PROMPT, {"sound": Sound(tokens)}),
        "plain_prompt": lambda: injector.embed(PROMPT.replace("<sound>", "thing"), {}),
        "unet_step": lambda: pipe.unet(latents, 500, encoder_hidden_states=states),
        "vae_decode": lambda: pipe.vae.decode(latents[:1]),
    }


@torch.no_grad()
def _timed(parts: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, float]:
    """The median seconds of each part, after one call to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(repeats + 1):
        for name, work in parts.items():
            start = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}
