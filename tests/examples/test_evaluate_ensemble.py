"""Ensembles of models of different kinds, of score files, and of a stand-in for PANNs."""

import importlib
import json
import shutil
import sys
import types
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from datasets import DatasetDict
from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

from tests.conftest import small_config
from transformers_cat import CATFeatureExtractor, CATForAudioClassification, load_audio
from transformers_cat.training import load_audio_dataset, read_scores
from transformers_cat.training.ensemble import panns_scores, pipeline_scores

NAMES = ["dog", "rain"]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    monkeypatch.delitem(sys.modules, "evaluate_ensemble", raising=False)
    return importlib.import_module("evaluate_ensemble")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four short clips of noise in two folds, a CAT at 32 kHz and an AST at 16 kHz whose classes are exchanged."""
    folder = tmp_path_factory.mktemp("ensemble")
    generator = np.random.default_rng(0)
    lines = ["audio,label,fold"]
    for i in range(4):
        soundfile.write(folder / f"{i}.wav", generator.normal(0, 0.1, 8000 + 400 * i), 32_000)
        lines.append(f"{i}.wav,{NAMES[i % 2]},{i // 2 + 1}")
    (folder / "clips.csv").write_text("\n".join(lines) + "\n")
    torch.manual_seed(0)
    CATForAudioClassification(small_config(num_labels=2, id2label=dict(enumerate(NAMES)))).save_pretrained(
        folder / "cat"
    )
    CATFeatureExtractor().save_pretrained(folder / "cat")
    ast = ASTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_length=64,
        num_mel_bins=32,
        id2label=dict(enumerate(NAMES[::-1])),
    )
    ASTForAudioClassification(ast).save_pretrained(folder / "ast")
    ASTFeatureExtractor(max_length=64, num_mel_bins=32).save_pretrained(folder / "ast")
    return folder


def test_models_of_different_kinds(script, folder, tmp_path):
    models = [str(folder / "cat"), str(folder / "ast")]
    results = script.main(["--data", f"{folder}/clips.csv", "--models", *models, "--output_dir", str(tmp_path)])
    assert list(results) == [*models, "ensemble"]
    expected = []
    for path, kind, extractor in (
        ("cat", CATForAudioClassification, CATFeatureExtractor),
        ("ast", ASTForAudioClassification, ASTFeatureExtractor),
    ):
        model, front_end = kind.from_pretrained(folder / path).eval(), extractor.from_pretrained(folder / path)
        rate, rows = front_end.sampling_rate, []
        for i in range(4):
            batch = front_end(load_audio(folder / f"{i}.wav", rate), sampling_rate=rate, return_tensors="pt")
            with torch.no_grad():
                rows.append(model(**batch).logits[0].softmax(-1).numpy())
        own = list(model.config.id2label.values())
        expected.append(np.array(rows)[:, [own.index(name) for name in NAMES]])
    written = read_scores(tmp_path / "predictions.csv")
    assert written.names == NAMES and written.folds == [1, 1, 2, 2]
    np.testing.assert_allclose(written.values, np.mean(expected, axis=0), atol=1e-5)
    assert results["ensemble"]["mean"] == pytest.approx(np.mean(list(results["ensemble"]["folds"].values())))
    saved = json.loads((tmp_path / "results.json").read_text())["results"]
    assert saved["ensemble"]["metrics"] == results["ensemble"]["metrics"]

    # The same from the files that were left, without any model.
    files = ["--scores", str(tmp_path / "predictions.csv"), "--output_dir", str(tmp_path / "again")]
    assert script.main(files)["ensemble"] == results["ensemble"]


def test_prepared_clips_are_in_folds_too(script, folder, tmp_path, monkeypatch):
    """They come as the one split `train`."""
    prepared = DatasetDict(train=load_audio_dataset(folder / "clips.csv"))
    monkeypatch.setattr(script, "load_audio_dataset", lambda _, multi_label: prepared)
    command = ["--data", "prepared", "--models", str(folder / "cat"), "--output_dir", str(tmp_path)]
    script.main([*command, "--test_folds", "2"])
    assert read_scores(tmp_path / "predictions.csv").folds == [2, 2]


def test_the_kind_of_problem_is_for_the_clips_too(script, folder, tmp_path):
    """Of which some may then have no label, though none has several."""
    rows = ["audio,label", *(f"{folder}/{i}.wav,{label}" for i, label in enumerate((*NAMES, "")))]
    (table := tmp_path / "clips.csv").write_text("\n".join(rows))
    command = ["--data", str(table), "--models", str(folder / "cat"), "--output_dir", str(tmp_path / "out")]
    script.main([*command, "--problem_type", "multi_label_classification"])
    assert read_scores(tmp_path / "out" / "predictions.csv").labels == [["dog"], ["rain"], []]


def test_folds_are_those_of_data(script, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.main(["--scores", "a.csv", "--test_folds", "1", "--output_dir", str(tmp_path)])
    assert "--test_folds chooses the clips of --data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("run", "flags", "message"),
    [
        ({"test_folds": [1]}, [], r"was trained on the folds \[2\] of these data; choose others by --test_folds"),
        ({"test_folds": [1]}, ["--test_folds", "1"], None),
        ({"test_folds": [3], "validation_folds": [1]}, ["--test_folds", "1"], None),
        ({}, ["--test_folds", "1"], r"on the folds \[1\]"),
        ({"source": "others"}, [], "on these clips"),
        ({"source": "others"}, ["--test_folds", "1"], None),
        ({"do_train": False}, [], None),
        ({"test_folds": [1], "folds": "others"}, ["--test_folds", "1"], "folds of these data were changed after"),
        ({"source": "others", "tested": "the same"}, [], None),
    ],
)
def test_clips_of_the_training_are_refused(script, folder, tmp_path, run, flags, message):
    """By the folds that the run did not hold out, also of a copy, or by the fingerprint of its training clips.

    Unless the clips that it was tested on had the same: files of one size in two folders, numbered in both.
    """
    clips = load_audio_dataset(folder / "clips.csv")
    results = {
        "arguments": {
            "data": {"data": "prepared", "test_folds": None, "validation_folds": None, **run},
            "training": {"do_train": True, **run},
        },
        "fingerprints": dict.fromkeys(["train", *["test"] * ("tested" in run)], script.data_fingerprint(clips)),
        "folds": run.get("folds", script.data_fingerprint(clips, sizes=False, folds=True)),
        "source": run.get("source", script.data_fingerprint(clips, sizes=False)),
    }
    model = shutil.copytree(folder / "cat", tmp_path / "model")
    (model / "results.json").write_text(json.dumps(results))
    command = ["--data", f"{folder}/clips.csv", "--models", str(model), "--output_dir", str(tmp_path), *flags]
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        script.main(command)


def test_other_classes_are_refused(script, folder, tmp_path):
    (tmp_path / "pann.csv").write_text("path,Dog,rain\n" + "".join(f"{i}.wav,0.5,0.5\n" for i in range(4)))
    command = ["--data", f"{folder}/clips.csv", "--models", str(folder / "cat"), "--scores", str(tmp_path / "pann.csv")]
    with pytest.raises(ValueError, match="1 lacking: Dog; 1 more: dog"):
        script.main([*command, "--output_dir", str(tmp_path)])


def test_several_labels_have_sigmoids(folder):
    from transformers import pipeline

    classifier = pipeline("audio-classification", model=str(folder / "cat"))
    clips = load_audio_dataset(folder / "clips.csv")
    several = pipeline_scores(classifier, clips, "multi_label_classification").values
    one = pipeline_scores(classifier, clips, "single_label_classification").values
    odds = several / (1 - several)
    np.testing.assert_allclose(one[:, 0] / one[:, 1], odds[:, 0] / odds[:, 1], rtol=1e-4)
    np.testing.assert_allclose(one.sum(axis=1), 1, rtol=1e-5)
    classifier.model.config.problem_type = "regression"
    with pytest.raises(ValueError, match="cat gives no probabilities: its problem type is 'regression'"):
        pipeline_scores(classifier, clips, "single_label_classification")


def test_panns(folder, script, tmp_path, monkeypatch):
    """With a stand-in of the package's interface, since its weights are a download."""
    heard = []

    class AudioTagging:
        def __init__(self, model=None, checkpoint_path=None, device="cuda"):
            assert checkpoint_path == "weights.pth"

        def inference(self, audio):
            heard.append(audio)
            return np.array([[0.25, 0.75]], dtype=np.float32), np.zeros((1, 2048))

    stand_in = types.SimpleNamespace(AudioTagging=AudioTagging, labels=NAMES)
    monkeypatch.setitem(sys.modules, "panns_inference", stand_in)
    command = ["--data", f"{folder}/clips.csv", "--panns", "weights.pth", "--output_dir", str(tmp_path)]
    assert script.main(command)["PANNs CNN14"]["metrics"] == {"accuracy": 0.5, "clips": 4}
    assert all(clip.dtype == np.float32 and clip.shape[0] == 1 for clip in heard)
    assert [clip.shape[1] for clip in heard] == [10_240] * 4  # the shortest that the network takes
    monkeypatch.setitem(sys.modules, "panns_inference", None)
    with pytest.raises(ImportError, match=r"pip install -e .\.\[panns\]"):
        panns_scores(load_audio_dataset(folder / "clips.csv"))
