"""Reads audio files as the model wants them: mono, float32, at one sampling rate."""

import io
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .configuration_cat import SAMPLING_RATE, validate_integers

# Of the files that a folder is searched for; a file named by hand may have any.
AUDIO_SUFFIXES = {f".{name}" for name in "wav w64 flac ogg oga opus mp3 aif aiff au caf m4a aac wma webm mp4".split()}
BLOCK_LENGTH = 2**16  # samples per channel that are decoded at a time
OGG_GAP = re.compile(r"libogg reports a hole.*|Skipped \d+ bytes looking.*")
UNKNOWN_LENGTH = 2**63 - 1  # what libsndfile gives for samples that a header does not count
MAX_RATE_RATIO = 100  # between two sampling rates: what lies further apart is a damaged header
MAX_RATE_TERM = 2000  # of the ratio's fraction: torchaudio's filters hold the product of its two terms


def audio_files(folder: str | os.PathLike) -> Iterator[Path]:
    """The audio files of a folder and of all below it, each folder's in alphabetic order, but no hidden ones.

    Hidden are names with a leading dot, such as the `._clip.wav` that some systems write beside `clip.wav`. Links are
    followed, but no folder is entered twice, by which way ever.
    """
    entered = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if os.path.splitext(name)[1].lower() in AUDIO_SUFFIXES and not name.startswith("."):
                yield Path(root, name)


def load_audio(path: str | os.PathLike, sampling_rate: int = SAMPLING_RATE) -> np.ndarray:
    """Reads a file, averages its channels and resamples it.

    wav, flac, ogg, mp3 and what else soundfile knows, which comes with this package, need nothing more; anything else
    (m4a, webm, the sound of a video) is read by the `ffmpeg` program where it is installed.

    Args:
        path: The file.
        sampling_rate: Of the result, in Hz; 32000, the model's, by default.

    Returns:
        (N,) float32, in [-1, 1] but for what files of floats hold beyond that.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file holds no audio that can be read, fewer samples than it says (as far as libsndfile tells: a
            FLAC that ends early is refused, most other formats are read as far as they go), or samples that are not
            finite; the message names the file and says why and what helps. Or `sampling_rate` is not a positive
            integer.
    """
    path = Path(path)
    validate_integers(1, 2**31, sampling_rate=sampling_rate)
    if not path.is_file():
        raise FileNotFoundError(f"There is no audio file {path}.")
    with path.open("rb", buffering=0) as stream:
        try:
            return read_audio(stream, path, sampling_rate)
        except UnknownFormatError as error:
            return _load_with_ffmpeg(path, sampling_rate, reason=str(error))


class UnknownFormatError(ValueError):
    """Says why soundfile cannot read what another program may be able to."""


def read_audio(stream: BinaryIO, name: str | os.PathLike, sampling_rate: int) -> np.ndarray:
    """`load_audio` for an open file or the bytes of one, by soundfile alone.

    Args:
        stream: At its beginning; it can be sought in.
        name: What errors call it.
        sampling_rate: Of the result, in Hz.

    Returns:
        (N,) float32.

    Raises:
        UnknownFormatError: soundfile cannot read it.
        ValueError: It is damaged, as for `load_audio`.
    """
    audio, rate = _decode(stream, name)
    if len(audio) == 0:
        raise ValueError(f"The audio file {name} is empty: it holds no samples.")
    if not np.isfinite(audio).all():
        raise ValueError(f"The audio file {name} holds NaN or infinite samples. Repair it or leave it out.")
    try:
        return resample(audio, rate, sampling_rate)
    except ValueError as error:
        raise ValueError(f"Cannot resample the audio file {name}: {error}") from error


def _decode(stream: BinaryIO, name: str | os.PathLike) -> tuple[np.ndarray, int]:
    """The whole of a file as (N,) float32 and its rate in Hz, or an error that tells what is lost."""
    import soundfile

    # A file's bytes are libsndfile's to read: where Python reads them for it, an interrupt or an error that comes at
    # that moment is taken for the end of the file. (Windows has no descriptors that two libraries could share.)
    by_itself = isinstance(stream, io.FileIO) and os.name == "posix"
    try:
        file = soundfile.SoundFile(stream.fileno() if by_itself else stream, closefd=not by_itself)
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: a name ending in .raw promises no header
        raise UnknownFormatError(getattr(error, "error_string", str(error))) from error
    with file:
        counted = file.frames < UNKNOWN_LENGTH and not file.subtype.startswith("MPEG")  # whose length is estimated
        try:
            audio = _all_samples(file)
            if file.format == "MP3" and stream.read(3) not in (b"", b"TAG", b"APE"):  # not at the end
                stream.seek(0)
                with soundfile.SoundFile(_SeeminglyLonger(stream.read())) as longer:
                    audio = _all_samples(longer)
        except soundfile.LibsndfileError as error:
            if not counted:  # another program may read what libsndfile gives up
                raise UnknownFormatError(error.error_string) from error
            raise ValueError(
                f"The audio file {name} is damaged: not all of its {file.frames} samples can be read: "
                f"{error.error_string}"
            ) from error
        if counted and len(audio) < file.frames:
            raise ValueError(
                f"The audio file {name} is damaged: of its {file.frames} samples, only {len(audio)} can be read."
            )
        if gap := OGG_GAP.search(file.extra_info):
            raise ValueError(f"The audio file {name} is damaged: libsndfile notes: {gap[0]}")
        return audio, file.samplerate


def _all_samples(file) -> np.ndarray:
    """A `soundfile.SoundFile` -> (N,) float32, the mean of its channels, up to its end or a gap."""
    blocks = []
    while not blocks or len(blocks[-1]) == BLOCK_LENGTH:
        blocks.append(file.read(BLOCK_LENGTH, dtype="float32", always_2d=True).mean(axis=1))
    return np.concatenate(blocks)


class _SeeminglyLonger(io.BytesIO):
    """An MP3 that seems to end far behind its end.

    Where no header counts the samples, libsndfile takes the bit rate of the first frame for that of all and stops where
    the file would then end, which can be early if the bit rate varies. It cannot if the file is so long that even the
    lowest bit rate (8 kbit/s), after the highest (320 kbit/s), would not fill it.
    """

    FACTOR = 320 // 8 + 1

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_END:
            return super().seek(offset + self.FACTOR * self.getbuffer().nbytes)
        return super().seek(offset, whence)

    def readinto(self, buffer) -> int:
        if self.tell() <= self.getbuffer().nbytes:
            return super().readinto(buffer)
        return self.seek(len(buffer), os.SEEK_CUR) and len(buffer)  # where a tag is looked for, there is something


def resample(audio: np.ndarray, rate: int, sampling_rate: int) -> np.ndarray:
    """(N,) at `rate` Hz -> (N * sampling_rate / rate,) at `sampling_rate` Hz, both float32.

    The ratio of the rates is exact where its fraction has no term above 2000, as that of any two usual rates; otherwise
    (44101 to 32000 Hz) the nearest such fraction stands in, at most 0.05 % off: less than a hundredth of a semitone.

    Raises:
        ValueError: The rates are more than a hundredfold apart, or are not positive integers.
    """
    check_rates(rate, sampling_rate)
    if rate == sampling_rate:
        return audio
    import torch
    import torchaudio

    low, high = sorted((int(rate), int(sampling_rate)))
    ratio = Fraction(low, high).limit_denominator(MAX_RATE_TERM)
    terms = (ratio.numerator, ratio.denominator) if rate == low else (ratio.denominator, ratio.numerator)
    return torchaudio.functional.resample(torch.from_numpy(audio), *terms).numpy()


def check_rates(rate: int, sampling_rate: int) -> None:
    """Raise ValueError for rates (in Hz) that `resample` refuses."""
    validate_integers(1, 2**31, rate=rate, sampling_rate=sampling_rate)
    if min(rate, sampling_rate) * MAX_RATE_RATIO < max(rate, sampling_rate):
        raise ValueError(
            f"Audio at {rate} Hz cannot be brought to {sampling_rate} Hz: the two are more than {MAX_RATE_RATIO}-fold "
            "apart. If the rate comes from a file's header, correct it there."
        )


def _load_with_ffmpeg(path: Path, sampling_rate: int, reason: str) -> np.ndarray:
    """`load_audio` for what soundfile cannot read, for the `reason` that it gave."""
    if shutil.which("ffmpeg") is None:
        raise ValueError(
            f"Cannot read the audio file {path}: {reason} If it is not damaged, convert it to wav, flac, ogg or mp3, "
            "or install the ffmpeg program, which reads most other formats."
        )
    command = ["ffmpeg", "-nostdin", "-loglevel", "error", "-i", str(path.absolute()), "-vn"]
    # By itself, ffmpeg keeps the power of channels that it mixes; so weighted, two become their mean.
    command += ["-af", "aresample=rematrix_maxval=1", "-ac", "1", "-ar", str(sampling_rate), "-f", "f32le", "-"]
    result = subprocess.run(command, capture_output=True)
    if result.returncode or not result.stdout:
        said = result.stderr.decode(errors="replace").strip() or "it holds no audio."
        raise ValueError(f"Cannot read the audio file {path}: soundfile says: {reason} ffmpeg says: {said}")
    return np.frombuffer(result.stdout, dtype="<f4").copy()
