"""Metrics of audio classification as local `evaluate.Metric`s: they need no network and add up over batches."""

from collections.abc import Callable

import datasets
import evaluate
import numpy as np
from datasets import Value
from scipy.special import expit, ndtri, softmax
from sklearn.metrics import accuracy_score, average_precision_score, roc_auc_score

SINGLE_LABEL, MULTI_LABEL = PROBLEM_TYPES = ("single_label_classification", "multi_label_classification")


class _LocalMetric(evaluate.Metric):
    """A metric that keeps its values in memory: no cache files, nothing that two processes could share."""

    description: str
    inputs: str
    value: object

    def __init__(self, **kwargs):
        kwargs.setdefault("keep_in_memory", True)
        super().__init__(**kwargs)

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": self.value, "references": self.value})
        return evaluate.MetricInfo(
            description=self.description, citation="", inputs_description=self.inputs, features=features
        )


class Accuracy(_LocalMetric):
    """Share of the clips whose predicted class is the right one: `{"accuracy"}`."""

    description = "Share of the clips whose predicted class is the right one."
    inputs = "predictions, references: class ids."
    value = Value("int64")

    def _compute(self, predictions, references):
        return {"accuracy": float(accuracy_score(references, predictions))}


class _PerClassMetric(_LocalMetric):
    inputs = "predictions: one score per class, of any scale; references: 1 for the classes of the clip, else 0."
    value = datasets.Sequence(Value("float32"))


class MeanAveragePrecision(_PerClassMetric):
    """Average precision, macro average over the classes that have a positive clip.

    `{"mAP", "mAP_classes"}`; the second is the number of classes that entered the mean.
    """

    description = "Average precision, averaged over the classes with at least one positive clip."

    def _compute(self, predictions, references):
        return _mean_average_precision(predictions, references)


class MeanAUC(_PerClassMetric):
    """Area under the ROC curve, macro average over the classes that have a positive and a negative clip.

    `{"AUC", "AUC_classes"}`; the second is the number of classes that entered the mean.
    """

    description = "Area under the ROC curve, averaged over the classes with positive and negative clips."

    def _compute(self, predictions, references):
        return _mean_auc(predictions, references)


class DPrime(_PerClassMetric):
    """d' = sqrt(2) * Phi^-1(mean AUC), with Phi the normal distribution function: `{"d_prime"}`.

    An AUC of 1 has an infinite d'.
    """

    description = "d-prime, the separation of two unit normals that have the mean AUC."

    def _compute(self, predictions, references):
        return {"d_prime": _d_prime(_mean_auc(predictions, references)["AUC"])}


def compute_metrics_for(problem_type: str) -> Callable:
    """The Trainer's `compute_metrics` for a problem type.

    Returns:
        A function of `EvalPrediction` (logits (n, C) with labels (n,) or (n, C)). Single label: `accuracy`. Multi
        label: `mAP`, `AUC`, `d_prime` and the number of classes behind them. Both: `clips`, the number evaluated.

    Raises:
        ValueError: the problem type is unknown.
    """
    if problem_type not in PROBLEM_TYPES:
        raise ValueError(f"problem_type is one of {PROBLEM_TYPES}, not {problem_type!r}")
    return _single_label_metrics if problem_type == SINGLE_LABEL else _multi_label_metrics


def main_metric(problem_type: str) -> str:
    """The metric by which models of a problem type are compared."""
    return "accuracy" if problem_type == SINGLE_LABEL else "mAP"


def probabilities(logits: np.ndarray, problem_type: str) -> np.ndarray:
    """Class probabilities (n, C) of logits (n, C): softmax for one label per clip, sigmoid for several."""
    logits = np.asarray(logits, dtype=np.float64)
    if problem_type == SINGLE_LABEL:
        return softmax(logits, axis=-1)
    return expit(logits)


def _single_label_metrics(prediction) -> dict[str, float]:
    logits = _logits(prediction)
    result = Accuracy().compute(predictions=logits.argmax(axis=-1), references=prediction.label_ids)
    return {**result, "clips": len(logits)}


def _multi_label_metrics(prediction) -> dict[str, float]:
    logits = _logits(prediction)
    # Not by the metrics' own `compute`: it copies all scores, and each would rank them anew.
    precision, auc = (score(logits, prediction.label_ids) for score in (_mean_average_precision, _mean_auc))
    return {**precision, **auc, "d_prime": _d_prime(auc["AUC"]), "clips": len(logits)}


def _logits(prediction) -> np.ndarray:
    logits = prediction.predictions
    logits = np.asarray(logits[0] if isinstance(logits, tuple) else logits)
    if not np.isfinite(logits).all():
        raise ValueError("The model's outputs are not finite: the training has diverged; lower the learning rate")
    return logits


def _mean_average_precision(predictions, references) -> dict[str, float]:
    scores = _per_class(average_precision_score, predictions, references, needs_negatives=False)
    return {"mAP": _mean(scores), "mAP_classes": len(scores)}


def _mean_auc(predictions, references) -> dict[str, float]:
    scores = _per_class(roc_auc_score, predictions, references, needs_negatives=True)
    return {"AUC": _mean(scores), "AUC_classes": len(scores)}


def _d_prime(mean_auc: float) -> float:
    return float(np.sqrt(2) * ndtri(mean_auc))


def _per_class(score: Callable, predictions, references, needs_negatives: bool) -> list[float]:
    """The score of every class for which it is defined; in float32, as the metrics' batches have it."""
    predictions, references = np.asarray(predictions, dtype=np.float32), np.asarray(references) > 0.5
    usable = references.any(axis=0) & (~references.all(axis=0) if needs_negatives else True)
    return [float(score(references[:, c], predictions[:, c])) for c in np.flatnonzero(usable)]


def _mean(scores: list[float]) -> float:
    return float(np.mean(scores)) if scores else float("nan")
