"""The foundation recipe, second half: the small latent diffusion model around the CLIP's text tower."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from aai.toy.recipe_clip import FoundationConfig, autocast, clip_input, to_unit, train_steps


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


def train_vae(cfg: FoundationConfig, pixels: Tensor) -> AutoencoderKL:
    """Trains the autoencoder on `reconstruction_loss` with a faint KL term.

    Sets `scaling_factor` so that latents have unit variance, as the diffusion model expects.
    """
    torch.manual_seed(cfg.seed)
    vae = build_vae(cfg)

    def loss_of(rows: Tensor) -> Tensor:
        """Reconstruction of the rows' pictures [B] from a sampled latent, and the KL term: a scalar."""
        x = to_unit(pixels[rows])
        with autocast():
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample
        return reconstruction_loss(y.float(), x) + 1e-5 * posterior.kl().float().mean()

    train_steps("vae", list(vae.parameters()), len(pixels), cfg.vae, cfg.seed, loss_of)
    latents = encode_latents(vae, pixels[:2048])
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    return vae.eval()


def train_decoder(cfg: FoundationConfig, vae: AutoencoderKL, clip: CLIPModel, pixels: Tensor) -> None:
    """Trains the VAE's decoder on, in place, with the encoder frozen.

    The latents get noise of up to 0.3 of their deviation, because sampled latents are never exact either. A perceptual
    term compares the CLIP's states of every patch, as LPIPS does with another network (Zhang et al. 2018,
    arXiv 1801.03924).
    """
    torch.manual_seed(cfg.seed)
    vae.requires_grad_(False)
    params = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    for param in params:
        param.requires_grad_(True)
    latents = encode_latents(vae, pixels)
    spread = latents.std()
    tower = clip.vision_model.requires_grad_(False).eval()

    def states(x: Tensor) -> Tensor:
        return tower(pixel_values=clip_input(x)).last_hidden_state.float()

    def loss_of(rows: Tensor) -> Tensor:
        """Reconstruction and perceptual term of the rows [B] from noisy latents: a scalar."""
        x, z = to_unit(pixels[rows]), latents[rows]
        noise = 0.3 * spread * torch.rand(len(z), 1, 1, 1)
        with autocast():
            y = vae.decode(z + noise * torch.randn_like(z)).sample.float()
            seen = F.cosine_similarity(states(x), states(y), dim=-1)
        return reconstruction_loss(y, x) + 0.5 * (1 - seen.mean())

    train_steps("decoder", params, len(pixels), cfg.decoder, cfg.seed, loss_of)
    vae.eval()


@torch.no_grad()
def encode_latents(vae: AutoencoderKL, pixels: Tensor, batch_size: int = 256) -> Tensor:
    """Unscaled posterior means [N, C, h, w] of uint8 pictures [N, H, W, 3]."""
    return torch.cat([vae.encode(to_unit(x)).latent_dist.mean for x in pixels.split(batch_size)])


@torch.no_grad()
def encode_captions(model: CLIPTextModel, tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Hidden states [N, L, D] of captions, padded as a diffusers pipeline pads them."""
    tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return torch.cat([model(input_ids=part).last_hidden_state for part in tokens.split(64)])


def train_unet(
    cfg: FoundationConfig,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    pixels: Tensor,
    captions: list[str],
    on_progress: Callable[[UNet2DConditionModel], None] | None = None,
) -> UNet2DConditionModel:
    """Trains the UNet on cached latents and caption states; a tenth of the captions is dropped for guidance.

    Returns the exponential moving average of the weights. `on_progress` gets it every 1,000 steps.
    """
    torch.manual_seed(cfg.seed)
    both = torch.cat([pixels, pixels.flip(2)])  # a mirrored scene is a scene
    latents = encode_latents(vae, both) * vae.config.scaling_factor
    texts = sorted({*captions, ""})
    number = {text: i for i, text in enumerate(texts)}
    which = torch.tensor([number[text] for text in captions] * 2)
    states = encode_captions(text_encoder, tokenizer, texts)
    unet, scheduler = build_unet(cfg), noise_scheduler()
    average = torch.optim.swa_utils.AveragedModel(unet, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998))
    done = 0

    def loss_of(rows: Tensor) -> Tensor:
        """Error of the predicted velocity v = sqrt(a) noise - sqrt(1 - a) z for the rows [B]: a scalar."""
        z = latents[rows]
        noise = torch.randn_like(z)
        t = torch.randint(0, scheduler.config.num_train_timesteps, (len(z),))
        keep = torch.rand(len(z)) >= 0.1
        context = states[torch.where(keep, which[rows], number[""])]
        with autocast():
            v = unet(scheduler.add_noise(z, noise, t), t, encoder_hidden_states=context).sample
        alpha = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
        return F.mse_loss(v.float(), alpha.sqrt() * noise - (1 - alpha).sqrt() * z)

    def after_step() -> None:
        nonlocal done
        average.update_parameters(unet)
        done += 1
        if on_progress and done % 1000 == 0:
            on_progress(average.module)

    train_steps("unet", list(unet.parameters()), len(latents), cfg.unet, cfg.seed, loss_of, after_step)
    return average.module


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
    """Trains VAE and UNet around the CLIP's text tower and saves the pipeline, also after every 1,000 steps.

    A finished VAE in `out` is used again.
    """
    tokenizer = CLIPTokenizer.from_pretrained(clip_dir)
    text_encoder = CLIPTextModel.from_pretrained(clip_dir, dtype=torch.float32).eval()
    if (out / "vae" / "config.json").exists():
        vae = AutoencoderKL.from_pretrained(out / "vae", dtype=torch.float32).eval()
    else:
        vae = train_vae(cfg, pixels)
        train_decoder(cfg, vae, CLIPModel.from_pretrained(clip_dir, dtype=torch.float32), pixels)
        vae.save_pretrained(out / "vae")
    unet = train_unet(
        cfg,
        vae,
        text_encoder,
        tokenizer,
        pixels,
        captions,
        on_progress=lambda current: save_pipeline(out, vae, current, text_encoder, tokenizer),
    )
    save_pipeline(out, vae, unet, text_encoder, tokenizer)
