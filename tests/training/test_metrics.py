"""The metrics against values worked out by hand and definitions written out."""

import math
import subprocess
import sys
from statistics import NormalDist

import numpy as np
import pytest
from transformers import EvalPrediction

from transformers_cat.training import metrics
from transformers_cat.training.metrics import (
    Accuracy,
    DPrime,
    MeanAUC,
    MeanAveragePrecision,
    compute_metrics_for,
    main_metric,
    probabilities,
)

SINGLE, MULTI = "single_label_classification", "multi_label_classification"

# Class 0: ranked positive, negative, positive, negative. Class 1 is never present, class 2 always.
SCORES = np.array([[0.9, 0.1, 0.3], [0.8, 0.2, 0.4], [0.7, 0.3, 0.5], [0.6, 0.4, 0.6]])
TARGETS = np.array([[1.0, 0, 1], [0, 0, 1], [1, 0, 1], [0, 0, 1]])


def test_accuracy():
    assert Accuracy().compute(predictions=[0, 1, 2, 2], references=[0, 1, 1, 2]) == {"accuracy": 0.75}


def test_batches_add_up():
    metric = Accuracy()
    metric.add_batch(predictions=[0, 1, 1], references=[0, 1, 0])
    metric.add_batch(predictions=[1], references=[0])
    assert metric.compute() == {"accuracy": 0.5}


def test_mean_average_precision_leaves_out_and_counts():
    result = MeanAveragePrecision().compute(predictions=SCORES, references=TARGETS)
    assert result == {"mAP": pytest.approx(((1 + 2 / 3) / 2 + 1) / 2), "mAP_classes": 2}


def test_mean_auc_leaves_out_and_counts():
    # Of class 0's four pairs of a positive and a negative, three are in order; class 2 has no negative.
    assert MeanAUC().compute(predictions=SCORES, references=TARGETS) == {"AUC": 0.75, "AUC_classes": 1}


def test_auc_is_the_share_of_ordered_pairs():
    generator = np.random.default_rng(0)
    scores, targets = generator.normal(size=(40, 3)), generator.random((40, 3)) < 0.3
    expected = [
        np.mean([(p > n) + 0.5 * (p == n) for p in s[t] for n in s[~t]])
        for s, t in zip(scores.T, targets.T, strict=True)
    ]
    result = MeanAUC().compute(predictions=scores, references=targets.astype(float))
    assert result["AUC"] == pytest.approx(np.mean(expected), abs=1e-6)


def test_d_prime():
    expected = math.sqrt(2) * NormalDist().inv_cdf(0.75)
    assert DPrime().compute(predictions=SCORES, references=TARGETS)["d_prime"] == pytest.approx(expected)
    assert DPrime().compute(predictions=[[0.0], [1.0]], references=[[0.0], [1.0]])["d_prime"] == math.inf


def test_no_class_has_a_score():
    result = MeanAveragePrecision().compute(predictions=[[0.5]], references=[[0.0]])
    assert math.isnan(result["mAP"]) and result["mAP_classes"] == 0


def test_single_label_function():
    logits = np.array([[3.0, 1, 0], [0, 1, 5], [1, 2, 0]])
    result = compute_metrics_for(SINGLE)(EvalPrediction(predictions=logits, label_ids=np.array([0, 2, 0])))
    assert result == {"accuracy": pytest.approx(2 / 3), "clips": 3}


def test_extra_outputs_are_ignored():
    outputs = (np.array([[3.0, 1], [0, 1]]), np.zeros((2, 7)))
    result = compute_metrics_for(SINGLE)(EvalPrediction(predictions=outputs, label_ids=np.array([0, 1])))
    assert result["accuracy"] == 1


def test_multi_label_function():
    result = compute_metrics_for(MULTI)(EvalPrediction(predictions=SCORES, label_ids=TARGETS))
    assert set(result) == {"mAP", "mAP_classes", "AUC", "AUC_classes", "d_prime", "clips"}
    assert result["clips"] == 4 and result["mAP_classes"] == 2 and result["AUC"] == 0.75


def test_multi_label_function_ranks_each_class_once(monkeypatch):
    """The values are those of the metrics, to the last digit, also of float64 scores."""
    generator = np.random.default_rng(0)
    scores, targets = 1 + 1e-7 * generator.normal(size=(30, 4)), (generator.random((30, 4)) < 0.3).astype(float)
    expected = {}
    for metric in (MeanAveragePrecision(), MeanAUC(), DPrime()):
        expected |= metric.compute(predictions=scores, references=targets)
    ranked = []
    for name in ("average_precision_score", "roc_auc_score"):
        score = getattr(metrics, name)
        monkeypatch.setattr(metrics, name, lambda *args, score=score: ranked.append(score) or score(*args))
    result = compute_metrics_for(MULTI)(EvalPrediction(predictions=scores, label_ids=targets))
    assert result == {**expected, "clips": 30} and len(ranked) == 8


def test_main_metric_is_computed():
    prediction = EvalPrediction(predictions=SCORES, label_ids=TARGETS)
    assert main_metric(MULTI) in compute_metrics_for(MULTI)(prediction)
    prediction = EvalPrediction(predictions=SCORES, label_ids=np.zeros(4, dtype=int))
    assert main_metric(SINGLE) in compute_metrics_for(SINGLE)(prediction)


def test_a_diverged_model_is_reported():
    logits = np.array([[np.nan, 1.0]])
    with pytest.raises(ValueError, match="not finite: the training has diverged"):
        compute_metrics_for(SINGLE)(EvalPrediction(predictions=logits, label_ids=np.array([0])))


def test_unknown_problem_type():
    with pytest.raises(ValueError, match="not 'regression'"):
        compute_metrics_for("regression")


def test_probabilities():
    logits = np.array([[0.0, math.log(3.0)], [-1000.0, 1000.0]])
    np.testing.assert_allclose(probabilities(logits, SINGLE), [[0.25, 0.75], [0, 1]], atol=1e-12)
    np.testing.assert_allclose(probabilities(logits, MULTI), [[0.5, 0.75], [0, 1]], atol=1e-12)
    assert 0 < probabilities([-40.0], MULTI) < 1e-17  # still ranked


def test_works_without_a_network(tmp_path):
    """In a process where opening any connection fails, and with an empty cache."""
    code = (
        "import socket\n"
        "def refuse(*args, **kwargs): raise OSError('network used')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "from transformers_cat.training.metrics import Accuracy\n"
        "metric = Accuracy()\n"
        "metric.add_batch(predictions=[1, 0], references=[1, 1])\n"
        "import pathlib, os\n"
        "print([str(path) for path in pathlib.Path(os.environ['HF_HOME']).rglob('*.arrow')])\n"
        "print(metric.compute())\n"
    )
    environment = {"HF_HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path), "PATH": ""}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.stdout.splitlines() == ["[]", "{'accuracy': 0.5}"], result.stderr  # nothing on disk either
