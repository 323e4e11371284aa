#!/usr/bin/env python
r"""Train on one data set, then transfer to another that comes in folds (Table IId).

    python examples/transfer.py --source /data/UrbanSound8K --data /data/ESC-50 --config_name model_cards/cat-tiny \
        --output_dir runs/us8k_to_esc50

For each seed, a model of all clips of the source is trained into `seed<s>/source`. On the folds of the target, it is
then probed (`seed<s>/probes.json`: logistic regression on Z, and on Z and all hidden states, of the clips as they are
and at five speeds; nothing else is trained) and the start of a fine-tuning (`seed<s>/fine_tuned`). What is finished is
not run again. All other flags are those of `run_audio_classification.py` and hold for both trainings, but for
`--config_name`, `--config_overrides` and `--init_from`, which make the source's model.

`summary.json` and `summary.md` hold the results, means over folds and seeds.
"""

import argparse
import json
from pathlib import Path

import cross_validate
import run_audio_classification as run
from accelerate import PartialState
from transformers import AutoConfig, AutoFeatureExtractor, AutoModelForAudioClassification

from transformers_cat.training import validate_audio_files
from transformers_cat.training.probe import SPEEDS, embed, linear_probe
from transformers_cat.training.protocol import comparability, markdown_table, per_cent, summarise
from transformers_cat.training.report import remember, write_json

# name -> whether the probe reads all hidden states, and whether it hears each clip at all speeds
PROBES = {
    "linear probe": (False, False),
    "linear probe, five speeds": (False, True),
    "linear probe of all layers": (True, False),
    "linear probe of all layers, five speeds": (True, True),
}


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Own arguments, and the flags of both trainings."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--source", required=True, help="folder or CSV file to train on: all, or its split `train`")
    parser.add_argument("--data", required=True, help="folder or CSV file with folds to transfer to")
    parser.add_argument("--config_name", required=True, help="the model, trained from scratch on the source")
    parser.add_argument("--config_overrides", help="JSON that replaces values of its configuration")
    parser.add_argument("--init_from", help="a Swin or CLAP (HTS-AT) checkpoint whose trunk is its start")
    parser.add_argument(
        "--leave_out_shared_recordings",
        action="store_true",
        help="between ESC-50 and UrbanSound8K: do not train on recordings of Freesound that the target has too",
    )
    parser.add_argument(
        "--recordings_as_labels",
        action="store_true",
        help="train on the source to tell the recordings within each of its classes apart",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    return parser.parse_known_args(argv)


def train_source(args: argparse.Namespace, flags: list[str], seed: int, folder: Path) -> None:
    """Train on every clip of the source or, where it comes in splits, on those for training."""
    own = ["--data", args.source, "--config_name", args.config_name, "--output_dir", str(folder), "--seed", str(seed)]
    for name in ("config_overrides", "init_from"):
        if getattr(args, name):
            own += [f"--{name}", getattr(args, name)]
    if args.leave_out_shared_recordings:
        own += ["--leave_out_recordings_of", args.data]
    if args.recordings_as_labels:
        own.append("--recordings_as_labels")
    run.main([*flags, *own, "--do_train", "--eval_strategy", "no"])


def objective(args: argparse.Namespace) -> str:
    """The loss weights of the source's training: a saved CAT no longer has that of the reconstruction loss."""
    config = AutoConfig.from_pretrained(args.config_name, **json.loads(args.config_overrides or "{}"))
    weights = ("causal_loss_weight", "reconstruction_loss_weight")
    return json.dumps({name: getattr(config, name) for name in weights if hasattr(config, name)})


def probe(source: Path, flags: list[str], path: Path) -> dict[str, dict[int, float]]:
    """Name of a linear probe -> its accuracy on each fold of the target that the flags name."""
    if not path.exists():
        model_args, data_args, _ = run.parse_arguments([*flags, "--output_dir", str(path.parent), "--do_train"])
        dataset = run.load_data(data_args, model_args)
        if data_args.check_audio:
            dataset, _ = validate_audio_files(dataset, data_args.on_bad_audio)
        model = AutoModelForAudioClassification.from_pretrained(source)
        extractor = AutoFeatureExtractor.from_pretrained(source)
        latents = embed(model, extractor, dataset, layers=True, speeds=SPEEDS)  # Z, then what the hidden states say
        of_z = embed(model, extractor, dataset.select(range(1))).shape[1]
        accuracy = {}
        for name, (layers, speeds) in PROBES.items():
            read = latents if layers else latents[..., :of_z]
            versions = read if speeds else read[:, SPEEDS.index(1)]
            accuracy[name] = linear_probe(versions, dataset["label"][:], dataset["fold"][:])
        write_json(path, accuracy)
    accuracy = json.loads(path.read_text())
    return {name: {int(fold): value for fold, value in accuracy[name].items()} for name in PROBES}


def write_summary(summary: dict, title: str, output_dir: Path) -> None:
    """Write the results as JSON and as a table."""
    write_json(output_dir / "summary.json", summary)
    rows = [
        [name, per_cent(summary[name]["mean"], summary[name]["deviation"]), summary[name]["deviation_of"]]
        for name in (*PROBES, "fine-tuned")
    ]
    table = markdown_table(["transfer", "accuracy, %", "± between"], rows)
    (output_dir / "summary.md").write_text(f"{title}. {summary['note']}\n\n{table}", encoding="utf-8")
    print(table)


def main(argv: list[str] | None = None) -> dict:
    """Run the script.

    Returns:
        The content of `summary.json`.
    """
    args, flags = parse_arguments(argv)
    named = ["--data", args.data, "--config_name", args.config_name]
    target = cross_validate.given([*named, *flags], args.output_dir)
    if not target.folds or target.multi_label:
        raise ValueError(f"--data {args.data} needs folds, and clips of one label: on each fold, a probe is measured")
    state = PartialState()
    if state.is_main_process:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        own = {key: value for key, value in vars(args).items() if key not in ("seeds", "output_dir")}
        remember({**own, "flags": flags, **target.identity}, args.output_dir / "flags.json")
    probed, fine_tuned = {name: {} for name in PROBES}, {}
    for seed in args.seeds:
        folder = args.output_dir / f"seed{seed}"
        source = folder / "source"
        if not (source / "results.json").exists():
            train_source(args, flags, seed, source)
        with state.main_process_first():
            for name, accuracy in probe(source, ["--data", args.data, *flags], folder / "probes.json").items():
                probed[name][seed] = accuracy
        own = ["--data", args.data, "--model_name_or_path", str(source), "--ignore_mismatched_sizes"]
        own += ["--config_overrides", objective(args)]
        own += ["--seeds", str(seed), "--output_dir", str(folder / "fine_tuned")]
        fine_tuned[seed] = cross_validate.main([*flags, *own])["seeds"][seed]["folds"]

    note = comparability(args.data, target.folds, target.folds, target.num_classes)
    summary = {"note": note, **{name: summarise(probed[name]) for name in PROBES}, "fine-tuned": summarise(fine_tuned)}
    if state.is_main_process:
        write_summary(summary, f"{args.source} to {args.data}", args.output_dir)
    return summary


if __name__ == "__main__":
    main()
