#!/usr/bin/env python
r"""The ablations of the paper's Table II and of the model's parts, each row a cross-validation of one configuration.

    python examples/ablate.py --table a --data /data/ESC-50 --config_name model_cards/cat-tiny --seeds 0 1 2 \
        --output_dir runs/table_a

--table a   without and with the causal loss (l_c and l_rs)
        b   without and with starting weights; needs --init_from, a Swin or CLAP (HTS-AT) checkpoint
        c   two backbones (CAT, and global attention without hierarchy as in AST) plain, with MRMF, with MRMF and CL
        d   transfer from --source to --data and the reverse, without and with the causal loss
        e   not the paper's: what the configuration has, and each of its parts left out or replaced alone

`--config_overrides` holds for every row, and the row's own overrides come on top. All other flags are those of
`cross_validate.py` or, for table d, of `transfer.py`, which takes no `--folds`; both resume what was interrupted. The
output folder gets a folder for each cell, and the result as `table.md`, `table.csv`, `results.json` and `table.png`:
mean accuracy (AudioSet: mAP) with the standard deviation between seeds or, with one seed, between folds; but for table
d the mean loss on the test clips, too.
"""

import argparse
import json
import re
from pathlib import Path

import cross_validate
import transfer
from accelerate import PartialState
from transformers import AutoConfig

import transformers_cat  # noqa: F401  registers the configuration with transformers
from transformers_cat.training.protocol import markdown_table, mean_and_deviation, per_cent
from transformers_cat.training.report import plot_means, write_results
from transformers_cat.training.tables import write_rows

WITHOUT_CAUSAL = {"causal_loss_weight": 0, "reconstruction_loss_weight": 0}
WITH_CAUSAL = {"causal_loss_weight": 1, "reconstruction_loss_weight": 1}  # the paper's weights
CAUSAL_COLUMNS = {"w/o CL": WITHOUT_CAUSAL, "w. CL": WITH_CAUSAL}


def one_window(config) -> dict:
    """Of 25 ms, on the time grid."""
    return {"window_lengths": [round(0.025 * config.sampling_rate)], "hop_lengths": [config.frame_shift]}


def global_attention(config) -> dict:
    """One stage of global attention as in AST: as deep as all stages, as wide as the third, or else the last."""
    width = config.stage_width(min(2, len(config.depths) - 1))
    # Of 32 channels, as Swin's, or the next more that the width allows; a number that two filters can share.
    heads = max(heads for heads in range(2, max(width // 32, 2) + 1, 2) if width % heads == 0)
    return {
        "window_size": None,
        "depths": [sum(config.depths)],
        "num_heads": [heads],
        "embed_dim": width,
        "patch_size": [16, 16],
        "stem_channels": [],
    }


def parts(config) -> dict[str, dict]:
    """What is changed of the configuration, one part at a time."""
    return {
        "as configured": {},
        "mel filters alone": {"filters": ["mel"]},
        "linear filters alone": {"filters": ["linear"]},
        "one window, 25 ms": one_window(config),
        "the same hop for all windows": {"hop_lengths": [config.frame_shift] * len(config.window_lengths)},
        "no exchange between resolutions": {"exchange_dim": 0},
        "no positions": {"use_position_embedding": False},
        "no convolutions": {"stem_channels": [], "depthwise_kernel_size": 0},
        "global attention, one stage": global_attention(config),
        **CAUSAL_COLUMNS,
    }


def cells(args: argparse.Namespace) -> dict[str, dict[str, tuple[dict, list[str]]]]:
    """row -> column -> the overrides of its runs, and flags that those of the command line may override."""
    if args.table == "a":
        return {name: {"CAT": (overrides, [])} for name, overrides in CAUSAL_COLUMNS.items()}
    if args.table == "b":
        plain = ["--muon", "false"]  # which would otherwise train from scratch alone
        return {
            "from scratch": {"CAT": ({}, plain)},
            "pre-trained": {"CAT": ({}, [*plain, "--init_from", args.init_from])},
        }
    base = AutoConfig.from_pretrained(args.config_name, **json.loads(args.config_overrides))
    if args.table == "e":
        return {name: {"CAT": (overrides, [])} for name, overrides in parts(base).items()}
    backbones = {"AST": global_attention(base), "CAT": {}}
    rows = {
        "plain": {"filters": ["mel"], **one_window(base), **WITHOUT_CAUSAL},
        "+ MRMF": WITHOUT_CAUSAL,
        "+ MRMF + CL": WITH_CAUSAL,
    }
    return {
        name: {backbone: ({**shape, **overrides}, []) for backbone, shape in backbones.items()}
        for name, overrides in rows.items()
    }


def measure_models(args: argparse.Namespace, flags: list[str]) -> dict[str, dict[str, dict]]:
    """row -> column -> summary of a cross-validation (tables a to c)."""
    results = {}
    for row, columns in cells(args).items():
        for column, (overrides, more) in columns.items():
            folder = args.output_dir / re.sub(r"\W+", "_", f"{column} {row}")
            overrides = {**json.loads(args.config_overrides), **overrides}
            own = ["--config_name", args.config_name, "--config_overrides", json.dumps(overrides), "--data", args.data]
            results.setdefault(row, {})[column] = cross_validate.main(
                [*more, *flags, *own, "--output_dir", str(folder)]
            )
    return results


def measure_transfer(args: argparse.Namespace, flags: list[str]) -> dict[str, dict[str, dict]]:
    """row -> column -> summary of a transfer (table d)."""
    results = {}
    names = {path: Path(path).stem for path in (args.source, args.data)}
    if len(set(names.values())) == 1:
        names = {path: path for path in names}
    for source, target in ((args.source, args.data), (args.data, args.source)):
        for column, overrides in CAUSAL_COLUMNS.items():
            folder = args.output_dir / re.sub(r"\W+", "_", f"{names[source]} to {names[target]} {column}")
            overrides = json.dumps({**json.loads(args.config_overrides), **overrides})
            own = ["--source", source, "--data", target, "--config_name", args.config_name]
            own += ["--config_overrides", overrides, "--output_dir", str(folder)]
            summary = transfer.main([*flags, *own])
            for how in ("linear probe", "fine-tuned"):
                row = f"{names[source]} to {names[target]}, {how}"
                results.setdefault(row, {})[column] = {"metric": "accuracy", "note": summary["note"], **summary[how]}
    return results


def table(results: dict[str, dict[str, dict]]) -> str:
    """row -> column -> mean, deviation and, where all have one, loss, as a table."""
    columns = list(next(iter(results.values())))
    with_loss = all("loss" in one for own in results.values() for one in own.values())
    header, rows = [""], [[row] for row in results]
    for column in columns:
        header += [column, f"{column}, loss"] if with_loss else [column]
        for row, own in zip(rows, results.values()):
            row.append(per_cent(own[column]["mean"], own[column]["deviation"]))
            if with_loss:
                row.append(f"{own[column]['loss']:.2f}")
    return markdown_table(header, rows)


def kept(summary: dict) -> dict[str, float | None]:
    """What a cell keeps of its summary; the loss is the mean over seeds, and a transfer has none."""
    losses = [own["loss"] for own in summary["seeds"].values() if "loss" in own]
    loss = {"loss": mean_and_deviation(losses)[0]} if losses else {}
    return {"mean": summary["mean"], "deviation": summary["deviation"], **loss}


def write_table(results: dict[str, dict[str, dict]], output_dir: Path) -> None:
    """Markdown, CSV, JSON and a picture of the results."""
    summaries = [summary for own in results.values() for summary in own.values()]
    label, deviation_of = f"{summaries[0]['metric']}, %", summaries[0]["deviation_of"]
    notes = " ".join(dict.fromkeys(summary["note"] for summary in summaries))
    figures = {row: {column: kept(summary) for column, summary in own.items()} for row, own in results.items()}
    text = f"{table(figures)}\n{label}; mean ± standard deviation between {deviation_of}. {notes}\n"
    write_results(output_dir, figures, text)
    header = ["row", "column", "mean", "deviation", "deviation_of", "loss"]
    rows = [
        [row, column, one["mean"], one["deviation"], deviation_of, one.get("loss")]
        for row, own in figures.items()
        for column, one in own.items()
    ]
    write_rows(output_dir / "table.csv", header, rows)
    means = {
        row: {column: (one["mean"], one["deviation"]) for column, one in own.items()} for row, own in figures.items()
    }
    plot_means(means, output_dir / "table.png", label)


def main(argv: list[str] | None = None) -> dict[str, dict[str, dict]]:
    """Run the script.

    Returns:
        row -> column -> summary.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--table", required=True, choices="abcde", help="which part of Table II, or e")
    parser.add_argument("--data", required=True, help="folder or CSV file")
    parser.add_argument("--source", help="table d: the other data set")
    parser.add_argument("--config_name", required=True, help="folder or id with a config.json")
    parser.add_argument("--config_overrides", default="{}", help="JSON that replaces values of it in every row")
    parser.add_argument("--init_from", help="table b: the starting weights")
    parser.add_argument("--output_dir", type=Path, required=True)
    args, flags = parser.parse_known_args(argv)
    for table, needed in (("b", "init_from"), ("d", "source")):
        if (args.table == table) != bool(getattr(args, needed)):
            parser.error(f"--{needed} is for --table {table}, which needs it")

    results = (measure_transfer if args.table == "d" else measure_models)(args, flags)
    if PartialState().is_main_process:
        write_table(results, args.output_dir)
    return results


if __name__ == "__main__":
    main()
