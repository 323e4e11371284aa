"""Saving, loading and serving through transformers' own doors."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForAudioClassification, AutoProcessor

from transformers_cat import CATConfig, CATFeatureExtractor, CATForAudioClassification, CATModel


def test_a_checkpoint_is_json_and_safetensors(checkpoint):
    assert sorted(path.name for path in checkpoint.iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]


def test_auto_classes_load_the_same_model(checkpoint, real_clips):
    batch = AutoFeatureExtractor.from_pretrained(checkpoint)(real_clips, sampling_rate=32_000, return_tensors="pt")
    model = AutoModelForAudioClassification.from_pretrained(checkpoint)
    assert type(model) is CATForAudioClassification and not model.training
    again = CATForAudioClassification.from_pretrained(checkpoint)
    with torch.no_grad():
        expected = model(**batch)
        torch.testing.assert_close(again(**batch).logits, expected.logits, atol=1e-5, rtol=1e-5)
        body = AutoModel.from_pretrained(checkpoint)
        assert type(body) is CATModel
        torch.testing.assert_close(body(**batch).pooler_output, expected.pooler_output)


def test_the_processor_is_the_feature_extractor(monkeypatch):
    """Of a checkpoint with its code, too, without the question whether to run that."""
    questions = []
    monkeypatch.setattr("builtins.input", lambda question: questions.append(question) or "n")
    assert type(AutoProcessor.from_pretrained("model_cards/cat-nano-esc10")) is CATFeatureExtractor
    assert not questions


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_classifies_alike(checkpoint, real_clips, dtype):
    full = CATForAudioClassification.from_pretrained(checkpoint)
    half = CATForAudioClassification.from_pretrained(checkpoint, dtype=dtype)
    for extractor in (CATFeatureExtractor(), CATFeatureExtractor(do_mrmf=False)):
        batch = extractor(real_clips, sampling_rate=32_000, return_tensors="pt")
        with torch.no_grad():
            expected = full(**batch).logits
            logits = half(batch["input_values"].to(dtype), batch["attention_mask"]).logits
        assert logits.dtype == dtype
        tolerance = 0.03 if dtype == torch.float16 else 0.25
        torch.testing.assert_close(logits.float(), expected, atol=tolerance, rtol=tolerance)


def test_front_end_and_configuration_agree(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    extractor = json.loads((checkpoint / "preprocessor_config.json").read_text())
    for name in ("sampling_rate", "window_lengths", "hop_lengths", "frame_shift", "filters", "num_bins", "f_max"):
        assert config[name] == extractor[name]
    assert CATConfig().feature_size == CATFeatureExtractor().feature_size


def test_importing_loads_no_training_library():
    code = "import sys, transformers_cat; print(*{'datasets', 'evaluate', 'matplotlib'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
