"""The pretrained backbones: the audio towers of transformers' models, each with its own front end.

A folder or hub id may hold the tower alone or the whole model that it is a part of. What it says of sizes and of the
spectrogram is kept with the encoder's settings, so that a bundle needs neither hub nor folder.
"""

import json
import os
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from aai.encoders.frontends import ASTFrontEnd, ClapFrontEnd, PEAudioFrontEnd, WhisperFrontEnd
from aai.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

BackboneName = Literal["ast", "cnn", "whisper", "clap", "pe_audio"]


@dataclass(frozen=True)
class Family:
    """What belongs to one kind of backbone."""

    tower_name: str
    """Class of the audio tower, as `pkgutil.resolve_name` finds it; with all its imports it takes seconds."""
    extractor_name: str
    """Class of the feature extractor that its weights were trained with."""
    front_end: Callable[[Any], nn.Module]
    """The same on the device, made from the extractor."""
    inside: str
    """Regular expression of the tower's place in the names of a whole model's weights."""
    idle: tuple[str, ...] = ()
    """Parts that are not trained; of those that get no gradient, DDP would wait for one."""

    @property
    def tower(self) -> Any:
        """The class of the audio tower."""
        return pkgutil.resolve_name(f"transformers{self.tower_name}")

    @property
    def extractor(self) -> Any:
        """The class of the feature extractor."""
        return pkgutil.resolve_name(f"transformers:{self.extractor_name}")


FAMILIES: dict[BackboneName, Family] = {
    "ast": Family(":ASTModel", "ASTFeatureExtractor", ASTFrontEnd, r"^audio_spectrogram_transformer\."),
    # Whisper's positions are sinusoids; transformers forgets that they are fixed when it loads them.
    "whisper": Family(
        ".models.whisper.modeling_whisper:WhisperEncoder",
        "WhisperFeatureExtractor",
        WhisperFrontEnd,
        r"^(model\.)?encoder\.",
        ("embed_positions",),
    ),
    # The parts that fuse crops of longer sounds: no sound is longer than what the tower takes.
    "clap": Family(
        ":ClapAudioModel", "ClapFeatureExtractor", ClapFrontEnd, r"^audio_model\.", ("fusion_model", "mel_conv2d")
    ),
    # The codec in front of the tower runs without gradients in transformers.
    "pe_audio": Family(
        ":PeAudioEncoder",
        "PeAudioFeatureExtractor",
        PEAudioFrontEnd,
        r"^(audio_model\.)?audio_encoder\.",
        ("dac_encoder", "bottleneck"),
    ),
}


def describe(
    backbone: BackboneName, where: str, revision: str | None, local: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sizes of a folder's or hub id's tower and settings of its feature extractor, as plain JSON; loads no weights.

    local: a hub is not asked; what it gave before may be on this machine.

    Raises UserError for what is not there, is of another kind, or does not fit together.
    """
    from transformers import AutoConfig

    family = FAMILIES[backbone]
    _check_pinned(where, revision)
    with_rule = "holds no readable config.json and preprocessor_config.json"
    try:
        found = AutoConfig.from_pretrained(where, revision=revision, local_files_only=local)
        extractor = family.extractor.from_pretrained(where, revision=revision, local_files_only=local)
    except (OSError, ValueError, KeyError) as error:
        remedy = "give a folder or a reachable hub id; a model's extractor is saved beside it with save_pretrained"
        raise UserError("encoder.pretrained", where, f"{with_rule} ({_first_line(error)})", remedy) from error
    kind, tower = found.model_type, found
    while tower is not None and not isinstance(tower, family.tower.config_class):
        tower = getattr(tower, "audio_config", None)
    if tower is None:
        raise UserError("encoder.backbone", backbone, f"{where} holds a model of the type {kind}", "name its own kind")
    _check_fit(backbone, where, tower, extractor)
    architecture = json.loads(tower.to_json_string(use_diff=False))
    # A layer that is dropped gets no gradient, for which DDP would wait.
    architecture |= {"encoder_layerdrop": 0.0} if backbone == "whisper" else {}
    return {k: v for k, v in architecture.items() if k != "_name_or_path"}, json.loads(extractor.to_json_string())


def build(backbone: BackboneName, architecture: dict[str, Any]) -> nn.Module:
    """A tower of these sizes with random weights."""
    family = FAMILIES[backbone]
    return _without_idle(family, family.tower(family.tower.config_class.from_dict(architecture)))


def load(backbone: BackboneName, architecture: dict[str, Any], where: str, revision: str | None) -> nn.Module:
    """The tower with its pretrained weights in float32. Raises UserError for weights that are absent or do not fit."""
    import transformers

    family = FAMILIES[backbone]
    # A tower of a whole model is loaded with parts left over, which is no notice's worth.
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        tower, report = family.tower.from_pretrained(
            where,
            config=family.tower.config_class.from_dict(architecture),
            revision=revision,
            dtype=torch.float32,
            use_safetensors=True,
            key_mapping={family.inside: ""},
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        rule, remedy = f"cannot be loaded ({_first_line(error)})", "give a folder or a reachable hub id"
        raise UserError("encoder.pretrained", where, rule, remedy) from error
    if absent := sorted(report["missing_keys"]):
        rule = f"lacks {len(absent)} weights of the tower, such as {absent[0]}"
        raise UserError("encoder.pretrained", where, rule, "give a folder with all weights of the model")
    return _without_idle(family, tower)


def front_end(backbone: BackboneName, extractor: dict[str, Any]) -> nn.Module:
    """Waveforms [B, S] -> what the tower takes, [B, T, M] or for pe_audio [B, S']."""
    family = FAMILIES[backbone]
    return family.front_end(family.extractor.from_dict(extractor))


def longest_s(backbone: BackboneName, extractor: dict[str, Any]) -> float:
    """Seconds of sound that the backbone takes at most."""
    found = FAMILIES[backbone].extractor.from_dict(extractor)
    if backbone == "ast":
        return float(found.max_length / 100)
    if backbone == "pe_audio":
        return float("inf")
    return float((found.n_samples if backbone == "whisper" else found.nb_max_samples) / found.sampling_rate)


def encode(
    backbone: BackboneName, tower: nn.Module, features: Tensor, num_samples: int, hop: int
) -> tuple[Tensor, Tensor]:
    """One vector [B, W] for each clip of what the front end gives, and states [B, T, W] in the order of time.

    num_samples, hop: the sound's own samples, and samples between spectra (for whisper, which pads to 30 s).
    """
    states: Tensor
    if backbone == "clap":
        one_channel, longer = features.unsqueeze(1), features.new_zeros(len(features), 1, dtype=torch.bool)
        found = tower(one_channel, is_longer=longer)
        return found.pooler_output, found.last_hidden_state.mean(dim=2).transpose(1, 2)  # [B, W, frequency, time]
    if backbone == "pe_audio":
        found = tower(features.unsqueeze(1))
        return found.pooler_output, found.last_hidden_state
    if backbone == "whisper":
        # One state for two frames; those after the clip's own are left out.
        own = max(1, num_samples // hop // 2)
        states = tower(features.transpose(1, 2)).last_hidden_state[:, :own]
        return states.mean(dim=1), states
    if backbone == "cnn":
        states = tower(features)
        return states.mean(dim=1), states
    states = tower(features).last_hidden_state
    sizes = tower.config
    bands = (sizes.num_mel_bins - sizes.patch_size) // sizes.frequency_stride + 1
    patches = states[:, 2:]  # after the class and the distillation token; frequency is slowest
    return states.mean(dim=1), patches.unflatten(1, (bands, -1)).mean(dim=1)


def blank(backbone: BackboneName, tower: nn.Module) -> Tensor | float:
    """What masked cells of the front end's output are set to: about the mean of the sounds it was trained on."""
    if backbone == "clap":
        mean: Tensor = tower.audio_encoder.batch_norm.running_mean  # type: ignore[assignment, union-attr]
        return mean
    return 0.0


def width(backbone: BackboneName, tower: Any) -> int:
    """Size W of the pooled vector."""
    if backbone == "cnn":
        return int(tower.hidden_size)
    return int(tower.config.d_model if backbone == "whisper" else tower.config.hidden_size)


def _without_idle(family: Family, tower: nn.Module) -> nn.Module:
    for name, parameter in tower.named_parameters():
        if any(part in family.idle for part in name.split(".")):
            parameter.requires_grad_(False)
    return tower


def _check_pinned(where: str, revision: str | None) -> None:
    if not os.path.isdir(where) and not revision:
        raise UserError("encoder.revision", "(missing)", f"hub id {where} is not pinned", "give its commit hash")


def _check_fit(backbone: BackboneName, where: str, tower: "PreTrainedConfig", extractor: Any) -> None:
    """Raises UserError when the extractor gives another shape than the tower takes."""
    if backbone == "ast":
        pairs = {"num_mel_bins": (extractor.num_mel_bins, tower.num_mel_bins)}
        pairs["max_length"] = (extractor.max_length, tower.max_length)
    elif backbone == "whisper":
        pairs = {"feature_size": (extractor.feature_size, tower.num_mel_bins)}
        pairs["chunk_length (in frames)"] = (extractor.nb_max_frames, 2 * tower.max_source_positions)
    elif backbone == "clap":
        pairs = {"feature_size": (extractor.feature_size, tower.num_mel_bins)}
        most, frames = tower.spec_size**2 // tower.num_mel_bins, extractor.nb_max_samples // extractor.hop_length + 1
        pairs["max_length_s (in frames)"] = (frames, min(frames, most))
    else:
        pairs = {"hop_length": (extractor.hop_length, tower.dac_config.hop_length)}
    for name, (given, taken) in pairs.items():
        if given != taken:
            rule = f"its preprocessor_config.json has {name} {given}, its model takes {taken}"
            raise UserError("encoder.pretrained", where, rule, "put the extractor beside the model that it belongs to")


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0][:200]
