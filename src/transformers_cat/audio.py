"""Reads audio files as the model wants them: mono, float32, at one sampling rate."""

import os
import shutil
import subprocess
from fractions import Fraction
from pathlib import Path

import numpy as np

from .configuration_cat import SAMPLING_RATE, validate_integers

# Of the files that a folder is searched for; a file named by hand may have any.
AUDIO_SUFFIXES = {f".{name}" for name in "wav flac ogg oga opus mp3 aif aiff au m4a aac wma webm mp4".split()}
MAX_RATE_RATIO = 100  # between two sampling rates: what lies further apart is a damaged header
MAX_RATE_TERM = 2000  # of the ratio's fraction: torchaudio's filters hold the product of its two terms


def load_audio(path: str | os.PathLike, sampling_rate: int = SAMPLING_RATE) -> np.ndarray:
    """Reads a file, averages its channels and resamples it.

    wav, flac, ogg and mp3 need nothing but soundfile, which comes with this package; anything else (m4a, webm, the
    sound of a video) is read by the `ffmpeg` program where it is installed.

    Args:
        path: The file.
        sampling_rate: Of the result, in Hz; 32000, the model's, by default.

    Returns:
        (N,) float32 in [-1, 1].

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file holds no audio that can be read, or samples that are not finite; the message names the file
            and says why and what helps. Or `sampling_rate` is not a positive integer.
    """
    path = Path(path)
    validate_integers(1, 2**31, sampling_rate=sampling_rate)
    if not path.is_file():
        raise FileNotFoundError(f"There is no audio file {path}.")
    import soundfile

    try:
        # As bytes, where names are bytes: they need not be UTF-8.
        name = os.fsencode(path) if os.name == "posix" else path
        audio, rate = soundfile.read(name, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: a name ending in .raw promises no header
        return _load_with_ffmpeg(path, sampling_rate, reason=getattr(error, "error_string", str(error)))
    except MemoryError as error:
        raise ValueError(f"The audio file {path} claims more samples than memory holds: {error}") from error
    if len(audio) == 0:
        raise ValueError(f"The audio file {path} is empty: it holds no samples.")
    audio = audio.mean(axis=1)
    if not np.isfinite(audio).all():
        raise ValueError(f"The audio file {path} holds NaN or infinite samples. Repair it or leave it out.")
    try:
        return resample(audio, rate, sampling_rate)
    except ValueError as error:
        raise ValueError(f"Cannot resample the audio file {path}: {error}") from error


def resample(audio: np.ndarray, rate: int, sampling_rate: int) -> np.ndarray:
    """(N,) at `rate` Hz -> (N * sampling_rate / rate,) at `sampling_rate` Hz, both float32.

    The ratio of the rates is exact where its fraction has no term above 2000, as that of any two usual rates; otherwise
    (44101 to 32000 Hz) the nearest such fraction stands in, at most 0.05 % off: less than a hundredth of a semitone.

    Raises:
        ValueError: The rates are more than a hundredfold apart, or are not positive integers.
    """
    validate_integers(1, 2**31, rate=rate, sampling_rate=sampling_rate)
    if rate == sampling_rate:
        return audio
    low, high = sorted((int(rate), int(sampling_rate)))
    if low * MAX_RATE_RATIO < high:
        raise ValueError(
            f"Audio at {rate} Hz cannot be brought to {sampling_rate} Hz: the two are more than {MAX_RATE_RATIO}-fold "
            "apart. If the rate comes from a file's header, correct it there."
        )
    import torch
    import torchaudio

    ratio = Fraction(low, high).limit_denominator(MAX_RATE_TERM)
    terms = (ratio.numerator, ratio.denominator) if rate == low else (ratio.denominator, ratio.numerator)
    return torchaudio.functional.resample(torch.from_numpy(audio), *terms).numpy()


def _load_with_ffmpeg(path: Path, sampling_rate: int, reason: str) -> np.ndarray:
    """`load_audio` for what soundfile cannot read, for the `reason` that it gave."""
    if shutil.which("ffmpeg") is None:
        raise ValueError(
            f"Cannot read the audio file {path}: {reason} If it is not damaged, convert it to wav, flac, ogg or mp3, "
            "or install the ffmpeg program, which reads most other formats."
        )
    command = ["ffmpeg", "-nostdin", "-loglevel", "error", "-i", str(path.absolute()), "-vn"]
    command += ["-ac", "1", "-ar", str(sampling_rate), "-f", "f32le", "-"]
    result = subprocess.run(command, capture_output=True)
    if result.returncode or not result.stdout:
        said = result.stderr.decode(errors="replace").strip() or "it holds no audio."
        raise ValueError(f"Cannot read the audio file {path}: soundfile says: {reason} ffmpeg says: {said}")
    return np.frombuffer(result.stdout, dtype="<f4").copy()
