"""Small random foundation models, loaded once for all test files that need them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # the libraries take seconds: only the tests that use a fixture pay for them
    from diffusers import StableDiffusionPipeline

    from aai.foundation.identity import FoundationSpec
    from aai.painter import Painter


@pytest.fixture(scope="session")
def pipe(spec: FoundationSpec) -> StableDiffusionPipeline:
    """The pipeline of `spec`; tests leave it as it is."""
    from aai.foundation.loaders import load_diffusion

    return load_diffusion(spec)


@pytest.fixture(scope="session")
def painter(spec: FoundationSpec, pipe: StableDiffusionPipeline) -> Painter:
    """A painter with random weights, two tokens a sound and a small vocabulary."""
    import torch

    from aai.adapt import AdapterConfig, AudioAdapter
    from aai.concepts import Vocabulary
    from aai.encoders.audio import AudioEncoder, AudioEncoderConfig
    from aai.painter import Painter

    torch.manual_seed(0)
    aligner = AudioEncoder(AudioEncoderConfig(hidden_size=32, num_layers=1, num_heads=2, head_size=32, embed_dim=32))
    adapter = AudioAdapter(AdapterConfig(num_tokens=2, hidden_size=32, embed_dim=32, token_dim=32), 1.0)
    vocabulary = Vocabulary(objects=("a dog", "a bell", "a clock"), ambiences=("at night", "in the rain"))
    return Painter(pipe, aligner.eval(), adapter.eval(), spec, vocabulary)
