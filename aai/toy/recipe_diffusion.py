"""The foundation recipe, second half: the small latent diffusion model around the CLIP's text tower."""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from aai.fit import Batch
from aai.toy.recipe_clip import FoundationConfig, clip_input, to_unit, train_model


def build_vae(cfg: FoundationConfig) -> AutoencoderKL:
    """A small KL autoencoder: 8x8 pixels to one latent position."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=cfg.latent_channels,
        sample_size=cfg.image_size_px,
        mid_block_add_attention=False,
    )


def build_unet(cfg: FoundationConfig) -> UNet2DConditionModel:
    """A small conditional UNet; it attends to the text at half the latent resolution, where attention is cheap."""
    return UNet2DConditionModel(
        sample_size=cfg.image_size_px // 8,
        in_channels=cfg.latent_channels,
        out_channels=cfg.latent_channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        block_out_channels=cfg.unet_channels,
        layers_per_block=1,
        cross_attention_dim=cfg.hidden_size,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=16,
    )


def noise_scheduler() -> DPMSolverMultistepScheduler:
    """Stable Diffusion's noise schedule with v-prediction (Salimans & Ho 2022, arXiv 2202.00512)."""
    return DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        steps_offset=1,
    )


def reconstruction_loss(y: Tensor, x: Tensor) -> Tensor:
    """L1 + MSE of pixels [N, 3, H, W] and L1 of their gradients, which keeps thin strokes."""

    def edges(z: Tensor) -> tuple[Tensor, Tensor]:
        return z[..., 1:] - z[..., :-1], z[..., 1:, :] - z[..., :-1, :]

    detail = sum(F.l1_loss(a, b) for a, b in zip(edges(x), edges(y), strict=True))
    return F.l1_loss(y, x) + F.mse_loss(y, x) + detail


class VaeTask(nn.Module):
    """The autoencoder under `reconstruction_loss`, with a faint KL term."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """batch: pixels [B, H, W, 3]."""
        x = to_unit(batch["pixels"])
        posterior = self.vae.encode(x).latent_dist
        y = self.vae.decode(posterior.sample()).sample
        return reconstruction_loss(y.float(), x) + 1e-5 * posterior.kl().float().mean(), {}


class DecoderTask(nn.Module):
    """The decoder alone, from latents with noise of up to 0.3 of their deviation: sampled latents are never exact.

    A perceptual term compares the CLIP's states of every patch, as LPIPS does with another network (Zhang et al. 2018,
    arXiv 1801.03924).
    """

    def __init__(self, vae: AutoencoderKL, clip: CLIPModel, spread: float) -> None:
        """spread: deviation of the latents."""
        super().__init__()
        self.vae, self.tower, self.spread = vae.requires_grad_(False), clip.vision_model.requires_grad_(False), spread
        for part in (vae.decoder, vae.post_quant_conv):
            part.requires_grad_(True)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """batch: pixels [B, H, W, 3], latents [B, C, h, w]."""
        x, z = to_unit(batch["pixels"]), batch["latents"]
        noise = 0.3 * self.spread * torch.rand(len(z), 1, 1, 1, device=z.device)
        y = self.vae.decode(z + noise * torch.randn_like(z)).sample
        seen = F.cosine_similarity(self._states(x).float(), self._states(y).float(), dim=-1)
        return reconstruction_loss(y.float(), x) + 0.5 * (1 - seen.mean()), {}

    def _states(self, x: Tensor) -> Tensor:
        states: Tensor = self.tower(pixel_values=clip_input(x)).last_hidden_state
        return states


def train_vae(cfg: FoundationConfig, clip: CLIPModel, pixels: Tensor, out: Path) -> AutoencoderKL:
    """Trains the autoencoder, then its decoder once more.

    Sets `scaling_factor` so that latents have unit variance, as the diffusion model expects.
    """
    torch.manual_seed(cfg.seed)
    vae = build_vae(cfg)
    train_model("vae", VaeTask(vae), {"pixels": pixels}, cfg.vae.fit(cfg.seed), out)
    latents = encode_latents(vae, pixels)
    vae.register_to_config(scaling_factor=float(1 / latents[:2048].std()))
    task = DecoderTask(vae, clip, float(latents.std()))
    train_model("decoder", task, {"pixels": pixels, "latents": latents}, cfg.decoder.fit(cfg.seed), out)
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode_latents(vae: AutoencoderKL, pixels: Tensor, batch_size: int = 256) -> Tensor:
    """Unscaled posterior means [N, C, h, w] of uint8 pictures [N, H, W, 3]."""
    return torch.cat([vae.encode(to_unit(x)).latent_dist.mean for x in pixels.split(batch_size)])


@torch.no_grad()
def encode_captions(model: CLIPTextModel, tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Hidden states [N, L, D] of captions, padded as a diffusers pipeline pads them."""
    tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return torch.cat([model(input_ids=part).last_hidden_state for part in tokens.split(64)])


class UnetTask(nn.Module):
    """The UNet under the error of the predicted velocity v = sqrt(a) noise - sqrt(1 - a) z."""

    def __init__(self, unet: UNet2DConditionModel, states: Tensor) -> None:
        """states: [U, L, D] of the different captions; the first is that of the empty one."""
        super().__init__()
        self.unet, self.scheduler = unet, noise_scheduler()
        self.register_buffer("states", states, persistent=False)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """batch: latents [B, C, h, w], text [B]; a tenth of the captions is dropped for guidance."""
        z, device = batch["latents"], batch["latents"].device
        noise = torch.randn_like(z)
        t = torch.randint(0, self.scheduler.config.num_train_timesteps, (len(z),), device=device)
        text = batch["text"] * (torch.rand(len(z), device=device) >= 0.1)
        alpha = self.scheduler.alphas_cumprod.to(device)[t].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * z + (1 - alpha).sqrt() * noise  # add_noise of this scheduler counts t from the other end
        v = self.unet(noisy, t, encoder_hidden_states=self.states[text]).sample
        return F.mse_loss(v.float(), alpha.sqrt() * noise - (1 - alpha).sqrt() * z), {}


def train_unet(
    cfg: FoundationConfig, vae: AutoencoderKL, states: Tensor, pixels: Tensor, text: Tensor, out: Path
) -> UNet2DConditionModel:
    """Trains on cached latents and caption states (see UnetTask); returns the moving average of the weights.

    pixels: uint8 [N, H, W, 3]; text [N]: which of the states is a picture's.
    """
    torch.manual_seed(cfg.seed)
    unet = build_unet(cfg)
    latents = encode_latents(vae, pixels) * vae.config.scaling_factor
    train_model(
        "unet", UnetTask(unet, states), {"latents": latents, "text": text}, cfg.unet.fit(cfg.seed, ema_decay=0.998), out
    )
    return unet


def save_pipeline(
    out: Path, vae: AutoencoderKL, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> None:
    """Writes a diffusers Stable Diffusion folder in fp16."""
    pipe = StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=noise_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    vae.register_to_config(_name_or_path="")  # else the folder it was read from goes into the model
    pipe.to(dtype=torch.float16)
    pipe.save_pretrained(out)
    pipe.to(dtype=torch.float32)


def train_diffusion(cfg: FoundationConfig, pixels: Tensor, captions: list[str], clip_dir: Path, out: Path) -> None:
    """Trains VAE and UNet around the CLIP's text tower and saves the pipeline."""
    tokenizer = CLIPTokenizer.from_pretrained(clip_dir)
    text_encoder = CLIPTextModel.from_pretrained(clip_dir, dtype=torch.float32).eval()
    vae = train_vae(cfg, CLIPModel.from_pretrained(clip_dir, dtype=torch.float32), pixels, out)
    texts = ["", *sorted(set(captions) - {""})]
    number = {text: i for i, text in enumerate(texts)}
    text = torch.tensor([number[caption] for caption in captions])
    unet = train_unet(cfg, vae, encode_captions(text_encoder, tokenizer, texts), pixels, text, out)
    save_pipeline(out, vae, unet, text_encoder, tokenizer)
