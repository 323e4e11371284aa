"""Exported graphs against the model: any batch, any length, real recordings, and nothing but numpy."""

import importlib.util
import json
import re
import textwrap
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from tests.conftest import awaken, small_config
from transformers_cat import CATConfig, CATFeatureExtractor, CATForAudioClassification
from transformers_cat.export import FILES, INPUTS, export, load_graph

ROOT = Path(__file__).parents[1]
LENGTHS = [(1,), (319,), (5_120,), (5_121, 1), (32_000, 31_999, 7_777), (64_001, 163_840)]  # samples


def make_model(**overrides) -> CATForAudioClassification:
    torch.manual_seed(0)
    return awaken(CATForAudioClassification(small_config(**overrides))).eval()


def noise(num_samples: int) -> np.ndarray:
    return np.random.default_rng(num_samples).normal(0, 0.1, num_samples).astype(np.float32)


@torch.no_grad()
def assert_equal_outputs(folder: Path, model: CATForAudioClassification, clips: list[np.ndarray]) -> None:
    """Each clip within the batch by the graph as well as alone by the model."""
    extractor = CATFeatureExtractor.from_pretrained(folder)
    (path,) = folder.glob("model.*")
    batch = extractor(clips, sampling_rate=32_000, return_tensors="pt")
    outputs = load_graph(path)(batch["input_values"], batch["attention_mask"])
    for i, clip in enumerate(clips):
        alone = model(**extractor(clip, sampling_rate=32_000, return_tensors="pt"), output_frame_logits=True)
        steps = alone.frame_logits.shape[1]
        expected = {
            "probabilities": alone.logits.softmax(-1),
            "logits": alone.logits,
            "embeddings": alone.pooler_output,
            "frame_logits": alone.frame_logits,
        }
        for name, value in expected.items():
            got = outputs[name][i, :steps] if name == "frame_logits" else outputs[name][i]
            torch.testing.assert_close(got, value[0], atol=1e-4, rtol=1e-4, msg=lambda m: f"{name}: {m}")
        assert outputs["token_mask"][i].tolist() == [step < steps for step in range(outputs["token_mask"].shape[1])]


KINDS = [
    pytest.param((format, inputs), id=f"{format}-{inputs}", marks=pytest.mark.slow if slow else ())
    for format, inputs, slow in (
        ("onnx", "waveform", False),
        ("torch_export", "features", False),
        ("onnx", "features", True),
        ("torch_export", "waveform", True),
    )
]


@pytest.fixture(scope="module", params=KINDS)
def exported(request, tmp_path_factory):
    """A folder and its model."""
    if request.param[0] == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    model = make_model()
    folder = tmp_path_factory.mktemp("export")
    export(model, folder, inputs=request.param[1], format=request.param[0])
    return folder, model


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_graph_computes_what_the_model_does(exported, lengths):
    assert_equal_outputs(*exported, [noise(length) for length in lengths])


def test_graph_agrees_on_real_recordings(exported, real_clips):
    assert_equal_outputs(*exported, [real_clips[0], real_clips[1][:50_001], real_clips[2][:100]])
    assert_equal_outputs(*exported, [real_clips[3][:77_777]])


def test_folder_names_labels_rate_and_problem(exported):
    folder, model = exported
    config = json.loads((folder / "config.json").read_text())
    assert config["problem_type"] == "single_label_classification"
    assert config["id2label"] == {str(i): label for i, label in model.config.id2label.items()}
    assert json.loads((folder / "preprocessor_config.json").read_text())["sampling_rate"] == 32_000
    assert len(list(folder.iterdir())) == 3
    assert str(ROOT).encode() not in next(folder.glob("model.*")).read_bytes()  # nothing of the machine


def test_export_leaves_the_model_as_it_was(exported):
    model = exported[1]
    assert model.reconstruction is not None and model.config.problem_type is None
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_pre_hooks for module in model.modules())
