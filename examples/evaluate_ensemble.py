#!/usr/bin/env python
r"""Average the class probabilities of several models and report each of them and the ensemble.

Three runs of one model, from the predictions that they left, without running them again (CAT* of Table I):

    python examples/evaluate_ensemble.py --scores runs/esc50/seed*/predictions.csv --output_dir runs/ensemble

Checkpoints of any audio classifier of transformers, each with its own features and sampling rate, and PANNs' CNN14
(CAT + PANN), on AudioSet's evaluation clips:

    python examples/evaluate_ensemble.py --data /data/audioset --panns \
        --models runs/audioset MIT/ast-finetuned-audioset-10-10-0.4593 --output_dir runs/ensemble

All members must have the same classes, by name, and score the same clips; else the differences are listed. A score
file is a CSV with a column `path` and one for each class, as `predictions.csv` of a run: scores of any other program
can join. A model is not evaluated on clips that its run was trained on. With the clips' folds, the mean over folds is
reported, as cross-validation does. The output folder gets `results.json`, `table.md` and, for the averaged scores,
`predictions.csv`, per-class scores and a confusion matrix.
"""

import argparse
from pathlib import Path

from datasets import Dataset, DatasetDict
from transformers import pipeline

import transformers_cat  # noqa: F401  registers the model with transformers
from transformers_cat.training import (
    Scores,
    align_scores,
    average_scores,
    environment,
    is_multi_label,
    load_audio_dataset,
    main_metric,
    read_scores,
    split_folds,
    without_only_split,
    write_predictions,
)
from transformers_cat.training.ensemble import panns_scores, pipeline_scores
from transformers_cat.training.metrics import MULTI_LABEL, PROBLEM_TYPES, SINGLE_LABEL
from transformers_cat.training.protocol import markdown_table, mean_and_deviation, per_cent, refuse_training_clips
from transformers_cat.training.report import data_fingerprint, git_state, write_results


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[], help="folders or ids of audio-classification models")
    parser.add_argument("--scores", nargs="+", default=[], help="score files")
    parser.add_argument(
        "--panns",
        nargs="?",
        const="",
        metavar="CHECKPOINT",
        help="CNN14 of the package panns_inference, which downloads its weights if no file is named",
    )
    parser.add_argument("--data", help="folder, CSV file or Hub id of the clips; needed to run models")
    parser.add_argument("--split", default="test", help="split of data that come in splits; default: test")
    parser.add_argument("--test_folds", type=int, nargs="+", help="folds to evaluate on; default: all clips")
    parser.add_argument(
        "--problem_type", choices=PROBLEM_TYPES, help="default: multi-label if a clip has several labels"
    )
    parser.add_argument("--batch_size", type=int, default=1, help="for most models only 1 is exact, for CAT any")
    parser.add_argument("--trust_remote_code", action="store_true", help="run model code that comes with a checkpoint")
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args(argv)
    if args.test_folds and not args.data:
        parser.error("--test_folds chooses the clips of --data that models hear; scores have theirs")
    if (args.models or args.panns is not None) and not args.data:
        parser.error("--models and --panns need the clips: give --data")
    if not (args.models or args.scores or args.panns is not None):
        parser.error("nothing to average: give --models, --scores or --panns")
    return args


def choose_clips(loaded: Dataset | DatasetDict, args: argparse.Namespace) -> Dataset:
    """The clips to evaluate on."""
    if isinstance(loaded, DatasetDict):
        if args.split not in loaded:
            raise ValueError(f"The data have no split {args.split!r}, only {list(loaded)}; choose one with --split")
        loaded = loaded[args.split]
    return split_folds(loaded, args.test_folds)["test"] if args.test_folds else loaded


def collect(args: argparse.Namespace, clips: Dataset | None) -> dict[str, Scores]:
    """The scores of every member, by its name."""
    members = {path: read_scores(path) for path in args.scores}
    if clips is None:
        return members
    problem_type = args.problem_type or (MULTI_LABEL if is_multi_label(clips) else SINGLE_LABEL)
    for name in args.models:
        classifier = pipeline("audio-classification", model=name, trust_remote_code=args.trust_remote_code)
        members[name] = pipeline_scores(classifier, clips, problem_type, args.batch_size)
    if args.panns is not None:
        members["PANNs CNN14"] = panns_scores(clips, args.panns or None)
    return members


def measure(scores: Scores, problem_type: str) -> dict:
    """Metrics of all clips together and, for clips in folds, of each fold with the mean over folds."""
    result = {"metrics": scores.metrics(problem_type)}
    folds = scores.by_fold()
    if len(folds) > 1:
        metric = main_metric(problem_type)
        result["folds"] = {fold: part.metrics(problem_type)[metric] for fold, part in folds.items()}
        result["mean"], result["deviation"] = mean_and_deviation(list(result["folds"].values()))
    return result


def table(results: dict[str, dict]) -> str:
    """Markdown: a row for each member and for the ensemble."""
    metrics = list(results["ensemble"]["metrics"])
    folds = "folds" in results["ensemble"]
    rows = []
    for name, result in results.items():
        row = [name, *(f"{value:.4f}" if isinstance(value, float) else value for value in result["metrics"].values())]
        rows.append(row + ([per_cent(result["mean"], result["deviation"])] if folds else []))
    return markdown_table(["scores", *metrics, *(["mean over folds, %"] if folds else [])], rows)


def main(argv: list[str] | None = None) -> dict:
    """Run the script.

    Returns:
        For each member and for "ensemble", what `measure` gives.
    """
    args = parse_arguments(argv)
    clips = None
    if args.data:
        loaded = without_only_split(load_audio_dataset(args.data, multi_label=args.problem_type == MULTI_LABEL))
        clips = choose_clips(loaded, args)
        for model in args.models:
            refuse_training_clips(model, loaded, clips)
    members = align_scores(collect(args, clips))
    average = average_scores(members)
    problem_type = args.problem_type or average.problem_type
    results = {name: measure(scores, problem_type) for name, scores in {**members, "ensemble": average}.items()}
    kept = {
        "results": results,
        "problem_type": problem_type,
        "arguments": vars(args),
        "fingerprint": None if clips is None else data_fingerprint(clips),
        "environment": environment(),
        "git": git_state(),
    }
    write_results(args.output_dir, kept, table(results))
    write_predictions(average, problem_type, args.output_dir)
    return results


if __name__ == "__main__":
    main()
