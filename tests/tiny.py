"""Small foundation models with random weights as ordinary Hugging Face folders, and a small ClipTable."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torchaudio.functional import resample
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTModel,
    ClapAudioConfig,
    ClapAudioModel,
    ClapFeatureExtractor,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PeAudioEncoder,
    PeAudioEncoderConfig,
    PeAudioFeatureExtractor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from aai import schema, storage
from aai.adapt import AdapterConfig, AudioAdapter
from aai.bundle import BundleConfig, write_bundle
from aai.concepts import Vocabulary
from aai.encoders.audio import AudioEncoder, AudioEncoderConfig
from aai.foundation.identity import FoundationSpec
from aai.media.waveform import encode_flac
from aai.toy.draw import draw_scene
from aai.toy.grammar import full_caption, random_scene
from aai.toy.recipe_clip import FoundationConfig, build_clip, build_tokenizer, image_processor
from aai.toy.recipe_diffusion import build_unet, build_vae, save_pipeline
from aai.toy.synthesis import synthesise

SIZES = FoundationConfig(image_size_px=64, hidden_size=32, unet_channels=(32, 32), vocab_size=574)
CAPTIONS = ["a photo of a big dog in the rain", "a sketch of a small bell at night", "a clock", "thing"]


def write_clip(folder: str | Path) -> Path:
    """A random CLIPModel (64 px, 32 features) with tokenizer and image processor."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(CAPTIONS, SIZES.vocab_size, SIZES.context_length)
    build_clip(SIZES, tokenizer).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    image_processor(SIZES.image_size_px).save_pretrained(folder)
    return Path(folder)


def write_diffusion(folder: str | Path, clip_folder: str | Path) -> Path:
    """A random Stable Diffusion pipeline around the text tower of `write_clip`'s folder (8x8x8 latents)."""
    torch.manual_seed(1)
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
    text_encoder = CLIPTextModel.from_pretrained(clip_folder, dtype=torch.float32)
    save_pipeline(Path(folder), build_vae(SIZES).eval(), build_unet(SIZES).eval(), text_encoder, tokenizer)
    return Path(folder)


def write_published(folder: Path, clip_folder: str | Path, kind: str) -> Path:
    """A random diffusion folder of the shape of a published one, narrow: "1.5", "2.1" or "xl" (64 px pictures)."""
    torch.manual_seed(8)
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
    text_encoder = CLIPTextModel.from_pretrained(clip_folder, dtype=torch.float32)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=64,
        scaling_factor=0.13025 if kind == "xl" else 0.18215,
    )
    unet: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (32, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 8 if kind == "1.5" else (2, 4),
        "cross_attention_dim": 80 if kind == "xl" else 32,
        "use_linear_projection": kind != "1.5",
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    parts: dict[str, Any] = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    if kind == "xl":
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        sizes = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3}
        places = {"max_position_embeddings": tokenizer.model_max_length, "vocab_size": len(tokenizer)}
        second = CLIPTextModelWithProjection(CLIPTextConfig(**sizes, **ends, **places, projection_dim=40))
        parts |= {"text_encoder_2": second, "tokenizer_2": CLIPTokenizer.from_pretrained(clip_folder, pad_token="!")}
        unet |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 40 + 6 * 8,
        }
        scheduler: Any = EulerDiscreteScheduler(**noise, timestep_spacing="leading", steps_offset=1)
        StableDiffusionXLPipeline(unet=UNet2DConditionModel(**unet), scheduler=scheduler, **parts).save_pretrained(
            folder
        )
        return folder
    if kind == "2.1":
        parts["tokenizer"] = CLIPTokenizer.from_pretrained(clip_folder, pad_token="!")
        scheduler = DDIMScheduler(**noise, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False)
    else:
        scheduler = PNDMScheduler(**noise, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False)
    rest: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = StableDiffusionPipeline(unet=UNet2DConditionModel(**unet), scheduler=scheduler, **parts, **rest)
    pipe.save_pretrained(folder)
    return folder


def write_vitl14_sizes(folder: Path) -> FoundationSpec:
    """Random models that take pictures as CLIP ViT-L/14 (224 px) and Stable Diffusion 1.5 (512 px), but are narrow."""
    torch.manual_seed(4)
    sizes = FoundationConfig(
        image_size_px=512, hidden_size=32, latent_channels=4, unet_channels=(32, 32), vocab_size=574
    )
    tokenizer = build_tokenizer(CAPTIONS, sizes.vocab_size, 77)
    narrow = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    clip = CLIPConfig(
        text_config={**narrow, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": 77},
        vision_config={**narrow, "image_size": 224, "patch_size": 14},
        projection_dim=768,
    )
    CLIPModel(clip).save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    image_processor(224).save_pretrained(folder / "clip")
    text_encoder = CLIPTextModel.from_pretrained(folder / "clip", dtype=torch.float32)
    save_pipeline(folder / "sd", build_vae(sizes).eval(), build_unet(sizes).eval(), text_encoder, tokenizer)
    return FoundationSpec(clip=str(folder / "clip"), diffusion=str(folder / "sd"))


def write_sizes(
    folder: Path, size: Any = 224, crop: Any = 224, latents: Any = 64, blocks: Any = (1, 2, 3, 4)
) -> FoundationSpec:
    """What a foundation's folders tell of sizes (ViT-L/14's, Stable Diffusion's), no models; None leaves a key out."""
    keys = {
        "clip/preprocessor_config.json": {"size": size, "crop_size": crop},
        "sd/unet/config.json": {"sample_size": latents},
        "sd/vae/config.json": {"block_out_channels": blocks},
    }
    for name, values in keys.items():
        storage.write_json(str(folder / name), {key: value for key, value in values.items() if value is not None})
    return FoundationSpec(clip=str(folder / "clip"), diffusion=str(folder / "sd"))


def write_ast(folder: str | Path, frames: int = 100) -> Path:
    """A random ASTModel (16 mel bins, frames of 10 ms)."""
    torch.manual_seed(2)
    config = ASTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        patch_size=8,
        frequency_stride=8,
        time_stride=8,
        max_length=frames,
        num_mel_bins=16,
    )
    ASTModel(config).save_pretrained(folder)
    ASTFeatureExtractor(num_mel_bins=16, max_length=frames, mean=-4.0, std=4.5).save_pretrained(folder)
    return Path(folder)


def write_whisper(folder: str | Path) -> Path:
    """A random WhisperModel that takes 2 s (80 mel bins)."""
    torch.manual_seed(5)
    config = WhisperConfig(
        d_model=32,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=64,
        vocab_size=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        max_source_positions=100,
    )
    WhisperModel(config).save_pretrained(folder)
    WhisperFeatureExtractor(chunk_length=2).save_pretrained(folder)
    return Path(folder)


CLAP_SIZES = {
    "num_mel_bins": 16,
    "spec_size": 64,
    "window_size": 4,
    "depths": [1, 1],
    "num_attention_heads": [2, 2],
    "hidden_size": 64,
    "patch_embeds_hidden_size": 32,
    "num_classes": 2,
}


def write_clap(folder: str | Path, fusion: bool = False) -> Path:
    """A random ClapAudioModel that takes 2 s at 48 kHz (16 mel bins), its batch norm as if it had been trained."""
    torch.manual_seed(6)
    model = ClapAudioModel(ClapAudioConfig(**CLAP_SIZES, enable_fusion=fusion))
    model.audio_encoder.batch_norm.running_mean.fill_(-40.0)
    model.audio_encoder.batch_norm.running_var.fill_(400.0)
    model.save_pretrained(folder)
    clap_extractor("fusion" if fusion else "rand_trunc").save_pretrained(folder)
    return Path(folder)


def clap_extractor(truncation: str, max_length_s: int = 2) -> ClapFeatureExtractor:
    """The extractor of `write_clap`'s models."""
    return ClapFeatureExtractor(feature_size=16, max_length_s=max_length_s, frequency_min=50, truncation=truncation)


PE_AUDIO_SIZES = {
    "dac_config": {"encoder_hidden_size": 4, "downsampling_ratios": [4, 8], "hidden_size": 16, "codebook_dim": 8},
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.3,  # a random tower would else hear nothing beside its own class token
}


def write_pe_audio(folder: str | Path) -> Path:
    """A random audio tower of PE-AV (32 samples a hop, 48 kHz)."""
    torch.manual_seed(7)
    config = PeAudioEncoderConfig(**PE_AUDIO_SIZES)
    PeAudioEncoder(config).save_pretrained(folder)
    PeAudioFeatureExtractor(hop_length=config.dac_config.hop_length).save_pretrained(folder)
    return Path(folder)


BACKBONES = {"ast": write_ast, "whisper": write_whisper, "clap": write_clap, "pe_audio": write_pe_audio}
"""A writer of a random pretrained folder of each kind."""


def write_bundle_of(folder: str | Path, foundation: FoundationSpec) -> Path:
    """A bundle with aligner and adapter of random weights around `write_clip` and `write_diffusion`."""
    torch.manual_seed(3)
    encoder = AudioEncoderConfig(hidden_size=32, num_layers=1, num_heads=2, head_size=32, embed_dim=32)
    adapter = AdapterConfig(num_tokens=2, hidden_size=32, embed_dim=32, token_dim=32)
    vocabulary = Vocabulary(objects=("a dog", "a bell", "a clock"), ambiences=("at night", "in the rain"))
    config = BundleConfig(
        foundation=foundation,
        encoder=encoder.model_dump(mode="json"),
        adapter=adapter.model_dump(mode="json"),
        vocabulary=vocabulary.model_dump(mode="json"),
    )
    weights = AudioEncoder(encoder).state_dict(), AudioAdapter(adapter, 1.0).state_dict()
    write_bundle(folder, config, *weights, {})
    return Path(folder)


def write_clip_table(
    folder: str | Path,
    num_shards: int = 2,
    rows_per_shard: int = 8,
    num_frames: int = 2,
    splits_in_turn: Sequence[str] = ("train", "train", "train", "val"),
    sample_rate_hz: int = 16_000,
) -> Path:
    """A ClipTable of toy scenes as curate's accepted/ holds them; every fourth clip is of the val split."""
    rng = np.random.default_rng(0)
    for shard in range(num_shards):
        splits = [splits_in_turn[i % len(splits_in_turn)] for i in range(rows_per_shard)]
        rows = [_clip_row(rng, f"{shard}-{i}", split, num_frames, sample_rate_hz) for i, split in enumerate(splits)]
        table = pa.Table.from_pylist(rows, schema=schema.CLIP_TABLE)
        storage.write_table(f"{folder}/shard-{shard:05d}.parquet", table)
    return Path(folder)


def of_kinds(folder: str | Path, kinds: Sequence[str]) -> str:
    """A ClipTable of `write_clip_table`, whose clips are now of these kinds in turn, file by file."""
    for file in storage.list_files(str(folder), ".parquet"):
        rows = storage.read_table(file).to_pylist()
        for i, row in enumerate(rows):
            row[schema.PICTURE] = kinds[i % len(kinds)]
            kept = {schema.STILL_PICTURE: 1, schema.NO_PICTURE: 0}.get(row[schema.PICTURE])
            row |= {"frames": row["frames"][:kept], "frame_pts_s": row["frame_pts_s"][:kept]}
        table = pa.Table.from_pylist(rows, schema=schema.CLIP_TABLE.append(pa.field(schema.PICTURE, pa.string())))
        storage.write_table(file, table)
    return str(folder)


def _clip_row(
    rng: np.random.Generator, name: str, split: str, num_frames: int, sample_rate_hz: int
) -> dict[str, object]:
    scene = random_scene(rng)
    sound = resample(torch.from_numpy(synthesise(scene, 2.0)), 16_000, sample_rate_hz).numpy()
    frames = []
    for i in range(num_frames):
        sink = io.BytesIO()
        draw_scene(scene, 64, time_s=0.5 * i).save(sink, "JPEG", quality=92)
        frames.append(sink.getvalue())
    return {
        "clip_id": f"clip-{name}",
        "content_hash": f"hash-{name}",
        "uri": f"clips/{name}.mp4",
        "caption": full_caption(scene),
        "labels": scene.labels,
        "split": split,
        "duration_s": 2.0,
        "audio": encode_flac(sound, sample_rate_hz),
        "frames": frames,
        "frame_pts_s": [0.5 * i for i in range(num_frames)],
    }


def paintable_bundle(folder: Path) -> Path:
    """A bundle of random weights that a Painter can load."""
    clip = write_clip(folder / "clip")
    spec = FoundationSpec(clip=str(clip), diffusion=str(write_diffusion(folder / "sd", clip)))
    size = SIZES.hidden_size
    encoder = AudioEncoderConfig(hidden_size=32, num_layers=1, num_heads=2, embed_dim=size, clip_s=1)
    adapter = AdapterConfig(hidden_size=32, embed_dim=size, token_dim=size)
    config = BundleConfig(foundation=spec, encoder=encoder.model_dump(), adapter=adapter.model_dump())
    made = write_bundle(
        folder / "bundle", config, AudioEncoder(encoder).state_dict(), AudioAdapter(adapter).state_dict(), {}
    )
    return made.folder
