"""The command `transformers-cat`: names sounds in files, and says what a checkpoint is.

    transformers-cat classify dog.wav recordings/ 'field/*.flac' --top 3
    transformers-cat info

It is the `audio-classification` pipeline of transformers and nothing beside it, so every model that the pipeline takes
can be named by `--model`.
"""

import argparse
import csv
import glob
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from huggingface_hub import ModelCard, snapshot_download
from safetensors import safe_open
from tqdm import tqdm
from transformers import AutoConfig, AutoFeatureExtractor, Pipeline, pipeline
from transformers.utils.logging import disable_progress_bar

from .audio import load_audio
from .configuration_cat import MRMF_ARGUMENTS

SHIPPED = Path(__file__).with_name("checkpoints") / "cat-nano-esc10"  # in a checkout, a link into model_cards/
SUFFIXES = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".m4a", ".aac", ".wma", ".aif", ".aiff", ".webm", ".mp4"}
ARCHITECTURE = ("patch_size", "embed_dim", "stem_channels", "depths", "num_heads", "window_size")


def find_files(patterns: Sequence[str]) -> list[Path]:
    """Files, the audio files of folders and what lies below them, and matches of globs; each once, in this order.

    Raises:
        FileNotFoundError: A pattern names nothing.
    """
    found = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            matches = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        else:
            matches = [path] if path.is_file() else sorted(map(Path, glob.glob(pattern, recursive=True)))
            matches = [match for match in matches if match.is_file()]
        if not matches:
            kind = "audio files in the folder" if path.is_dir() else "file"
            raise FileNotFoundError(f"There is no {kind} {pattern}.")
        found += matches
    return list(dict.fromkeys(found))


def classify_files(classifier: Pipeline, files: Iterable[Path], top: int, batch_size: int) -> Iterator[tuple]:
    """Classifies files, of which `batch_size` are in memory at a time.

    Yields:
        (file, seconds of audio, scores as the pipeline gives them, `None`), or (file, 0, `None`, what went wrong).
    """
    rate = classifier.feature_extractor.sampling_rate
    options = {"top_k": top}
    if classifier.model.config.problem_type == "multi_label_classification":
        options["function_to_apply"] = "sigmoid"  # by itself the pipeline knows that from transformers 5.23 on
    files = iter(files)
    while batch := list(islice(files, batch_size)):
        clips, scores, errors = {}, {}, {}
        for file in batch:
            try:
                clips[file] = load_audio(file, rate)
            except (OSError, ValueError) as error:
                errors[file] = error
        try:
            if clips:  # of nothing, the pipeline makes an error
                scores = dict(zip(clips, classifier(list(clips.values()), batch_size=batch_size, **options)))
        except (RuntimeError, ValueError):  # one of them, and the others need not suffer
            for file, clip in clips.items():
                try:
                    scores[file] = classifier(clip, **options)
                except (RuntimeError, ValueError) as error:
                    errors[file] = error
        for file in batch:
            if file in scores:
                yield file, len(clips[file]) / rate, scores[file], None
            else:
                yield file, 0.0, None, errors[file]


def classify(arguments: argparse.Namespace) -> int:
    """`transformers-cat classify`: 0, or 1 if a file could not be read, or 2 if there are none."""
    try:
        files = find_files(arguments.files)
    except FileNotFoundError as error:
        print(f"{error} Pass files, folders or globs.", file=sys.stderr)
        return 2
    classifier = pipeline("audio-classification", model=str(arguments.model), device=arguments.device)
    rows = csv.writer(sys.stdout)
    if arguments.csv:
        rows.writerow(["file", "label", "score"])
    failed, heard, start = 0, 0.0, time.perf_counter()
    results = classify_files(classifier, files, arguments.top, arguments.batch_size)
    for file, seconds, scores, error in tqdm(results, total=len(files), unit="file", disable=None, leave=False):
        heard += seconds
        if error is not None:
            failed += 1
            tqdm.write(f"{file}: {error}", file=sys.stderr)
        elif arguments.json:
            print(json.dumps({"file": str(file), "scores": scores}, ensure_ascii=False), flush=True)
        elif arguments.csv:
            rows.writerows([file, item["label"], f"{item['score']:.6f}"] for item in scores)
        else:
            print(f"{file}: " + ", ".join(f"{item['label']} {item['score']:.2f}" for item in scores), flush=True)
    elapsed = time.perf_counter() - start
    print(f"{heard:.1f} s of audio in {elapsed:.2f} s; {failed} of {len(files)} files failed", file=sys.stderr)
    return int(failed > 0)


def describe(model: str | Path) -> dict:
    """What a checkpoint is, from its configuration, its card and the header of its weights, which are not loaded."""
    folder = Path(model if Path(model).is_dir() else snapshot_download(str(model)))
    config, extractor = AutoConfig.from_pretrained(folder), AutoFeatureExtractor.from_pretrained(folder)
    parameters = size = 0
    for weights in folder.glob("*.safetensors"):
        size += weights.stat().st_size
        with safe_open(weights, framework="np") as tensors:
            parameters += sum(int(np.prod(tensors.get_slice(name).get_shape())) for name in tensors.keys())
    front_end = [name for name in MRMF_ARGUMENTS if hasattr(extractor, name)]
    card = folder / "README.md"
    results = (ModelCard.load(card).data.eval_results or []) if card.is_file() else []
    return {
        "model": str(model),
        "model_type": config.model_type,
        "parameters": parameters,
        "megabytes": round(size / 1e6, 1),
        "labels": [config.id2label[index] for index in range(config.num_labels)],
        "problem_type": config.problem_type,
        "front_end": {name: getattr(extractor, name) for name in front_end},
        "architecture": {name: getattr(config, name) for name in ARCHITECTURE if hasattr(config, name)},
        "results": [f"{one.metric_name}: {one.metric_value} ({one.dataset_name})" for one in results],
    }


def info(arguments: argparse.Namespace) -> int:
    """`transformers-cat info`."""
    facts = describe(arguments.model)
    if arguments.json:
        print(json.dumps(facts, ensure_ascii=False))
        return 0
    for name, value in facts.items():
        if isinstance(value, dict):
            value = "".join(f"\n  {key}: {part}" for key, part in value.items())
        elif isinstance(value, list):
            value = ", ".join(value) or "none stated"
        print(f"{name}: {value}")
    return 0


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser("transformers-cat", description="Name sounds with a transformers model.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("classify", help="name the sounds in files")
    command.add_argument("files", nargs="+", metavar="FILE", help="files, folders or globs")
    command.add_argument("--model", default=SHIPPED, help="folder, or id on the Hub; default: the model shipped here")
    command.add_argument("--top", type=_positive, default=5, help="labels for each file")
    output = command.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="a JSON object for each file and line")
    output.add_argument("--csv", action="store_true", help="a row for each file and label")
    command.add_argument("--batch_size", type=_positive, default=1, help="files that are classified at once")
    command.add_argument("--device", help="as in PyTorch, like cuda:0; default: the first accelerator, else the CPU")
    command.set_defaults(run=classify)

    command = commands.add_parser("info", help="say what a checkpoint is")
    command.add_argument("model", nargs="?", default=SHIPPED, help="folder, or id on the Hub")
    command.add_argument("--json", action="store_true", help="as a JSON object")
    command.set_defaults(run=info)

    arguments = parser.parse_args(argv)
    disable_progress_bar()  # of loading weights, which takes no time
    return arguments.run(arguments)
