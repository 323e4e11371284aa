#!/usr/bin/env python
r"""Whether models name clips better that they hear at several speeds.

    python examples/speeds.py --data ../shared/data/esc10 --runs runs/esc10/seed0 --output_dir runs/speeds

`--runs` is the folder of one seed of `cross_validate.py`: the model of each fold hears the clips of that fold at each
of `--speeds`, as training plays them faster and slower. The result is `results.json` and `table.md`: the accuracy at
each speed, and that of the mean of the probabilities.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import peers  # noqa: F401  registers the models that compare_models.py writes with transformers
import torch
from datasets import Dataset
from evaluate_ensemble import measure
from torch.utils.data import DataLoader
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification

from transformers_cat.training import (
    AudioCollator,
    align_labels,
    decode_audio,
    is_multi_label,
    load_audio_dataset,
    split_folds,
    without_only_split,
)
from transformers_cat.training.metrics import PROBLEM_TYPES, probabilities
from transformers_cat.training.protocol import markdown_table, per_cent
from transformers_cat.training.report import write_json
from transformers_cat.training.scores import Scores, average_scores, concatenate_scores


def collate(examples: list[dict], collator: AudioCollator, speed: float) -> dict[str, torch.Tensor]:
    """A batch of clips (N,) that are played `speed` times as fast."""
    played = []
    for example in examples:
        waveform = torch.as_tensor(example["audio"], dtype=torch.float32)
        size = max(round(len(waveform) / speed), 1)
        waveform = torch.nn.functional.interpolate(waveform[None, None], size=size, mode="linear")[0, 0]
        played.append({**example, "audio": waveform})
    return collator(played)


@torch.no_grad()
def scores_at(folder: Path, clips: Dataset, speed: float) -> Scores:
    """What the model in `folder` says of clips at a speed."""
    model = AutoModelForAudioClassification.from_pretrained(folder).eval()
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    names = [model.config.id2label[i] for i in range(model.config.num_labels)]
    clips = align_labels(clips, names)
    collator = partial(collate, collator=AudioCollator(extractor, training=False, num_labels=len(names)), speed=speed)
    batches = DataLoader(decode_audio(clips, extractor.sampling_rate), batch_size=16, collate_fn=collator)
    logits = torch.cat([model(**batch).logits for batch in batches])
    return Scores.of(clips, probabilities(logits.numpy(), PROBLEM_TYPES[0]), names)


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
    if is_multi_label(dataset):
        raise ValueError("The clips have several labels; the accuracy is that of clips with one")
    finished = sorted(args.runs.glob("fold*/results.json"))
    if not finished:
        raise FileNotFoundError(f"{args.runs} holds no finished run of cross_validate.py, such as fold1/results.json")
    clips = {
        path.parent: split_folds(dataset, json.loads(path.read_text())["arguments"]["data"]["test_folds"])["test"]
        for path in finished
    }
    members = {
        f"{speed:g}": concatenate_scores([scores_at(folder, tested, speed) for folder, tested in clips.items()])
        for speed in args.speeds
    }
    members["mean of their probabilities"] = average_scores(members)
    results = {name: measure(scores, PROBLEM_TYPES[0]) for name, scores in members.items()}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(args.output_dir / "results.json", results)
    (args.output_dir / "table.md").write_text(table(results), encoding="utf-8")
    print(table(results))
    return results


if __name__ == "__main__":
    main()
