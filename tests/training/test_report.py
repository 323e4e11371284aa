"""Figures and versions: what stands in them, read back from matplotlib's objects."""

import json
import platform

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from transformers_cat.training.report import environment, plot_confusion_matrix, plot_learning_curves

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
