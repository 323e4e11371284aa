"""Audio data sets as `datasets.Dataset`: readers of known layouts, folds, labels.

Every reader returns the columns `audio` (path of the clip), `label` and, where the data set has given folds, `fold`.
`label` is a `ClassLabel`, or a list of them where a clip may have several labels. Nothing is decoded while reading:
`clips.decode_audio` attaches a transform that loads clips when the data loader asks for them, so a data set of any size
needs the memory of one batch.
"""

import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import datasets
import numpy as np
from datasets import Audio, ClassLabel, Dataset, DatasetDict, List

from ..audio import AUDIO_SUFFIXES, audio_files
from .audioset import INDEX, read_audioset
from .clips import clip_name, path_and_bytes, raw_audio
from .tables import (
    NAMED_ITEMS,
    build_dataset,
    check_choice,
    existing,
    integer,
    read_rows,
    refuse_duplicates,
    some,
)

logger = logging.getLogger(__name__)

SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval"),
}
LABEL_SEPARATOR = ";"
# 1-100032-A-0: fold, recording, take, target; 101415-3-0-2: recording, class, occurrence, slice.
FREESOUND_NAME = re.compile(r"\d-(?P<esc50>\d+)-[A-Z]-\d+|(?P<urbansound8k>\d+)-\d+-\d+-\d+")
LAYOUTS = (
    "ESC-50 (meta/esc50.csv and audio/), UrbanSound8K (metadata/UrbanSound8K.csv and audio/foldN/), "
    "AudioSet (class_labels_indices.csv and tables of segments), an audio folder (train/<class>/..., "
    "test/<class>/..., or <class>/... alone), or a .csv file"
)


# ---------------------------------------------------------------------------------------------------------------------
# Readers
# ---------------------------------------------------------------------------------------------------------------------
def read_esc50(folder: str | Path, on_missing: str = "error", missing: list[str] | None = None) -> Dataset:
    """Read a folder with the layout of ESC-50 (ESC-10 included): `meta/esc50.csv`, `audio/`.

    Label ids are contiguous: the targets that occur, in increasing order; names are the categories.

    Args:
        folder: the data set's root.
        on_missing: "error" (default) or "skip" rows whose file does not exist.
        missing: a list to which the paths of the rows that are left out are appended.

    Returns:
        A data set with the columns `audio`, `label`, `fold`.
    """
    folder = Path(folder)
    table = folder / "meta" / "esc50.csv"
    rows = read_rows(table, ("filename", "fold", "target", "category"))
    paths = [folder / "audio" / row["filename"] for row in rows]
    return _numbered_classes(rows, paths, table, ("target", "category"), on_missing, missing)


def read_urbansound8k(folder: str | Path, on_missing: str = "error", missing: list[str] | None = None) -> Dataset:
    """Read a folder with the layout of UrbanSound8K: `metadata/UrbanSound8K.csv`, `audio/foldN/`.

    The folds are those that the CSV lists, so a part of the data set with a shortened CSV reads as it is. Folds that
    were drawn anew are refused: slices of one recording would be in training and test, and accuracies some 15 points
    too high.

    Args:
        folder: the data set's root.
        on_missing: "error" (default) or "skip" rows whose file does not exist.
        missing: a list to which the paths of the rows that are left out are appended.

    Returns:
        A data set with the columns `audio`, `label`, `fold`.

    Raises:
        ValueError: slices of one recording (whose names begin with its number) lie in several folds.
    """
    folder = Path(folder)
    table = folder / "metadata" / "UrbanSound8K.csv"
    rows = read_rows(table, ("slice_file_name", "fold", "classID", "class"))
    folds_of = defaultdict(set)
    for row in rows:
        folds_of[row["slice_file_name"].split("-")[0]].add(row["fold"])
    spread = [recording for recording, folds in folds_of.items() if len(folds) > 1]
    if spread:
        raise ValueError(
            f"{table}: slices of the same recording lie in several folds ({len(spread)} recordings: "
            f"{some(spread)}), so the folds were reshuffled; use the folds that come with UrbanSound8K"
        )
    paths = [folder / "audio" / f"fold{row['fold']}" / row["slice_file_name"] for row in rows]
    return _numbered_classes(rows, paths, table, ("classID", "class"), on_missing, missing)


def read_audiofolder(
    folder: str | Path, on_missing: str = "error", missing: list[str] | None = None
) -> Dataset | DatasetDict:
    """Read class sub-folders, either alone or below `train/`, `validation/`, `test/`, in whatever case.

    A clip's label is the name of its class folder; clips may lie deeper, and behind links. Ids follow the sorted names
    (by value where all names are numbers) over all splits together. Beside a sub-folder that is named otherwise and has
    audio, `train/` is a class, too.

    Args:
        folder: the data set's root.
        on_missing: "error" (default) or "skip" files whose names are not UTF-8, which no table can hold.
        missing: a list to which the paths of the files that are left out are appended.

    Returns:
        A `DatasetDict` with the splits that exist, or one `Dataset` where there are no split folders.

    Raises:
        ValueError: no audio file was found, a file name is not UTF-8, or two folders are for the same split.
    """
    folder = Path(folder)
    roots = _split_folders(folder) or {"train": folder}
    found = {split: _with_utf8_names(_labelled_files(root), on_missing, missing) for split, root in roots.items()}
    for split, files in found.items():
        if not files:
            raise ValueError(
                f"No audio file below {roots[split]}: expected one sub-folder per class with files of the types "
                f"{', '.join(sorted(AUDIO_SUFFIXES))}"
            )
    names = _sorted_names(name for files in found.values() for _, name in files)
    parts = {
        split: build_dataset([path for path, _ in files], [names.index(name) for _, name in files], names)
        for split, files in found.items()
    }
    return parts["train"] if list(roots.values()) == [folder] else DatasetDict(parts)


def read_csv(
    path: str | Path,
    audio_column: str = "audio",
    label_column: str = "label",
    on_missing: str = "error",
    missing: list[str] | None = None,
    multi_label: bool = False,
) -> Dataset:
    """Read a UTF-8 CSV file with one clip per row.

    Several labels in a cell are separated by ";"; one such cell makes the whole data set multi-label, in which a clip
    may also have no label. A column `fold` of integers is kept.

    Args:
        path: the CSV file.
        audio_column: column with the clips' paths, relative to the CSV file or absolute.
        label_column: column with the labels.
        on_missing: "error" (default) or "skip" rows whose file does not exist.
        missing: a list to which the paths of the rows that are left out are appended.
        multi_label: that the data set is multi-label, though no clip has several labels.

    Returns:
        A data set with the columns `audio`, `label` and, if given, `fold`.
    """
    path = Path(path)
    rows = read_rows(path, (audio_column, label_column))
    paths = [path.parent / row[audio_column] for row in rows]
    refuse_duplicates(
        map(os.path.abspath, paths),
        path,
        f"give a clip one row, and several labels with {LABEL_SEPARATOR!r} between them",
    )
    kept = existing(paths, on_missing, missing)
    cells = [rows[i][label_column].strip() for i in kept]
    names, labels = _encode_labels([_split_cell(cell) for cell in cells], path, multi_label)
    with_folds = any("fold" in row for row in rows)
    folds = [integer(rows[i].get("fold", ""), "fold", path) for i in kept] if with_folds else None
    return build_dataset([paths[i] for i in kept], labels, names, folds)


def load_audio_dataset(
    name_or_path: str | Path,
    audio_column: str = "audio",
    label_column: str = "label",
    on_missing: str = "error",
    missing: list[str] | None = None,
    multi_label: bool = False,
    **load_dataset_kwargs,
) -> Dataset | DatasetDict:
    """Load a data set from a folder or CSV file whose layout is recognised, or from the Hub.

    Args:
        name_or_path: a folder (ESC-50, UrbanSound8K, AudioSet, audio folder, the shards of `shards.py`, or a
            downloaded data set of the Hub in Parquet files), a `.csv` file, or the id of a data set on the Hub.
        audio_column: column of the clips in a CSV file or a data set of the Hub.
        label_column: column of the labels in a CSV file or a data set of the Hub.
        on_missing: "error" (default) or "skip" table rows whose file does not exist, and files whose names are not
            UTF-8.
        missing: a list to which the names of what is left out are appended.
        multi_label: that a CSV file is multi-label, though no clip has several labels: some may have none.
        load_dataset_kwargs: passed to `datasets.load_dataset` for a data set of the Hub (name, revision, token, ...).

    Returns:
        A data set, or one per split, with the columns `audio`, `label` and, where known, `fold`. Clips from the Hub
        are kept as `{"bytes", "path"}`.

    Raises:
        FileNotFoundError: neither a path nor a data set of the Hub.
        ValueError: a folder whose layout is unknown.
    """
    path = Path(name_or_path)
    if path.is_dir() and (_known_reader(path) or not any(path.rglob("*.parquet"))):
        return _read_folder(path, on_missing, missing)
    if path.is_file():
        if path.suffix.lower() != ".csv":
            raise ValueError(f"{path} is not a data set that can be read; known layouts: {LAYOUTS}")
        return read_csv(path, audio_column, label_column, on_missing, missing, multi_label)
    if not path.is_dir() and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(name_or_path)):
        raise FileNotFoundError(f"{name_or_path} does not exist; check the path of the data set")
    try:
        loaded = datasets.load_dataset(str(name_or_path), **load_dataset_kwargs)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{name_or_path} is neither a file or folder here nor a data set on the Hub that can be reached; "
            "check its spelling"
        ) from error
    return _from_hub(loaded, audio_column, label_column)


# ---------------------------------------------------------------------------------------------------------------------
# What is done to a data set
# ---------------------------------------------------------------------------------------------------------------------
def split_folds(
    dataset: Dataset | DatasetDict, test_folds: Sequence[int], validation_folds: Sequence[int] = ()
) -> DatasetDict:
    """Split by the given folds: `test`, `validation`, and the rest as `train`; empty parts are left out.

    Raises:
        ValueError: no `fold` column, several splits, a fold that does not exist, or a fold used twice.
    """
    dataset = without_only_split(dataset)  # as prepared clips come
    if "fold" not in dataset.column_names:
        raise ValueError("The data set has no column `fold`: name splits instead of folds, or add the column")
    folds = np.asarray(dataset.with_format(None)["fold"][:])
    existing = sorted(set(folds.tolist()))
    parts = {"test": set(test_folds), "validation": set(validation_folds)}
    for name, chosen in parts.items():
        unknown = sorted(chosen - set(existing))
        if unknown:
            raise ValueError(f"{name} folds {unknown} do not exist; the data set has the folds {existing}")
    shared = parts["test"] & parts["validation"]
    if shared:
        raise ValueError(f"Folds {sorted(shared)} are named for test and for validation; a fold can serve one of them")
    parts["train"] = set(existing) - parts["test"] - parts["validation"]
    return DatasetDict(
        {
            name: dataset.select(np.flatnonzero(np.isin(folds, sorted(parts[name]))))
            for name in ("train", "validation", "test")
            if parts[name]
        }
    )


def refuse_shared_clips(train: Dataset, test: Dataset) -> None:
    """Raise ValueError if a file is in both, by whatever path. Clips that are known by their bytes are not compared."""
    held_out = _resolved_paths(test)
    shared = [path for path in _resolved_paths(train) if path in held_out]
    if shared:
        raise ValueError(
            f"{len(shared)} clips are in training and in test: {some(shared)}. Remove them from one of the two: nobody "
            "should train on what is tested"
        )


def _resolved_paths(dataset: Dataset) -> dict[str, None]:
    """The distinct files of a data set, in its order."""
    known = (path_and_bytes(clip) for clip in raw_audio(dataset))
    return dict.fromkeys(str(Path(path).resolve()) for path, encoded in known if encoded is None)


def is_multi_label(dataset: Dataset) -> bool:
    """Whether a clip may have several labels."""
    return isinstance(dataset.features["label"], List)


def label_names(dataset: Dataset) -> list[str]:
    """The class names, in the order of their ids."""
    feature = dataset.features["label"]
    return list(feature.feature.names if isinstance(feature, List) else feature.names)


def align_labels(dataset: Dataset, names: Sequence[str]) -> Dataset:
    """Renumber the labels so that their ids are positions in `names`, the order that a trained model has.

    Raises:
        ValueError: the data set has a class that `names` lacks, or clips without a label.
    """
    own, names = label_names(dataset), list(names)
    if own == names:
        return dataset
    unknown = [name for name in own if name not in names]
    if unknown:
        raise ValueError(f"The data set has the classes {unknown[:NAMED_ITEMS]}, unknown among {names[:20]}")
    new_id = [names.index(name) for name in own]
    labels = dataset.with_format(None)["label"][:]
    if any(i < 0 for row in labels for i in (row if isinstance(row, list) else [row])):
        raise ValueError("The data set has clips without a label, which is stored as -1: choose another split")
    labels = [[new_id[i] for i in row] if isinstance(row, list) else new_id[row] for row in labels]
    feature = List(ClassLabel(names=names)) if is_multi_label(dataset) else ClassLabel(names=names)
    return _with_labels(dataset, labels, feature)


def as_multi_label(dataset: Dataset) -> Dataset:
    """Lists of one label instead of labels, for a multi-label model of clips that have one label each."""
    if is_multi_label(dataset):
        return dataset
    labels = [[label] for label in dataset.with_format(None)["label"]]
    return _with_labels(dataset, labels, List(dataset.features["label"]))


def without_only_split(loaded: Dataset | DatasetDict) -> Dataset | DatasetDict:
    """A `DatasetDict` of one split as its `Dataset`: one split is no split."""
    return next(iter(loaded.values())) if isinstance(loaded, DatasetDict) and len(loaded) == 1 else loaded


def freesound_number(name: str) -> str | None:
    """The recording on Freesound that a clip of ESC-50 or UrbanSound8K was cut from, `None` for other names."""
    match = FREESOUND_NAME.fullmatch(Path(name).stem)
    return match and (match["esc50"] or match["urbansound8k"])


def without_recordings_of(dataset: Dataset, other: Dataset | DatasetDict) -> Dataset:
    """The clips of `dataset` but for those of Freesound recordings that clips of `other` are cut from too.

    ESC-50 and UrbanSound8K both come from Freesound, so that one may hold what the other tests on.

    Raises:
        ValueError: a clip has not the name that it has in one of the two.
    """
    numbers = _freesound_numbers(dataset)
    shared = set(_freesound_numbers(other))
    return dataset.select([i for i, number in enumerate(numbers) if number not in shared])


def label_by_recording(dataset: Dataset) -> Dataset:
    """Each class split into the Freesound recordings that its clips were cut from, as in "dog_bark 101415".

    A model that tells these apart keeps what differs within a class, which its classes alone do not ask for, and other
    classes may.

    Raises:
        ValueError: clips have several labels, or names other than those of ESC-50 and UrbanSound8K.
    """
    if is_multi_label(dataset):
        raise ValueError("Clips have several labels each, so that no class can be split into its recordings")
    names = label_names(dataset)
    numbers = _freesound_numbers(dataset)
    finer = [f"{names[label]} {number}" for label, number in zip(dataset.with_format(None)["label"], numbers)]
    names = sorted(set(finer))
    id_of = {name: i for i, name in enumerate(names)}
    return _with_labels(dataset, [id_of[name] for name in finer], ClassLabel(names=names))


def _freesound_numbers(dataset: Dataset | DatasetDict) -> list[str]:
    parts = dataset.values() if isinstance(dataset, DatasetDict) else [dataset]
    names = [clip_name(clip, i) for part in parts for i, clip in enumerate(raw_audio(part))]
    numbers = [freesound_number(name) for name in names]
    if None in numbers:
        raise ValueError(
            f"The clip {names[numbers.index(None)]} is not named as in ESC-50 or UrbanSound8K, by the number of its "
            "recording on Freesound, so that it cannot be told which recording it is from"
        )
    return numbers


# ---------------------------------------------------------------------------------------------------------------------
# Parts of the readers
# ---------------------------------------------------------------------------------------------------------------------
def _known_reader(folder: Path) -> Callable | None:
    """The reader for the table or the shards in a folder."""
    layouts = {"meta/esc50.csv": read_esc50, "metadata/UrbanSound8K.csv": read_urbansound8k, INDEX: read_audioset}
    for table, read in layouts.items():
        if (folder / table).is_file():
            return read
    if any(folder.glob("*-of-*.arrow")):
        from .shards import read_shards  # which decodes by this module

        return lambda folder, on_missing, missing: read_shards(folder)
    return None


def _read_folder(folder: Path, on_missing: str, missing: list[str] | None) -> Dataset | DatasetDict:
    if read := _known_reader(folder):
        return read(folder, on_missing, missing)
    tables = sorted(folder.glob("*.csv"))
    if tables:
        raise ValueError(f"{folder} holds tables: name the one to read, e.g. {tables[0]}")
    if not any(entry.is_dir() and not entry.name.startswith(".") for entry in folder.iterdir()):
        raise ValueError(f"The layout of {folder} is not known: it has no sub-folders; known layouts: {LAYOUTS}")
    return read_audiofolder(folder, on_missing, missing)


def _numbered_classes(
    rows: list[dict[str, str]],
    paths: list[Path],
    table: Path,
    columns: tuple[str, str],
    on_missing: str,
    missing: list[str] | None,
) -> Dataset:
    """A data set whose table gives class numbers and names in two columns; ids are the rank of the number."""
    refuse_duplicates(paths, table, "remove the other row")
    kept = existing(paths, on_missing, missing)
    # Names come from all rows: ids must not depend on which files are there.
    classes = {(integer(row[columns[0]], columns[0], table), row[columns[1]]) for row in rows}
    numbers, names = zip(*sorted(classes))
    if len(set(numbers)) < len(classes) or len(set(names)) < len(classes):
        raise ValueError(f"{table}: {columns[0]} and {columns[1]} do not belong together one to one: {sorted(classes)}")
    id_of = {number: i for i, number in enumerate(numbers)}
    labels = [id_of[int(rows[i][columns[0]])] for i in kept]
    folds = [integer(rows[i]["fold"], "fold", table) for i in kept]
    return build_dataset([paths[i] for i in kept], labels, list(names), folds)


def _split_folders(folder: Path) -> dict[str, Path]:
    """The folder of each split, or none where there is audio in a sub-folder that is no split."""
    splits, others = {}, []
    for entry in _sub_folders(folder):
        split = next((split for split, names in SPLIT_FOLDERS.items() if entry.name.lower() in names), None)
        if split is None:
            others.append(entry)
        elif split in splits:
            raise ValueError(f"{splits[split]} and {entry} are both for the split {split}; put their clips into one")
        else:
            splits[split] = entry
    if splits and any(True for other in others for _ in audio_files(other)):
        return {}
    return {split: splits[split] for split in SPLIT_FOLDERS if split in splits}


def _labelled_files(root: Path) -> list[tuple[Path, str]]:
    """(audio file, name of its class folder); class folders without any are named in a warning."""
    files = {folder.name: sorted(audio_files(folder)) for folder in _sub_folders(root)}
    empty = [name for name, found in files.items() if not found]
    if empty:
        logger.warning("%d folders in %s hold no audio file and are no class: %s", len(empty), root, some(empty))
    return [(path, name) for name, found in files.items() for path in found]


def _sub_folders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _with_utf8_names(
    files: list[tuple[Path, str]], on_missing: str, missing: list[str] | None
) -> list[tuple[Path, str]]:
    """The files but for those whose names Arrow cannot hold: an error about these, or a warning."""
    check_choice("on_missing", on_missing)
    names = {path: os.fsencode(path).decode(errors="backslashreplace") for path, _ in files}
    others = [name for path, name in names.items() if name != str(path)]
    if not others:
        return files
    listed = f"{len(others)} of {len(files)} files have names that are not UTF-8: {some(others)}"
    if on_missing == "error":
        raise ValueError(f"{listed}. Rename them, or leave them out with on_missing='skip'")
    logger.warning("%s. They are left out.", listed)
    if missing is not None:
        missing += others
    return [(path, label) for path, label in files if names[path] == str(path)]


def _split_cell(cell: str) -> list[str]:
    labels = (label.strip() for label in cell.split(LABEL_SEPARATOR))
    return list(dict.fromkeys(label for label in labels if label))


def _encode_labels(labels: list[list[str]], source: str | Path, multi_label: bool) -> tuple[list[str], list]:
    """Names and ids of lists of labels; lists of ids where that is asked for or some clip has more than one label."""
    names = _sorted_names(name for row in labels for name in row)
    if not names:
        raise ValueError(f"{source} has no label at all")
    id_of = {name: i for i, name in enumerate(names)}
    if multi_label or any(len(row) > 1 for row in labels):
        return names, [[id_of[name] for name in row] for row in labels]
    if [] in labels:
        raise ValueError(
            f"{source}: clip number {labels.index([]) + 1} has no label; every clip needs one, unless the problem is "
            "multi-label: say so by multi_label=True, --problem_type multi_label_classification in a training, or "
            "--multi_label where clips are prepared"
        )
    return names, [id_of[name] for (name,) in labels]


def _sorted_names(names: Iterable[str]) -> list[str]:
    """Distinct names in order; numbers by value, since "10" should follow "9"."""
    distinct = sorted(set(names))
    return sorted(distinct, key=int) if all(name.isdecimal() for name in distinct) else distinct


def _from_hub(loaded: Dataset | DatasetDict, audio_column: str, label_column: str) -> Dataset | DatasetDict:
    """Bring a loaded data set to this module's columns; its clips stay encoded."""
    parts = loaded if isinstance(loaded, DatasetDict) else {"train": loaded}
    columns = next(iter(parts.values())).column_names
    missing = [name for name in (audio_column, label_column) if name not in columns]
    if missing:
        raise ValueError(f"The data set has no column {missing}; its columns are {columns}")
    kept = [audio_column, label_column] + (["fold"] if "fold" in columns else [])
    parts = {
        split: part.select_columns(kept)
        .rename_columns({audio_column: "audio", label_column: "label"})
        .cast_column("audio", Audio(decode=False))
        for split, part in parts.items()
    }
    parts = _with_class_labels(parts)
    return DatasetDict(parts) if isinstance(loaded, DatasetDict) else parts["train"]


def _with_class_labels(parts: dict[str, Dataset]) -> dict[str, Dataset]:
    """Labels given as text or plain numbers become class labels, with the same ids in every split.

    Raises:
        ValueError: a clip has no label, or one of them twice.
    """
    feature = next(iter(parts.values())).features["label"]
    multi = isinstance(feature, List)
    values = {split: part["label"][:] for split, part in parts.items()}
    unlabelled = [split for split, rows in values.items() if rows and all(row is None for row in rows)]
    if unlabelled and len(unlabelled) < len(parts):  # as the test clips of a challenge
        logger.warning("The splits %s have no labels, and are left out.", unlabelled)
        parts, values = ({k: v for k, v in own.items() if k not in unlabelled} for own in (parts, values))
    for split, rows in values.items():
        unknown = [i for i, row in enumerate(rows, start=1) if row is None or (multi and None in row)]
        if unknown:
            raise ValueError(
                f"{split}: clip number {unknown[0]} has no label (of {len(unknown)}); every clip needs one"
            )
    if isinstance(feature.feature if multi else feature, ClassLabel):
        return parts
    if multi and any(len(set(row)) < len(row) for rows in values.values() for row in rows):
        raise ValueError(
            "A clip has a label twice, as in lists of 0 and 1 with a place for each class: store the list of the names "
            "or numbers of a clip's own classes"
        )
    flat = [value for rows in values.values() for row in rows for value in (row if multi else [row])]
    names = _sorted_names(str(value) for value in flat)
    id_of = {name: i for i, name in enumerate(names)}
    encoded = {
        split: [[id_of[str(v)] for v in row] if multi else id_of[str(row)] for row in rows]
        for split, rows in values.items()
    }
    new_feature = List(ClassLabel(names=names)) if multi else ClassLabel(names=names)
    return {split: _with_labels(part, encoded[split], new_feature) for split, part in parts.items()}


def _with_labels(dataset: Dataset, labels: list, feature: ClassLabel | List) -> Dataset:
    return dataset.remove_columns("label").add_column("label", labels, feature=feature)
