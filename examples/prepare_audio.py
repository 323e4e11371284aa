#!/usr/bin/env python
"""Turn a folder of recordings into shards that training reads without resampling or searching.

    python examples/prepare_audio.py --data /data/audioset --output_dir /data/audioset-32k --num_workers 16

Takes every layout that training takes (AudioSet, ESC-50, UrbanSound8K, audio folders, CSV files), and any format that
soundfile or the ffmpeg program reads. Missing and broken clips are left out; `report.csv` names each with the reason.
An interrupted run goes on when the same command is given again. Train with `--data OUTPUT_DIR --check_audio false`.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from datasets import Dataset, DatasetDict

from transformers_cat.configuration_cat import SAMPLING_RATE
from transformers_cat.training import load_audio_dataset
from transformers_cat.training.data import as_multi_label
from transformers_cat.training.report import write_json
from transformers_cat.training.shards import PLAN, REPORT, shard_path, write_shard
from transformers_cat.training.tables import write_rows


def fingerprint(splits: DatasetDict, clips_per_shard: int) -> str:
    """Changes with the clips, their sizes, labels and order, and the size of the shards: what is in which shard."""
    digest = hashlib.sha256(str(clips_per_shard).encode())
    for split, dataset in splits.items():
        digest.update(f"{split} {dataset.features}".encode())
        for row in dataset:
            size = os.path.getsize(row["audio"]) if isinstance(row["audio"], str) else None
            digest.update(json.dumps([row["audio"], size, row["label"], row.get("fold")], default=_digest).encode())
    return digest.hexdigest()


def _digest(encoded: bytes) -> str:
    return hashlib.sha256(encoded).hexdigest()


def check_plan(folder: Path, plan: str) -> None:
    """Shards of other clips must not be mixed with those to come."""
    path = folder / PLAN
    if path.is_file() and path.read_text() != plan:
        raise ValueError(
            f"{folder} holds shards of other clips, of these as they were before, or of another size; choose another "
            "--output_dir"
        )
    path.write_text(plan)


def prepare(dataset: Dataset, path: Path) -> dict[str, str]:
    """Write a shard, or read what was skipped in one that is there."""
    if path.is_file():
        return json.loads(path.with_suffix(".skipped.json").read_text(encoding="utf-8"))
    return write_shard(dataset, path, SAMPLING_RATE)


def main(argv: list[str] | None = None) -> dict[str, int]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of recordings, or CSV file")
    parser.add_argument("--output_dir", required=True, type=Path, help="where the shards are written")
    parser.add_argument(
        "--multi_label",
        action="store_true",
        help="the labels are multi-label, though no clip has several; in a CSV file, some may have none",
    )
    parser.add_argument("--clips_per_shard", type=int, default=1000, help="some 250 MB for clips of 10 s")
    parser.add_argument("--num_workers", type=int, default=multiprocessing.cpu_count(), help="processes")
    arguments = parser.parse_args(argv)

    missing = []
    loaded = load_audio_dataset(arguments.data, on_missing="skip", missing=missing, multi_label=arguments.multi_label)
    splits = loaded if isinstance(loaded, DatasetDict) else DatasetDict(train=loaded)
    if arguments.multi_label:
        splits = DatasetDict({split: as_multi_label(dataset) for split, dataset in splits.items()})
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    check_plan(arguments.output_dir, fingerprint(splits, arguments.clips_per_shard))

    skipped = dict.fromkeys(missing, "there is no such file, or its name is not UTF-8")
    context = multiprocessing.get_context("spawn")  # libraries that decode and resample start threads of their own
    with ProcessPoolExecutor(arguments.num_workers, mp_context=context) as pool:
        parts, paths = [], []
        for split, dataset in splits.items():
            starts = range(0, len(dataset), arguments.clips_per_shard)
            for number, start in enumerate(starts):
                parts.append(dataset.select(range(start, min(start + arguments.clips_per_shard, len(dataset)))))
                paths.append(shard_path(arguments.output_dir, split, number, len(starts)))
        for done, (path, reasons) in enumerate(zip(paths, pool.map(prepare, parts, paths)), start=1):
            skipped |= reasons
            print(f"{path.name} ({done} of {len(paths)}), {len(reasons)} clips skipped", flush=True)

    write_rows(arguments.output_dir / "report.csv", ["clip", "reason"], skipped.items())
    # AudioSet's balanced clips, one in a hundred, are part of `train` and written once more for training on them alone.
    listed = sum(len(dataset) for split, dataset in splits.items() if split != "balanced_train") + len(missing)
    counts = {"listed": listed, "missing": len(missing), "unreadable": len(skipped) - len(missing)}
    counts["written"] = listed - len(skipped)
    write_json(arguments.output_dir / REPORT, counts)  # last: who finds it knows that nothing is missing
    print(counts)
    return counts


if __name__ == "__main__":
    main()
