"""Reader of AudioSet: segment tables, the index of its 527 labels, and a folder of clips of which some are missing."""

from pathlib import Path

from datasets import Dataset, DatasetDict, concatenate_datasets

from ..audio import audio_files
from .tables import build_dataset, keep_found, read_lines, read_rows, refuse_duplicates, some

INDEX = "class_labels_indices.csv"
SEGMENTS = {
    "balanced_train": "balanced_train_segments.csv",
    "unbalanced_train": "unbalanced_train_segments.csv",
    "test": "eval_segments.csv",
}


def read_audioset(folder: str | Path, on_missing: str = "error", missing: list[str] | None = None) -> DatasetDict:
    """Read a folder with AudioSet's tables, as they are distributed, and its clips in any sub-folders.

    The tables are `class_labels_indices.csv` and those of `balanced_train_segments.csv`,
    `unbalanced_train_segments.csv` and `eval_segments.csv` that are there. A clip of the video `<id>` is a file
    `<id>`, `Y<id>`, `<id>_<start>` or `<id>_<start>_<end>` (also with `Y`) with any suffix of an audio file, where the
    times are seconds (`30` or `30.000`) or milliseconds (`30000`). Each file is one clip: nothing is cut out of longer
    recordings. Files without a row are ignored.

    Args:
        folder: the data set's root.
        on_missing: "error" (default) or "skip" rows without a file; usually a part of AudioSet cannot be had.
        missing: a list to which the ids of the rows that are left out are appended.

    Returns:
        The splits `train` (both training tables), `test` and, where both training tables are there, `balanced_train`
        ("AudioSet-20k"), with the columns `audio` (path) and `label` (list of class ids, in the order of the index).

    Raises:
        FileNotFoundError: no table of segments, or missing clips with "error", or a table without any clip.
        ValueError: a broken table, an unknown label, or a clip that is listed twice.
    """
    folder = Path(folder)
    rows = read_rows(folder / INDEX, ("index", "mid", "display_name"))
    if [row["index"] for row in rows] != [str(i) for i in range(len(rows))]:
        raise ValueError(f"{folder / INDEX}: the column index does not count from 0 to {len(rows) - 1}")
    tables = {split: folder / name for split, name in SEGMENTS.items() if (folder / name).is_file()}
    if not tables:
        raise FileNotFoundError(f"{folder} has {INDEX} but none of {', '.join(SEGMENTS.values())}")

    segments = {
        split: _read_segments(path, {row["mid"]: i for i, row in enumerate(rows)}) for split, path in tables.items()
    }
    _refuse_overlap(segments)
    clips = _find_clips(folder)
    names = [row["display_name"] for row in rows]
    parts = {split: _build(part, clips, names, on_missing, missing) for split, part in segments.items()}
    training = [parts[split] for split in ("balanced_train", "unbalanced_train") if split in parts]
    splits = {"train": concatenate_datasets(training)} if training else {}
    if len(training) == 2:
        splits["balanced_train"] = parts["balanced_train"]
    if "test" in parts:
        splits["test"] = parts["test"]
    return DatasetDict(splits)


Segment = tuple[str, float, float, list[int]]  # id of the video, start and end in seconds, class ids


def _read_segments(path: Path, class_id: dict[str, int]) -> list[Segment]:
    """Rows `id, start, end, "mid,mid"` below comments that start with #."""
    segments = []
    for line, cells in read_lines(path, comment="#"):
        if len(cells) != 4:
            raise ValueError(f"{path}, row {line} has {len(cells)} cells, not id, start, end and labels: {cells}")
        video, start, end, labels = cells
        try:
            times = float(start), float(end)
        except ValueError:
            raise ValueError(f"{path}, row {line}: {start!r} and {end!r} are not times in seconds") from None
        mids = labels.split(",")
        unknown = [mid for mid in mids if mid not in class_id]
        if unknown:
            raise ValueError(f"{path}, row {line}: the labels {unknown} are not in {INDEX}")
        segments.append((video, *times, [class_id[mid] for mid in mids]))
    if not segments:
        raise ValueError(f"{path} has no rows")
    refuse_duplicates((segment[0] for segment in segments), path, "a video has one segment: remove the other row")
    return segments


def _refuse_overlap(segments: dict[str, list[Segment]]) -> None:
    held_out = {video for video, *_ in segments.get("test", ())}
    for split in set(segments) - {"test"}:
        shared = sorted(held_out.intersection(video for video, *_ in segments[split]))
        if shared:
            raise ValueError(
                f"{len(shared)} videos are in {SEGMENTS[split]} and in {SEGMENTS['test']}: {some(shared)}. Remove them "
                "from one of the two: nobody should train on what is tested"
            )


def _find_clips(folder: Path) -> dict[str, Path]:
    """All audio files below the folder by name without suffix; where two share it, the first in alphabetic order."""
    clips = {}
    for path in audio_files(folder):
        clips.setdefault(path.stem, path)
    return clips


def _build(
    segments: list[Segment], clips: dict[str, Path], names: list[str], on_missing: str, missing: list[str] | None
) -> Dataset:
    paths = [next((clips[stem] for stem in _stems(*segment[:3]) if stem in clips), None) for segment in segments]
    kept = keep_found([segment[0] for segment in segments], [path is not None for path in paths], on_missing, missing)
    return build_dataset([paths[i] for i in kept], [segments[i][3] for i in kept], names)


def _stems(video: str, start: float, end: float) -> list[str]:
    """The names under which the clip of a segment may be stored."""
    stems = [video]
    for form in ("{:.0f}", "{:.3f}"):
        stems += [f"{video}_{form.format(start)}", f"{video}_{form.format(start)}_{form.format(end)}"]
    stems += [f"{video}_{1000 * start:.0f}", f"{video}_{1000 * start:.0f}_{1000 * end:.0f}"]
    return stems + [f"Y{stem}" for stem in stems]
