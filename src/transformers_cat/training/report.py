"""What a run leaves behind for people: learning curves, a confusion matrix, the versions it ran with."""

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import confusion_matrix

PACKAGES = (
    "transformers-cat",
    "torch",
    "torchaudio",
    "transformers",
    "datasets",
    "evaluate",
    "accelerate",
    "soundfile",
    "scikit-learn",
    "numpy",
)
_MAX_COUNTED_CLASSES = 20  # with more classes the numbers in the cells are too small to read


def plot_learning_curves(log_history: Sequence[dict], path: str | Path, metric: str = "accuracy") -> Path:
    """Plot the losses above and the metric below, over epochs, and save the figure.

    Args:
        log_history: `trainer.state.log_history`.
        path: file to write; its suffix gives the format.
        metric: name of the metric, logged as `eval_<metric>`.

    Returns:
        The path.

    Raises:
        ValueError: the history holds no loss.
    """
    curves = {key: _curve(log_history, key) for key in ("loss", "eval_loss", f"eval_{metric}")}
    if not curves["loss"][0] and not curves["eval_loss"][0]:
        raise ValueError("The log history holds neither loss nor eval_loss: train or evaluate before plotting")
    figure = _figure(7, 6)
    upper, lower = figure.subplots(2, 1, sharex=True)
    for key, name in (("loss", "training"), ("eval_loss", "evaluation")):
        if curves[key][0]:
            upper.plot(*curves[key], marker=".", label=name)
    lower.plot(*curves[f"eval_{metric}"], marker=".", color="tab:green")
    upper.set_ylabel("loss")
    upper.set_ylim(0, 1.05 * max(curves["loss"][1] + curves["eval_loss"][1]))
    upper.legend()
    lower.set_ylabel(f"{metric} (evaluation)")
    lower.set_ylim(0, 1.02)
    lower.set_xlabel("epoch")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    return Path(path)


def plot_confusion_matrix(labels, predictions, names: Sequence[str], path: str | Path) -> Path:
    """Plot the confusion matrix, each row divided by its number of clips, and save the figure.

    Up to 20 classes, cells also show the number of clips. A class without clips has an empty row.

    Args:
        labels: class ids (n,) of the clips.
        predictions: predicted class ids (n,).
        names: class names (C,).
        path: file to write; its suffix gives the format.

    Returns:
        The path.
    """
    counts = confusion_matrix(labels, predictions, labels=range(len(names)))
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 2.5 + 0.4 * len(names) if len(names) <= _MAX_COUNTED_CLASSES else 2.5 + 0.2 * len(names)
    figure = _figure(max(side, 5) + 1, max(side, 5))
    axes = figure.subplots()
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(image, ax=axes, label="share of the class's clips", shrink=0.8)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    if len(names) <= _MAX_COUNTED_CLASSES:
        for row, column in zip(*np.nonzero(counts), strict=True):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, counts[row, column], ha="center", va="center", color=color, fontsize=8)
    figure.savefig(path, dpi=150)
    return Path(path)


def environment() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on; those not installed are left out."""
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _curve(log_history: Sequence[dict], key: str) -> tuple[list[float], list[float]]:
    entries = [entry for entry in log_history if key in entry and "epoch" in entry]
    return [entry["epoch"] for entry in entries], [entry[key] for entry in entries]


def _figure(width: float, height: float) -> Figure:
    """A figure of its own canvas: pyplot's global state and backend, which may be the user's notebook, stay alone."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
