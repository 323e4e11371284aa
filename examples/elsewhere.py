#!/usr/bin/env python
r"""What models say of recordings of another data set that hold one of their classes, by whatever name it has there.

    python examples/elsewhere.py --runs runs/esc10 --data ../shared/data/urbansound8k --label dog_bark --expected dog \
        --output_dir runs/elsewhere

`--runs` are folders of `cross_validate.py`, of which every finished model hears all clips of `--label`, or folders of
one model. Values of their feature extractors may be replaced. The result is `results.json`, how often each model gave
which answer, and `table.md`.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import numpy as np
import peers  # noqa: F401  registers the models that compare_models.py writes with transformers
from datasets import Dataset, DatasetDict, concatenate_datasets
from transformers import pipeline

from transformers_cat.configuration_cat import class_names
from transformers_cat.training import as_multi_label, decode_audio, label_names, load_audio_dataset
from transformers_cat.training.protocol import markdown_table
from transformers_cat.training.report import write_results

ANSWERS_SHOWN = 3  # beside the expected one


def models(runs: Path) -> list[Path]:
    """The finished models of a cross-validation, or the folder itself.

    Raises:
        FileNotFoundError: there is neither.
    """
    finished = sorted(path.parent for path in runs.glob("seed*/fold*/results.json"))
    if not finished and not (runs / "config.json").is_file():
        raise FileNotFoundError(f"{runs} holds neither a model nor the finished runs of cross_validate.py")
    return finished or [runs]


def clips_of(data: str, label: str) -> Dataset:
    """The clips of one class, of all splits.

    Raises:
        ValueError: there is no such class.
    """
    loaded = load_audio_dataset(data)
    clips = concatenate_datasets(list(loaded.values())) if isinstance(loaded, DatasetDict) else loaded
    names = label_names(clips)
    if label not in names:
        raise ValueError(f"{data} has no class {label!r}, only {names}")
    rows = as_multi_label(clips).with_format(None)["label"][:]
    return clips.select([i for i, own in enumerate(rows) if names.index(label) in own])


def answers(model: Path, clips: Dataset, expected: str, overrides: dict) -> dict[str, int]:
    """How often the model says what, the most frequent first.

    Raises:
        ValueError: it cannot say what is expected, or its feature extractor has nothing by the name of an override.
    """
    classifier = pipeline("audio-classification", model=str(model))
    if expected not in (names := class_names(classifier.model.config)):
        raise ValueError(f"{model} has no class {expected!r}, only {names}")
    extractor = classifier.feature_extractor
    for name, value in overrides.items():
        if not hasattr(extractor, name):
            raise ValueError(f"The feature extractor of {model} has no {name!r}")
        setattr(extractor, name, value)
    decoded = decode_audio(clips, extractor.sampling_rate)
    audio = ({"raw": decoded[i]["audio"], "sampling_rate": extractor.sampling_rate} for i in range(len(decoded)))
    return dict(Counter(best["label"] for (best,) in classifier(audio, top_k=1)).most_common())


def table(results: dict[str, list[dict[str, int]]], expected: str) -> str:
    """run -> answers of its models, as a table of means over them."""
    rows = []
    for name, counts in results.items():
        right = [own.get(expected, 0) for own in counts]
        others = Counter()
        for own in counts:
            others.update({answer: count / len(counts) for answer, count in own.items() if answer != expected})
        frequent = ", ".join(f"{answer} {count:.0f}" for answer, count in others.most_common(ANSWERS_SHOWN))
        between = f"{min(right)} to {max(right)}"
        rows.append([name, len(counts), sum(counts[0].values()), f"{np.mean(right):.0f}", between, frequent])
    return markdown_table(["run", "models", "clips", expected, "from, to", "others"], rows)


def main(argv: list[str] | None = None) -> dict[str, list[dict[str, int]]]:
    """Run the script.

    Returns:
        The `answers` of `results.json`: run -> for each of its models, answer -> clips.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="+", required=True)
    parser.add_argument("--data", required=True, help="folder or CSV file of clips that the models were not trained on")
    parser.add_argument("--label", required=True, help="the class whose clips are heard")
    parser.add_argument("--expected", required=True, help="what the models call it")
    parser.add_argument(
        "--feature_extractor_overrides", type=json.loads, default={}, help='JSON, for instance {"whitening": 0}'
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args(argv)
    clips = clips_of(args.data, args.label)
    results = {
        str(runs): [answers(model, clips, args.expected, args.feature_extractor_overrides) for model in models(runs)]
        for runs in args.runs
    }
    kept = {"expected": args.expected, "answers": results}
    write_results(args.output_dir, kept, table(results, args.expected))
    return results


if __name__ == "__main__":
    main()
