"""Figures and versions: what stands in them, read back from matplotlib's objects."""

import csv
import json
import platform
import subprocess

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from transformers_cat.training import Scores, read_csv
from transformers_cat.training.metrics import PROBLEM_TYPES
from transformers_cat.training.report import (
    data_fingerprint,
    environment,
    git_state,
    per_class_scores,
    plot_confusion_matrix,
    plot_learning_curves,
    plot_means,
    refuse_changes,
    remember,
    write_history,
    write_predictions,
)

HISTORY = [
    {"epoch": 1.0, "loss": 2.0, "learning_rate": 1e-3},
    {"epoch": 1.0, "eval_loss": 1.8, "eval_accuracy": 0.4},
    {"epoch": 2.0, "loss": 1.0, "learning_rate": 1e-4},
    {"epoch": 2.0, "eval_loss": 0.9, "eval_accuracy": 0.7},
    {"epoch": 2.0, "train_runtime": 1.0, "train_loss": 1.5},
]


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    saved, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: saved.append(self) or save(self, *args, **kw))
    return saved


def test_learning_curves(tmp_path, figures):
    path = plot_learning_curves(HISTORY, tmp_path / "curve.png")
    upper, lower = figures[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in upper.lines}
    assert lines == {"training": [[1, 2.0], [2, 1.0]], "evaluation": [[1, 1.8], [2, 0.9]]}
    assert lower.lines[0].get_xydata().tolist() == [[1, 0.4], [2, 0.7]]
    assert (upper.get_ylabel(), lower.get_ylabel(), lower.get_xlabel()) == ("loss", "accuracy (evaluation)", "epoch")
    with Image.open(path) as image:
        assert min(image.size) > 800


def test_learning_curves_without_evaluation(tmp_path, figures):
    plot_learning_curves([{"epoch": 1.0, "loss": 2.0}], tmp_path / "curve.png", metric="mAP")
    assert [line.get_label() for line in figures[0].axes[0].lines] == ["training"]


def test_learning_curves_below_zero(tmp_path, figures):
    """Where a causal loss, which may be negative, is the larger part."""
    plot_learning_curves([{"epoch": 1.0, "loss": 0.1}, {"epoch": 2.0, "loss": -0.3}], tmp_path / "curve.png")
    low, high = figures[0].axes[0].get_ylim()
    assert low <= -0.3 and high >= 0.1


def test_learning_curves_of_nothing(tmp_path):
    with pytest.raises(ValueError, match="neither loss nor eval_loss"):
        plot_learning_curves([{"epoch": 1.0, "train_runtime": 3.0}], tmp_path / "curve.png")


def test_confusion_matrix(tmp_path, figures):
    path = plot_confusion_matrix([0, 0, 0, 1, 1], [0, 0, 1, 1, 1], ["dog", "cat", "emu"], tmp_path / "matrix.png")
    axes = figures[0].axes[0]
    shares = np.asarray(axes.images[0].get_array())
    np.testing.assert_allclose(shares, [[2 / 3, 1 / 3, 0], [0, 1, 0], [0, 0, 0]])  # rows are true classes
    counts = {text.get_position(): text.get_text() for text in axes.texts}
    assert counts == {(0, 0): "2", (1, 0): "1", (1, 1): "2"}  # (predicted, true)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["dog", "cat", "emu"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    assert path.stat().st_size > 0


@pytest.mark.parametrize("name", ["cash_$_register_$", "US$ and AU$"])
def test_names_are_no_formulas(tmp_path, name):
    assert plot_confusion_matrix([0, 1], [0, 1], [name, "dog"], tmp_path / "matrix.png").stat().st_size > 0
    values = {name: {name: (0.5, None)}, "dog": {name: (0.5, 0.1)}}
    assert plot_means(values, tmp_path / "means.png", "accuracy").stat().st_size > 0


def test_confusion_matrix_of_many_classes_has_no_counts(tmp_path, figures):
    labels = np.arange(50)
    plot_confusion_matrix(labels, labels, [f"class {i}" for i in labels], tmp_path / "matrix.png")
    assert not figures[0].axes[0].texts


def test_environment():
    versions = environment()
    assert versions["python"] == platform.python_version()
    assert torch.__version__.startswith(versions["torch"])
    assert "transformers" in versions
    json.dumps(versions)


SCORES = Scores(
    paths=["a.wav", "b.wav", "c.wav"],
    names=["dog", "cat", "emu"],
    values=np.array([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1]]),
    labels=[["dog"], ["cat"], ["cat"]],
)


def test_scores_of_each_class():
    dog, cat, emu = per_class_scores(SCORES, PROBLEM_TYPES[0])
    assert dog == {"class": "dog", "clips": 1, "accuracy": 1.0, "average_precision": 1.0, "AUC": 1.0}
    assert cat == {"class": "cat", "clips": 2, "accuracy": 0.5, "average_precision": 1.0, "AUC": 1.0}
    assert emu == {"class": "emu", "clips": 0, "accuracy": None, "average_precision": None, "AUC": None}
    assert "accuracy" not in per_class_scores(SCORES, PROBLEM_TYPES[1])[0]


def test_predictions(tmp_path):
    write_predictions(SCORES, PROBLEM_TYPES[0], tmp_path)
    matrix = list(csv.reader((tmp_path / "confusion_matrix.csv").open(newline="")))
    assert matrix == [
        ["class", "dog", "cat", "emu"],
        ["dog", "1", "0", "0"],
        ["cat", "1", "1", "0"],
        ["emu", "0", "0", "0"],
    ]
    assert {path.name for path in tmp_path.iterdir()} == {
        "predictions.csv",
        "per_class.csv",
        "confusion_matrix.csv",
        "confusion_matrix.png",
    }


def test_history_has_a_row_for_each_epoch(tmp_path):
    rows = list(csv.DictReader(write_history(HISTORY, tmp_path / "history.csv").open(newline="")))
    assert [(row["epoch"], row["loss"], row["eval_accuracy"]) for row in rows] == [
        ("1.0", "2.0", "0.4"),
        ("2.0", "1.0", "0.7"),
    ]


def test_fingerprint_is_of_the_data_alone(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for name in "ab":
            (tmp_path / folder / f"{name}.wav").write_bytes(name.encode() * 9)
        (tmp_path / folder / "clips.csv").write_text("audio,label\na.wav,x\nb.wav,y\n")
    one, two = (read_csv(tmp_path / folder / "clips.csv") for folder in ("one", "two"))
    assert data_fingerprint(one) == data_fingerprint(two) == data_fingerprint(one.select([1, 0]))
    assert data_fingerprint(one) != data_fingerprint(one.select([0]))
    (tmp_path / "two" / "b.wav").write_bytes(b"longer than before")
    assert data_fingerprint(one) != data_fingerprint(two)
    in_folds, otherwise = (one.add_column("fold", folds) for folds in ([1, 2], [2, 1]))
    assert data_fingerprint(in_folds) == data_fingerprint(otherwise) == data_fingerprint(one, folds=True)
    assert data_fingerprint(in_folds, folds=True) == data_fingerprint(in_folds.select([1, 0]), folds=True)
    assert data_fingerprint(in_folds, folds=True) != data_fingerprint(otherwise, folds=True)


def test_git_state(tmp_path):
    file = tmp_path / "code.py"
    file.write_text("")
    assert git_state(file) is None
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "code.py"], [*identity, "commit", "-q", "-m", "x"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    state = git_state(file)
    assert len(state["commit"]) == 40 and state["dirty"] is False
    file.write_text("changed")
    assert git_state(file) == {**state, "dirty": True}
    (tmp_path / "untracked.py").write_text("")
    assert git_state(tmp_path / "untracked.py") is None  # as a package installed into a checkout's environment


def test_means_are_where_their_values_are(tmp_path, figures):
    values = {"plain": {"AST": (0.5, 0.1), "CAT": (0.6, None)}, "all": {"AST": (0.7, 0.1), "CAT": (0.8, 0.1)}}
    plot_means(values, tmp_path / "means.png", "accuracy, %")
    axes = figures[0].axes[0]
    assert [text.get_text() for text in axes.texts] == ["50.0", "70.0", "60.0", "80.0"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["plain", "all"]


class TestRemember:
    def test_other_settings_are_refused_by_name(self, tmp_path):
        path = tmp_path / "flags.json"
        remember({"rate": 1e-3, "folds": (1, 2), "seed": 0}, path)
        written = path.read_text()
        remember({"rate": 1e-3, "folds": [1, 2], "new": True}, path)
        with pytest.raises(
            ValueError, match=r"\(before, now\): \{'rate': \(0.001, 0.01\)\}. Choose another --output_dir"
        ):
            refuse_changes({"rate": 1e-2, "folds": (1, 2), "seed": 0}, path)
        assert path.read_text() == written

    @pytest.mark.parametrize(
        "given", ["--token hf_x", "--token=hf_x", "--hub_token hf_x", "--hub-token=hf_x", "--tok hf_x"]
    )
    def test_tokens_are_neither_written_nor_compared(self, tmp_path, given):
        path, flags = tmp_path / "flags.json", ["--seed", "1", *given.split(), "--folds", "1", "-2"]
        remember({"flags": flags}, path)
        assert json.loads(path.read_text()) == {"flags": ["--seed", "1", "--folds", "1", "-2"]}
        path.write_text(json.dumps({"flags": flags}))  # as one was written that kept them
        remember({"flags": ["--seed", "1", "--folds", "1", "-2", "--token", "hf_y"]}, path)
        with pytest.raises(ValueError) as refusal:
            remember({"flags": ["--seed", "2", *given.split()]}, path)
        assert "hf_" not in str(refusal.value)
