"""The command `transformers-cat`: names sounds in files, says why, and says what a checkpoint is.

    transformers-cat classify dog.wav recordings/ 'field/*.flac' --top 3
    transformers-cat why dog.wav
    transformers-cat info

`classify` is the `audio-classification` pipeline of transformers and nothing beside it, so every model that the
pipeline takes can be named by `--model`; `why` asks a CAT alone.
"""

import argparse
import codecs
import csv
import dataclasses
import glob
import io
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import accumulate, chain, islice
from math import isfinite, prod
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import ModelCard, snapshot_download
from safetensors import safe_open
from tqdm import tqdm
from transformers import AutoConfig, Pipeline, pipeline
from transformers.utils.logging import disable_progress_bar

from .audio import audio_files, load_audio
from .cards import FUNCTIONS
from .configuration_cat import MRMF_ARGUMENTS, CATConfig, class_names, implied_problem_type
from .why import Explanation, explain

SHIPPED = Path(__file__).with_name("checkpoints") / "cat-nano-esc10"  # in a checkout, a link into model_cards/

# What `info` shows of a configuration: the sizes of CAT, and the names that most other models have for theirs.
ARCHITECTURE = ("patch_size", "embed_dim", "stem_channels", "depths", "num_heads", "window_size")
ARCHITECTURE += ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
# What a feature extractor's file holds besides the front end.
BOOKKEEPING = {"feature_extractor_type", "processor_class", "auto_map"}
BOOKKEEPING |= {"padding_side", "padding_value", "return_attention_mask"}
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")  # of batch norms: saved, but no parameters


def find_files(patterns: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Files, the audio files of folders and what lies below them, and matches of globs; each once, in this order.

    A file is the same by whichever way its folder is reached, as a glob with ** goes around where links make a ring.

    Returns:
        The files, and the patterns that name none.
    """
    found, missing = [], []
    for pattern in patterns:
        # A name that looks like a glob, such as "take [1].wav", may be that of a file.
        paths = [Path(pattern)] if os.path.exists(pattern) else sorted(map(Path, glob.glob(pattern, recursive=True)))
        matches = [file for path in paths for file in (sorted(audio_files(path)) if path.is_dir() else [path])]
        found += matches
        if not matches:
            missing.append(pattern)
    once: dict[str, Path] = {}
    for file in found:
        once.setdefault(os.path.join(os.path.realpath(file.parent), file.name), file)
    return list(once.values()), missing


def cut(clip: np.ndarray, length: int | None) -> list[np.ndarray]:
    """Pieces of `length` samples, of which the last has half as many more or less; without a length, all in one."""
    count = max(1, round(len(clip) / length)) if length else 1
    return np.split(clip, [length * index for index in range(1, count)])


def classify_files(
    classifier: Pipeline, files: Iterable[Path], top: int, batch_size: int, every: float | None = None
) -> Iterator[tuple]:
    """Classifies files, or pieces of `every` seconds of them; `batch_size` files are in memory at a time.

    Yields:
        (file, seconds of each of its pieces, scores of each as the pipeline gives them, `None`), or (file, `[]`,
        `None`, what went wrong).
    """
    rate = classifier.feature_extractor.sampling_rate
    function = FUNCTIONS.get(implied_problem_type(classifier.model.config), "softmax")
    options = {"top_k": top, "function_to_apply": function}
    length = every and round(every * rate)
    files = iter(files)
    while batch := list(islice(files, batch_size)):
        pieces, scores, errors = {}, {}, {}
        for file in batch:
            try:
                pieces[file] = cut(load_audio(file, rate), length)
            except (OSError, ValueError) as error:
                errors[file] = error
        try:
            if pieces:  # of nothing, the pipeline makes an error
                every_piece = list(chain.from_iterable(pieces.values()))
                answers = iter(classifier(every_piece, batch_size=batch_size, **options))
                scores = {file: list(islice(answers, len(own))) for file, own in pieces.items()}
        except Exception:  # by one of them, and the others need not suffer; which it is depends on the model
            for file, own in pieces.items():
                try:
                    scores[file] = classifier(own, **options)
                except Exception as error:
                    errors[file] = error
        for file in batch:
            if not all(isfinite(item["score"]) for answer in scores.get(file, ()) for item in answer):
                errors[file] = ValueError("the model gives no number for it: are its weights damaged?")
            if file not in errors:
                yield file, [len(piece) / rate for piece in pieces[file]], scores[file], None
            else:
                yield file, [], None, errors[file]


def classify(arguments: argparse.Namespace) -> int:
    """`transformers-cat classify`: 0, or 1 if a file could not be classified, or 2 if there is none or no model."""
    files, missing, classifier = _open(arguments)
    if classifier is None:
        return 2
    if arguments.csv:
        _print_row(["file", *(["start", "end"] if arguments.every else []), "rank", "label", "score"])
    failed, heard, began = 0, 0.0, time.perf_counter()
    results = classify_files(classifier, files, arguments.top, arguments.batch_size, arguments.every)
    for file, seconds, scores, error in tqdm(results, total=len(files), unit="file", disable=None, leave=False):
        with tqdm.external_write_mode():  # or the line would be written into the bar
            if error is not None:
                failed += 1
                print(f"{file}: {_reason(error)}", file=sys.stderr)
                continue
            ends = list(accumulate(seconds))
            for start, end, answer in zip([0.0, *ends], ends, scores):
                span = {"start": round(start, 3), "end": round(end, 3)} if arguments.every else {}
                _print_scores(str(file), span, answer, arguments)
            heard += ends[-1]
            sys.stdout.flush()
    elapsed = time.perf_counter() - began
    done = f"{len(files) - failed} of {len(files)} files"
    print(f"{done}, {heard:.1f} s of audio, in {elapsed:.2f} s", file=sys.stderr)
    return int(failed > 0 or len(missing) > 0)


def why(arguments: argparse.Namespace) -> int:
    """`transformers-cat why`: 0, or 1 if a file could not be explained, or 2 if there is none, no model or no label."""
    files, missing, classifier = _open(arguments)
    if classifier is None:
        return 2
    model, extractor = classifier.model, classifier.feature_extractor
    if model.config.model_type != CATConfig.model_type:
        print(f"{arguments.model} is no CAT but {type(model).__name__}, which `why` cannot ask.", file=sys.stderr)
        return 2
    names = list(map(str, class_names(model.config)))
    if arguments.label is not None and arguments.label not in names:
        print(f"{arguments.model} has no label {arguments.label!r}, but: {', '.join(names)}", file=sys.stderr)
        return 2
    failed = 0
    for file in tqdm(files, unit="file", disable=None, leave=False):
        try:
            clip = load_audio(file, extractor.sampling_rate)
            explanation = explain(model, extractor, clip, arguments.label, arguments.span, arguments.bands)
        except (OSError, ValueError) as error:
            failed += 1
            with tqdm.external_write_mode():
                print(f"{file}: {_reason(error)}", file=sys.stderr)
            continue
        with tqdm.external_write_mode():
            _print_explanation(str(file), explanation, arguments)
            sys.stdout.flush()
    return int(failed > 0 or len(missing) > 0)


def _print_explanation(file: str, explanation: Explanation, arguments: argparse.Namespace) -> None:
    """A file's label with what it is due to, in the form that was asked for."""
    if arguments.json:
        print(json.dumps({"file": file, **dataclasses.asdict(explanation)}))
        return
    print(f"{file}: {explanation.label} {explanation.score:.2f}\n{'without':>28}{'alone':>8}")
    for parts, span in (
        (explanation.times, "{:.1f}-{:.1f} s"),
        (explanation.frequencies, "{:.0f}-{:.0f} Hz"),
    ):
        for part in parts:
            print(f"{span.format(part.start, part.end):>20}{part.without:>8.2f}{part.alone:>8.2f}")


def _open(arguments: argparse.Namespace) -> tuple[list[Path], list[str], Pipeline | None]:
    """Files, the patterns that name none, and the model's pipeline: `None` where there is no file or no model.

    What is missing is said.
    """
    files, missing = find_files(arguments.files)
    for pattern in missing:
        print(f"{pattern}: there is no such file, nor an audio file in such a folder", file=sys.stderr)
    if not files:
        print("No file to classify: pass files, folders or globs.", file=sys.stderr)
        return files, missing, None
    try:
        return files, missing, pipeline("audio-classification", model=str(arguments.model), device=arguments.device)
    except Exception as error:  # what can be wrong with a checkpoint is up to its model
        _refuse(arguments.model, error)
        return files, missing, None


def _print_scores(file: str, span: dict[str, float], scores: list[dict], arguments: argparse.Namespace) -> None:
    """A file's scores, or those of a piece of it, in the form that was asked for."""
    if arguments.json:
        print(json.dumps({"file": file, **span, "scores": scores}))
    elif arguments.csv:
        for rank, item in enumerate(scores, 1):
            _print_row([file, *span.values(), rank, item["label"], item["score"]])
    else:
        where = " {start:.1f}-{end:.1f} s".format(**span) if span else ""
        print(f"{file}{where}: " + ", ".join(f"{item['label']} {item['score']:.2f}" for item in scores))


def _print_row(cells: Sequence) -> None:
    csv.writer(sys.stdout, lineterminator="\n").writerow(cells)


def describe(model: str | Path) -> dict:
    """What a checkpoint is, from its configuration, its card and the header of its weights, which are not loaded.

    Args:
        model: Its folder, or its id on the Hub, of which all but weights in other formats is then downloaded.

    Returns:
        What `transformers-cat info --json` prints. `parameters` is `None` where there are no weights in safetensors.
    """
    if not Path(model).is_dir():
        model = snapshot_download(str(model), allow_patterns=["*.json", "*.safetensors", "README.md"])
    folder = Path(model)
    config = AutoConfig.from_pretrained(folder)
    sizes = config.to_dict()
    settings = {name: sizes[name] for name in MRMF_ARGUMENTS if name in sizes}
    if (extractor := folder / "preprocessor_config.json").is_file():
        settings = json.loads(extractor.read_text(encoding="utf-8"))
    whole = folder / "model.safetensors"
    files = [whole] if whole.is_file() else sorted(folder.glob("model-*-of-*.safetensors"))
    card, results = folder / "README.md", []
    if card.is_file():
        with suppress(Exception):  # of a card that says it wrongly, the rest is worth to be shown
            results = ModelCard.load(card, ignore_metadata_errors=True).data.eval_results or []
    return {
        "model": str(folder),
        "model_type": config.model_type,
        "parameters": sum(map(_count_parameters, files)) or None,
        "bytes": sum(file.stat().st_size for file in files),
        "labels": class_names(config),
        "problem_type": config.problem_type,
        "front_end": {
            name: settings[name]
            for name in dict.fromkeys([*MRMF_ARGUMENTS, *settings])
            if name in settings and name not in BOOKKEEPING
        },
        "architecture": {name: sizes[name] for name in ARCHITECTURE if name in sizes},
        "results": [
            {
                "metric": one.metric_name or one.metric_type,
                "value": one.metric_value,
                "dataset": one.dataset_name,
                "split": one.dataset_split,
            }
            for one in results
        ],
    }


def info(arguments: argparse.Namespace) -> int:
    """`transformers-cat info`: 0, or 2 if the model is none."""
    try:
        facts = describe(arguments.model)
    except Exception as error:  # as in `classify`
        return _refuse(arguments.model, error)
    if arguments.json:
        print(json.dumps(facts))
        return 0
    parameters = f"{facts['parameters']:,}" if facts["parameters"] else "unknown: there are no weights in safetensors"
    print(f"model         {facts['model']}")
    print(f"type          {facts['model_type']}, {facts['problem_type'] or 'problem type not stated'}")
    print(f"parameters    {parameters}")
    print(f"weights       {facts['bytes'] / 1e6:.1f} MB")
    print(f"labels        {len(facts['labels'])}: {', '.join(map(str, facts['labels']))}")
    for title in ("front_end", "architecture"):
        for index, (name, value) in enumerate(facts[title].items()):
            value = ", ".join(map(str, value)) if isinstance(value, list) else value
            print(f"{title.replace('_', ' ') if index == 0 else '':13} {name}: {value}")
    for index, one in enumerate(facts["results"]):
        where = ", ".join(filter(None, (one["dataset"], one["split"])))
        value = f"{one['value']:.4g}" if isinstance(one["value"], int | float) else one["value"]
        print(f"{'results' if index == 0 else '':13} {one['metric']} {value} ({where})")
    if not facts["results"]:
        print("results       none stated")
    return 0


def _count_parameters(file: Path) -> int:
    """Numbers in a file of weights, by its header."""
    with safe_open(file, framework="np") as tensors:
        names = [name for name in tensors.keys() if not name.endswith(BUFFERS)]
        return sum(prod(tensors.get_slice(name).get_shape()) for name in names)


def _refuse(model: str | Path, error: Exception) -> int:
    """Says why a model cannot be used; the status to exit with."""
    if model == SHIPPED and not SHIPPED.is_dir():
        print(
            f"The model that comes with this package is missing: there is no folder {SHIPPED}.\n"
            "Install the package again, or name another model.",
            file=sys.stderr,
        )
        return 2
    where = "" if Path(model).is_dir() else ", which is no folder here"
    print(
        f"Cannot load the model {model}{where}: {_reason(error)}\n"
        "Pass an id on the Hub, or a folder with config.json, preprocessor_config.json and model.safetensors.",
        file=sys.stderr,
    )
    return 2


def _reason(error: Exception) -> str:
    """What an error says; its name where it says nothing, as an assertion may."""
    return str(error).strip() or type(error).__name__


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text}")
    return int(text)


def _seconds(text: str) -> float:
    with suppress(ValueError):
        if 0.1 <= (seconds := float(text)) <= 1e6:
            return seconds
    raise argparse.ArgumentTypeError(f"must be a number of seconds, from 0.1 to 1e6, not {text}")


def _device(text: str) -> torch.device:
    try:
        return torch.empty(0, device=text).device
    except Exception as error:  # an assertion, where PyTorch was built without that kind of device
        reason = _reason(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text} is no device that PyTorch has here: {reason}") from error


def _as_it_is(error: UnicodeError) -> tuple:
    """Names of files are bytes, which need not be UTF-8: as they are; and escaped, what the output cannot write."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


codecs.register_error("as_it_is", _as_it_is)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="as_it_is")
    parser = argparse.ArgumentParser("transformers-cat", description="Name sounds with a transformers model.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("files", nargs="+", metavar="FILE", help="files, folders or globs, next to each other")
    common.add_argument("--model", default=SHIPPED, help="folder, or id on the Hub; default: the model shipped here")
    common.add_argument(
        "--device", type=_device, help="as in PyTorch, like cuda:0; default: the first accelerator, else the CPU"
    )

    command = commands.add_parser("classify", parents=[common], help="name the sounds in files")
    command.add_argument("--top", type=_positive, default=5, help="labels for each file, likeliest first; default: 5")
    command.add_argument(
        "--every",
        type=_seconds,
        metavar="SECONDS",
        help="scores for each piece of so many seconds, but for a shorter or longer last one; default: all in one",
    )
    output = command.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="JSON lines: an object for each file, on a line of its own")
    output.add_argument(
        "--csv", action="store_true", help="a row for each label: file, (with --every: start, end,) rank, label, score"
    )
    command.add_argument("--batch_size", type=_positive, default=1, help="files to classify at once; default: 1")
    command.set_defaults(run=classify)

    command = commands.add_parser(
        "why",
        parents=[common],
        help="say which times and frequencies a label is due to",
        description="The label's probability without each time span and each band of frequencies, and by it alone: "
        "what is necessary for it, and what is sufficient.",
    )
    command.add_argument("--label", help="label to explain; default: each file's likeliest")
    command.add_argument(
        "--span", type=_seconds, metavar="SECONDS", help="of time; default: 0.5, or a twentieth of what is over 10 s"
    )
    command.add_argument("--bands", type=_positive, default=6, help="of frequencies; default: 6")
    command.add_argument(
        "--json", action="store_true", help="JSON lines: an object for each file, on a line of its own"
    )
    command.set_defaults(run=why)

    command = commands.add_parser("info", help="say what a checkpoint is")
    command.add_argument(
        "model", nargs="?", default=SHIPPED, help="folder, or id on the Hub; default: the model shipped here"
    )
    command.add_argument("--json", action="store_true", help="as a JSON object")
    command.set_defaults(run=info)

    arguments = parser.parse_args(argv)
    disable_progress_bar()  # of loading weights, which takes no time
    try:
        status = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # who reads, like `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130  # as shells have it
