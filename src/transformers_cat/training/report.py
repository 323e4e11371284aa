"""What a run leaves behind for people: curves, scores, a confusion matrix, and all that is needed to repeat it."""

import argparse
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import matplotlib
import numpy as np
import torch
from datasets import Dataset, DatasetDict, Value
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import average_precision_score, confusion_matrix, roc_auc_score

from .clips import clip_names
from .data import is_multi_label, label_names
from .metrics import SINGLE_LABEL
from .scores import Scores, write_scores
from .tables import write_rows

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
# Names as they are: in that of a class "$" would begin a formula.
_plain_text = matplotlib.rc_context({"text.parse_math": False})


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
    figure = new_figure(7, 6)
    upper, lower = figure.subplots(2, 1, sharex=True)
    for key, name in (("loss", "training"), ("eval_loss", "evaluation")):
        if curves[key][0]:
            upper.plot(*curves[key], marker=".", label=name)
    lower.plot(*curves[f"eval_{metric}"], marker=".", color="tab:green")
    upper.set_ylabel("loss")
    upper.set_ylim(bottom=min(0, *curves["loss"][1], *curves["eval_loss"][1]))  # a causal loss may lie below zero
    upper.legend()
    lower.set_ylabel(f"{metric} (evaluation)")
    lower.set_ylim(0, 1.02)
    lower.set_xlabel("epoch")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    return Path(path)


@_plain_text
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
    figure = new_figure(max(side, 5) + 1, max(side, 5))
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


@_plain_text
def plot_means(values: dict[str, dict[str, tuple[float, float | None]]], path: str | Path, label: str) -> Path:
    """Plot groups of means as points, with their values beside them and deviations as whiskers, and save the figure.

    Args:
        values: group -> series -> mean and deviation (None: no whisker), both shares of 1; shown in per cent.
        path: file to write; its suffix gives the format.
        label: of the axis.

    Returns:
        The path.
    """
    groups, names = list(values), list(next(iter(values.values())))
    figure = new_figure(2 + 1.2 * len(groups) * len(names) ** 0.5, 4)
    axes = figure.subplots()
    for i, name in enumerate(names):
        centres = np.arange(len(groups)) + 0.6 * ((i + 0.5) / len(names) - 0.5)
        means = [100 * values[group][name][0] for group in groups]
        deviations = [100 * (values[group][name][1] or 0) for group in groups]
        axes.errorbar(centres, means, deviations, fmt="o", capsize=3, label=name)
        for centre, mean in zip(centres, means):
            axes.annotate(f"{mean:.1f}", (centre, mean), xytext=(6, 0), textcoords="offset points", va="center")
    axes.set_xticks(range(len(groups)), groups)
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.set_ylabel(label)
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    return Path(path)


def write_predictions(scores: Scores, problem_type: str, folder: str | Path) -> None:
    """Write what the scores of labelled clips say: `predictions.csv` (a score file), `per_class.csv` and, where clips
    have one label each, `confusion_matrix.csv` (rows: true classes) and `confusion_matrix.png`.

    Args:
        scores: probabilities of the clips.
        problem_type: one of `metrics.PROBLEM_TYPES`.
        folder: existing folder to write to.
    """
    folder = Path(folder)
    write_scores(scores, folder / "predictions.csv")
    per_class = per_class_scores(scores, problem_type)
    write_rows(folder / "per_class.csv", list(per_class[0]), [row.values() for row in per_class])
    if problem_type == SINGLE_LABEL:
        labels, predicted = scores.targets().argmax(axis=1), scores.values.argmax(axis=1)
        plot_confusion_matrix(labels, predicted, scores.names, folder / "confusion_matrix.png")
        counts = confusion_matrix(labels, predicted, labels=range(len(scores.names))).tolist()
        rows = [[name, *row] for name, row in zip(scores.names, counts)]
        write_rows(folder / "confusion_matrix.csv", ["class", *scores.names], rows)


def per_class_scores(scores: Scores, problem_type: str) -> list[dict]:
    """For each class its number of clips, average precision and AUC (one class against the rest) and, where clips have
    one label each, accuracy: the share of its clips that are named rightly. None where a score is not defined.
    """
    targets, predicted = scores.targets(), scores.values.argmax(axis=1)
    rows = []
    for i, name in enumerate(scores.names):
        positive = targets[:, i] == 1
        row = {"class": name, "clips": int(positive.sum())}
        if problem_type == SINGLE_LABEL:
            row["accuracy"] = float((predicted[positive] == i).mean()) if positive.any() else None
        column = scores.values[:, i]
        row["average_precision"] = float(average_precision_score(positive, column)) if positive.any() else None
        both = positive.any() and not positive.all()
        row["AUC"] = float(roc_auc_score(positive, column)) if both else None
        rows.append(row)
    return rows


def write_history(log_history: Sequence[dict], path: str | Path) -> Path:
    """Write one CSV row for each epoch that was logged, with losses and metrics of training and evaluation.

    Args:
        log_history: `trainer.state.log_history`. Where an epoch has several entries, the last value counts.
        path: file to write.

    Returns:
        The path.
    """
    epochs = {}
    for entry in log_history:
        if "epoch" in entry and "train_runtime" not in entry:  # that one is about the whole training
            epochs.setdefault(entry["epoch"], {}).update(entry)
    keys = list(dict.fromkeys(["epoch", "step", *(key for entry in epochs.values() for key in entry)]))
    return write_rows(path, keys, [[epochs[epoch].get(key) for key in keys] for epoch in sorted(epochs)])


def write_json(path: str | Path, content: dict) -> Path:
    """Write JSON at once: a reader sees all of the file or, after a crash, none of it."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # each process writes its own
    partial.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return path


def write_results(folder: str | Path, results: dict, table: str) -> None:
    """Print a table, and write it to `table.md` and its figures to `results.json`, in a folder made for them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", results)
    (folder / "table.md").write_text(table, encoding="utf-8")
    print(table)


def remember(settings: dict, path: str | Path) -> None:
    """Write down what the runs in a folder have in common, or refuse to mix them with others.

    Args:
        settings: name -> value, which JSON can hold. Of a command line under the name `flags`, the tokens are left out.
        path: file in the folder.

    Raises:
        ValueError: the file holds other settings.
    """
    if Path(path).exists():
        refuse_changes(settings, path)
    else:
        write_json(path, _without_tokens(settings))


def refuse_changes(settings: dict, path: str | Path) -> None:
    """Refuse settings that differ from those that `remember` wrote; what only one of the two knows is not compared.

    Raises:
        ValueError: the names of what differs, with the values before and now.
    """
    before = _without_tokens(json.loads(Path(path).read_text(encoding="utf-8")))
    now = json.loads(json.dumps(_without_tokens(settings), default=str))
    changed = {key: (before[key], now[key]) for key in now if key in before and before[key] != now[key]}
    if changed:
        raise ValueError(
            f"{Path(path).parent} holds runs with other flags (before, now): {changed}. Choose another --output_dir"
        )


def _without_tokens(settings: dict) -> dict:
    """The settings, without tokens for the Hub among their `flags`."""
    parser = argparse.ArgumentParser(add_help=False)  # which knows all ways to write a flag
    parser.add_argument("--token", "--hub_token", "--hub-token")
    return {key: parser.parse_known_args(value)[1] if key == "flags" else value for key, value in settings.items()}


def environment() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on; those not installed are left out."""
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        versions["accelerator"] = torch.cuda.get_device_name()
    return versions


def git_state(file: str | Path = __file__) -> dict | None:
    """The commit that a file was run at, `{"commit", "dirty"}`; None where git does not know the file.

    Args:
        file: by default this one. A package that is installed elsewhere belongs to no checkout, even if its
            environment lies in one.

    Returns:
        The commit's hash, and whether tracked files differ from it.
    """
    folder = Path(file).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(file).name)
        return {
            "commit": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.CalledProcessError):  # no git, no checkout, or no commit yet
        return None


def data_fingerprint(data: Dataset | DatasetDict, sizes: bool = True, folds: bool = False) -> str:
    """SHA-256 over the clips' names, sizes in bytes and labels, in any order: which data a run saw.

    Names are those of the files, without their folders, so a copy elsewhere has the same fingerprint. The size of a
    clip that is stored inside the data set is left out, since it would be read for it; without `sizes`, that of all, so
    that data which were prepared have the fingerprint of the recordings. With `folds`, the fold of each clip counts,
    where the data have any.
    """
    lines = []
    for dataset in data.values() if isinstance(data, DatasetDict) else [data]:
        names, multi = label_names(dataset), is_multi_label(dataset)
        files = sizes and dataset.features["audio"] == Value("string")
        plain = dataset.with_format(None)
        given = plain["fold"][:] if folds and "fold" in dataset.column_names else [None] * len(dataset)
        for path, label, fold in zip(clip_names(dataset), plain["label"][:], given):
            labels = sorted(names[k] for k in label) if multi else [names[label]]
            line = [Path(path).name, os.path.getsize(path) if files else None, labels]
            lines.append(json.dumps(line if fold is None else [*line, fold]))
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _curve(log_history: Sequence[dict], key: str) -> tuple[list[float], list[float]]:
    entries = [entry for entry in log_history if key in entry and "epoch" in entry]
    return [entry["epoch"] for entry in entries], [entry[key] for entry in entries]


def new_figure(width: float, height: float) -> Figure:
    """A figure of its own canvas: pyplot's global state and backend, which may be the user's notebook, stay alone."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
