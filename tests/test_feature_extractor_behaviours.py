"""What transformers' own tests ask of every feature extractor of sequences, under the names that they have there."""

import json

import numpy as np
import pytest
import torch
from transformers import BatchFeature

from transformers_cat import CATFeatureExtractor

RATE = 32_000


@pytest.fixture(scope="module", params=[True, False], ids=["spectrograms", "waveforms"])
def extractor(request):
    return CATFeatureExtractor(do_mrmf=request.param)


@pytest.fixture
def features(extractor):
    """Features of three clips, not padded, as lists of frames or samples."""
    rng = np.random.default_rng(0)
    clips = [rng.uniform(-0.5, 0.5, size).astype(np.float32) for size in (3_200, 2_000, 640)]
    return extractor(clips, sampling_rate=RATE, padding=False)["input_values"]


def as_lists(features):
    return {"input_values": [value.tolist() for value in features]}


def as_arrays(features):
    return {"input_values": list(features)}


def as_tensors(features):
    return {"input_values": [torch.from_numpy(value) for value in features]}


def test_feat_extract_to_json_string(extractor):
    values = json.loads(extractor.to_json_string())
    assert values["sampling_rate"] == RATE and values["do_mrmf"] is extractor.do_mrmf
    assert values["feature_extractor_type"] == "CATFeatureExtractor"


def test_feat_extract_to_json_file(extractor, tmp_path):
    extractor.to_json_file(tmp_path / "extractor.json")
    again = CATFeatureExtractor.from_json_file(tmp_path / "extractor.json")
    assert again.to_dict() == extractor.to_dict()


def test_feat_extract_from_and_save_pretrained_kwargs(extractor, tmp_path):
    assert [path.endswith("preprocessor_config.json") for path in extractor.save_pretrained(tmp_path)] == [True]
    again, unused = CATFeatureExtractor.from_pretrained(
        tmp_path, padding_value=-1.0, colour="red", return_unused_kwargs=True
    )
    assert again.padding_value == -1.0 and unused == {"colour": "red"}


def test_init_without_params(caplog):
    assert CATFeatureExtractor() is not None and caplog.text == ""


def test_feat_extract_common_properties(extractor):
    assert all(hasattr(extractor, name) for name in ("feature_size", "sampling_rate", "padding_value"))
    assert extractor.model_input_names[0] == "input_values"


def test_batch_feature(extractor, features):
    batch = BatchFeature(as_arrays(features))
    assert all(np.array_equal(*pair) for pair in zip(batch["input_values"], features))
    equal = BatchFeature({"input_values": [features[0]] * 3}, tensor_type="np")["input_values"]
    assert equal.shape == (3, *features[0].shape) and equal.dtype == np.float32


def test_batch_feature_pt(extractor, features):
    equal = BatchFeature({"input_values": [features[0]] * 3}, tensor_type="pt")["input_values"]
    assert tuple(equal.shape) == (3, *features[0].shape) and equal.dtype == torch.float32


def check_padding(extractor, features, form) -> None:
    longest = len(features[0])
    for padding, arguments, length in (
        (True, {}, longest),
        ("longest", {}, longest),
        ("max_length", {"max_length": longest + 7}, longest + 7),
        (True, {"pad_to_multiple_of": 64}, -(-longest // 64) * 64),
    ):
        batch = extractor.pad(form(features), padding=padding, return_tensors="np", **arguments)["input_values"]
        assert batch.shape == (3, length, *features[0].shape[1:]) and batch.dtype == np.float32
        for row, value in zip(batch, features):
            np.testing.assert_array_equal(row[: len(value)], value)
            assert (row[len(value) :] == extractor.padding_value).all()
    unpadded = extractor.pad(form(features), padding=False)["input_values"]
    assert [len(value) for value in unpadded] == [len(value) for value in features]
    with pytest.raises(ValueError, match="max_length"):
        extractor.pad(form(features), padding="max_length")


def test_padding_from_list(extractor, features):
    check_padding(extractor, features, as_lists)


def test_padding_from_array(extractor, features):
    check_padding(extractor, features, as_arrays)


def test_padding_accepts_tensors_pt(extractor, features):
    of_arrays = extractor.pad(as_arrays(features), padding=True, return_tensors="np")["input_values"]
    of_tensors = extractor.pad(as_tensors(features), padding=True, return_tensors="pt")["input_values"]
    np.testing.assert_array_equal(of_arrays, of_tensors.numpy())


def check_truncation(extractor, features, form) -> None:
    shortest = len(features[2])
    cut = extractor.pad(form(features), padding="max_length", max_length=shortest, truncation=True, return_tensors="np")
    assert cut["input_values"].shape[:2] == (3, shortest)
    for row, value in zip(cut["input_values"], features):
        np.testing.assert_array_equal(row, value[:shortest])
    with pytest.raises(ValueError):
        extractor.pad(form(features), padding="longest", truncation=True)


def test_truncation_from_list(extractor, features):
    check_truncation(extractor, features, as_lists)


def test_truncation_from_array(extractor, features):
    check_truncation(extractor, features, as_arrays)


def test_attention_mask(extractor, features):
    batch = extractor.pad(as_arrays(features), padding=True, return_tensors="np")
    assert batch["attention_mask"].shape == batch["input_values"].shape[:2]
    assert batch["attention_mask"].sum(1).tolist() == [len(value) for value in features]


def test_attention_mask_with_truncation(extractor, features):
    length = len(features[1])
    batch = extractor.pad(
        as_arrays(features), padding="max_length", max_length=length, truncation=True, return_tensors="np"
    )
    assert batch["attention_mask"].sum(1).tolist() == [length, length, len(features[2])]


def test_double_precision_pad(extractor, features):
    doubles = [value.astype(np.float64) for value in features]
    for values in (doubles, [value.tolist() for value in doubles]):
        batch = {"input_values": values}
        assert extractor.pad(batch, padding=True, return_tensors="np")["input_values"].dtype == np.float32
        assert extractor.pad(batch, padding=True, return_tensors="pt")["input_values"].dtype == torch.float32


def test_call(extractor):
    rng = np.random.default_rng(0)
    clips = [rng.uniform(-0.5, 0.5, size).astype(np.float32) for size in (800, 1_000, 1_200)]
    batch = extractor(clips, sampling_rate=RATE, return_tensors="np")["input_values"]
    from_lists = extractor([clip.tolist() for clip in clips], sampling_rate=RATE, return_tensors="np")["input_values"]
    np.testing.assert_allclose(batch, from_lists, atol=1e-5)
    for row, clip in zip(batch, clips):
        alone = extractor(clip, sampling_rate=RATE, return_tensors="np")["input_values"]
        assert len(alone) == 1
        np.testing.assert_allclose(row[: alone.shape[1]], alone[0], atol=1e-5)
    # An array of two dimensions is a batch.
    equal = np.stack([clip[:800] for clip in clips])
    of_array = extractor(equal, sampling_rate=RATE, return_tensors="np")["input_values"]
    of_list = extractor(list(equal), sampling_rate=RATE, return_tensors="np")["input_values"]
    np.testing.assert_array_equal(of_array, of_list)


def test_integration():
    """A 1 kHz sine of amplitude 1, against the spectrum of its windows by the definition of the transform."""
    time = np.arange(RATE) / RATE
    values = CATFeatureExtractor()(np.sin(2 * np.pi * 1_000 * time), sampling_rate=RATE)["input_values"]
    assert values.shape == (1, 100, 384)
    spectrogram = values[0, 50].reshape(2, 3, 64)  # filter, resolution, bin
    # Linear filters: 64 centres evenly between 50 and 14000 Hz.
    centres = np.linspace(50, 14_000, 66)
    assert (spectrogram[1].argmax(-1) == np.abs(centres[1:-1] - 1_000).argmin()).all()
    for resolution, (window, length) in enumerate(((400, 1_024), (800, 1_024), (1_600, 2_048))):
        hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
        power = np.abs(np.fft.rfft(hann * np.sin(2 * np.pi * 1_000 * time[:window]), length)) ** 2
        frequencies = np.arange(length // 2 + 1) * RATE / length
        for bin_index in (2, 3, 4, 5):
            low, centre, high = centres[bin_index : bin_index + 3]
            triangle = np.minimum((frequencies - low) / (centre - low), (high - frequencies) / (high - centre))
            expected = np.log((power * triangle.clip(0)).sum() + 1e-5)
            # The phase of the sine under a window moves the power a little where it is small.
            assert spectrogram[1, resolution, bin_index] == pytest.approx(expected, abs=0.1), (resolution, bin_index)


def test_integration_of_a_recording(real_clips):
    values = CATFeatureExtractor()(real_clips[0], sampling_rate=RATE, return_tensors="pt")["input_values"]
    assert values.shape == (1, -(-len(real_clips[0]) // 320), 384) and values.isfinite().all()
    # The loudest frame of the recording is the loudest of every resolution under both filters.
    frames = np.pad(real_clips[0], (0, -len(real_clips[0]) % 320)).reshape(-1, 320)
    loudest = np.square(frames).sum(1).argmax()
    power = values[0].exp().unflatten(1, (6, 64)).sum(2)
    assert (power.argmax(0) - loudest).abs().max() <= 3
    assert values.min() >= np.log(1e-5) - 1e-4
