"""Means over folds and seeds, what is comparable, and the linear probe."""

import numpy as np
import pytest
import soundfile
import torch
from datasets import ClassLabel, Dataset, List
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoModelForAudioClassification

from transformers_cat import CATFeatureExtractor, load_audio
from transformers_cat.configuration_cat import class_names
from transformers_cat.training.probe import embed, fit_head, linear_probe
from transformers_cat.training.protocol import comparability, refuse_reshuffled_folds, summarise


def test_deviation_is_between_seeds_or_else_folds():
    one = summarise({0: {1: 0.5, 2: 0.7}})
    assert one["mean"] == pytest.approx(0.6) and one["deviation"] == pytest.approx(0.2 / 2**0.5)
    assert one["deviation_of"] == "folds"
    two = summarise({0: {1: 0.5, 2: 0.7}, 1: {1: 0.8, 2: 0.8}})
    assert two["mean"] == pytest.approx(0.7) and two["deviation"] == pytest.approx(0.2 / 2**0.5)
    assert two["deviation_of"] == "seeds"
    assert two["seeds"][0] == one["seeds"][0]
    assert summarise({0: {None: 0.5}})["deviation"] is None


def test_comparability_is_said(tmp_path):
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "UrbanSound8K.csv").touch()
    folds = range(1, 11)
    assert "2 of 10 folds and 10 of 10 classes of UrbanSound8K: not comparable" in comparability(
        tmp_path, [1, 2], [1, 2], 10
    )
    assert "the whole benchmark" in comparability(tmp_path, folds, folds, 10)
    assert "not comparable" in comparability(tmp_path, folds, folds, 9)
    assert comparability("clips.csv", [1], [1, 2, 3], 4) == "1 of 3 given folds."


def test_folds_of_urbansound8k_are_not_reshuffled():
    paths = ["audio/fold1/7-0-0-0.wav", "audio/fold2/8-0-0-0.wav"]
    refuse_reshuffled_folds(Dataset.from_dict({"audio": paths, "fold": [1, 2]}))
    refuse_reshuffled_folds(Dataset.from_dict({"audio": ["dogs/a.wav", "folders/b.wav"], "fold": [1, 2]}))
    with pytest.raises(ValueError, match="7-0-0-0.wav was given in fold1 and is now in fold 2"):
        refuse_reshuffled_folds(Dataset.from_dict({"audio": paths, "fold": [2, 1]}))


def test_probe_is_fitted_to_the_other_folds():
    generator = np.random.default_rng(0)
    labels = np.tile([0, 1], 30)
    folds = np.repeat([1, 2, 3], 20)
    latents = generator.normal(size=(60, 4)) * 0.1
    latents[:, 0] += labels
    assert linear_probe(latents, labels, folds) == {1: 1.0, 2: 1.0, 3: 1.0}
    labels[folds == 3] = 1 - labels[folds == 3]  # only fold 3 contradicts the others
    assert linear_probe(latents[folds != 2], labels[folds != 2], folds[folds != 2]) == {1: 0.0, 3: 0.0}


def test_latents_are_those_of_evaluation_in_the_order_of_the_clips(small_model, tmp_path):
    paths = [tmp_path / f"{i}.wav" for i in range(3)]
    for path, samples in zip(paths, (9_000, 20_000, 4_000)):
        soundfile.write(path, np.random.default_rng(samples).normal(0, 0.1, samples), 32_000)
    dataset = Dataset.from_dict({"audio": [str(path) for path in paths], "label": [0, 1, 0]})
    latents = embed(small_model.train(), extractor := CATFeatureExtractor(), dataset, batch_size=2)
    for path, latent in zip(paths, latents, strict=True):
        alone = small_model.eval()(**extractor(load_audio(path), sampling_rate=32_000, return_tensors="pt"))
        np.testing.assert_allclose(latent, alone.pooler_output[0].detach(), atol=1e-4)


def test_latents_of_all_layers_follow_z_and_know_no_padding(small_model, tmp_path):
    for i, samples in enumerate((9_000, 20_000)):
        soundfile.write(tmp_path / f"{i}.wav", np.random.default_rng(i).normal(0, 0.1, samples), 32_000)
    dataset = Dataset.from_dict({"audio": [f"{tmp_path}/{i}.wav" for i in range(2)], "label": [0, 1]})
    latents = embed(small_model, extractor := CATFeatureExtractor(), dataset, layers=True)
    for i, own in enumerate(latents):
        batch = extractor(load_audio(tmp_path / f"{i}.wav"), sampling_rate=32_000, return_tensors="pt")
        with torch.no_grad():
            outputs = small_model.eval()(**batch, output_hidden_states=True)
        expected = [outputs.pooler_output[0].numpy()]
        for state in outputs.hidden_states:
            tokens = state[0].flatten(0, 1).numpy()
            expected += [tokens.mean(0), tokens.max(0), tokens.std(0)]
        np.testing.assert_allclose(own, np.concatenate(expected), atol=1e-4)


def test_latents_at_several_speeds_are_those_of_the_clips_played_so(small_model, tmp_path):
    rate, seconds = 32_000, np.arange(16_000) / 32_000
    tone, higher = (np.sin(2 * np.pi * hertz * seconds) * 0.5 for hertz in (1000, 1250))
    for name, waveform in (("tone", tone), ("higher", higher[: len(higher) * 4 // 5]), ("other", tone[:9_000])):
        soundfile.write(tmp_path / f"{name}.wav", waveform, rate, subtype="FLOAT")

    def latents(*names, **more):
        dataset = Dataset.from_dict({"audio": [f"{tmp_path}/{name}.wav" for name in names]})
        return embed(small_model, CATFeatureExtractor(), dataset, **more)

    for layers in (False, True):
        whole = latents("tone", "other", layers=layers)
        played = latents("tone", "other", layers=layers, speeds=(1.0, 1.25))
        assert played.shape == (2, 2, whole.shape[1])
        np.testing.assert_allclose(played[:, 0], whole, atol=1e-5)
        expected = latents("higher")[0]  # faster, and higher with it
        z = len(expected)
        assert np.abs(played[0, 1, :z] - expected).max() < 0.1 * np.abs(whole[0, :z] - expected).max()


def test_probe_of_several_versions_takes_the_mean_of_their_probabilities():
    labels, folds = np.tile([5, 7], 20), np.repeat([1, 2], 20)
    right = np.repeat((labels - 6.0)[:, None, None], 3, axis=1)  # -1 or 1 in each of three versions
    assert linear_probe(right, labels, folds) == linear_probe(right[:, 0], labels, folds) == {1: 1.0, 2: 1.0}
    tested = (folds == 2)[:, None]
    for versions, expected in (
        ((1, 1, -1.2), 1.0),  # the surest alone is wrong
        ((-0.2, -0.2, 1), 1.0),  # most are wrong
        ((1, -1, -1), 0.0),
        ((-1, 0.2, 0.2), 0.0),
    ):
        latents = np.where(tested, labels[:, None] - 6.0, 1)[..., None] * np.array(versions)[:, None]
        latents = np.where(tested[..., None], latents, right)
        assert linear_probe(latents, labels, folds)[2] == expected, versions


def test_probe_is_of_standardised_latents():
    """A feature of tiny values counts as much as one of large ones."""
    generator = np.random.default_rng(0)
    labels, folds = np.tile([0, 1], 30), np.repeat([1, 2, 3], 20)
    latents = generator.normal(size=(60, 4))
    latents[:, 0] = 1e-3 * (labels + 0.1 * latents[:, 0])
    assert linear_probe(latents, labels, folds) == {1: 1.0, 2: 1.0, 3: 1.0}


@pytest.fixture
def hums(tmp_path) -> Dataset:
    """Tones of three pitches, four clips each, of different lengths and phases."""
    rng, rows = np.random.default_rng(0), {"audio": [], "label": []}
    for i in range(12):
        time = np.arange(9_600 + 800 * i) / 32_000
        waveform = 0.3 * np.sin(2 * np.pi * 400 * 3 ** (i % 3) * time) + 0.01 * rng.standard_normal(len(time))
        soundfile.write(tmp_path / f"{i}.wav", waveform, 32_000, subtype="FLOAT")
        rows["audio"].append(f"{tmp_path}/{i}.wav")
        rows["label"].append(i % 3)
    return Dataset.from_dict(rows).cast_column("label", ClassLabel(names=["low", "mid", "high"]))


@pytest.mark.parametrize("kind", ["three", "two", "several"])
def test_a_fitted_head_is_the_probe(small_model, hums, tmp_path, kind):
    if kind == "two":
        hums = hums.filter(lambda label: label < 2, input_columns="label")
        hums = hums.cast_column("label", ClassLabel(names=["low", "mid"]))
    if kind == "several":  # low or mid, mid or high
        labels = [[[0], [0, 1], [1]][label] for label in hums["label"]]
        hums = hums.remove_columns("label").add_column("label", labels)
        hums = hums.cast_column("label", List(ClassLabel(names=["low or mid", "mid or high"])))
    body = {name: value.clone() for name, value in small_model.cat.state_dict().items()}
    extractor = CATFeatureExtractor()
    fit_head(small_model, extractor, hums, speeds=(0.9, 1.0))
    assert all(value.equal(body[name]) for name, value in small_model.cat.state_dict().items())
    small_model.save_pretrained(tmp_path / "model")
    model = AutoModelForAudioClassification.from_pretrained(tmp_path / "model")
    latents = embed(model, extractor, hums)
    logits = model.classifier(torch.from_numpy(latents)).detach()
    fitted = np.concatenate(embed(model, extractor, hums, speeds=(0.9, 1.0)))

    def expected(labels):
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        return classifier.fit(fitted, np.repeat(labels, 2)).predict_proba(latents)

    if kind == "several":
        assert model.config.problem_type == "multi_label_classification"
        for k in range(2):
            own = expected([k in labels for labels in hums["label"]])[:, 1]
            np.testing.assert_allclose(logits.sigmoid()[:, k], own, atol=1e-3)
    else:
        assert model.config.problem_type == "single_label_classification"
        names = hums.features["label"].names
        assert class_names(model.config) == names and model.config.label2id == dict(zip(names, range(3)))
        np.testing.assert_allclose(logits.softmax(-1), expected(hums["label"]), atol=1e-3)
        assert (logits.argmax(1).numpy() == hums["label"]).all()


def test_a_head_needs_clips_of_each_class_and_a_linear_layer(small_model, hums):
    more = hums.cast_column("label", ClassLabel(names=["low", "mid", "high", "highest"]))
    before = small_model.classifier
    with pytest.raises(ValueError, match="no clip has them, or each: highest"):
        fit_head(small_model, CATFeatureExtractor(), more)
    everything = hums.remove_columns("label").add_column("label", [[0, 1], [0]] * 6)
    everything = everything.cast_column("label", List(ClassLabel(names=["sound", "odd"])))
    with pytest.raises(ValueError, match="no clip has them, or each: sound"):
        fit_head(small_model, CATFeatureExtractor(), everything)
    one = hums.filter(lambda label: label == 0, input_columns="label").cast_column("label", ClassLabel(names=["low"]))
    with pytest.raises(ValueError, match="no clip has them, or each: low"):
        fit_head(small_model, CATFeatureExtractor(), one)
    assert small_model.classifier is before and len(small_model.config.id2label) == before.out_features
    unlabelled = Dataset.from_dict({"audio": hums["audio"], "label": [-1, 1, 2] + [0, 1, 2] * 3})
    with pytest.raises(ValueError, match="clips without a label"):
        fit_head(small_model, CATFeatureExtractor(), unlabelled.cast_column("label", hums.features["label"]))
    small_model.classifier = torch.nn.Sequential(before)
    with pytest.raises(ValueError, match="no linear layer `classifier`"):
        fit_head(small_model, CATFeatureExtractor(), hums)
