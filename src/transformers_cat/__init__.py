"""Causal Audio Transformer (CAT) for Hugging Face Transformers.

Importing the package registers the model with the `Auto*` classes and so with `pipeline`.
"""

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioClassification,
    AutoProcessor,
)

from .audio import load_audio
from .cards import model_card
from .configuration_cat import CATConfig
from .feature_extraction_cat import CATFeatureExtractor
from .hub import include_code, push_to_hub
from .modeling_cat import CATForAudioClassification, CATModel, CATPreTrainedModel
from .mrmf import MRMFSpectrogram
from .why import explain

__version__ = "0.1.0"

AutoConfig.register(CATConfig.model_type, CATConfig, exist_ok=True)
AutoFeatureExtractor.register(CATConfig, CATFeatureExtractor, exist_ok=True)
# Otherwise it looks for a tokenizer and an image processor first, and asks whether to run the code of a checkpoint.
AutoProcessor.register(CATConfig, CATFeatureExtractor, exist_ok=True)
AutoModel.register(CATConfig, CATModel, exist_ok=True)
AutoModelForAudioClassification.register(CATConfig, CATForAudioClassification, exist_ok=True)

__all__ = [
    "CATConfig",
    "CATFeatureExtractor",
    "CATForAudioClassification",
    "CATModel",
    "CATPreTrainedModel",
    "MRMFSpectrogram",
    "explain",
    "include_code",
    "load_audio",
    "model_card",
    "push_to_hub",
]
