"""Checks and lazy decoding, on tiny written files and on the real data where it is present."""

import pickle
import shutil
import subprocess

import numpy as np
import pytest
import soundfile
from datasets import Dataset

from transformers_cat.training import clips, load_audio_dataset
from transformers_cat.training.clips import (
    EMPTY,
    TRUNCATED,
    audio_problem,
    decode_audio,
    decode_clip,
    validate_audio_files,
)

from .test_data import RATE, write_clip


class TestValidation:
    def broken(self, folder):
        """One good clip and broken ones: truncated, no audio, or empty."""
        good = write_clip(folder / "good.wav")
        noise = np.random.default_rng(0).normal(0, 0.1, RATE)
        names = [good]
        for suffix in ("flac", "wav", "ogg"):
            soundfile.write(folder / f"whole.{suffix}", noise, RATE)
            encoded = (folder / f"whole.{suffix}").read_bytes()
            names.append(folder / f"half.{suffix}")
            names[-1].write_bytes(encoded[: len(encoded) // 2])
        (folder / "text.wav").write_text("not audio")
        (folder / "nothing.wav").write_bytes(b"")
        soundfile.write(folder / "empty.wav", np.zeros(0), RATE)
        names += [folder / name for name in ("text.wav", "nothing.wav", "empty.wav")]
        return Dataset.from_dict({"audio": [str(name) for name in names], "label": list(range(7))})

    @pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
    def test_whole_files_are_good(self, tmp_path, suffix):
        path = tmp_path / f"clip.{suffix}"
        soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, RATE), RATE)
        assert audio_problem(str(path)) is None
        assert audio_problem({"bytes": path.read_bytes(), "path": None}) is None

    def test_a_length_that_a_pipe_could_not_know_is_no_truncation(self, tmp_path):
        path = write_clip(tmp_path / "piped.wav")
        encoded = bytearray(path.read_bytes())
        encoded[40:44] = b"\xff\xff\xff\xff"  # the length of the samples in a canonical header
        path.write_bytes(encoded)
        assert audio_problem(str(path)) is None

    @pytest.mark.parametrize(
        ("name", "problem"),
        [
            ("half.wav", TRUNCATED),
            ("half.flac", "half.flac is damaged: "),
            ("empty.wav", EMPTY),
            ("slow.wav", "Audio at 100 Hz cannot be brought to 32000 Hz"),
            ("gap.flac", "gap.flac is damaged: "),
        ],
    )
    def test_reasons(self, tmp_path, name, problem):
        self.broken(tmp_path)
        soundfile.write(tmp_path / "slow.wav", np.zeros(100), 100)
        encoded = bytearray((tmp_path / "whole.flac").read_bytes())
        middle = len(encoded) // 2
        encoded[middle : middle + 300] = b"damage" * 50
        (tmp_path / "gap.flac").write_bytes(encoded)
        assert problem in audio_problem(str(tmp_path / name))
        assert problem in audio_problem({"bytes": (tmp_path / name).read_bytes(), "path": name})

    def test_samples_without_a_header_are_a_problem(self, tmp_path):
        (tmp_path / "clip.raw").write_bytes(bytes(100))
        assert "clip.raw: " in audio_problem(str(tmp_path / "clip.raw"))

    @pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="the ffmpeg program encodes it")
    def test_an_mp3_in_a_wav_is_good(self, tmp_path):
        source, path = write_clip(tmp_path / "a.wav", samples=RATE), tmp_path / "mp3.wav"
        subprocess.run(["ffmpeg", "-loglevel", "error", "-i", source, "-c:a", "mp3", path], check=True)
        assert audio_problem(str(path)) is None

    def test_samples_that_are_no_numbers(self, tmp_path):
        samples = np.zeros(2 * RATE, dtype=np.float32)
        soundfile.write(tmp_path / "float.wav", samples, RATE, subtype="FLOAT")
        assert audio_problem(str(tmp_path / "float.wav")) is None
        samples[RATE + 1] = np.nan
        soundfile.write(tmp_path / "float.wav", samples, RATE, subtype="FLOAT")
        assert "float.wav holds NaN" in audio_problem(str(tmp_path / "float.wav"))

    def test_samples_that_were_not_scaled(self, tmp_path):
        """What prepares recordings would cut them off at full scale, and hear noise."""
        samples = np.array([0.0, 100.0, -100.0], dtype=np.float32)
        soundfile.write(tmp_path / "float.wav", samples, RATE, subtype="FLOAT")
        assert audio_problem(str(tmp_path / "float.wav")) is None
        soundfile.write(tmp_path / "float.wav", 200 * samples, RATE, subtype="FLOAT")
        assert "samples up to 20000, but full scale is 1" in audio_problem(str(tmp_path / "float.wav"))

    def test_error_names_the_files(self, tmp_path):
        with pytest.raises(ValueError, match=r"6 of 7 clips .*half\.flac.*text\.wav.* 1 more .*on_bad_audio='skip'"):
            validate_audio_files(self.broken(tmp_path))

    def test_skip_counts(self, tmp_path, caplog):
        dataset, skipped = validate_audio_files(self.broken(tmp_path), on_bad_audio="skip")
        assert dataset["label"][:] == [0]
        names = ["half.flac", "half.wav", "half.ogg", "text.wav", "nothing.wav", "empty.wav"]
        assert [name.rsplit("/", 1)[1] for name in skipped] == names
        assert "6 of 7 clips cannot be read" in caplog.text

    def test_nothing_left(self, tmp_path):
        with pytest.raises(ValueError, match="No clip is left: 3 of 3"):
            validate_audio_files(self.broken(tmp_path).select([1, 4, 6]), on_bad_audio="skip")

    def test_unknown_choice(self, tmp_path):
        with pytest.raises(ValueError, match="on_bad_audio is 'error' or 'skip'"):
            validate_audio_files(self.broken(tmp_path), on_bad_audio="drop")

    def test_real(self, data_dir):
        dataset = load_audio_dataset(data_dir / "esc10")
        checked, skipped = validate_audio_files(dataset)
        assert len(checked) == 400 and skipped == []


class TestDecoding:
    def test_only_what_is_read_is_decoded(self, tmp_path, monkeypatch):
        paths = [str(write_clip(tmp_path / f"{i}.wav", value=i / 10)) for i in range(4)]
        decoded = []
        load_audio = clips.load_audio
        monkeypatch.setattr(clips, "load_audio", lambda path, rate: decoded.append(path) or load_audio(path, rate))
        dataset = decode_audio(Dataset.from_dict({"audio": paths, "label": [0, 1, 2, 3]}), RATE)
        assert decoded == []
        row = dataset[2]
        assert decoded == [paths[2]]
        np.testing.assert_allclose(row["audio"], 0.2, atol=1e-4)
        assert row["audio"].dtype == np.float32

    def test_bytes_are_mixed_to_mono_and_resampled(self, tmp_path):
        stereo = np.stack([np.full(800, 0.2), np.full(800, 0.4)], axis=1)
        soundfile.write(tmp_path / "a.wav", stereo, RATE)
        waveform = decode_clip({"bytes": (tmp_path / "a.wav").read_bytes(), "path": None}, 2 * RATE)
        assert waveform.shape == (1600,) and waveform.dtype == np.float32
        np.testing.assert_allclose(waveform[200:-200], 0.3, atol=1e-2)
        same = decode_clip({"bytes": None, "path": str(tmp_path / "a.wav")}, 2 * RATE)
        np.testing.assert_allclose(waveform, same, atol=1e-6)

    def test_broken_bytes(self):
        with pytest.raises(ValueError, match=r"Clip a\.wav cannot be decoded"):
            decode_clip({"bytes": b"no audio", "path": "a.wav"}, RATE)

    def test_workers_that_are_spawned_can_receive_the_data_set(self, tmp_path):
        dataset = decode_audio(Dataset.from_dict({"audio": [str(write_clip(tmp_path / "a.wav"))]}), RATE)
        assert pickle.loads(pickle.dumps(dataset))[0]["audio"].shape == (400,)
