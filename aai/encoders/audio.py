"""The trained audio encoder: waveform -> front end (mostly a log-mel) -> backbone -> head into CLIP space.

Every clip is padded or cut to the same length and normalised by constants of the data set (not of the clip: loudness
carries meaning), so that an embedding depends on its clip alone, never on the batch.
"""

from typing import Any

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aai.config import Config
from aai.encoders import backbones
from aai.encoders.backbones import BackboneName
from aai.encoders.convolutions import GROUPS, ConvBackbone
from aai.encoders.frontends import LogMel
from aai.errors import UserError
from aai.media.limits import SAMPLE_RATE_HZ

FROM_SCRATCH = ("ast", "cnn")
MOST_HALVINGS = 6
"""Layers of the backbone cnn."""
OF_THE_BACKBONE = (
    "window_ms", "hop_ms", "num_mel_bins", "hidden_size", "num_layers", "num_heads", "patch_size", "stride"
)  # fmt: skip
"""Settings of an encoder from scratch; a pretrained backbone has its own."""


class AudioEncoderConfig(Config):
    """The front end, the backbone and the head."""

    backbone: BackboneName = "ast"
    """ast: Audio Spectrogram Transformer (arXiv 2104.01778), from scratch or pretrained. cnn: convolutions, from
    scratch only; they hear more of few clips. Pretrained only: whisper, its encoder (arXiv 2212.04356); clap, its audio
    tower (arXiv 2211.06687); pe_audio, the audio tower of PE-AV."""
    pretrained: str | None = None
    """Local folder or hub id of the backbone's weights and feature extractor; empty = AST from scratch with the sizes
    below. A pretrained backbone hears the spectrogram that it was trained with."""
    revision: str | None = None
    """Commit of the hub id; required for a hub id so that a run can be repeated."""
    architecture: dict[str, Any] | None = None
    """Sizes of the pretrained backbone; align takes them from its config.json and keeps them in the bundle."""
    extractor: dict[str, Any] | None = None
    """Settings of its feature extractor; align takes them from its preprocessor_config.json and keeps them."""
    freeze_backbone: bool = False
    """Train only the head."""
    sample_rate_hz: int = pydantic.Field(SAMPLE_RATE_HZ, ge=8_000)
    """Rate of the sounds it hears; must be that of the features. A pretrained backbone's own where it is left out."""
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
    """Width of the states; of cnn, channels of its last layer."""
    num_layers: int = pydantic.Field(4, ge=1)
    """Of ast, its layers; of cnn, pairs of convolutions, each of which halves time and frequency."""
    num_heads: int = 4
    """Of ast alone, as the next two."""
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
    apart_below: float | None = pydantic.Field(None, exclude_if=lambda value: value is None)
    """The cosine below which the halves of a sound tell of different things (`aai.parting`); empty = not known."""

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "AudioEncoderConfig":
        if self.backbone not in FROM_SCRATCH and not self.pretrained:
            raise ValueError(f"backbone {self.backbone} has no from-scratch sizes: set pretrained")
        if self.backbone == "cnn" and self.pretrained:
            raise ValueError("backbone cnn has no published weights: leave pretrained out, or name their backbone")
        if self.backbone == "cnn" and self.hidden_size % GROUPS:
            raise ValueError(f"hidden_size {self.hidden_size}: backbone cnn takes multiples of {GROUPS}")
        if self.backbone == "cnn" and self.num_layers > MOST_HALVINGS:
            raise ValueError(f"num_layers {self.num_layers}: backbone cnn takes at most {MOST_HALVINGS}")
        if self.backbone != "cnn" and self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of num_heads {self.num_heads}")
        return self

    @property
    def clip_samples(self) -> int:
        """Samples of a padded or cut clip."""
        return round(self.clip_s * self.sample_rate_hz)

    @property
    def num_frames(self) -> int:
        """Log-mel frames of a clip, from scratch."""
        return self.clip_samples // self.hop_samples

    @property
    def window_samples(self) -> int:
        """Samples of a spectrum's window."""
        return round(self.window_ms * self.sample_rate_hz / 1000)

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


def log_mel(config: AudioEncoderConfig) -> LogMel:
    """The front end of an encoder from scratch."""
    return LogMel(
        config.sample_rate_hz,
        config.window_samples,
        config.hop_samples,
        config.num_mel_bins,
        config.mel_mean,
        config.mel_std,
    )


def described(config: AudioEncoderConfig, local: bool = False) -> AudioEncoderConfig:
    """These settings with what a pretrained backbone says of itself: its sizes, its spectrogram, its rate.

    local: a hub is not asked (see `backbones.describe`).

    Raises UserError for a folder or hub id that does not say it, and for settings that are not those of the backbone.
    """
    if not config.pretrained:
        return config
    for name in sorted(config.model_fields_set.intersection((*OF_THE_BACKBONE, "architecture", "extractor"))):
        rule = f"{config.pretrained} has its own sizes and spectrogram"
        raise UserError(f"encoder.{name}", getattr(config, name), rule, "leave it out")
    architecture, extractor = backbones.describe(config.backbone, config.pretrained, config.revision, local)
    rate_hz = extractor["sampling_rate"]
    if "sample_rate_hz" in config.model_fields_set and config.sample_rate_hz != rate_hz:
        rule = f"{config.pretrained} was trained on sounds of {rate_hz} Hz"
        raise UserError("encoder.sample_rate_hz", config.sample_rate_hz, rule, "leave it out")
    longest_s = backbones.longest_s(config.backbone, extractor)
    if config.clip_s > longest_s:
        rule = f"is longer than {config.pretrained} takes"
        raise UserError("encoder.clip_s", config.clip_s, rule, f"set it to {longest_s:g} or less")
    own = {"architecture": architecture, "extractor": extractor, "sample_rate_hz": rate_hz}
    return config.model_copy(update=own)


class AudioEncoder(nn.Module):
    """Sound into the space of the frozen CLIP."""

    def __init__(self, config: AudioEncoderConfig, from_pretrained: bool = False) -> None:
        """Builds the model with random weights; from_pretrained: with the backbone's, read from folder or hub.

        Raises UserError for weights it cannot load, and for a pretrained backbone that was not `described`.
        """
        super().__init__()
        self.config = config
        if not config.pretrained:
            self.mel: nn.Module = log_mel(config)
            self.backbone: nn.Module = _from_scratch(config)
        else:
            if config.architecture is None or config.extractor is None:
                rule = f"is missing: older encoders fed {config.pretrained} with a spectrogram that was not its own"
                raise UserError("encoder.extractor", "(missing)", rule, "align again")
            self.mel = backbones.front_end(config.backbone, config.extractor)
            if from_pretrained:
                source = config.pretrained, config.revision
                self.backbone = backbones.load(config.backbone, config.architecture, *source)
            else:
                self.backbone = backbones.build(config.backbone, config.architecture)
        if config.freeze_backbone:
            self.backbone.requires_grad_(False)
        self.head = nn.Sequential(
            nn.Linear(backbones.width(config.backbone, self.backbone), config.head_size),
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

    @property
    def blank(self) -> Tensor | float:
        """What a masked cell of the features is set to, [M] or a number: about the data's mean."""
        return backbones.blank(self.config.backbone, self.backbone)

    def features(self, waveforms: Tensor) -> Tensor:
        """What the backbone hears of waveforms [B, S] in -1..1 at `sample_rate_hz`: [B, T, M], or [B, S'] for pe_audio.

        Raises ValueError for another shape, or no samples.
        """
        if waveforms.ndim != 2 or waveforms.shape[1] == 0:
            raise ValueError(f"waveforms have shape {tuple(waveforms.shape)}, not [B, S] with S > 0")
        with torch.autocast(waveforms.device.type, enabled=False):
            heard: Tensor = self.mel(fit_length(waveforms.float(), self.config.clip_samples))
        return heard

    def embed_features(self, features: Tensor) -> Tensor:
        """Unit-norm embeddings [B, D] of what `features` returns."""
        return F.normalize(self.head(self._encode(features)[0]).float(), dim=-1)

    def _encode(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return backbones.encode(self.config.backbone, self.backbone, features, self.config.clip_samples, self.mel.hop)

    def parts(self, waveforms: Tensor, count: int) -> Tensor:
        """Unit-norm embeddings [B, 1 + count, D] of waveforms [B, S]: of the whole, then of parts.

        A part is the mean of the backbone's states over a share of the time, through the same head.
        """
        pooled, states = self._encode(self.features(waveforms))
        rows = pooled[:, None]
        if count:
            cells = F.adaptive_avg_pool1d(states.transpose(1, 2), count).transpose(1, 2)
            rows = torch.cat([rows, cells], dim=1)
        return F.normalize(self.head(rows).float(), dim=-1)

    def forward(self, waveforms: Tensor) -> Tensor:
        """Unit-norm embeddings [B, D] of waveforms [B, S] in -1..1 at `sample_rate_hz`."""
        return self.embed_features(self.features(waveforms))


@torch.no_grad()
def mel_statistics(config: AudioEncoderConfig, waveforms: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of the raw log-mel over waveforms [N, S]: for `mel_mean` and `mel_std`."""
    mel = log_mel(config.model_copy(update={"mel_mean": 0.0, "mel_std": 1.0}))(waveforms)
    return float(mel.mean()), float(mel.std())


def _from_scratch(config: AudioEncoderConfig) -> nn.Module:
    if config.backbone == "cnn":
        return ConvBackbone(config.hidden_size, config.num_layers)
    from transformers import ASTConfig, ASTModel

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
    return ASTModel(sizes)
