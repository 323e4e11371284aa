"""What an answer is due to: parts are taken away and left alone as is said, and a bark is found where it is."""

import json
import math
import re

import numpy as np
import pytest
import soundfile
import torch

from transformers_cat import CATFeatureExtractor, CATForAudioClassification, explain, load_audio
from transformers_cat.why import frequency_bands, time_spans

from .conftest import awaken, small_config
from .test_cli import EXAMPLES, SHIPPED, needs_shipped, run

NOISE = 0.1 * np.random.default_rng(0).standard_normal(32_000 * 3 // 2).astype(np.float32)  # 1.5 s


@pytest.fixture(scope="module")
def extractor():
    return CATFeatureExtractor()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = awaken(CATForAudioClassification(small_config()))
    model.cat.feature_norm.running_mean.uniform_(-9, -1)
    return model.eval()


@torch.no_grad()
def probability(model, features, label):
    return float(model(features[None]).logits.softmax(-1)[0, model.config.label2id[label]])


def test_a_span_is_taken_away_in_all_spectrograms(model, extractor):
    answer = explain(model, extractor, NOISE, label="LABEL_2")
    features = extractor(NOISE, sampling_rate=32_000, return_tensors="pt")["input_values"][0]  # (T, G * K * F)
    assert answer.label == "LABEL_2" and answer.score == pytest.approx(probability(model, features, "LABEL_2"))
    assert [(part.start, part.end) for part in answer.times] == [(0, 0.5), (0.5, 1), (1, 1.5)]
    mean = model.cat.feature_norm.running_mean.expand_as(features)
    without = torch.cat([features[:50], mean[50:100], features[100:]])
    alone = torch.cat([mean[:50], features[50:100], mean[100:]])
    assert answer.times[1].without == pytest.approx(probability(model, without, "LABEL_2"), abs=1e-6)
    assert answer.times[1].alone == pytest.approx(probability(model, alone, "LABEL_2"), abs=1e-6)
    assert len({part.without for part in answer.times} | {part.alone for part in answer.times}) == 6


def test_a_band_is_of_the_same_frequencies_in_mel_and_linear_filters(model, extractor):
    answer = explain(model, extractor, NOISE, label="LABEL_2", bands=4)
    features = extractor(NOISE, sampling_rate=32_000, return_tensors="pt")["input_values"][0]
    low, high = (2595 * math.log10(1 + hertz / 700) for hertz in (50, 14_000))
    edges = [700 * (10 ** ((low + i * (high - low) / 4) / 2595) - 1) for i in range(5)]
    assert [part.start for part in answer.frequencies] == pytest.approx(edges[:-1])
    assert [part.end for part in answer.frequencies] == pytest.approx(edges[1:])
    third = torch.zeros(2, 3, 64, dtype=torch.bool)  # filters, resolutions, bins
    for i in range(64):
        share = (i + 1) / 65
        third[0, :, i] = 0.5 <= share < 0.75
        third[1, :, i] = edges[2] <= 50 + share * (14_000 - 50) < edges[3]
    assert third.any(-1).all() and not third.all(-1).any()
    without = torch.where(third.flatten(), model.cat.feature_norm.running_mean, features)
    alone = torch.where(third.flatten(), features, model.cat.feature_norm.running_mean)
    assert answer.frequencies[2].without == pytest.approx(probability(model, without, "LABEL_2"), abs=1e-6)
    assert answer.frequencies[2].alone == pytest.approx(probability(model, alone, "LABEL_2"), abs=1e-6)


@pytest.mark.parametrize(
    ("frames", "span", "count"), [(150, None, 3), (1, None, 1), (100_000, None, 20), (77, 0.1, 8), (77, 9.0, 1)]
)
def test_parts_are_the_whole_and_do_not_overlap(frames, span, count):
    parts = list(time_spans(frames, span, 100.0))
    assert len(parts) == count and parts[0][0] == 0 and parts[-1][1] == frames / 100
    assert torch.stack([where.flatten() for *_, where in parts]).sum(0).tolist() == [1] * frames
    assert all(int(where.sum()) == round(100 * (end - start)) for start, end, where in parts)
    for bands in (1, 6, 64):
        config = small_config(filters=("linear", "mel"))
        parts = torch.stack([where for *_, where in frequency_bands(config, bands)])
        assert parts.shape == (bands, 1, 2, 1, 64) and (parts.sum(0) == 1).all()


@pytest.mark.parametrize("do_mrmf", [True, False])
def test_the_likeliest_label_and_the_models_mode(model, do_mrmf):
    extractor = CATFeatureExtractor(do_mrmf=do_mrmf)
    with torch.no_grad():
        expected = model(**extractor(NOISE, sampling_rate=32_000, return_tensors="pt")).logits.softmax(-1)[0]
    model.train()
    model.cat.feature_norm.eval()  # as who keeps its statistics does
    answer = explain(model, extractor, torch.from_numpy(NOISE))
    assert model.training and model.cat.embeddings.training and not model.cat.feature_norm.training
    model.eval()
    assert answer.label == model.config.id2label[int(expected.argmax())]
    assert answer.score == pytest.approx(float(expected.max()))


def test_labels_of_several_at_once_have_their_own_probability(extractor):
    torch.manual_seed(0)
    model = awaken(CATForAudioClassification(small_config(problem_type="multi_label_classification"))).eval()
    answer = explain(model.bfloat16(), extractor, NOISE, label="LABEL_1")
    with torch.no_grad():
        logits = model(**extractor(NOISE, sampling_rate=32_000, return_tensors="pt")).logits.float()
    assert answer.score == pytest.approx(float(logits.sigmoid()[0, 1]), abs=1e-2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label": "cow"}, "no label 'cow'. Its labels are: LABEL_0, "),
        ({"bands": 65}, "`bands` must be within 1 and 64"),
        ({"span": 0.001}, "`span` must be a number of at least 0.01"),
        ({"waveform": np.stack([NOISE, NOISE])}, "One recording at a time can be explained; got 2"),
    ],
)
def test_what_cannot_be_explained_is_refused(model, extractor, arguments, message):
    with pytest.raises(ValueError, match=message):
        explain(**{"model": model, "feature_extractor": extractor, "waveform": NOISE, **arguments})
    assert not model.training


def test_models_without_labels_or_numbers_are_refused(extractor):
    with pytest.raises(ValueError, match="one of regression"):
        explain(CATForAudioClassification(small_config(problem_type="regression")), extractor, NOISE)
    with pytest.raises(ValueError, match="one of regression"):  # to the losses of transformers
        explain(CATForAudioClassification(small_config(num_labels=1)), extractor, NOISE)
    broken = CATForAudioClassification(small_config())
    broken.classifier.bias.data[0] = math.nan
    with pytest.raises(ValueError, match="gives no number for it"):
        explain(broken, extractor, NOISE)


@needs_shipped
def test_where_a_bark_is_and_that_it_suffices(tmp_path, capsys):
    """One bark in three seconds of faint noise."""
    bark = load_audio(EXAMPLES / "dog.ogg")[64_000:80_000]
    clip = 1e-3 * np.random.default_rng(0).standard_normal(96_000).astype(np.float32)
    clip[48_000:64_000] += bark
    soundfile.write(tmp_path / "bark.wav", clip, 32_000)
    (tmp_path / "damaged.wav").write_text("no sound")
    status, out, err = run(capsys, "why", tmp_path, "--json", "--label", "dog", "--device", "cpu")
    assert status == 1 and "damaged.wav: Cannot read" in err
    answer = json.loads(out)
    assert answer["file"].endswith("bark.wav") and answer["label"] == "dog" and answer["score"] > 0.5
    times = answer["times"]
    assert [part["start"] for part in times] == [0, 0.5, 1, 1.5, 2, 2.5]
    others = times[:3] + times[4:]
    assert times[3]["alone"] > 0.5 > 2 * max(part["alone"] for part in others)
    assert times[3]["without"] < 0.25 < 0.5 * min(part["without"] for part in others)
    status, out, _ = run(capsys, "why", tmp_path / "bark.wav", "--bands", 2, "--span", 1.5)
    first, header, *lines = out.splitlines()
    assert status == 0 and first.endswith(f"bark.wav: dog {answer['score']:.2f}")
    assert header.split() == ["without", "alone"] and len(lines) == 4
    assert lines[0].startswith("0.0-1.5 s".rjust(20)) and lines[-1].lstrip().split(" Hz")[0].endswith("-14000")


@needs_shipped
def test_the_command_names_a_label_that_there_is_not(capsys):
    status, out, err = run(capsys, "why", EXAMPLES, "--label", "cow")
    assert (status, out) == (2, "") and f"{SHIPPED} has no label 'cow', but: dog, rooster, rain" in err


@needs_shipped
def test_the_readme_shows_what_the_command_prints(capsys):
    readme = (EXAMPLES.parents[1] / "README.md").read_text()
    shown = readme.partition("transformers-cat why examples/audio/rooster.ogg\n```")[2].split("```")[1].splitlines()
    _, out, _ = run(capsys, "why", EXAMPLES / "rooster.ogg", "--device", "cpu")
    printed = dict(re.findall(r"([\d.]+-[\d.]+ (?:s|Hz)) +(.*)", out))
    rows = re.findall(r"([\d.]+-[\d.]+ (?:s|Hz)) +(.*)", "\n".join(shown))
    assert len(rows) == 4
    for part, figures in rows:  # another processor rounds otherwise
        assert list(map(float, figures.split())) == pytest.approx(list(map(float, printed[part].split())), abs=0.02)
