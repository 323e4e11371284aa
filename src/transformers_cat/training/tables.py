"""What the readers of data sets share: CSV tables, files that are missing, `datasets.Dataset`s of paths and labels."""

import csv
import logging
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, List, Value

logger = logging.getLogger(__name__)

NAMED_ITEMS = 5  # an error names this many, then counts


def read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a UTF-8 CSV file with a header.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8, lacks one of the `columns` or has it twice, has no rows, or a row that is too
            short.
    """
    lines = read_lines(path)
    header = next(lines, (0, []))[1]
    missing = [name for name in columns if name not in header]
    if missing:
        raise ValueError(f"{path} has no column {missing}; its columns are {header}")
    if twice := [name for name in columns if header.count(name) > 1]:
        raise ValueError(f"{path} has several columns {twice}: rename those that are not meant")
    rows = []
    for line, cells in lines:
        if any(header.index(name) >= len(cells) for name in columns):
            raise ValueError(f"{path}, row {line} has fewer cells than the header names columns")
        rows.append(dict(zip(header, cells)))
    if not rows:
        raise ValueError(f"{path} has a header but no rows")
    return rows


def read_lines(path: Path, comment: str | None = None) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of each line that is neither empty nor a comment.

    The csv module reads them: pandas' large strings cannot be cast to `datasets.Audio`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; is its folder the right one?")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, skipinitialspace=True)
            for cells in reader:
                if cells and not (comment and cells[0].startswith(comment)):
                    yield reader.line_num, cells
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error
    except csv.Error as error:
        raise ValueError(f"{path} is not a CSV table: {error}") from error


def write_rows(path: str | Path, header: Sequence[str], rows: Iterable[Iterable]) -> Path:
    """Write a CSV file; None is an empty cell."""
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return Path(path)


def existing(paths: Sequence[Path], on_missing: str, missing: list[str] | None = None) -> list[int]:
    """Positions of the paths that exist; an error about the others, or a warning and their names in `missing`."""
    found = [path.is_file() for path in paths]
    return keep_found([str(path) for path in paths], found, on_missing, missing)


def keep_found(
    names: Sequence[str], found: Sequence[bool], on_missing: str, missing: list[str] | None = None
) -> list[int]:
    """Positions of what was found; an error about the rest, or a warning and its names in `missing`."""
    check_choice("on_missing", on_missing)
    kept = [i for i, there in enumerate(found) if there]
    absent = [name for name, there in zip(names, found, strict=True) if not there]
    if not absent:
        return kept
    listed = f"{len(absent)} of {len(names)} listed files do not exist: {some(absent)}"
    if not kept:
        raise FileNotFoundError(f"{listed}. Complete the data set, or remove the table that lists them")
    if on_missing == "error":
        raise FileNotFoundError(
            f"{listed}. Complete the data set, or leave the rows out: by on_missing='skip', --on_bad_audio skip in a "
            "training, or examples/prepare_audio.py, whose shards lack them"
        )
    logger.warning("%s. Their rows are left out.", listed)
    if missing is not None:
        missing += absent
    return kept


def refuse_duplicates(keys: Iterable[Hashable], path: Path, remedy: str) -> None:
    """Raise ValueError if a clip is listed twice: it would count twice, or be in training and test."""
    seen = set()
    for key in keys:
        if key in seen:
            raise ValueError(f"{path} lists {key} twice; {remedy}")
        seen.add(key)


def integer(cell: str, column: str, path: Path) -> int:
    """The integer in a cell."""
    try:
        return int(cell)
    except ValueError:
        raise ValueError(f"{path}: {column} {cell!r} is not an integer") from None


def build_dataset(paths: list[Path], labels: list, names: list[str], folds: list[int] | None = None) -> Dataset:
    """The columns `audio` (paths), `label` (ids, or lists of ids) and, if given, `fold`."""
    label = ClassLabel(names=names)
    columns = {"audio": [str(path) for path in paths], "label": labels}
    features = {"audio": Value("string"), "label": List(label) if isinstance(labels[0], list) else label}
    if folds is not None:
        columns["fold"], features["fold"] = folds, Value("int64")
    return Dataset.from_dict(columns, features=Features(features))


def check_choice(name: str, value: str) -> None:
    """Raise ValueError for anything but the two ways to treat what is broken."""
    if value not in ("error", "skip"):
        raise ValueError(f"{name} is 'error' or 'skip', not {value!r}")


def some(items: Sequence[str]) -> str:
    """The first items by name, the others by number."""
    more = len(items) - NAMED_ITEMS
    return ", ".join(items[:NAMED_ITEMS]) + (f" and {more} more" if more > 0 else "")
