#!/usr/bin/env python
"""Lay out a trained model as the Hub repository that it would be, with the code that runs it and a card.

    python examples/publish_checkpoint.py --model runs/esc10-all --cross_validation runs/esc10 \
        --output_dir model_cards/cat-nano-esc10

`--model` is a folder that `run_audio_classification.py` wrote. If it was trained on all clips, `--cross_validation`,
a folder of `cross_validate.py` with the same recipe, gives the figures of its card. The card knows the data set by its
folder, or by `--dataset` where `prepare_audio.py` made another.
"""

import argparse
import json
from pathlib import Path

from run_audio_classification import EVALUATION, INCIDENTAL

from transformers_cat import CATFeatureExtractor, CATForAudioClassification, include_code, model_card
from transformers_cat.cards import DATASETS, known_dataset

# How arguments begin by which a model of all clips and those of its cross-validation may differ.
NOT_THE_RECIPE = (*INCIDENTAL, *EVALUATION, "test_folds", "validation_folds", "seed")


def check_same_recipe(own: dict, others: list[dict]) -> None:
    """Refuses scores of another recipe: they would say nothing of this model."""
    for other in others:
        for part in ("data", "training"):
            ours, theirs = own["arguments"][part], other["arguments"][part]
            differing = {key for key in ours if ours[key] != theirs.get(key) and not key.startswith(NOT_THE_RECIPE)}
            if differing:
                raise ValueError(f"The cross-validation had other arguments than the model: {sorted(differing)}")
        for start in ("model_name_or_path", "init_from"):
            if own["arguments"]["model"].get(start) != other["arguments"]["model"].get(start):
                raise ValueError(f"The cross-validation had another --{start} than the model")
        if own["config"] != other["config"]:
            raise ValueError("The cross-validation had another configuration than the model")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a finished run")
    parser.add_argument("--cross_validation", type=Path, help="folder of a cross-validation by the same recipe")
    parser.add_argument("--dataset", choices=list(DATASETS), help="what the model was trained on")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the repository, named as it is")
    arguments = parser.parse_args(argv)

    own = json.loads((arguments.model / "results.json").read_text())
    folds = []
    if arguments.cross_validation:
        folds = [json.loads(path.read_text()) for path in sorted(arguments.cross_validation.rglob("results.json"))]
        check_same_recipe(own, folds)
    model = CATForAudioClassification.from_pretrained(arguments.model)
    extractor = CATFeatureExtractor.from_pretrained(arguments.model)
    data = own["arguments"]["data"]
    data = data["dataset_name"] or data["data"] or data["train_file"]
    dataset = arguments.dataset or known_dataset(data, model.config.num_labels)
    with include_code(model, extractor):
        model.save_pretrained(arguments.output_dir)
        extractor.save_pretrained(arguments.output_dir)
    model_card(model, arguments.output_dir.name, [own, *folds], dataset).save(arguments.output_dir / "README.md")


if __name__ == "__main__":
    main()
