"""Exported graphs against the model: any batch, any length, real recordings, and nothing but numpy."""

import importlib
import json
import re
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from tests.conftest import awaken, small_config
from transformers_cat import CATConfig, CATFeatureExtractor, CATForAudioClassification
from transformers_cat.export import TOLERANCE, ExportedModel, compare, export, load_graph

ROOT = Path(__file__).parents[1]
LENGTHS = [(1,), (319,), (5_120,), (5_121, 1), (32_000, 31_999, 7_777), (64_001, 163_840)]  # samples


def make_model(**overrides) -> CATForAudioClassification:
    torch.manual_seed(0)
    return awaken(CATForAudioClassification(small_config(**overrides))).eval()


def noise(num_samples: int) -> np.ndarray:
    return np.random.default_rng(num_samples).normal(0, 0.1, num_samples).astype(np.float32)


@torch.no_grad()
def assert_equal_outputs(folder: Path, model: CATForAudioClassification, graph, clips: list[np.ndarray]) -> None:
    """What the graph makes of a batch is what the model makes of each clip alone."""
    extractor = CATFeatureExtractor.from_pretrained(folder)
    batch = extractor(clips, sampling_rate=32_000, return_tensors="pt")
    outputs = graph(batch["input_values"], batch["attention_mask"])
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
            torch.testing.assert_close(got, value[0], atol=1e-4, rtol=1e-4)
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
    """A folder, the model that it was made of, and the graph that it holds."""
    if request.param[0] == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    # So that one graph of each format has them, too.
    of_waveforms = request.param[1] == "waveform"
    model = make_model(normalize_volume=of_waveforms, whitening=0.5 * of_waveforms)
    model.config.auto_map = {"AutoConfig": "configuration_cat.CATConfig"}  # as a checkpoint with its code has it
    folder = tmp_path_factory.mktemp("export")
    export(model, folder, inputs=request.param[1], format=request.param[0])
    (path,) = folder.glob("model.*")
    return folder, model, load_graph(path)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_graph_computes_what_the_model_does(exported, lengths):
    assert_equal_outputs(*exported, [noise(length) for length in lengths])


def test_graph_agrees_on_real_recordings(exported, real_clips):
    assert_equal_outputs(*exported, [real_clips[0], real_clips[1][:50_001], real_clips[2][:100]])
    assert_equal_outputs(*exported, [real_clips[3][:77_777]])


def test_folder_names_labels_rate_and_problem(exported):
    folder, model, _ = exported
    config = json.loads((folder / "config.json").read_text())
    assert config["problem_type"] == "single_label_classification"
    assert config["id2label"] == {str(i): label for i, label in model.config.id2label.items()}
    assert json.loads((folder / "preprocessor_config.json").read_text())["sampling_rate"] == 32_000
    assert len(list(folder.iterdir())) == 3 and "auto_map" not in config  # which names files beside a checkpoint
    assert str(ROOT).encode() not in next(folder.glob("model.*")).read_bytes()  # nothing of the machine


def test_export_leaves_the_model_as_it_was(exported):
    model = exported[1]
    assert model.reconstruction is not None and model.config.problem_type is None
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    "overrides",
    [
        {"window_size": None, "patch_size": (16, 16), "depths": (2,), "num_heads": (4,)},
        {"filters": ("mel",), "window_lengths": (800,), "hop_lengths": (320,), "depths": (2, 1), "num_heads": (2, 4)},
        {"patch_size": (1, 64), "depths": (1,), "num_heads": (4,), "return_dict": False},
    ],
    ids=["global_attention", "one_spectrogram", "the_papers_patch"],
)
def test_other_architectures_export(tmp_path, overrides):
    model = make_model(stem_channels=(), reconstruction_loss_weight=0.0, **overrides)
    export(model, tmp_path, inputs="features", format="torch_export")
    model.config.return_dict = True
    assert_equal_outputs(tmp_path, model, load_graph(tmp_path / "model.pt2"), [noise(1), noise(99_999), noise(40_000)])


@pytest.mark.parametrize(
    ("overrides", "function"),
    [
        ({}, lambda logits: logits.softmax(-1)),
        ({"problem_type": "multi_label_classification"}, torch.sigmoid),
        ({"problem_type": "regression"}, None),
        ({"num_labels": 1}, None),
    ],
    ids=["single_label", "multi_label", "regression", "one_label"],
)
def test_probabilities_follow_the_problem_type(overrides, function):
    model = make_model(depths=(1,), num_heads=(2,), **overrides)
    outputs = ExportedModel(model, "sdpa")(torch.randn(2, 77, 384), torch.ones(2, 77, dtype=torch.int32))
    assert ("probabilities" in outputs) == (function is not None)
    if function is not None:
        torch.testing.assert_close(outputs["probabilities"], function(outputs["logits"]))


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cat-nano", "cat-tiny"])
def test_sizes_of_the_model_cards_run_on_real_recordings(tmp_path, real_clips, config):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model = CATForAudioClassification(CATConfig.from_pretrained(ROOT / "model_cards" / config, num_labels=7))
    export(awaken(model).eval(), tmp_path, clips=real_clips[:2])
    assert_equal_outputs(tmp_path, model, load_graph(tmp_path / "model.onnx"), [real_clips[2], real_clips[3][:77_777]])


def test_a_wrong_graph_is_refused():
    exported = ExportedModel(make_model(), "sdpa")
    batch = torch.randn(2, 77, 384), torch.ones(2, 77, dtype=torch.int32)
    assert compare(exported, exported, [batch])["logits"] == 0

    def other(change):
        return lambda *inputs: {name: change(output.float()) for name, output in exported(*inputs).items()}

    for change in (lambda x: x + 10 * TOLERANCE * x.abs().max(), lambda x: x * float("nan"), lambda x: x[:, 1:]):
        with pytest.raises(RuntimeError, match=r"(?s)inputs of shape \(2, 77, 384\).*differs"):
            compare(exported, other(change), [batch])


@pytest.mark.parametrize("arguments", [{"inputs": "wave"}, {"format": "tflite"}])
def test_unknown_choices_are_named(small_model, tmp_path, arguments):
    with pytest.raises(ValueError, match=f"not '{next(iter(arguments.values()))}'"):
        export(small_model, tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


def test_the_folder_of_a_model_is_refused(small_model, tmp_path):
    small_model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="holds a model, whose configurations would be overwritten"):
        export(small_model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_missing_packages_are_named_first(small_model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"onnxruntime.*pip install -e .\.\[export\]"):
        export(small_model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_script_and_the_ten_lines_of_its_docstring(tmp_path, monkeypatch, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.delitem(sys.modules, "export", raising=False)
    script = importlib.import_module("export")
    monkeypatch.chdir(tmp_path)
    model = make_model(depths=(1,), num_heads=(2,), stem_channels=())
    model.config.id2label = {i: f"sound {i}" for i in range(5)}
    model.save_pretrained("runs/esc10")
    soundfile.write("dog.wav", noise(48_001), 32_000, subtype="FLOAT")
    script.main(re.search(r"python examples/export.py (.*)", script.__doc__)[1].split())
    said = capsys.readouterr().out
    assert re.search(r"probabilities +\d\.\de-\d\d", said)

    snippet = textwrap.dedent(
        script.__doc__[script.__doc__.index("    import json") : script.__doc__.index("Of clips")]
    )
    exec(snippet, {})
    index = int(model(torch.from_numpy(noise(48_001))[None]).logits.argmax())
    assert capsys.readouterr().out.startswith(f"sound {index} 0.")
    session = onnxruntime.InferenceSession("runs/esc10-onnx/model.onnx")
    assert [value.shape for value in session.get_inputs()] == [["batch", "length"]] * 2


def test_the_graph_is_checked_on_the_clips_that_are_given(tmp_path, monkeypatch):
    checked = []
    monkeypatch.setattr("transformers_cat.export.compare", lambda exported, graph, batches: checked.extend(batches))
    model = make_model(depths=(1,), num_heads=(2,), stem_channels=())
    export(model, tmp_path, inputs="features", format="torch_export", clips=[noise(12_345)])
    features, mask = checked[-1]
    assert features.shape == (2, 39, 384) and mask.sum(1).tolist() == [39, 13]
