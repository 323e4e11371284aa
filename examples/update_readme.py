#!/usr/bin/env python
"""Write the figures of the documents from the JSON files that the runs left.

    python examples/update_readme.py                # from examples/results
    python examples/update_readme.py --runs runs    # take over what these runs left, first

`examples/results` keeps what is needed of each run. A figure stands in the README.md here or there between
`<!-- name -->` and `<!-- /name -->`; `tests/examples/test_update_readme.py` compares the two.
"""

import argparse
import json
import shutil
from collections.abc import Callable, Container
from pathlib import Path

import ablate
import benchmark
import benchmark_gpu
import causal_cost
import causal_experiment
import compare_models
import cross_validate
import pointing
import robustness
from transfer import PROBES

from transformers_cat.training.protocol import fold_means, markdown_table, mean_and_deviation, per_cent
from transformers_cat.training.report import write_json

RESULTS = Path(__file__).parent / "results"
DOCUMENTS = (RESULTS.parents[1] / "README.md", RESULTS / "README.md")
SUMMARY = {"seeds", "mean", "deviation"}
TRANSFER = (*PROBES, "fine-tuned")


def by_fold(title: str, runs: list[tuple[str, dict]]) -> str:
    """A row for each run: its name, its score on each fold, their mean and deviation."""
    folds = list(runs[0][1]["folds"])
    rows = [
        [name, *(per_cent(own["folds"][fold], None) for fold in folds), per_cent(own["mean"], own["deviation"])]
        for name, own in runs
    ]
    return markdown_table([title, *(f"fold {fold}" for fold in folds), "mean ± standard deviation"], rows)


def transfer(summary: dict) -> str:
    """The transfers of a `summary.json` of transfer.py."""
    return by_fold("transfer", [(name, own) for name in summary for own in summary[name]["seeds"].values()])


def transfers(summaries: dict[str, dict]) -> str:
    """The means of several `summary.json` of transfer.py, each with its deviation over the folds.

    A fold's figure is the mean of the seeds, whose number is said of more than one.
    """

    def cell(of: dict | None) -> str:
        if not of:  # not measured
            return ""
        seeds = f" ({len(of['seeds'])})" if len(of["seeds"]) > 1 else ""
        return per_cent(*mean_and_deviation(list(fold_means(of).values()))) + seeds

    rows = [[row, *(cell(summary.get(name)) for name in TRANSFER)] for row, summary in summaries.items()]
    return markdown_table(["model, and what it was trained to tell apart", *TRANSFER], rows)


def ensemble(results: dict) -> str:
    """The folds of each member and of their mean, of a `results.json` of evaluate_ensemble.py."""
    *members, (_, mean) = results["results"].items()
    named = [(f"`{Path(name).parent.parent}`", own) for name, own in members]
    return by_fold("run", [*named, ("mean of their probabilities", mean)])


def one_run(results: dict) -> str:
    """The accuracy of a `results.json` of run_audio_classification.py."""
    training, test = results["clips"]["train"], results["clips"]["test"]
    rows = [[training, test, f"{results['metrics']['epoch']:g}", per_cent(results["metrics"]["eval_accuracy"], None)]]
    return markdown_table(["training clips", "test clips", "epochs", "accuracy, %"], rows)


# name -> the file that the runs leave (or those of several rows), what is kept of it (all: None), how it is shown
FIGURES: dict[str, tuple[str | dict[str, str], Container[str] | None, Callable[[dict], str]]] = {
    "esc10": ("esc10/summary.json", SUMMARY, cross_validate.table),
    "esc10_ensemble": ("esc10_ensemble/results.json", {"results"}, ensemble),
    "esc10_strided": ("esc10_strided/summary.json", SUMMARY, cross_validate.table),
    "esc10_unwhitened": ("esc10_unwhitened/summary.json", SUMMARY, cross_validate.table),
    "esc10_adamw": ("esc10_adamw/summary.json", SUMMARY, cross_validate.table),
    "esc10_12db": ("esc10_12db/summary.json", SUMMARY, cross_validate.table),
    "esc10_6db": ("esc10_6db/summary.json", SUMMARY, cross_validate.table),
    "esc10_with_cnn": ("esc10_with_cnn/results.json", {"results"}, ensemble),
    "esc10_cnn_adamw": ("esc10_cnn_adamw/summary.json", SUMMARY, cross_validate.table),
    "objective": ("objective/summary.json", SUMMARY, cross_validate.table),
    "compare": ("compare/results.json", None, compare_models.table),
    "compare_us8k": ("compare_us8k/results.json", None, compare_models.table),
    "compare_unwhitened": ("compare_unwhitened/results.json", None, compare_models.table),
    "transfer": (
        {
            "CAT, classes": "transfer/summary.json",
            "CAT, recordings": "transfer_recordings/summary.json",
            "CNN, classes": "transfer_cnn/summary.json",
            "CNN, recordings": "transfer_cnn_recordings/summary.json",
            "HTS-AT, classes": "transfer_hts-at/summary.json",
            "HTS-AT, recordings": "transfer_hts-at_recordings/summary.json",
            "AST, classes": "transfer_ast/summary.json",
        },
        TRANSFER,
        transfers,
    ),
    "transfer_strided": ("transfer_strided/summary.json", TRANSFER, transfer),
    "volume": ("volume/results.json", None, robustness.table),
    "length": ("length/results.json", None, robustness.table),
    "precision": ("precision/results.json", None, robustness.table),
    "ablation": ("table_e/results.json", None, ablate.table),
    "digits": ("digits/results.json", {"metrics", "clips"}, one_run),
    "causal": ("causal/results.json", None, causal_experiment.table),
    "cost": ("cost/results.json", None, causal_cost.table),
    "pointing": ("pointing/results.json", None, pointing.table),
    "benchmark": ("benchmark/results.json", None, benchmark.table),
    "benchmark_avx2": ("benchmark_avx2/results.json", None, benchmark.table),
    "benchmark_gpu": ("benchmark_gpu/results.json", None, benchmark_gpu.table),
}


def collect(runs: Path, results: Path) -> None:
    """Keep what the documents need of the runs that are there."""
    results.mkdir(exist_ok=True)
    for name, (path, kept, _) in FIGURES.items():
        target = results / f"{name}.json"
        if isinstance(path, dict):
            rows = {row: kept_of(runs / one, kept) for row, one in path.items() if (runs / one).is_file()}
            before = json.loads(target.read_text(encoding="utf-8")) if target.is_file() else {}
            if rows:
                write_json(target, {row: {**before, **rows}[row] for row in path if row in rows or row in before})
        elif (runs / path).is_file():
            write_json(target, kept_of(runs / path, kept))
            if (picture := (runs / path).with_name("table.png")).is_file():
                shutil.copy(picture, results / f"{name}.png")


def kept_of(path: Path, kept: Container[str] | None) -> dict:
    """What is kept of a file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return {key: content[key] for key in content if kept is None or key in kept}


def updated(texts: list[str], results: Path) -> list[str]:
    """The documents' texts with the figures of all files in `results`.

    Raises:
        ValueError: there is not one place for one of them.
    """
    texts = list(texts)
    for path in sorted(results.glob("*.json")):
        *_, show = FIGURES[path.stem]
        figure = show(json.loads(path.read_text(encoding="utf-8")))
        start, end = f"<!-- {path.stem} -->", f"<!-- /{path.stem} -->"
        places = [index for index, text in enumerate(texts) if start in text and end in text]
        if len(places) != 1:
            raise ValueError(f"One of the documents needs a place for {path.name}, from {start} to {end}")
        before, _, rest = texts[places[0]].partition(start)
        texts[places[0]] = f"{before}{start}\n{figure}{end}{rest.partition(end)[2]}"
    return texts


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, help="folder of runs to take figures from")
    args = parser.parse_args(argv)
    if args.runs:
        collect(args.runs, RESULTS)
    texts = updated([document.read_text(encoding="utf-8") for document in DOCUMENTS], RESULTS)
    for document, text in zip(DOCUMENTS, texts):
        document.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
