"""Mixtures are as loud and as long as is said, and the shipped model points at a bark where it was added."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from transformers_cat import CATFeatureExtractor, CATForAudioClassification, load_audio
from transformers_cat.training import load_audio_dataset

from ..test_cli import EXAMPLES as AUDIO
from ..test_cli import SHIPPED, needs_shipped


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    return importlib.import_module("pointing")


@pytest.fixture
def clips(tmp_path) -> Path:
    """Two clips of the barks in a recording, another that is too short to be one, and noise."""
    bark, rng = load_audio(AUDIO / "dog.ogg")[64_000:80_000], np.random.default_rng(0)
    rows = []
    for name, label, audio in (
        ("101415-3-0-2", "bark", bark),
        ("101415-3-0-3", "bark", bark),
        ("24347-3-0-1", "bark", bark[:8000]),
        ("57320-0-0-1", "noise", rng.standard_normal(40_000) / 10),
    ):
        soundfile.write(tmp_path / f"{name}.wav", audio, 32_000)
        rows.append(f"{name}.wav,{label}\n")
    (tmp_path / "clips.csv").write_text(f"audio,label\n{''.join(rows)}")
    return tmp_path / "clips.csv"


def test_mixtures(script):
    sound, background = torch.tensor([1.0, -1.0]), torch.tensor([0.5, 0.5, -0.5])
    mixture = script.mixed(sound, background, 4, 20.0)
    assert mixture.tolist() == pytest.approx([0.5, 0.5, -0.5, 0.5, 5.5, -5.5, *[0.5, 0.5, -0.5] * 4, 0.5, 0.5][:20])
    assert background.tolist() == [0.5, 0.5, -0.5]


def test_one_clip_of_each_recording(script, clips):
    sounds = script.first_of_each_recording(script.clips_of(str(clips), "bark"))
    assert [Path(path).stem for path in sounds["audio"]] == ["101415-3-0-2", "24347-3-0-1"]
    assert len(load_audio_dataset(clips)) == 4


@torch.no_grad()
def frame_scores(model, extractor, waveform):
    inputs = extractor(waveform, sampling_rate=32_000, return_tensors="pt")
    return model(**inputs, output_frame_logits=True).frame_logits[0].softmax(-1)


@needs_shipped
@pytest.mark.parametrize("place", [2, 7])
def test_pointers_name_spans(script, place):
    bark = torch.from_numpy(load_audio(AUDIO / "dog.ogg")[64_000:80_000])
    noise = torch.randn(160_000, generator=torch.Generator().manual_seed(0))
    model = CATForAudioClassification.from_pretrained(SHIPPED).eval()
    model.config.label2id = {"dog": 5}  # as transformers leaves it where `id2label` is replaced
    extractor = CATFeatureExtractor.from_pretrained(SHIPPED)
    mixture = script.mixed(bark, 0.01 * noise, place * 16_000, 40.0)
    named = script.pointed(model, extractor, mixture, "dog")
    best = float(frame_scores(model, extractor, mixture)[:, 0].argmax())
    assert named == {"without": place, "alone": place, "frame logits": int((best + 0.5) * 0.32 / 0.5)}


@needs_shipped
def test_pointing(script, clips, tmp_path, monkeypatch):
    mixed = script.mixed
    command = ["--model", str(SHIPPED), "--data", str(clips), "--sound", "bark", "--background", "noise"]
    command += ["--output_dir", str(tmp_path / "out"), "--decibels", "40", "--label"]
    with pytest.raises(ValueError, match=r"has no label 'bark', only \['"):
        script.main([*command, "bark"])
    results = script.main([*command, "dog"])
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["40.0"]["mixtures"] == 1 and results["40.0"]["without"] == results["40.0"]["alone"] == 1.0
    assert "| +40 dB | 1 | 100.0 | 100.0 |" in (tmp_path / "out" / "table.md").read_text()
    assert script.main([*command, "rain"])["40.0"]["alone"] == 0.0  # the bark is no rain
    drawn = []
    monkeypatch.setattr(script, "mixed", lambda *given: drawn.append(given) or mixed(*given))
    script.main([*command, "dog", "--decibels", "40", "30"])
    (*_, first, louder), (*_, second, softer) = drawn  # places and loudness
    assert first == second and (louder, softer) == (40.0, 30.0)
    known = tmp_path / "known.csv"
    known.write_text("audio,label\n101415-3-0-2.wav,bark\n")
    with pytest.raises(ValueError, match="None of the 1 sounds lasts 0.5 s"):
        script.main([*command, "dog", "--leave_out_recordings_of", str(known)])
