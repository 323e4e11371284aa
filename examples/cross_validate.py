#!/usr/bin/env python
r"""Cross-validate over the given folds of a data set, with one or several seeds.

The five folds of ESC-50 with three seeds:

    python examples/cross_validate.py --data /data/ESC-50 --config_name model_cards/cat-tiny --seeds 0 1 2 \
        --output_dir runs/esc50

All other flags are those of `run_audio_classification.py`, which runs once for each seed and fold into
`seed<s>/fold<k>`. When the same command is given again, finished runs are kept and an interrupted one goes on from its
last checkpoint; more seeds or folds may be asked for later, beside those of before. The result is that of the mean of
the last epochs' weights; with `--choose_epoch` the fold after the tested one is held out too and chooses the epoch. The
tested fold never does.

There are no random folds: those of UrbanSound8K in particular must not be reshuffled. Data with a test split instead of
folds (AudioSet) run once for each seed, into `seed<s>`.

`summary.json` and `summary.md` hold the runs that were asked for, with mean and standard deviation; `seed<s>/` the
predictions of all their folds together, with per-class scores and a confusion matrix.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import run_audio_classification as run
from accelerate import PartialState
from datasets import DatasetDict

from transformers_cat.training import is_multi_label, label_names, main_metric, read_scores, write_predictions
from transformers_cat.training.protocol import (
    comparability,
    fold_means,
    markdown_table,
    mean_and_deviation,
    per_cent,
    refuse_reshuffled_folds,
    summarise,
)
from transformers_cat.training.report import data_fingerprint, remember, write_json
from transformers_cat.training.scores import concatenate_scores

OWN_FLAGS = "--test_folds, --validation_folds, --seed and --load_best_model_at_end"


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Own arguments, and the flags of each run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--folds", type=int, nargs="+", help="folds to test on, one after the other; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--choose_epoch", action="store_true", help="choose the epoch on the fold after the tested one")
    return parser.parse_known_args(argv)


class Given(NamedTuple):
    """What the data are: their folds (none where they come in splits), their folder if they are one, their classes;
    and what tells them and the model's configuration from others."""

    folds: list[int]
    folder: str | None
    num_classes: int
    multi_label: bool
    identity: dict


def given(flags: list[str], output_dir: Path, choose_epoch: bool = False) -> Given:
    """Look at the data and the configuration that the flags name, and refuse flags that cross-validation sets."""
    model_args, data_args, args = run.parse_arguments([*flags, "--output_dir", str(output_dir), "--do_train"])
    if data_args.test_folds or data_args.validation_folds or args.load_best_model_at_end or args.seed:
        raise ValueError(
            f"Cross-validation sets {OWN_FLAGS} itself: leave them out; see --folds, --seeds, --choose_epoch"
        )
    if choose_epoch and (lacking := run.choice_lacks(args)):
        raise ValueError(f"--choose_epoch needs {lacking}")
    loaded = run.load_data(data_args, model_args)
    folds, some = [], loaded
    if isinstance(loaded, DatasetDict):
        some = next(iter(loaded.values()))
    elif "fold" not in loaded.column_names:
        raise ValueError("The data have neither folds nor a test split: add a column `fold` to their CSV file")
    else:
        refuse_reshuffled_folds(loaded)
        folds = sorted(set(loaded["fold"][:]))
    identity = {"fingerprint": data_fingerprint(loaded, folds=True), **run.configuration(run.load_config(model_args))}
    return Given(folds, data_args.data, len(label_names(some)), is_multi_label(some), identity)


def check_folds(args: argparse.Namespace, existing: list[int]) -> None:
    """Refuse what the data cannot do."""
    if args.folds and not existing:
        raise ValueError("The data come with splits instead of folds: leave out --folds")
    unknown = sorted(set(args.folds or ()) - set(existing))
    if unknown:
        raise ValueError(f"--folds names {unknown}; the data have the folds {existing}")
    if args.choose_epoch and len(existing) < 3:
        raise ValueError(f"--choose_epoch holds out two folds of at least three, but there are {len(existing)}")


def run_folder(output_dir: Path, seed: int, fold: int | None) -> Path:
    return output_dir / f"seed{seed}" / ("" if fold is None else f"fold{fold}")


def fold_flags(fold: int | None, existing: list[int], choose_epoch: bool) -> list[str]:
    """What a run holds out."""
    if fold is None:
        return []
    flags = ["--test_folds", str(fold)]
    if choose_epoch:
        flags += ["--validation_folds", str(existing[(existing.index(fold) + 1) % len(existing)])]
    return flags


def summarise_runs(output_dir: Path, seeds: list[int], folds: list[int | None], note: str) -> dict:
    """The results that the runs left; means and deviations of the main metric, and mean losses on the test clips."""
    results = {
        (seed, fold): json.loads((run_folder(output_dir, seed, fold) / "results.json").read_text())
        for seed in seeds
        for fold in folds
    }
    problem_type = results[seeds[0], folds[0]]["config"]["problem_type"]
    metric = main_metric(problem_type)
    values = {seed: {fold: results[seed, fold]["metrics"][f"eval_{metric}"] for fold in folds} for seed in seeds}
    runs = [{"seed": seed, "fold": fold, "metrics": one["metrics"]} for (seed, fold), one in results.items()]
    summary = {"metric": metric, "problem_type": problem_type, "note": note, **summarise(values), "runs": runs}
    for seed, own in summary["seeds"].items():
        own["loss"], _ = mean_and_deviation([results[seed, fold]["metrics"]["eval_loss"] for fold in folds])
    return summary


def table(summary: dict) -> str:
    """The folds of each seed and, of several, their means, as Markdown; the losses too, where the summary has them."""
    seeds = list(summary["seeds"].values())
    folds = list(seeds[0]["folds"])
    with_loss = all("loss" in own for own in seeds)
    named = list(summary["seeds"].items())
    if len(seeds) > 1:
        total = {"folds": fold_means(summary), "mean": summary["mean"], "deviation": summary["deviation"]}
        if with_loss:
            total["loss"], _ = mean_and_deviation([own["loss"] for own in seeds])
        named.append(("mean", total))
    rows = []
    for seed, own in named:
        scores = [per_cent(own["folds"][fold], None) for fold in folds]
        loss = [f"{own['loss']:.2f}"] if with_loss else []
        rows.append([seed, *scores, per_cent(own["mean"], own["deviation"]), *loss])
    columns = ["test" if fold in (None, "null") else f"fold {fold}" for fold in folds]
    return markdown_table(["seed", *columns, "mean ± standard deviation", *(["loss"] if with_loss else [])], rows)


def write_summary(summary: dict, output_dir: Path, folds: list[int | None]) -> None:
    """Write the summary and, for each seed, what the predictions of all folds together say."""
    write_json(output_dir / "summary.json", summary)
    total = f"{summary['metric']} {per_cent(summary['mean'], summary['deviation'])} %"
    if summary["deviation"] is not None:
        total += f" (mean ± standard deviation between {summary['deviation_of']})"
    text = f"{total}. {summary['note']}\n\n{table(summary)}"
    (output_dir / "summary.md").write_text(text, encoding="utf-8")
    print(text)
    if folds == [None]:
        return
    for seed in summary["seeds"]:
        parts = [read_scores(run_folder(output_dir, seed, fold) / "predictions.csv") for fold in folds]
        write_predictions(concatenate_scores(parts), summary["problem_type"], output_dir / f"seed{seed}")


def main(argv: list[str] | None = None) -> dict:
    """Run the script.

    Returns:
        The content of `summary.json`.
    """
    args, flags = parse_arguments(argv)
    data = given(flags, args.output_dir, args.choose_epoch)
    check_folds(args, data.folds)
    folds = args.folds or data.folds or [None]
    note = "The given test split."
    if folds != [None]:
        note = comparability(data.folder, folds, data.folds, data.num_classes)
    state = PartialState()
    if state.is_main_process:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        own = {"flags": flags, "choose_epoch": args.choose_epoch, **data.identity}
        remember(own, args.output_dir / "flags.json")
        print(note)
    for seed in args.seeds:
        for fold in folds:
            folder = run_folder(args.output_dir, seed, fold)
            if (folder / "results.json").exists():
                continue
            own = ["--output_dir", str(folder), "--seed", str(seed), "--do_train", "--do_eval"]
            run.main([*flags, *own, *fold_flags(fold, data.folds, args.choose_epoch)])
    state.wait_for_everyone()  # the main process writes the results of the last run after the others have left it
    summary = summarise_runs(args.output_dir, args.seeds, folds, note)
    if state.is_main_process:
        write_summary(summary, args.output_dir, folds)
    return summary


if __name__ == "__main__":
    main()
