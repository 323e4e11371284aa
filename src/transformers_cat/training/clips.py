"""The clips of a data set: what they are called, their check, their lazy decoding."""

import io
import logging
import re
from collections import Counter
from collections.abc import Iterable

import numpy as np
import soundfile
from datasets import Dataset, Value

from ..audio import UnknownFormatError, check_rates, load_audio, read_audio
from ..configuration_cat import SAMPLING_RATE
from ..feature_extraction_cat import MAX_AMPLITUDE
from .tables import check_choice, some

logger = logging.getLogger(__name__)

EMPTY, TRUNCATED = "it holds no samples", "it is truncated: it ends before its header says"
TOO_LOUD = "it has samples up to {:.6g}, but full scale is 1: divide them by their range, as by 32768 of 16 bits"
LARGEST_DECLARED = 0x7FFF0000  # bytes


def decode_audio(dataset: Dataset, sampling_rate: int) -> Dataset:
    """Decode `audio` to float32 mono waveforms (N,) at `sampling_rate` Hz whenever rows are read, never before.

    `datasets` applies a transform to whole rows: read labels and folds from the data set as it was before, since the
    column of a decoded one decodes all clips.
    """
    return dataset.with_transform(_DecodeAudio(sampling_rate))


class _DecodeAudio:
    """A transform for `Dataset.with_transform`; a class, since data workers may have to pickle it."""

    def __init__(self, sampling_rate: int):
        self.sampling_rate = sampling_rate

    def __call__(self, rows: dict) -> dict:
        if "audio" not in rows:
            return rows
        return {**rows, "audio": [decode_clip(clip, self.sampling_rate) for clip in rows["audio"]]}


def decode_clip(clip: str | dict, sampling_rate: int) -> np.ndarray:
    """Decode one clip, given as a path or as the `{"bytes", "path"}` of `datasets.Audio(decode=False)`.

    Returns:
        float32 mono waveform (N,) at `sampling_rate` Hz.
    """
    path, encoded = path_and_bytes(clip)
    if encoded is None:
        return load_audio(path, sampling_rate)
    try:
        return read_audio(io.BytesIO(encoded), path or "that has no name", sampling_rate)
    except UnknownFormatError as error:
        raise ValueError(f"Clip {path} cannot be decoded ({error}); convert it to wav, flac or ogg") from error


def path_and_bytes(clip: str | dict) -> tuple[str | None, bytes | None]:
    return (clip, None) if isinstance(clip, str) else (clip["path"], clip["bytes"])


def clip_name(clip: str | dict, position: int) -> str:
    """How reports name a clip: its path, or its number where only its bytes are known."""
    path = clip if isinstance(clip, str) else clip["path"]
    return path or f"clip {position}"


def clip_names(dataset: Dataset) -> list[str]:
    """The path of each clip, or its number where only its bytes are known, each once; no clip is read for it."""
    audio = dataset.with_format(None).select_columns("audio")
    if dataset.features["audio"] != Value("string"):
        audio = audio.flatten().select_columns("audio.path")
    return distinct(path or f"clip {i}" for i, path in enumerate(audio[audio.column_names[0]]))


def distinct(names: Iterable[str]) -> list[str]:
    """The second "a.wav" becomes "a.wav (2)": inside of Parquet files, clips may share a name."""
    distinct, tries = {}, Counter()
    for name in names:
        free = name
        while free in distinct:
            tries[name] += 1
            free = f"{name} ({tries[name] + 1})"
        distinct[free] = None
    return list(distinct)


def raw_audio(dataset: Dataset) -> list:
    """The clips as they are stored: paths, or dicts of path and bytes."""
    return dataset.with_format(None)["audio"]


def validate_audio_files(dataset: Dataset, on_bad_audio: str = "error") -> tuple[Dataset, list[str]]:
    """Read every clip by `audio_problem`: a broken file should be found now, not in mid-training.

    Args:
        dataset: with the column `audio`.
        on_bad_audio: "error" (default) raises and names the files; "skip" leaves them out.

    Returns:
        The data set without the unreadable clips, and their names.

    Raises:
        ValueError: unreadable clips with "error", or no readable clip at all.
    """
    check_choice("on_bad_audio", on_bad_audio)
    clips = raw_audio(dataset)
    problems = {i: problem for i, clip in enumerate(clips) if (problem := audio_problem(clip))}
    if not problems:
        return dataset, []
    names = [clip_name(clips[i], i) for i in problems]
    listed = f"{len(problems)} of {len(dataset)} clips cannot be read: {some(names)} ({next(iter(problems.values()))})"
    if on_bad_audio == "error":
        raise ValueError(f"{listed}. Repair or remove them, or leave them out with on_bad_audio='skip'")
    if len(problems) == len(dataset):
        raise ValueError(f"No clip is left: {listed}")
    logger.warning("%s. They are left out.", listed)
    return dataset.select([i for i in range(len(dataset)) if i not in problems]), names


def audio_problem(clip: str | dict, sampling_rate: int = SAMPLING_RATE) -> str | None:
    """Why a clip cannot be read to its end, brought to `sampling_rate` Hz (default 32000) or heard as it is, or None.

    Of uncompressed integers only the header is looked at. All else is decoded: compressed audio may have a gap
    anywhere, and numbers in floating point may be none, or on the scale of integers.
    """
    path, encoded = path_and_bytes(clip)
    rate = sampling_rate
    try:
        with (
            open(path, "rb") if encoded is None else io.BytesIO(encoded) as stream,
            soundfile.SoundFile(stream) as file,
        ):
            if file.frames == 0:
                return EMPTY
            if _says_truncated(file.extra_info):
                return TRUNCATED
            rate = file.samplerate
            check_rates(rate, sampling_rate)
            if file.subtype.startswith("PCM") and file.format != "FLAC":
                return None
    except (soundfile.LibsndfileError, TypeError):
        pass  # `decode_clip` may know its format
    except (ValueError, OSError) as error:
        return str(error)
    try:
        peak = np.abs(decode_clip(clip, rate)).max()
    except (ValueError, OSError) as error:
        return str(error)
    return TOO_LOUD.format(peak) if peak > MAX_AMPLITUDE else None


def _says_truncated(log: str) -> bool:
    """Whether libsndfile noted that a file ends early, which it reads without an error where the format allows it."""
    if "lacks an end-of-stream" in log:
        return True
    declared = re.search(r"^data : (\d+) \(should be (\d+)\)", log, re.MULTILINE)
    # A program that writes to a pipe cannot know the length and declares the largest one.
    return bool(declared) and int(declared[2]) < int(declared[1]) < LARGEST_DECLARED
