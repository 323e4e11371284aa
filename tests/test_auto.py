"""Saving, loading and serving through transformers' own doors."""

import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForAudioClassification, pipeline

from transformers_cat import CATConfig, CATFeatureExtractor, CATForAudioClassification, CATModel, load_audio
from transformers_cat.audio import resample

from .conftest import awaken, small_config


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Folder of a saved small model with its feature extractor."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    names = ["dog", "rain", "clock", "rooster", "crying"]
    config = small_config(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})
    awaken(CATForAudioClassification(config)).eval().save_pretrained(folder)
    CATFeatureExtractor().save_pretrained(folder)
    return folder


def test_a_checkpoint_is_json_and_safetensors(checkpoint):
    assert sorted(path.name for path in checkpoint.iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]


def test_auto_classes_load_the_same_model(checkpoint, real_clips):
    batch = AutoFeatureExtractor.from_pretrained(checkpoint)(real_clips, sampling_rate=32_000, return_tensors="pt")
    model = AutoModelForAudioClassification.from_pretrained(checkpoint)
    assert type(model) is CATForAudioClassification and not model.training
    again = CATForAudioClassification.from_pretrained(checkpoint)
    with torch.no_grad():
        expected = model(**batch)
        assert (again(**batch).logits == expected.logits).all()
        body = AutoModel.from_pretrained(checkpoint)
        assert type(body) is CATModel
        torch.testing.assert_close(body(**batch).pooler_output, expected.pooler_output)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_classifies_alike(checkpoint, real_clips, dtype):
    full = CATForAudioClassification.from_pretrained(checkpoint)
    half = CATForAudioClassification.from_pretrained(checkpoint, dtype=dtype)
    for extractor in (CATFeatureExtractor(), CATFeatureExtractor(do_mrmf=False)):
        batch = extractor(real_clips, sampling_rate=32_000, return_tensors="pt")
        with torch.no_grad():
            expected = full(**batch).logits
            logits = half(batch["input_values"].to(dtype), batch["attention_mask"]).logits
        assert logits.dtype == dtype
        tolerance = 0.03 if dtype == torch.float16 else 0.25
        torch.testing.assert_close(logits.float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_pipeline_on_files_of_any_rate(checkpoint, real_clips, tmp_path, rate, channels):
    path = tmp_path / "clip.wav"
    clip = resample(real_clips[3], 32_000, rate)
    soundfile.write(path, np.stack([clip] * channels, axis=1), rate, subtype="FLOAT")
    classifier = pipeline("audio-classification", model=str(checkpoint))
    scores = classifier(load_audio(path), top_k=5)
    assert {item["label"] for item in scores} == {"dog", "rain", "clock", "rooster", "crying"}
    assert sum(item["score"] for item in scores) == pytest.approx(1, abs=1e-4)
    # the pipeline's own resampling of a dictionary takes the same way
    direct = classifier({"array": clip, "sampling_rate": rate}, top_k=5)
    assert direct[0]["score"] == pytest.approx(scores[0]["score"], abs=1e-3)


@pytest.mark.parametrize("seconds", [0.05, 0.4, 5, 60, 300])
def test_pipeline_on_clips_of_any_length(checkpoint, real_clips, seconds):
    clip = np.tile(np.concatenate(real_clips), 1 + int(seconds / 20))[: int(seconds * 32_000)]
    scores = pipeline("audio-classification", model=str(checkpoint))(clip, top_k=1)
    assert 0.2 <= scores[0]["score"] <= 1


def test_pipeline_batches_score_as_one_at_a_time(checkpoint, real_clips):
    clips = [clip[: 20_000 + 30_000 * index] for index, clip in enumerate(real_clips)]
    classifier = pipeline("audio-classification", model=str(checkpoint))
    for one, of_batch in zip([classifier(clip, top_k=5) for clip in clips], classifier(clips, batch_size=4, top_k=5)):
        assert [item["label"] for item in one] == [item["label"] for item in of_batch]
        for left, right in zip(one, of_batch):
            assert left["score"] == pytest.approx(right["score"], abs=1e-4)


def test_multi_label_scores_are_sigmoids(real_clips):
    model = awaken(CATForAudioClassification(small_config(problem_type="multi_label_classification"))).eval()
    classifier = pipeline("audio-classification", model=model, feature_extractor=CATFeatureExtractor())
    scores = classifier(real_clips[0], top_k=5, function_to_apply="sigmoid")
    batch = CATFeatureExtractor()(real_clips[0], sampling_rate=32_000, return_tensors="pt")
    expected = model(**batch).logits.sigmoid()[0].sort(descending=True).values
    torch.testing.assert_close(torch.tensor([item["score"] for item in scores]), expected, atol=1e-5, rtol=1e-4)


def test_front_end_and_configuration_agree(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    extractor = json.loads((checkpoint / "preprocessor_config.json").read_text())
    for name in ("sampling_rate", "window_lengths", "hop_lengths", "frame_shift", "filters", "num_bins", "f_max"):
        assert config[name] == extractor[name]
    assert CATConfig().feature_size == CATFeatureExtractor().feature_size


def test_importing_loads_no_training_library():
    code = "import sys, transformers_cat; print(*{'datasets', 'evaluate', 'matplotlib'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
