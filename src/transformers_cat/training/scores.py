"""Class probabilities of clips: as CSV files, measured, and averaged over models into an ensemble.

A score file has one clip per row. Its first column is `path`; `fold`, `label` (true labels, separated by ";"),
`predicted` and `probability` may follow; every column after these is a class. The last two are for people, and are
not read. A file made by any other program can take part if it has `path` and the classes.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import EvalPrediction

from .clips import clip_names, distinct
from .data import LABEL_SEPARATOR, freesound_number, label_names
from .metrics import MULTI_LABEL, SINGLE_LABEL, compute_metrics_for
from .tables import integer, read_lines, some, write_rows

_LEADING = ("path", "fold", "label", "predicted", "probability")


@dataclass(frozen=True)
class Scores:
    """Probabilities of the classes for each of n clips.

    Attributes:
        paths: name of each clip, each one once.
        names: the C classes.
        values: (n, C), in [0, 1].
        labels: true classes of each clip; None if unknown.
        folds: fold of each clip; None if there are none.
    """

    paths: list[str]
    names: list[str]
    values: np.ndarray
    labels: list[list[str]] | None = None
    folds: list[int] | None = None

    @classmethod
    def of(cls, dataset: Dataset, values: np.ndarray, names: Sequence[str]) -> "Scores":
        """The clips, labels and folds of a data set with scores (n, C) of the classes `names`."""
        rows, known = dataset.with_format(None), label_names(dataset)
        ids = [row if isinstance(row, list) else [row] for row in rows["label"][:]]
        return cls(
            paths=clip_names(dataset),
            names=list(names),
            values=np.asarray(values, dtype=np.float64),
            labels=[[known[i] for i in row] for row in ids],
            folds=rows["fold"][:] if "fold" in dataset.column_names else None,
        )

    @property
    def problem_type(self) -> str:
        """Multi-label if a clip has several labels, or none."""
        return MULTI_LABEL if any(len(row) != 1 for row in self._known_labels()) else SINGLE_LABEL

    def targets(self) -> np.ndarray:
        """True classes as 0 and 1, (n, C).

        Raises:
            ValueError: the labels are not known, or not among the classes.
        """
        position = {name: i for i, name in enumerate(self.names)}
        unknown = sorted({name for row in self._known_labels() for name in row} - position.keys())
        if unknown:
            raise ValueError(f"The clips have labels that are no class of the scores: {some(unknown)}")
        targets = np.zeros(self.values.shape, dtype=np.int64)
        for i, row in enumerate(self.labels):
            targets[i, [position[name] for name in row]] = 1
        return targets

    def metrics(self, problem_type: str) -> dict[str, float]:
        """What `compute_metrics_for` gives for these scores."""
        targets = self.targets()
        if problem_type == SINGLE_LABEL:
            several = [path for path, row in zip(self.paths, self.labels) if len(row) != 1]
            if several:
                raise ValueError(
                    f"Accuracy needs clips with one label each, but not so: {some(several)}; "
                    f"use the problem type {MULTI_LABEL}"
                )
            targets = targets.argmax(axis=1)
        return compute_metrics_for(problem_type)(EvalPrediction(predictions=self.values, label_ids=targets))

    def by_fold(self) -> dict[int, "Scores"]:
        """The clips of each fold, if there are folds."""
        folds = sorted(set(self.folds or ()))
        return {fold: self.select([i for i, own in enumerate(self.folds) if own == fold]) for fold in folds}

    def select(self, positions: Sequence[int]) -> "Scores":
        """The clips at these positions, in this order."""
        columns = {
            name: None if getattr(self, name) is None else [getattr(self, name)[i] for i in positions]
            for name in ("paths", "labels", "folds")
        }
        return replace(self, values=self.values[list(positions)], **columns)

    def _known_labels(self) -> list[list[str]]:
        if self.labels is None:
            raise ValueError("The clips' labels are not known: give the data set, or a score file with `label`")
        return self.labels


def write_scores(scores: Scores, path: str | Path) -> Path:
    """Write a score file; probabilities have the seven digits of single precision."""
    clip_columns = {"path": scores.paths, "fold": scores.folds}
    if scores.labels is not None:
        clip_columns["label"] = [LABEL_SEPARATOR.join(row) for row in scores.labels]
    best = scores.values.argmax(axis=1)
    clip_columns["predicted"] = [scores.names[i] for i in best]
    clip_columns["probability"] = [f"{row[i]:.7g}" for row, i in zip(scores.values, best)]
    clip_columns = {name: cells for name, cells in clip_columns.items() if cells is not None}
    rows = zip(zip(*clip_columns.values()), scores.values)
    rows = ([*cells, *(f"{value:.7g}" for value in row)] for cells, row in rows)
    return write_rows(path, [*clip_columns, *scores.names], rows)


def read_scores(path: str | Path) -> Scores:
    """Read a score file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no table in UTF-8, has no column `path` or no class, a clip or class twice, or a score that is
            no probability.
    """
    (_, header), *lines = list(read_lines(Path(path))) or [(1, [])]
    leading = _leading(header)
    names = header[len(leading) :]
    if "path" not in leading or not names or not lines:
        raise ValueError(f"{path} is no score file: it needs a first column `path`, a column per class, and clips")
    for line, row in lines:
        if len(row) != len(header):
            raise ValueError(f"{path}, row {line} has {len(row)} cells, not the {len(header)} of the header")
    numbers, rows = zip(*lines)
    columns = {name: [row[i] for row in rows] for i, name in enumerate(leading)}
    for what, items in (("clips", columns["path"]), ("classes", names)):
        twice = [item for item, count in Counter(items).items() if count > 1]
        if twice:
            raise ValueError(f"{path} has {what} more than once: {some(twice)}")
    try:
        values = np.array([row[len(leading) :] for row in rows], dtype=np.float64)
    except ValueError as error:
        raise ValueError(f"{path} has a score that is not a number: {error}") from None
    bad = np.flatnonzero(~((values >= 0) & (values <= 1)).all(axis=1))
    if len(bad):
        raise ValueError(
            f"{path}, row {numbers[bad[0]]} has a score outside of [0, 1]: write probabilities, not logits, to be "
            "averaged"
        )
    labels, folds = columns.get("label"), columns.get("fold")
    return Scores(
        paths=columns["path"],
        names=names,
        values=values,
        labels=None if labels is None else [_labels_of(cell, names) for cell in labels],
        folds=None if folds is None else [integer(fold, "fold", Path(path)) for fold in folds],
    )


def _labels_of(cell: str, names: list[str]) -> list[str]:
    """The labels in a cell of a score file; the name of a class may have the separator in it."""
    return [cell] if cell in names else [name for name in cell.split(LABEL_SEPARATOR) if name]


def concatenate_scores(parts: Sequence[Scores]) -> Scores:
    """The clips of all parts, which have the same classes, one part after the other; repeated names are numbered."""
    first = parts[0]
    for part in parts[1:]:
        _refuse_difference("classes", first.names, part.names, "another part")
    columns = {
        name: None if getattr(first, name) is None else [item for part in parts for item in getattr(part, name)]
        for name in ("paths", "labels", "folds")
    }
    values = np.concatenate([_columns(part, first.names) for part in parts])
    columns["paths"] = distinct(columns["paths"])
    return replace(first, values=values, **columns)


def average_scores(members: dict[str, Scores]) -> Scores:
    """The mean of the probabilities of several models for the same clips: an ensemble.

    Args:
        members: scores by the name of their model, aligned by `align_scores`.
    """
    aligned = list(members.values())
    return replace(aligned[0], values=np.mean([scores.values for scores in aligned], axis=0))


def accuracy_difference(one: Sequence[Scores], other: Sequence[Scores]) -> tuple[float, float | None]:
    """How much more accurate one model is than another on the same clips, each by the mean of its runs.

    Clips of one recording on Freesound are right or wrong together, so that the recordings are what is drawn: the
    error is that of a ratio estimate over them (Cochran, Sampling Techniques, 1977, ch. 6).

    Args:
        one, other: the scores of each run of the two models.

    Returns:
        The difference and its standard error; None for the error where there is one recording alone.
    """
    names = [f"{model} {run}" for model, runs in (("one", one), ("other", other)) for run in range(len(runs))]
    aligned = list(align_scores(dict(zip(names, [*one, *other]))).values())
    right = np.array([scores.values.argmax(1) == scores.targets().argmax(1) for scores in aligned])
    gain = right[: len(one)].mean(0) - right[len(one) :].mean(0)
    difference = gain.mean()
    recordings = [freesound_number(path) or path for path in aligned[0].paths]
    _, cluster = np.unique(recordings, return_inverse=True)
    residuals = np.bincount(cluster, gain - difference)
    if len(residuals) < 2:
        return float(difference), None
    variance = len(residuals) / (len(residuals) - 1) * np.square(residuals).sum()
    return float(difference), float(np.sqrt(variance) / len(gain))


def align_scores(members: dict[str, Scores]) -> dict[str, Scores]:
    """Scores of several models for the same clips, brought to the order of the first.

    Clips are matched by their file names where these differ from each other, else by their whole paths; classes by
    name. Labels and folds come from the first member that has them.

    Args:
        members: scores by the name of their model.

    Raises:
        ValueError: clips, classes or true labels differ; the message lists how.
    """
    (first_name, first), *others = members.items()
    whole = any(len({Path(p).name for p in scores.paths}) < len(scores.paths) for scores in members.values())
    keys = {name: s.paths if whole else [Path(p).name for p in s.paths] for name, s in members.items()}
    aligned = {first_name: first}
    for name, scores in others:
        between = f"{name}, compared with {first_name}"
        _refuse_difference("classes", first.names, scores.names, between)
        _refuse_difference("clips", keys[first_name], keys[name], between)
        position = {key: i for i, key in enumerate(keys[name])}
        scores = scores.select([position[key] for key in keys[first_name]])
        aligned[name] = replace(scores, names=first.names, values=_columns(scores, first.names))
    _refuse_other_labels({name: scores for name, scores in aligned.items() if scores.labels is not None})
    common = {
        column: next((c for s in aligned.values() if (c := getattr(s, column)) is not None), None)
        for column in ("paths", "labels", "folds")
    }
    return {name: replace(scores, **common) for name, scores in aligned.items()}


def _columns(scores: Scores, names: Sequence[str]) -> np.ndarray:
    """The values with the classes in another order."""
    position = {name: i for i, name in enumerate(scores.names)}
    return scores.values[:, [position[name] for name in names]]


def _refuse_difference(what: str, expected: Sequence[str], got: Sequence[str], between: str) -> None:
    lacking, extra = sorted(set(expected) - set(got)), sorted(set(got) - set(expected))
    if lacking or extra:
        parts = [f"{len(lacking)} lacking: {some(lacking)}"] if lacking else []
        parts += [f"{len(extra)} more: {some(extra)}"] if extra else []
        raise ValueError(f"The {what} of {between}, differ: {'; '.join(parts)}. Only scores of the same can be joined")


def _refuse_other_labels(labelled: dict[str, Scores]) -> None:
    if len(labelled) < 2:
        return
    (first_name, first), *others = labelled.items()
    for name, scores in others:
        differ = [
            f"{path} ({';'.join(own)} or {';'.join(other)})"
            for path, own, other in zip(first.paths, first.labels, scores.labels)
            if set(own) != set(other)
        ]
        if differ:
            raise ValueError(f"{first_name} and {name} give clips other labels: {some(differ)}")


def _leading(header: list[str]) -> list[str]:
    """The columns before the classes; by position, since a class may be called "label" or "fold"."""
    end = 0
    while end < len(header) and header[end] in _LEADING and header[end] not in header[:end]:
        end += 1
        if header[end - 1] == _LEADING[-1]:  # ours has all of them before it
            break
    return header[:end]
