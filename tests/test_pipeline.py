"""`pipeline("audio-classification")`: what it takes for audio, and that its scores are the model's."""

import shutil
import subprocess

import numpy as np
import pytest
import soundfile
import torch
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset

from transformers_cat import CATFeatureExtractor, CATForAudioClassification, load_audio
from transformers_cat.audio import resample

RATES = [8_000, 11_025, 16_000, 22_050, 32_000, 44_100, 48_000, 96_000]
needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="the ffmpeg program is not installed")


@pytest.fixture(scope="module")
def classifier(checkpoint):
    return pipeline("audio-classification", model=str(checkpoint))


def sweep(rate: int, seconds: float = 0.5, start: float = 100.0) -> np.ndarray:
    """A tone that rises from `start` to 3.5 kHz, below half of the lowest rate, with silence at both ends."""
    time = np.arange(int(rate * seconds)) / rate
    phase = 2 * np.pi * (start * time + (3_500 - start) * time**2 / (2 * seconds))
    return (0.4 * np.sin(phase) * np.hanning(len(time))).astype(np.float32)


def by_label(scores: list[dict]) -> dict[str, float]:
    return {item["label"]: item["score"] for item in scores}


def expected_scores(checkpoint, clip: np.ndarray) -> dict[str, float]:
    """The model's own probabilities for a clip at its own rate."""
    model = CATForAudioClassification.from_pretrained(checkpoint)
    batch = CATFeatureExtractor()(clip, sampling_rate=32_000, return_tensors="pt")
    with torch.no_grad():
        probabilities = model(**batch).logits[0].softmax(-1)
    return {model.config.id2label[index]: value for index, value in enumerate(probabilities.tolist())}


def assert_well_formed(scores: list[dict], number: int) -> None:
    assert len(scores) == number
    for item in scores:
        assert item.keys() == {"score", "label"}
        assert isinstance(item["score"], float) and isinstance(item["label"], str)
        assert 0 <= item["score"] <= 1
    assert [item["score"] for item in scores] == sorted((item["score"] for item in scores), reverse=True)


class TestArrays:
    @pytest.mark.parametrize("kind", ["float32", "float64", "int16", "tensor", "read-only", "strided"])
    def test_at_the_models_rate(self, checkpoint, classifier, kind):
        clip = sweep(32_000)
        expected = expected_scores(checkpoint, clip)
        if kind == "int16":
            clip = np.round(clip * 32_768).astype(np.int16)
        elif kind == "tensor":
            clip = torch.from_numpy(clip)
        elif kind == "read-only":
            clip.setflags(write=False)
        elif kind == "strided":
            clip = np.repeat(clip, 2)[::2]
        else:
            clip = clip.astype(kind)
        scores = classifier(clip)
        assert_well_formed(scores, 5)
        # 16 bits are heard in the near silence of the ends.
        assert by_label(scores) == pytest.approx(expected, abs=5e-3 if kind == "int16" else 1e-5)

    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    @pytest.mark.parametrize("rate", RATES)
    def test_at_any_rate(self, checkpoint, classifier, rate, dtype):
        clip = sweep(rate)
        given = {"array": clip.astype(dtype), "sampling_rate": rate}
        scores = classifier(given)
        assert by_label(scores) == pytest.approx(expected_scores(checkpoint, resample(clip, rate, 32_000)), abs=1e-4)
        raw = {"raw": given["array"], "sampling_rate": rate}
        assert classifier(raw) == scores
        assert given.keys() == {"array", "sampling_rate"}

    def test_several_channels_are_refused(self, classifier):
        with pytest.raises(ValueError, match="single channel"):
            classifier(np.zeros((2, 16_000), dtype=np.float32))

    @pytest.mark.parametrize("seconds", [0.05, 0.4, 5, 60])
    def test_of_any_length(self, classifier, seconds):
        noise = np.random.default_rng(0).normal(0, 0.1, int(seconds * 32_000))
        scores = classifier(noise)
        assert_well_formed(scores, 5)
        assert sum(item["score"] for item in scores) == pytest.approx(1, abs=1e-4)


class TestFiles:
    @pytest.mark.parametrize("channels", [1, 2])
    @pytest.mark.parametrize(
        "rate, subtype", [*((rate, "FLOAT") for rate in RATES), (44_100, "PCM_16"), (8_000, "DOUBLE")]
    )
    def test_of_any_rate_and_format(self, checkpoint, classifier, tmp_path, rate, channels, subtype):
        path = tmp_path / "clip.wav"
        clip = np.stack([sweep(rate), sweep(rate, start=1_000)][:channels], axis=1)
        soundfile.write(path, clip, rate, subtype=subtype)
        expected = expected_scores(checkpoint, resample(clip.mean(axis=1), rate, 32_000))
        scores = by_label(classifier(load_audio(path)))
        assert scores == pytest.approx(expected, abs=5e-3 if subtype == "PCM_16" else 1e-4)

    @needs_ffmpeg
    @pytest.mark.parametrize("channels", [1, 2])
    @pytest.mark.parametrize("rate", RATES)
    def test_paths_and_bytes_are_read_by_ffmpeg(self, checkpoint, classifier, tmp_path, rate, channels):
        path = tmp_path / "clip.wav"
        clip = np.stack([sweep(rate), sweep(rate, start=1_000)][:channels], axis=1)
        soundfile.write(path, clip, rate, subtype="FLOAT")
        scores = classifier(str(path))
        assert_well_formed(scores, 5)
        assert classifier(path.read_bytes()) == scores
        # Two resamplers differ in their filters.
        assert by_label(scores) == pytest.approx(by_label(classifier(load_audio(path))), abs=0.02)

    @needs_ffmpeg
    @pytest.mark.parametrize("extension", ["flac", "ogg", "mp3", "m4a", "wma"])
    def test_compressed_files_by_path(self, classifier, tmp_path, extension):
        soundfile.write(tmp_path / "clip.wav", sweep(44_100), 44_100)
        path = tmp_path / f"clip.{extension}"
        subprocess.run(["ffmpeg", "-loglevel", "error", "-i", tmp_path / "clip.wav", path], check=True)
        # The index of an m4a stands at its end, out of reach for the pipeline, which feeds ffmpeg through a pipe.
        scores = classifier(load_audio(path) if extension == "m4a" else str(path))
        # The last block of an mp3 ends in padding, which ffmpeg keeps and soundfile cuts off.
        tolerance = 0.1 if extension == "mp3" else 0.02
        assert by_label(scores) == pytest.approx(by_label(classifier(load_audio(path))), abs=tolerance)

    def test_without_ffmpeg_a_path_is_refused_and_load_audio_reads_it(self, classifier, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        path = tmp_path / "clip.flac"
        soundfile.write(path, sweep(44_100), 44_100)
        with pytest.raises(ValueError, match="ffmpeg was not found"):
            classifier(str(path))
        assert_well_formed(classifier(load_audio(path)), 5)
        path = tmp_path / "clip.m4a"
        path.write_bytes(b"a format that soundfile does not read")
        with pytest.raises(ValueError, match=r"clip\.m4a.*install the ffmpeg program"):
            load_audio(path)

    def test_recordings(self, checkpoint, classifier, real_clips, data_dir):
        for clip in real_clips:
            assert by_label(classifier(clip)) == pytest.approx(expected_scores(checkpoint, clip), abs=1e-5)
        if shutil.which("ffmpeg"):
            path = data_dir / "esc10" / "audio" / "1-100032-A-0.ogg"
            assert by_label(classifier(str(path))) == pytest.approx(by_label(classifier(real_clips[0])), abs=0.02)


class TestBatches:
    @pytest.mark.parametrize("function", ["softmax", "sigmoid", "none"])
    def test_score_as_one_at_a_time(self, classifier, function):
        clips = [sweep(32_000, seconds, start) for seconds, start in ((0.2, 100), (1, 300), (0.5, 900), (1.7, 50))]
        alone = [by_label(classifier(clip, function_to_apply=function)) for clip in clips]
        assert alone[0] != pytest.approx(alone[1], abs=1e-2)
        for batch_size in (2, 4):
            together = classifier(clips, batch_size=batch_size, function_to_apply=function)
            for one, of_batch in zip(alone, together, strict=True):
                assert by_label(of_batch) == pytest.approx(one, abs=2e-5)

    def test_of_recordings_score_as_one_at_a_time(self, classifier, real_clips):
        clips = [clip[: 20_000 + 30_000 * index] for index, clip in enumerate(real_clips)]
        for clip, scores in zip(clips, classifier(clips, batch_size=4), strict=True):
            assert by_label(scores) == pytest.approx(by_label(classifier(clip)), abs=2e-5)

    def test_a_generator(self, classifier):
        clips = [sweep(32_000, seconds) for seconds in (0.2, 0.4, 0.3)]
        for clip, scores in zip(clips, classifier((clip for clip in clips), batch_size=1), strict=True):
            assert by_label(scores) == pytest.approx(by_label(classifier(clip)), abs=2e-5)

    def test_a_column_of_rows(self, classifier):
        clips = [sweep(32_000, seconds) for seconds in (0.2, 0.4, 0.3)]
        rows = [{"audio": {"array": clip, "sampling_rate": 32_000}} for clip in clips]
        for scores, clip in zip(classifier(KeyDataset(rows, "audio"), batch_size=2), clips, strict=True):
            assert by_label(scores) == pytest.approx(by_label(classifier(clip)), abs=2e-5)

    def test_a_dataset_of_arrow(self, classifier):
        datasets = pytest.importorskip("datasets")
        clips = [sweep(32_000, seconds) for seconds in (0.2, 0.4, 0.3)]
        rows = datasets.Dataset.from_dict({"audio": clips}).with_format("numpy")
        for scores, clip in zip(classifier(KeyDataset(rows, "audio"), batch_size=2), clips, strict=True):
            assert by_label(scores) == pytest.approx(by_label(classifier(clip)), abs=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_transformers_asks_of_every_model(checkpoint, tmp_path, dtype):
    """Two clips of zeros in float64, every label or some, lists of several sizes, saved and loaded again."""
    classifier = pipeline("audio-classification", model=str(checkpoint), dtype=dtype)
    assert classifier.model.dtype == dtype
    clips = [np.zeros(34_000), np.zeros(14_000)]
    for clip in clips:
        assert_well_formed(classifier(clip), 5)
        assert_well_formed(classifier(clip, top_k=1), 1)
    for number in (4, 10):
        results = classifier([clips[index % 2] for index in range(number)], batch_size=4)
        assert len(results) == number
        for scores in results:
            assert_well_formed(scores, 5)
    classifier.save_pretrained(tmp_path)
    again = pipeline("audio-classification", model=str(tmp_path))
    assert again.model.dtype == dtype
    assert again(sweep(32_000)) == classifier(sweep(32_000))
    full = pipeline("audio-classification", model=str(checkpoint), dtype=torch.float32)
    tolerance = {torch.float32: 0, torch.float16: 0.01, torch.bfloat16: 0.06}[dtype]
    assert by_label(classifier(sweep(32_000))) == pytest.approx(by_label(full(sweep(32_000))), abs=tolerance)
