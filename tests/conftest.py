"""Fixtures that the tests share: a small model, and real recordings where they are at hand."""

import os
from pathlib import Path

import pytest
import torch

from transformers_cat import CATConfig, CATFeatureExtractor, CATForAudioClassification, load_audio

DATA = Path(os.environ.get("TRANSFORMERS_CAT_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder that holds `esc10`, `urbansound8k` and `fsdd`."""
    if not DATA.is_dir():
        pytest.skip(f"no recordings in {DATA}; set TRANSFORMERS_CAT_DATA to a folder that holds esc10")
    return DATA


@pytest.fixture(scope="session")
def real_clips(data_dir) -> list:
    """Four recordings of ESC-10 at 32 kHz: a dog, rain, a clock and a rooster."""
    names = ("1-100032-A-0", "1-17367-A-10", "1-21934-A-38", "1-26806-A-1")
    return [load_audio(data_dir / "esc10" / "audio" / f"{name}.ogg") for name in names]


def small_config(**overrides) -> CATConfig:
    """A configuration of some 100,000 parameters that has every part of the model."""
    arguments = {
        "embed_dim": 16,
        "depths": (2, 2, 1),
        "num_heads": (2, 4, 8),
        "exchange_dim": 4,
        "depthwise_kernel_size": 3,
        "stem_channels": (8, 8),
        "num_labels": 5,
    }
    return CATConfig(**{**arguments, **overrides})


def awaken(model: torch.nn.Module) -> torch.nn.Module:
    """Gives every parameter a random value, so that no part that starts as zero or one hides from a test."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.fill_(-5.0)
            if name.endswith("running_var"):
                buffer.fill_(9.0)
    return model


@pytest.fixture
def small_model() -> CATForAudioClassification:
    """A small model in evaluation mode with random values in every parameter."""
    torch.manual_seed(0)
    return awaken(CATForAudioClassification(small_config())).eval()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """Folder of a saved small model with its feature extractor, to read from only."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    names = ["dog", "rain", "clock", "rooster", "crying"]
    config = small_config(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})
    awaken(CATForAudioClassification(config)).eval().save_pretrained(folder)
    CATFeatureExtractor().save_pretrained(folder)
    return folder


@pytest.fixture
def poisoned_memory():
    """Memory that nobody has written to holds NaN and the largest integers, not the zeros of a fresh page."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
