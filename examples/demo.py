#!/usr/bin/env python
"""Train a small Causal Audio Transformer on a folder of recordings and let it name clips that it has not heard.

    python examples/demo.py --data ../shared/data/esc10

The folder has the layout of ESC-50 or UrbanSound8K, whose first fold is then held out, or train/<class>/... and
test/<class>/... sub-folders.
"""

import argparse
import csv
from pathlib import Path

import run_audio_classification
from transformers import pipeline

from transformers_cat import load_audio
from transformers_cat.training import load_audio_dataset

SHOWN = 10  # clips


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of recordings")
    parser.add_argument("--epochs", default="8", help="a few minutes on two cores for the 320 clips of ESC-10")
    parser.add_argument("--output_dir", default="runs/demo", help="where the model is saved")
    arguments = parser.parse_args()

    dataset = load_audio_dataset(arguments.data)
    folds = ["--test_folds", str(min(dataset["fold"]))] if "fold" in getattr(dataset, "features", ()) else []
    metrics = run_audio_classification.main(
        ["--data", arguments.data, "--output_dir", arguments.output_dir, "--do_train", "--do_eval", *folds]
        + ["--config_name", str(Path(__file__).parents[1] / "model_cards" / "cat-nano")]
        # So short a training has no time for strong augmentation.
        + ["--num_train_epochs", arguments.epochs, "--mixup_probability", "0", "--save_strategy", "no"]
    )

    # Now as any user would, who has nothing but the saved folder.
    classifier = pipeline("audio-classification", model=arguments.output_dir)
    with open(Path(arguments.output_dir) / "predictions.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    print(f"\nClips that the model did not train on ({metrics['eval_accuracy']:.0%} of {len(rows)} named rightly):")
    for row in rows[:: max(len(rows) // SHOWN, 1)][:SHOWN]:
        heard = ", ".join(
            f"{item['label']} {item['score']:.2f}" for item in classifier(load_audio(row["path"]), top_k=3)
        )
        print(f"  {Path(row['path']).name:24} is {row['label']:16} heard as {heard}")
    print(f"\nThe model is in {arguments.output_dir}: pipeline('audio-classification', model='{arguments.output_dir}')")


if __name__ == "__main__":
    main()
