"""The foundation recipe, last part: a LoRA with which the diffusion model paints in four steps.

Latent consistency distillation (LCM, arXiv 2310.04378, algorithm 1) into a LoRA (arXiv 2311.05556): the model learns to
name from any point of a sampling path the end that it would reach itself, with guidance, in many steps. `aai generate
--set addons.lora=FILE --set addons.scheduler=lcm --set request.steps=4 --set request.guidance_scale=1` paints with it.
"""

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from aai.fit import Batch
from aai.toy.recipe_clip import FoundationConfig, train_model
from aai.toy.recipe_diffusion import encode_captions, encode_latents, noise_scheduler

ADAPTED = (
    "conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv_in", "conv_out", "conv", "proj_in", "proj_out",
    "to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "linear_1", "linear_2",
)  # fmt: skip
"""Layers of the UNet that get low-rank weights: all of them, as in the published LCM-LoRA, and first and last."""
SOLVER_STEPS = 50
"""Steps of the path that is distilled: LCMScheduler's `original_inference_steps`."""
SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0
"""LCMScheduler's."""


class ConsistencyTask(nn.Module):
    """The UNet with low-rank weights, which have the only gradients, under the consistency of neighbouring points."""

    def __init__(self, unet: UNet2DConditionModel, states: Tensor, guidance_scale: float, rank: int) -> None:
        """states: [U, L, D] of the different captions; the first is that of the empty one."""
        super().__init__()
        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(ADAPTED)))
        self.unet = unet
        self.register_buffer("guidance_scale", torch.tensor(guidance_scale), persistent=False)
        self.register_buffer("states", states, persistent=False)
        self.register_buffer("alphas", noise_scheduler().alphas_cumprod, persistent=False)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """batch: latents [B, C, h, w], text [B]. The pseudo-Huber distance of what two neighbours name as their end."""
        z, text = batch["latents"], self.states[batch["text"]]
        stride = len(self.alphas) // SOLVER_STEPS
        t = torch.randint(1, SOLVER_STEPS + 1, (len(z),), device=z.device) * stride - 1
        before = (t - stride).clamp(min=0)
        alpha = self._alpha(t)
        noisy = alpha.sqrt() * z + (1 - alpha).sqrt() * torch.randn_like(z)
        end = self._end(noisy, t, text)
        with torch.no_grad():
            nearer = self._solved(noisy, t, before, text)
            wanted = self._end(nearer, before, text)
        error = (end - wanted).square().sum(dim=(1, 2, 3))
        scale = 1e-3 * z[0].numel() ** 0.5
        return ((error + scale**2).sqrt() - scale).mean() / z[0].numel() ** 0.5, {}

    def _alpha(self, t: Tensor) -> Tensor:
        alpha: Tensor = self.alphas[t].view(-1, 1, 1, 1)
        return alpha

    def _end(self, noisy: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """What the model, with its low-rank weights, names as the end of the path: the consistency function."""
        alpha = self._alpha(t)
        v = self.unet(noisy, t, encoder_hidden_states=text).sample.float()
        x0 = alpha.sqrt() * noisy - (1 - alpha).sqrt() * v
        scaled = (t * TIMESTEP_SCALING).view(-1, 1, 1, 1)
        skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
        return skip * noisy + scaled / (scaled**2 + SIGMA_DATA**2) ** 0.5 * x0

    def _solved(self, noisy: Tensor, t: Tensor, before: Tensor, text: Tensor) -> Tensor:
        """One DDIM step from t to `before` by the frozen model with classifier-free guidance."""
        self.unet.disable_adapters()
        both = torch.cat([self.states[:1].expand_as(text), text])
        empty, named = (
            self.unet(noisy.repeat(2, 1, 1, 1), t.repeat(2), encoder_hidden_states=both).sample.float().chunk(2)
        )
        self.unet.enable_adapters()
        v = empty + self.guidance_scale * (named - empty)
        alpha, beta = self._alpha(t), self._alpha(before)
        x0 = alpha.sqrt() * noisy - (1 - alpha).sqrt() * v
        noise = (1 - alpha).sqrt() * noisy + alpha.sqrt() * v
        return beta.sqrt() * x0 + (1 - beta).sqrt() * noise


def train_consistency(
    cfg: FoundationConfig, pixels: Tensor, captions: list[str], diffusion_dir: Path, out: Path
) -> None:
    """Distills the diffusion model of a folder; writes pytorch_lora_weights.safetensors to `out`."""
    torch.manual_seed(cfg.seed)
    pipe = StableDiffusionPipeline.from_pretrained(diffusion_dir, torch_dtype=torch.float32, safety_checker=None)
    tokenizer, text_encoder = CLIPTokenizer.from_pretrained(diffusion_dir / "tokenizer"), pipe.text_encoder
    assert isinstance(text_encoder, CLIPTextModel)
    texts = ["", *sorted(set(captions) - {""})]
    number = {text: i for i, text in enumerate(texts)}
    text = torch.tensor([number[caption] for caption in captions])
    latents = encode_latents(pipe.vae, pixels) * pipe.vae.config.scaling_factor
    states = encode_captions(text_encoder, tokenizer, texts)
    task = ConsistencyTask(pipe.unet, states, cfg.lcm_guidance_scale, cfg.lcm_rank)
    fit = cfg.lcm.fit(cfg.seed, ema_decay=0.99)
    train_model("lcm", task, {"latents": latents, "text": text}, fit, out)
    half = {name: weight.half() for name, weight in get_peft_model_state_dict(pipe.unet).items()}
    StableDiffusionPipeline.save_lora_weights(out, unet_lora_layers=half)
