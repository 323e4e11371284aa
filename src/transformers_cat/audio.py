"""Reads audio files as the model wants them: mono, float32, at one sampling rate."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np

from .configuration_cat import SAMPLING_RATE


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
        ValueError: The file holds no audio that can be read; the message says why and what helps.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no audio file {path}.")
    import soundfile

    try:
        audio, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        return _load_with_ffmpeg(path, sampling_rate, reason=str(error))
    if len(audio) == 0:
        raise ValueError(f"The audio file {path} is empty: it holds no samples.")
    return resample(audio.mean(axis=1), rate, sampling_rate)


def resample(audio: np.ndarray, rate: int, sampling_rate: int) -> np.ndarray:
    """(N,) at `rate` Hz -> (N * sampling_rate / rate,) at `sampling_rate` Hz, both float32."""
    if rate == sampling_rate:
        return audio
    import torch
    import torchaudio

    return torchaudio.functional.resample(torch.from_numpy(audio), rate, sampling_rate).numpy()


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
