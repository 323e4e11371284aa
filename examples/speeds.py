#!/usr/bin/env python
r"""Whether models name clips better that they hear at several speeds.

    python examples/speeds.py --data ../shared/data/esc10 --runs runs/esc10/seed0 --output_dir runs/speeds

`--runs` is the folder of one seed of `cross_validate.py`: the model of each fold hears the clips of that fold at each
of `--speeds`, as training plays them faster and slower. The result is `results.json` and `table.md`: the accuracy at
each speed, and that of the mean of the probabilities.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from evaluate_ensemble import measure
from volume import SINGLE_LABEL, heard, tested_clips

from transformers_cat.training import load_audio_dataset, without_only_split
from transformers_cat.training.protocol import markdown_table, per_cent
from transformers_cat.training.report import write_json
from transformers_cat.training.scores import average_scores, concatenate_scores


def played(waveform: torch.Tensor, speed: float) -> torch.Tensor:
    """A waveform (N,) that is played `speed` times as fast."""
    size = max(round(len(waveform) / speed), 1)
    return torch.nn.functional.interpolate(waveform[None, None], size=size, mode="linear")[0, 0]


def table(results: dict) -> str:
    """The folds at each speed and of the mean, as Markdown."""
    folds = list(results["mean of their probabilities"].get("folds", {}))  # none, where there is one alone
    rows = []
    for name, own in results.items():
        mean = per_cent(own.get("mean", own["metrics"]["accuracy"]), own.get("deviation"))
        rows.append([name, *(per_cent(own["folds"][fold], None) for fold in folds), mean])
    return markdown_table(["speed", *(f"fold {fold}" for fold in folds), "mean ± standard deviation"], rows)


def main(argv: list[str] | None = None) -> dict:
    """Run the script.

    Returns:
        The content of `results.json`: speed, or "mean of their probabilities" -> metrics, folds, mean and deviation.

    Raises:
        FileNotFoundError: `runs` holds no finished fold.
        ValueError: clips have several labels.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder or CSV file of the clips, in folds")
    parser.add_argument("--runs", type=Path, required=True, help="folder of one seed of cross_validate.py")
    parser.add_argument("--speeds", type=float, nargs="+", default=[0.9, 1.0, 1.1])
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args(argv)
    dataset = without_only_split(load_audio_dataset(args.data))
    clips, members = tested_clips(args.runs, dataset, "fold*"), {}
    for speed in args.speeds:
        parts = [heard(folder, tested, partial(played, speed=speed)) for folder, tested in clips.items()]
        members[f"{speed:g}"] = concatenate_scores(parts)
    members["mean of their probabilities"] = average_scores(members)
    results = {name: measure(scores, SINGLE_LABEL) for name, scores in members.items()}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(args.output_dir / "results.json", results)
    (args.output_dir / "table.md").write_text(table(results), encoding="utf-8")
    print(table(results))
    return results


if __name__ == "__main__":
    main()
