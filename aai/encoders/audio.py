"""The trained audio encoder: waveform -> log-mel -> transformer -> head into CLIP space.

Every clip is padded or cut to the same length and normalised by constants of the data set (not of the clip: loudness
carries meaning), so that an embedding depends on its clip alone, never on the batch.
"""

import os
from typing import Any, Literal

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchaudio.transforms import MelSpectrogram
from transformers import ASTConfig, ASTModel, ClapAudioModel, WhisperModel

from aai.config import Config
from aai.errors import UserError
from aai.media.limits import SAMPLE_RATE_HZ


class AudioEncoderConfig(Config):
    """The front-end, the backbone and the head.

    A pretrained backbone expects the front-end it was trained with: set the mel settings accordingly.
    """

    backbone: Literal["ast", "whisper", "clap"] = "ast"
    """ast: Audio Spectrogram Transformer (arXiv 2104.01778), from scratch or pretrained; whisper: the encoder
    (arXiv 2212.04356) and clap: the audio tower (arXiv 2211.06687), pretrained only."""
    pretrained: str | None = None
    """Local folder or hub id of the backbone's weights; empty = AST from scratch with the sizes below."""
    revision: str | None = None
    """Commit of the hub id; required for a hub id so that a run can be repeated."""
    freeze_backbone: bool = False
    """Train only the head."""
    sample_rate_hz: int = pydantic.Field(SAMPLE_RATE_HZ, ge=8_000)
    """Rate of the sounds it hears; must be that of the features."""
    clip_s: float = pydantic.Field(2.0, gt=0)
    """Length every clip is padded or cut to, in seconds."""
    window_ms: float = pydantic.Field(25.0, gt=0)
    """Length of a spectrum's window, in milliseconds."""
    hop_ms: float = pydantic.Field(10.0, gt=0)
    """Time between two spectra, in milliseconds."""
    num_mel_bins: int = pydantic.Field(64, ge=8)
    mel_mean: float = 0.0
    """Mean of the log-mel over the training data."""
    mel_std: float = pydantic.Field(1.0, gt=0)
    """Standard deviation of the log-mel over the training data."""
    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    patch_size: int = 16
    """Edge of a spectrogram patch, in mel bins and frames."""
    stride: int = 16
    """Distance between patches; smaller than patch_size makes them overlap."""
    dropout: float = pydantic.Field(0.1, ge=0, lt=1)
    """Of the head."""
    head_size: int = 256
    """Width of the head's hidden layer."""
    embed_dim: int = 128
    """Dimension of the CLIP space."""

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "AudioEncoderConfig":
        if self.backbone != "ast" and not self.pretrained:
            raise ValueError(f"backbone {self.backbone} has no from-scratch sizes: set pretrained")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of num_heads {self.num_heads}")
        return self

    @property
    def clip_samples(self) -> int:
        """Samples of a padded or cut clip."""
        return round(self.clip_s * self.sample_rate_hz)

    @property
    def num_frames(self) -> int:
        """Log-mel frames of a clip."""
        return self.clip_samples // self.hop_samples

    @property
    def hop_samples(self) -> int:
        """Samples between two spectra."""
        return round(self.hop_ms * self.sample_rate_hz / 1000)


def fit_length(waveforms: Tensor, samples: int) -> Tensor:
    """Waveforms [..., S] with exactly `samples` samples: zeros after a short one, the middle of a long one."""
    extra = waveforms.shape[-1] - samples
    if extra > 0:
        return waveforms[..., extra // 2 : extra // 2 + samples]
    return F.pad(waveforms, (0, -extra))


class LogMel(nn.Module):
    """Waveforms [B, S] -> normalised log-mel energies [B, T, M]."""

    def __init__(self, config: AudioEncoderConfig, num_frames: int | None = None) -> None:
        """num_frames: T, where a backbone takes more than a clip has; what is missing is silence."""
        super().__init__()
        self.config = config
        self.num_frames = num_frames or config.num_frames
        window = round(config.window_ms * config.sample_rate_hz / 1000)
        self.power = MelSpectrogram(
            sample_rate=config.sample_rate_hz,
            n_fft=1 << (window - 1).bit_length(),
            win_length=window,
            hop_length=config.hop_samples,
            n_mels=config.num_mel_bins,
            power=2.0,
        )

    def forward(self, waveforms: Tensor) -> Tensor:
        """Float waveforms [B, S] -> float32 [B, T, M]. Raises ValueError for another shape, or no samples."""
        if waveforms.ndim != 2 or waveforms.shape[1] == 0:
            raise ValueError(f"waveforms have shape {tuple(waveforms.shape)}, not [B, S] with S > 0")
        clips = fit_length(waveforms.float(), self.config.clip_samples)
        missing = self.num_frames * self.config.hop_samples - clips.shape[1]
        # Spectra are taken in float32 even under autocast: squares of quiet sounds are below bfloat16's resolution.
        with torch.autocast(waveforms.device.type, enabled=False):
            power = self.power(F.pad(clips, (0, max(0, missing))))[..., : self.num_frames]
            mel: Tensor = (torch.log(power + 1e-6) - self.config.mel_mean) / self.config.mel_std
        return mel.transpose(1, 2)


class AudioEncoder(nn.Module):
    """Sound into the space of the frozen CLIP."""

    def __init__(self, config: AudioEncoderConfig) -> None:
        """Builds the model, random or from pretrained weights. Raises UserError for weights it cannot load."""
        super().__init__()
        self.config = config
        self.backbone, width, num_frames = _build_backbone(config)
        if config.num_frames > num_frames:
            raise UserError(
                "encoder.clip_s",
                config.clip_s,
                f"is longer than {config.pretrained} takes",
                f"set it to {num_frames * config.hop_samples / config.sample_rate_hz:g} or less",
            )
        self.mel = LogMel(config, num_frames)
        if config.freeze_backbone:
            self.backbone.requires_grad_(False)
        self.head = nn.Sequential(
            nn.Linear(width, config.head_size),
            nn.LayerNorm(config.head_size),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.head_size, config.embed_dim),
        )

    def train(self, mode: bool = True) -> "AudioEncoder":
        """Training mode; batch norms (CLAP has one) keep their statistics, so that clips stay independent."""
        super().train(mode)
        for module in self.backbone.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def log_mel(self, waveforms: Tensor) -> Tensor:
        """Normalised log-mel energies [B, T, M] of waveforms [B, S] in -1..1 at `sample_rate_hz`."""
        mel: Tensor = self.mel(waveforms)
        return mel

    def embed_mel(self, mel: Tensor) -> Tensor:
        """Unit-norm embeddings [B, D] of what `log_mel` returns."""
        pooled = _pool(self.config, self.backbone, mel)
        return F.normalize(self.head(pooled).float(), dim=-1)

    def forward(self, waveforms: Tensor) -> Tensor:
        """Unit-norm embeddings [B, D] of waveforms [B, S] in -1..1 at `sample_rate_hz`."""
        return self.embed_mel(self.log_mel(waveforms))


@torch.no_grad()
def mel_statistics(config: AudioEncoderConfig, waveforms: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of the raw log-mel over waveforms [N, S]: for `mel_mean` and `mel_std`."""
    mel = LogMel(config.model_copy(update={"mel_mean": 0.0, "mel_std": 1.0}))(waveforms)
    return float(mel.mean()), float(mel.std())


def _build_backbone(config: AudioEncoderConfig) -> tuple[nn.Module, int, int]:
    """The backbone, the width of what it pools, and the number of log-mel frames it takes."""
    if config.backbone == "whisper":
        encoder = _pretrained(WhisperModel, config).get_encoder()
        _check_bins(config, encoder.config.num_mel_bins)
        return encoder, encoder.config.d_model, 2 * encoder.config.max_source_positions
    if config.backbone == "clap":
        clap = _pretrained(ClapAudioModel, config)
        _check_bins(config, clap.config.num_mel_bins)
        return clap, clap.config.hidden_size, config.num_frames
    if config.pretrained:
        ast = _pretrained(ASTModel, config)
        _check_bins(config, ast.config.num_mel_bins)
        return ast, ast.config.hidden_size, ast.config.max_length
    sizes = ASTConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=4 * config.hidden_size,
        patch_size=config.patch_size,
        frequency_stride=config.stride,
        time_stride=config.stride,
        max_length=config.num_frames,
        num_mel_bins=config.num_mel_bins,
    )
    return ASTModel(sizes), config.hidden_size, config.num_frames


def _pretrained(kind: Any, config: AudioEncoderConfig) -> Any:
    where = str(config.pretrained)
    if not os.path.isdir(where) and not config.revision:
        raise UserError("encoder.revision", "(missing)", f"hub id {where} is not pinned", "give its commit hash")
    try:
        return kind.from_pretrained(where, revision=config.revision, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).split("\n")[0][:200]
        raise UserError(
            "encoder.pretrained", where, f"cannot be loaded ({reason})", "give a folder or a reachable hub id"
        ) from error


def _check_bins(config: AudioEncoderConfig, expected: int) -> None:
    if config.num_mel_bins != expected:
        raise UserError(
            "encoder.num_mel_bins",
            config.num_mel_bins,
            f"{config.pretrained} was trained with {expected}",
            f"set encoder.num_mel_bins={expected}",
        )


def _pool(config: AudioEncoderConfig, backbone: nn.Module, mel: Tensor) -> Tensor:
    """One vector [B, W] for each log-mel [B, T, M]."""
    pooled: Tensor
    if config.backbone == "clap":
        pooled = backbone(mel.unsqueeze(1)).pooler_output
    elif config.backbone == "whisper":
        # Whisper pads to 30 s: the states (one for two frames) after the clip's own are left out.
        pooled = backbone(mel.transpose(1, 2)).last_hidden_state[:, : config.num_frames // 2].mean(dim=1)
    else:
        pooled = backbone(mel).last_hidden_state.mean(dim=1)
    return pooled
