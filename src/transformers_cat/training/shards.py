"""Data sets as Arrow files of decoded, resampled and losslessly re-encoded clips, which are mapped from disk.

A split is `<split>-00000-of-00004.arrow` and so on, each an Arrow stream that `datasets.Dataset.from_file` reads. Clips
are mono FLAC of 16 bits at the model's rate, inside the files: random access costs one read and no resampling, and
memory holds no more than what the system chooses to cache.
"""

import io
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow
import soundfile
from datasets import Audio, Dataset, DatasetDict, Features, concatenate_datasets

from .clips import audio_problem, clip_name, decode_clip

SHARD = re.compile(r"(?P<split>\w+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.arrow")
ROWS_PER_WRITE = 16  # all that a writer keeps in memory
# What a folder of shards is begun with, and what it ends with.
PLAN, REPORT = "plan.txt", "report.json"


def shard_path(folder: str | Path, split: str, number: int, count: int) -> Path:
    """Where shard `number` of `count` lies."""
    return Path(folder) / f"{split}-{number:05}-of-{count:05}.arrow"


def write_shard(dataset: Dataset, path: Path, sampling_rate: int) -> dict[str, str]:
    """Write clips as one shard, which appears at once or, if this is interrupted, not at all.

    Beside it, `<shard>.skipped.json` says which clips were left out, and why.

    Args:
        dataset: clips as the readers of this package return them.
        path: from `shard_path`.
        sampling_rate: of the written clips, in Hz.

    Returns:
        The reason for each clip that could not be read, by its name.
    """
    schema = Features({**dataset.features, "audio": Audio(sampling_rate, decode=False)}).arrow_schema
    partial = path.with_suffix(".partial")
    skipped: dict[str, str] = {}
    rows = _encoded_rows(dataset, sampling_rate, skipped)
    with pyarrow.OSFile(str(partial), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
        while group := list(islice(rows, ROWS_PER_WRITE)):
            writer.write_batch(pyarrow.RecordBatch.from_pylist(group, schema=schema))
    path.with_suffix(".skipped.json").write_text(json.dumps(skipped, indent=1), encoding="utf-8")
    os.replace(partial, path)
    return skipped


def read_shards(folder: str | Path) -> DatasetDict:
    """Map the shards of each split from disk.

    Raises:
        FileNotFoundError: shards are missing, since their writing has not ended.
    """
    if (Path(folder) / PLAN).is_file() and not (Path(folder) / REPORT).is_file():
        raise FileNotFoundError(f"{folder} is not complete: run the command that prepares it again")
    found = defaultdict(dict)
    for path in sorted(Path(folder).glob("*.arrow")):
        if name := SHARD.fullmatch(path.name):
            found[name["split"], int(name["count"])][int(name["number"])] = path
    for (split, count), shards in found.items():
        if len(shards) < count:
            raise FileNotFoundError(
                f"{folder} has {len(shards)} of {count} shards of {split}: run the command that prepares it again"
            )
    return DatasetDict(
        {
            split: concatenate_datasets([Dataset.from_file(str(path)) for path in shards.values()])
            for (split, _), shards in found.items()
        }
    )


def _encoded_rows(dataset: Dataset, sampling_rate: int, skipped: dict[str, str]) -> Iterator[dict]:
    for position, row in enumerate(dataset.with_format(None)):
        name = clip_name(row["audio"], position)
        problem = audio_problem(row["audio"], sampling_rate)
        if problem is None:
            try:
                encoded = _flac(decode_clip(row["audio"], sampling_rate), sampling_rate)
            except (ValueError, OSError, soundfile.LibsndfileError) as error:
                problem = str(error)
        if problem is None:
            yield {**row, "audio": {"bytes": encoded, "path": name}}
        else:
            skipped[name] = problem


def _flac(waveform: np.ndarray, sampling_rate: int) -> bytes:
    """(N,) in [-1, 1]; what lies outside, as after resampling, is clipped."""
    if not np.isfinite(waveform).all():
        raise ValueError("it has samples that are no numbers")
    file = io.BytesIO()
    soundfile.write(file, waveform.clip(-1, 1), sampling_rate, format="FLAC", subtype="PCM_16")
    return file.getvalue()
