#!/usr/bin/env python
r"""How much a model's accuracy depends on the volume and the length of what it hears, and on its own precision.

    python examples/robustness.py --data runs/esc10-32k --runs runs/esc10 --decibels -20 0 --output_dir runs/volume
    python examples/robustness.py --data runs/esc10-32k --runs runs/esc10 --seconds 0.5 1 5 --output_dir runs/length
    python examples/robustness.py --data runs/esc10-32k --runs runs/esc10 --precisions int8 --output_dir runs/precision

`--runs` is a folder of `cross_validate.py`: the model of each fold hears the clips of that fold, louder or quieter by
each of `--decibels`, the loudest part of each that lasts `--seconds`, and, at each of `--precisions`, the clips as they
are. Several folders are compared. The result is `results.json` and `table.md`: the accuracy over the clips of all
folds and, for a precision, the share of them for which it names the same class as float32.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import peers  # noqa: F401  registers the models that compare_models.py writes with transformers
import torch
from datasets import Dataset, DatasetDict
from torch.utils.data import DataLoader
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification

from transformers_cat.configuration_cat import class_names
from transformers_cat.linear import make_plain
from transformers_cat.training import (
    AudioCollator,
    align_labels,
    decode_audio,
    is_multi_label,
    load_audio_dataset,
    read_scores,
    split_folds,
    without_only_split,
)
from transformers_cat.training.clips import clip_names
from transformers_cat.training.metrics import SINGLE_LABEL, probabilities
from transformers_cat.training.protocol import markdown_table, per_cent
from transformers_cat.training.report import write_results
from transformers_cat.training.scores import Scores
from transformers_cat.training.tables import some


def quantised(model: torch.nn.Module) -> torch.nn.Module:
    """The model with its linear layers in 8 bits, for CPUs; their inputs are quantised as they come."""
    make_plain(model)
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


PRECISIONS = {
    "float32": torch.nn.Module.float,
    "bfloat16": torch.nn.Module.bfloat16,
    "float16": torch.nn.Module.half,
    "int8": quantised,
}


def unchanged(waveform: torch.Tensor, sampling_rate: int) -> torch.Tensor:
    return waveform


def louder(waveform: torch.Tensor, sampling_rate: int, decibels: float) -> torch.Tensor:
    """(N,) -> the same, with a gain."""
    return waveform * 10 ** (decibels / 20)


def loudest(waveform: torch.Tensor, sampling_rate: int, seconds: float) -> torch.Tensor:
    """(N,) -> the part of that length with the most energy, the first of several; a shorter one as it is."""
    samples = max(round(seconds * sampling_rate), 1)
    if len(waveform) <= samples:
        return waveform
    energy = torch.nn.functional.pad(waveform.double().square().cumsum(0), (1, 0))
    start = int((energy[samples:] - energy[:-samples]).argmax())
    return waveform[start : start + samples]


@torch.no_grad()
def heard(
    folder: Path, clips: Dataset, change: Callable[[torch.Tensor, int], torch.Tensor], precision: str = "float32"
) -> Scores:
    """What the model in `folder` says of clips, the waveform (N,) of each of which is changed first, at its rate."""
    model = PRECISIONS[precision](AutoModelForAudioClassification.from_pretrained(folder).eval())
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    names = class_names(model.config)
    clips = align_labels(clips, names)
    collator = AudioCollator(extractor, training=False, num_labels=len(names))
    changed = partial(change, sampling_rate=extractor.sampling_rate)

    def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
        return collator([{**example, "audio": changed(torch.as_tensor(example["audio"]))} for example in examples])

    batches = DataLoader(decode_audio(clips, extractor.sampling_rate), batch_size=16, collate_fn=collate)
    logits = torch.cat([model(**batch).logits for batch in batches])
    return Scores.of(clips, probabilities(logits.float().numpy(), SINGLE_LABEL), names)


def tested_clips(runs: Path, dataset: Dataset | DatasetDict) -> dict[Path, Dataset]:
    """The folder of each finished run of a cross-validation, and the clips that it was tested on.

    Raises:
        FileNotFoundError: `runs` holds none.
        ValueError: clips have several labels, or come in splits instead of folds; or a run was not tested on clips that
            its folds have here, so that it may have been trained on them.
    """
    if isinstance(dataset, DatasetDict):
        raise ValueError(f"The data come in the splits {list(dataset)}; the models of folds hear the clips of folds")
    if is_multi_label(dataset):
        raise ValueError("The clips have several labels; the accuracy is that of clips with one")
    finished = sorted(runs.glob("seed*/fold*/results.json"))
    if not finished:
        raise FileNotFoundError(f"{runs} holds no seed*/fold*/results.json of a finished run of cross_validate.py")
    folds = {path.parent: json.loads(path.read_text())["arguments"]["data"]["test_folds"] for path in finished}
    clips = {folder: split_folds(dataset, own)["test"] for folder, own in folds.items()}
    for folder, own in clips.items():
        tested = {Path(name).name for name in read_scores(folder / "predictions.csv").paths}
        if others := [name for name in clip_names(own) if Path(name).name not in tested]:
            raise ValueError(f"{folder} was not tested on {some(others)}: pass the --data and folds of the run")
    return clips


def changes(decibels: list[float], seconds: list[float]) -> dict[str, Callable[[torch.Tensor, int], torch.Tensor]]:
    """What the clips are changed by, by name."""
    gains = {f"{value:+g} dB" if value else "0 dB": partial(louder, decibels=value) for value in decibels}
    return gains | {f"{value:g} s": partial(loudest, seconds=value) for value in seconds}


def accuracy(scores: list[Scores]) -> float:
    """Over the clips of all folds."""
    shares = [own.metrics(SINGLE_LABEL)["accuracy"] for own in scores]
    return float(np.average(shares, weights=[len(own.paths) for own in scores]))


def agreement(scores: list[Scores], others: list[Scores]) -> float:
    """The share of clips for which both name the same class."""
    pairs = zip(scores, others, strict=True)
    return float(np.concatenate([own.values.argmax(1) == other.values.argmax(1) for own, other in pairs]).mean())


def measure(runs: Path, dataset: Dataset, changes: dict[str, Callable], precisions: list[str]) -> dict[str, float]:
    """The shares over the tested folds of a cross-validation, by what is changed."""
    clips = tested_clips(runs, dataset)

    def hear(change: Callable, precision: str = "float32") -> list[Scores]:
        return [heard(folder, tested, change, precision) for folder, tested in clips.items()]

    results = {name: accuracy(hear(change)) for name, change in changes.items()}
    if precisions:
        reference = hear(unchanged)
        results["float32"] = accuracy(reference)
    for precision in precisions:
        scores = hear(unchanged, precision)
        results[precision] = accuracy(scores)
        results[f"{precision}, class as in float32"] = agreement(scores, reference)
    return results


def table(results: dict[str, dict[str, float]]) -> str:
    """run -> change -> share, as a table."""
    columns = list(next(iter(results.values())))
    rows = [[name, *(per_cent(own[column], None) for column in columns)] for name, own in results.items()]
    return markdown_table(["", *columns], rows)


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Run the script.

    Returns:
        The content of `results.json`: run -> change -> share.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder or CSV file of the clips, in folds")
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="folders of cross_validate.py")
    parser.add_argument("--decibels", type=float, nargs="+", default=[], help="gains")
    parser.add_argument("--seconds", type=float, nargs="+", default=[], help="lengths")
    parser.add_argument("--precisions", choices=list(PRECISIONS)[1:], nargs="+", default=[], help="beside float32")
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args(argv)
    if not args.decibels + args.seconds + args.precisions:
        parser.error("nothing to change: pass --decibels, --seconds or --precisions")
    if any(value <= 0 for value in args.seconds):
        parser.error(f"--seconds must be positive, not {args.seconds}")
    dataset = without_only_split(load_audio_dataset(args.data))
    named = {runs.name for runs in args.runs}
    changed = changes(args.decibels, args.seconds)
    results = {
        runs.name if len(named) == len(args.runs) else str(runs): measure(runs, dataset, changed, args.precisions)
        for runs in args.runs
    }
    write_results(args.output_dir, results, table(results))
    return results


if __name__ == "__main__":
    main()
