import os
import shutil
import subprocess

import numpy as np
import pytest
import soundfile

from transformers_cat import load_audio


def tone(rate: int, seconds: float = 0.5, channels: int = 1) -> np.ndarray:
    """440 Hz at half of full scale; a second channel is silent."""
    wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate)
    return np.stack([wave] + [np.zeros_like(wave)] * (channels - 1), axis=1).astype(np.float32)


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 32_000, 44_100, 48_000, 96_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_any_rate_and_channels_become_mono_at_the_models_rate(tmp_path, rate, channels):
    path = tmp_path / "tone.wav"
    soundfile.write(path, tone(rate, channels=channels), rate, subtype="FLOAT")
    audio = load_audio(path)
    assert audio.dtype == np.float32 and audio.shape == (16_000,)
    expected = tone(32_000)[:, 0] / channels
    np.testing.assert_allclose(audio[500:-500], expected[500:-500], atol=2e-3)


@pytest.mark.parametrize("extension", ["wav", "flac", "ogg", "mp3"])
def test_formats_that_need_no_ffmpeg(tmp_path, extension, monkeypatch):
    monkeypatch.setenv("PATH", "")
    path = tmp_path / f"tone.{extension}"
    soundfile.write(path, tone(32_000), 32_000)
    audio = load_audio(str(path))
    spectrum = np.abs(np.fft.rfft(audio))
    assert abs(spectrum.argmax() * 32_000 / len(audio) - 440) < 3
    assert load_audio(path, sampling_rate=16_000).size == pytest.approx(audio.size / 2, abs=1)


def test_a_real_recording(data_dir):
    audio = load_audio(data_dir / "esc10" / "audio" / "1-100032-A-0.ogg")
    assert audio.shape == (160_032,) or audio.shape == (160_000,)
    assert 0.05 < np.abs(audio).max() <= 1.5


@pytest.mark.skipif(os.name != "posix", reason="elsewhere, libsndfile cannot share a file with Python")
@pytest.mark.parametrize("extension", ["wav", "ogg", "mp3"])
def test_nothing_that_interrupts_the_reading_is_taken_for_the_end_of_the_file(tmp_path, extension, monkeypatch):
    """As it would be in Python code that libsndfile calls: Ctrl-C there made a good file a damaged one."""
    path = tmp_path / f"tone.{extension}"
    soundfile.write(path, tone(32_000, seconds=3), 32_000)
    calls = []
    monkeypatch.setattr(soundfile.SoundFile, "_init_virtual_io", lambda self, file: calls.append(file))
    audio = load_audio(path)
    assert not calls and abs(len(audio) - 96_000) < 3 * 1152


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.wav"):
        load_audio(tmp_path / "nowhere.wav")
    with pytest.raises(FileNotFoundError, match=tmp_path.name):
        load_audio(tmp_path)


@pytest.mark.parametrize("content", [b"", b"RIFF", b"not audio at all" * 100])
def test_a_damaged_file_is_named_with_a_remedy(tmp_path, content, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda program: None)
    path = tmp_path / "broken.wav"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken.wav.*ffmpeg"):
        load_audio(path)


def test_a_file_without_samples_is_named(tmp_path):
    path = tmp_path / "silent.wav"
    soundfile.write(path, np.zeros((0, 1), dtype=np.float32), 32_000)
    with pytest.raises(ValueError, match="silent.wav is empty"):
        load_audio(path)


@pytest.mark.parametrize("extension", ["flac", "ogg"])
def test_damage_in_the_middle_is_no_shorter_recording(tmp_path, extension):
    path = tmp_path / f"gap.{extension}"
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 64_000), 32_000)
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + b"damage" * 500 + content[middle + 3000 :])
    with pytest.raises(ValueError, match=f"gap.{extension} is damaged: .*of its 64000 samples"):
        load_audio(path)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="the ffmpeg program encodes it")
@pytest.mark.parametrize("header", ["0", "1"])
@pytest.mark.parametrize("tail", [b"", b"TAG" + bytes(125)])
def test_an_mp3_of_varying_bit_rate_is_read_to_its_end(tmp_path, header, tail):
    # The bit rate of the first frame, which libsndfile takes for that of all, is high for noise and low for silence.
    noise = np.random.default_rng(0).normal(0, 0.3, 32_000)
    soundfile.write(tmp_path / "clip.wav", np.concatenate([noise, np.zeros(128_000)]), 32_000)
    path = tmp_path / "clip.mp3"
    command = ["ffmpeg", "-loglevel", "error", "-i", tmp_path / "clip.wav", "-q:a", "2", "-write_xing", header, path]
    subprocess.run(command, check=True)
    path.write_bytes(path.read_bytes() + tail)
    assert 160_000 <= len(load_audio(path)) < 160_000 + 3 * 1152


def test_other_formats_are_read_by_ffmpeg(tmp_path, monkeypatch):
    # A stand-in for the program: what counts is what it is asked for and what becomes of its output and errors.
    program = tmp_path / "ffmpeg"
    program.write_text('#!/bin/sh\necho "$@" > "$(dirname "$0")/asked"\nprintf "\\000\\000\\000\\077"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    path = tmp_path / "clip.m4a"
    path.write_bytes(b"no format that soundfile knows")
    np.testing.assert_array_equal(load_audio(path, sampling_rate=16_000), [0.5])
    assert "-ac 1 -ar 16000 -f f32le" in (tmp_path / "asked").read_text()
    program.write_text("#!/bin/sh\necho moov atom not found >&2\nexit 1\n")
    with pytest.raises(ValueError, match=r"clip.m4a.*moov atom not found"):
        load_audio(path)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="the ffmpeg program is not installed")
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_ffmpeg_averages_channels_as_soundfile(tmp_path, channels):
    """A lossless copy in a container that soundfile does not know; by itself, ffmpeg makes stereo too loud."""
    clip = np.repeat(tone(32_000), channels, axis=1)
    soundfile.write(tmp_path / "tone.wav", clip, 32_000)
    copy = ["ffmpeg", "-loglevel", "error", "-i", tmp_path / "tone.wav", "-c:a", "flac", tmp_path / "tone.mka"]
    subprocess.run(copy, check=True)
    np.testing.assert_allclose(load_audio(tmp_path / "tone.mka"), load_audio(tmp_path / "tone.wav"), atol=1e-3)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="the ffmpeg program is not installed")
def test_ffmpeg_agrees_with_soundfile(tmp_path):
    soundfile.write(tmp_path / "tone.wav", tone(44_100), 44_100)
    subprocess.run(["ffmpeg", "-loglevel", "error", "-i", tmp_path / "tone.wav", tmp_path / "tone.wma"], check=True)
    audio = load_audio(tmp_path / "tone.wma")
    assert abs(np.abs(np.fft.rfft(audio)).argmax() * 32_000 / len(audio) - 440) < 3
