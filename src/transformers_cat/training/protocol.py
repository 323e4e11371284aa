"""Evaluation protocols: given folds, means over folds and seeds, tables."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict

from ..cards import DATASETS
from .clips import clip_names
from .report import data_fingerprint

BENCHMARKS = (DATASETS["esc50"], DATASETS["urbansound8k"])  # what published figures are about; ESC-10 is a part of one


def comparability(data: str | Path | None, tested: Sequence[int], given: Sequence[int], num_classes: int) -> str:
    """A sentence that says whether a result on these folds can be compared with published ones.

    Args:
        data: the data set's folder, if it is one.
        tested: folds that were tested on.
        given: folds of the data.
        num_classes: classes of the data.
    """
    benchmark = next((known for known in BENCHMARKS if data and (Path(data) / known.marker).is_file()), None)
    if benchmark is None:
        return f"{len(tested)} of {len(given)} given folds."
    here, whole = (len(tested), num_classes), (benchmark.folds, benchmark.labels)
    of = f"{here[0]} of {whole[0]} folds and {here[1]} of {whole[1]} classes of {benchmark.name}"
    return f"{of}: {'the whole benchmark' if here == whole else 'not comparable with published figures on all of it'}."


def refuse_reshuffled_folds(dataset: Dataset) -> None:
    """Refuse clips of UrbanSound8K in other folds than those that they come in.

    Slices of one recording lie in one fold; in a random split they are in training and test, and accuracy is too high
    by some 15 points. The given fold is known from the clip's folder, `foldN`.

    Raises:
        ValueError: a clip in the folder `foldN` has another fold.
    """
    for path, fold in zip(clip_names(dataset), dataset.with_format(None)["fold"][:]):
        folder = Path(path).parent.name
        if folder.removeprefix("fold").isdecimal() and folder.startswith("fold") and folder != f"fold{fold}":
            raise ValueError(
                f"{path} was given in {folder} and is now in fold {fold}: folds of UrbanSound8K must not be "
                "reshuffled, since parts of one recording would be in training and test. Use the given folds"
            )


def training_in(folder: str | Path) -> dict | None:
    """The `results.json` of a training in a folder; None where there is none, or that of something else."""
    path = Path(folder) / "results.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return results if results.get("arguments", {}).get("training", {}).get("do_train") else None


def refuse_training_clips(model: str | Path, loaded: Dataset | DatasetDict, clips: Dataset) -> None:
    """Refuse to evaluate on what the model was trained on, where the `results.json` of its run is beside it.

    Args:
        model: folder of the model, or an id on the Hub, of which nothing is known.
        loaded: the data that the clips are from: the folds that a run on the same data, or on what was prepared of
            them, did not hold out are refused.
        clips: the clips to evaluate on; from anywhere, if they are just those of the training, and do not look like
            those that the run itself was tested on, as in folders for training and test whose files have the same
            names and sizes.

    Raises:
        ValueError: the model was trained on some of the clips, or their folds have been changed since.
    """
    run = training_in(model)
    if run is None:
        return
    trained = run["arguments"]["data"]
    if "fold" in clips.column_names and run.get("source") == data_fingerprint(loaded, sizes=False):
        if run.get("folds") not in (None, data_fingerprint(loaded, sizes=False, folds=True)):
            raise ValueError(
                f"The folds of these data were changed after {model} was trained, so that nobody can tell on which of "
                "them: give the clips the folds that they had, or train anew"
            )
        held_out = {*(trained["test_folds"] or ()), *(trained["validation_folds"] or ())}
        if folds := sorted(set(clips["fold"][:]) - held_out):
            raise ValueError(f"{model} was trained on the folds {folds} of these data; choose others by --test_folds")
    fingerprints, own = run["fingerprints"], data_fingerprint(clips)
    if own == fingerprints.get("train") and own not in (fingerprints.get("test"), fingerprints.get("validation")):
        raise ValueError(f"{model} was trained on these clips")


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1); None for the deviation of a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def summarise(values: dict[int, dict[int | None, float]]) -> dict:
    """Mean and standard deviation of a metric over folds and seeds.

    Args:
        values: seed -> fold -> metric; the fold is None where the data come with a test split instead.

    Returns:
        `seeds`: for each seed its `folds`, and `mean` and `deviation` over them. `mean`: of the seeds' means.
        `deviation`: between the seeds' means or, with one seed, between its folds; `deviation_of` says which.
    """
    seeds = {}
    for seed, folds in sorted(values.items()):
        mean, deviation = mean_and_deviation(list(folds.values()))
        seeds[seed] = {"folds": dict(folds), "mean": mean, "deviation": deviation}
    mean, deviation = mean_and_deviation([seed["mean"] for seed in seeds.values()])
    if len(seeds) > 1:
        return {"seeds": seeds, "mean": mean, "deviation": deviation, "deviation_of": "seeds"}
    (only,) = seeds.values()
    return {"seeds": seeds, "mean": mean, "deviation": only["deviation"], "deviation_of": "folds"}


def fold_means(summary: dict) -> dict[int | None, float]:
    """fold -> mean over the seeds of what `summarise` returned."""
    seeds = list(summary["seeds"].values())
    return {fold: mean_and_deviation([own["folds"][fold] for own in seeds])[0] for fold in seeds[0]["folds"]}


def per_cent(mean: float, deviation: float | None) -> str:
    """As tables show it: 96.4 ± 0.3, or 96.4."""
    return f"{100 * mean:.1f}" + ("" if deviation is None else f" ± {100 * deviation:.1f}")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A table in Markdown, with a line break at its end."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(str(cell) for cell in line) + " |\n" for line in lines)
