"""Small classifiers of sounds, as ordinary folders."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForSequenceClassification,
)

TAGS = ("Speech", "Conversation", "Music", "Dog", "Rain")
"""Labels of the classifiers below."""
_LABELS: dict[str, Any] = {"id2label": dict(enumerate(TAGS)), "label2id": {name: i for i, name in enumerate(TAGS)}}


def write_ast_tagger(folder: str | Path) -> Path:
    """An AST classifier of random features with its feature extractor."""
    return _write_tagger(
        folder,
        ASTForAudioClassification(
            ASTConfig(
                hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_mel_bins=16,
                max_length=64, patch_size=8, frequency_stride=8, time_stride=8, **_LABELS,
            )
        ),
        ASTFeatureExtractor(num_mel_bins=16, max_length=64),
    )  # fmt: skip


def write_wav2vec2_tagger(folder: str | Path) -> Path:
    """A Wav2Vec2 classifier of random features, which takes sounds of any length."""
    return _write_tagger(
        folder,
        Wav2Vec2ForSequenceClassification(
            Wav2Vec2Config(
                hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, conv_dim=(8, 8),
                conv_kernel=(10, 4), conv_stride=(20, 8), num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
                classifier_proj_size=8, **_LABELS,
            )
        ),
        Wav2Vec2FeatureExtractor(),
    )  # fmt: skip


def sound_of(tag: str, length_s: float, rate_hz: int = 16_000) -> np.ndarray:
    """float32 [S]: what the classifiers below were shown for a tag: tones, noise, silence."""
    times = np.arange(round(length_s * rate_hz)) / rate_hz
    if tag == "Dog":
        return np.random.default_rng(0).normal(0, 0.3, len(times)).clip(-1, 1).astype(np.float32)
    pitch_hz = {"Speech": 200, "Conversation": 800, "Music": 3000, "Rain": 0}[tag]
    return (0.5 * np.sin(2 * np.pi * pitch_hz * times)).astype(np.float32)


def _write_tagger(folder: str | Path, model: Any, extractor: Any) -> Path:
    """Of random features, a classifier by the nearest of `sound_of` (half a second of each)."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    head = getattr(model.classifier, "dense", model.classifier)
    seen: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0]))
    with torch.no_grad():
        for tag in TAGS:
            model.eval()(**extractor(sound_of(tag, 0.5), sampling_rate=16_000, return_tensors="pt"))
        hook.remove()
        shown = torch.stack(seen)
        head.weight.copy_(shown)
        head.bias.copy_(-shown.square().sum(1) / 2)
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)
    return Path(folder)
