#!/usr/bin/env python
r"""CAT beside models of its size, from scratch, on the same clips with the same recipe.

    python examples/compare_models.py --data ../shared/data/esc10 --config_name model_cards/cat-nano \
        --output_dir runs/compare

Every model (`cat`, and the peers in `peers.py`) is trained with each of the learning rates on the first fold, and with
the rate that was best there on the others. What counts are those other folds: the first has chosen something. With one
learning rate, nothing is chosen, and all folds count. All other flags are those of `cross_validate.py`, which resumes
what was interrupted; with several `--seeds`, a score is their mean. The result is `results.json`, `table.md` and
`table.png`, which keep the models of earlier calls into the same folder; only seeds and models may then differ. How far
a model is behind CAT is given with its standard error over recordings.
"""

import argparse
import json
from pathlib import Path

import cross_validate
from accelerate import PartialState
from peers import PEERS, write_peer
from transformers import AutoConfig, AutoModelForAudioClassification

from transformers_cat.training import read_scores
from transformers_cat.training.protocol import fold_means, markdown_table, mean_and_deviation, per_cent
from transformers_cat.training.report import plot_means, remember, write_results
from transformers_cat.training.scores import accuracy_difference


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Own arguments, and the flags of each run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--models", nargs="+", choices=["cat", *PEERS], default=["cat", *PEERS])
    parser.add_argument("--config_name", required=True, help="folder or id with the config.json of the CAT")
    parser.add_argument("--config_overrides", default="{}", help="JSON that replaces values of it")
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[3e-4, 1e-3])
    parser.add_argument("--folds", type=int, nargs="+", required=True, help="the first one chooses among several rates")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--max_length_seconds", type=float, default=2.5, help="length of the training crops")
    parser.add_argument("--output_dir", type=Path, required=True)
    args, flags = parser.parse_known_args(argv)
    if len(args.learning_rates) > 1 and len(set(args.folds)) < 2:
        parser.error("--folds needs at least two: one to choose the learning rate, and others to report on")
    return args, flags


def measure(model: str, args: argparse.Namespace, flags: list[str]) -> dict:
    """Choose the learning rate on the first fold, if there are several, then train on the others."""
    own = ["--max_length_seconds", str(args.max_length_seconds)]
    if model == "cat":
        own += ["--config_name", args.config_name, "--config_overrides", args.config_overrides]
    else:
        cat = AutoConfig.from_pretrained(args.config_name, **json.loads(args.config_overrides))
        folder = args.output_dir / "peers" / model
        with PartialState().main_process_first():
            peer = write_peer(model, args.max_length_seconds, folder, cat.normalize_volume, cat.whitening)
        own += ["--config_name", str(peer)]
    rates, tuning, reported = args.learning_rates, {}, args.folds

    def cross_validated(rate: float, folds: list[int]) -> tuple[Path, dict]:
        folder = args.output_dir / model / f"{rate:g}"
        command = [*flags, *own, "--learning_rate", str(rate), "--output_dir", str(folder)]
        return folder, cross_validate.main([*command, "--folds", *map(str, folds), "--seeds", *map(str, args.seeds)])

    if len(rates) > 1:
        first, *reported = args.folds
        tuning = {rate: cross_validated(rate, [first])[1]["mean"] for rate in rates}
    best = max(tuning, key=tuning.get) if tuning else rates[0]
    folder, summary = cross_validated(best, reported)
    seeds = list(summary["seeds"].values())
    folds = {str(fold): mean for fold, mean in fold_means(summary).items()}
    mean, deviation = mean_and_deviation(list(folds.values()))
    one = cross_validate.run_folder(folder, next(iter(summary["seeds"])), reported[0])
    return {
        "metric": summary["metric"],
        "learning_rate": f"{best:g}",
        "tuning": {f"{rate:g}": score for rate, score in tuning.items()},
        "seeds": len(seeds),
        "runs": [f"{model}/{folder.name}/seed{seed}" for seed in summary["seeds"]],
        "folds": folds,
        "mean": mean,
        "deviation": deviation,
        "loss": mean_and_deviation([own["loss"] for own in seeds])[0],
        "note": summary["note"],
        "parameters": AutoModelForAudioClassification.from_pretrained(one).num_parameters(),
    }


def behind_cat(results: dict, output_dir: Path) -> dict[str, tuple[float, float | None]]:
    """How far each other model is behind CAT, and the standard error, where clips have one label."""
    if "cat" not in results or results["cat"]["metric"] != "accuracy":
        return {}
    scores = {
        model: [read_scores(output_dir / run / "predictions.csv") for run in own["runs"]]
        for model, own in results.items()
    }
    return {model: accuracy_difference(scores["cat"], scores[model]) for model in results if model != "cat"}


def table(results: dict) -> str:
    """What `main` returns, as Markdown; with several seeds, a fold's figure is their mean."""
    folds = list(next(iter(results.values()))["folds"])
    tuned = any(own["tuning"] for own in results.values())
    with_seeds = any(own["seeds"] > 1 for own in results.values())
    with_loss = all("loss" in own for own in results.values())
    with_difference = any("behind_cat" in own for own in results.values())
    rows = []
    for model, own in results.items():
        tuning = ", ".join(f"{rate}: {100 * score:.1f}" for rate, score in own["tuning"].items())
        chosen = [tuning, own["learning_rate"]] if tuned else []
        seeds = [own["seeds"]] if with_seeds else []
        scores = [per_cent(own["folds"][fold], None) for fold in folds]
        mean = per_cent(own["mean"], own["deviation"])
        loss = [f"{own['loss']:.2f}"] if with_loss else []
        behind = [per_cent(*own["behind_cat"]) if "behind_cat" in own else ""] if with_difference else []
        rows.append([model, f"{own['parameters'] / 1e6:.2f} M", *chosen, *seeds, *scores, mean, *loss, *behind])
    columns = ["fold that chose the learning rate", "chosen"] if tuned else []
    columns += ["seeds"] if with_seeds else []
    columns += [f"fold {fold}" for fold in folds] + ["mean"] + (["loss"] if with_loss else [])
    columns += ["behind CAT by"] if with_difference else []
    return markdown_table(["model", "parameters", *columns], rows)


def main(argv: list[str] | None = None) -> dict:
    """Run the script.

    Returns:
        The content of `results.json`.
    """
    args, flags = parse_arguments(argv)
    state, path = PartialState(), args.output_dir / "results.json"
    if state.is_main_process:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        own = {key: value for key, value in vars(args).items() if key not in ("models", "seeds", "output_dir")}
        remember({**own, "flags": flags}, args.output_dir / "flags.json")
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    results |= {model: measure(model, args, flags) for model in args.models}
    results = {model: results[model] for model in ("cat", *PEERS) if model in results}
    if state.is_main_process:
        for model, difference in behind_cat(results, args.output_dir).items():
            results[model]["behind_cat"] = difference
        write_results(args.output_dir, results, table(results))
        metric = results[args.models[0]]["metric"]
        means = {model: {metric: (own["mean"], own["deviation"])} for model, own in results.items()}
        plot_means(means, args.output_dir / "table.png", f"{metric}, %")
    return results


if __name__ == "__main__":
    main()
