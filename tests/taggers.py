"""Small classifiers of sounds with random weights, as ordinary folders."""

from pathlib import Path
from typing import Any

import torch
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
    """An AST classifier of random weights with its feature extractor."""
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
    """A Wav2Vec2 classifier of random weights, which takes sounds of any length."""
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


def _write_tagger(folder: str | Path, model: Any, extractor: Any) -> Path:
    with torch.no_grad():
        torch.manual_seed(1)
        for parameter in model.parameters():  # as large as it takes for sounds to be told apart
            parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)
    return Path(folder)
