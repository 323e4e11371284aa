import json
import pickle

import numpy as np
import pytest
import torch
from transformers import AutoFeatureExtractor, DataCollatorWithPadding

from transformers_cat import CATFeatureExtractor, CATForAudioClassification

from .conftest import small_config

RATE = 32_000


@pytest.fixture(scope="module")
def extractor():
    return CATFeatureExtractor()


@pytest.fixture
def clips():
    rng = np.random.default_rng(0)
    return [rng.uniform(-0.5, 0.5, size).astype(np.float32) for size in (16_000, 9_001, 100)]


def test_shapes_mask_and_types(extractor, clips):
    batch = extractor(clips, sampling_rate=RATE, return_tensors="pt")
    assert batch["input_values"].shape == (3, 50, 384) and batch["input_values"].dtype == torch.float32
    assert batch["attention_mask"].sum(1).tolist() == [50, 29, 1]
    as_numpy = extractor(clips, sampling_rate=RATE)
    assert isinstance(as_numpy["input_values"], np.ndarray)
    np.testing.assert_array_equal(as_numpy["input_values"], batch["input_values"].numpy())
    assert "attention_mask" not in extractor(clips, sampling_rate=RATE, return_attention_mask=False)


def test_a_batch_is_its_clips(extractor, clips):
    batch = extractor(clips, sampling_rate=RATE, return_tensors="pt")
    unpadded = extractor(clips, sampling_rate=RATE, padding=False)["input_values"]
    for index, clip in enumerate(clips):
        alone = extractor(clip, sampling_rate=RATE, return_tensors="pt")["input_values"][0]
        torch.testing.assert_close(batch["input_values"][index, : len(alone)], alone, atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(unpadded[index], alone, atol=1e-5)
        assert (batch["input_values"][index, len(alone) :] == 0).all()


def test_every_kind_of_input_is_the_same_audio(extractor, clips):
    clip = clips[0]
    expected = extractor(clip, sampling_rate=RATE)["input_values"]
    inputs = [
        clip.astype(np.float64),
        clip.tolist(),
        torch.from_numpy(clip),
        [torch.from_numpy(clip)],
        [clip.tolist()],
        clip[None],
        torch.from_numpy(clip)[None],
        np.repeat(clip, 2)[::2],
        torch.from_numpy(clip).requires_grad_(),
    ]
    for same in inputs:
        np.testing.assert_allclose(extractor(same, sampling_rate=RATE)["input_values"], expected, atol=1e-5)
    read_only = clip.copy()
    read_only.flags.writeable = False
    np.testing.assert_array_equal(extractor(read_only, sampling_rate=RATE)["input_values"], expected)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.int32])
def test_integer_pcm_is_scaled_by_its_dtype(extractor, dtype):
    levels = np.array([-64, -32, 0, 32, 64] * 1000)
    info = np.iinfo(dtype)
    scaled = levels * (2 ** (info.bits - 8)) + (128 if info.min == 0 else 0)
    features = extractor(scaled.astype(dtype), sampling_rate=RATE)["input_values"]
    np.testing.assert_allclose(features, extractor(levels / 128, sampling_rate=RATE)["input_values"], atol=1e-5)


def test_padding_and_truncation(extractor, clips):
    to_length = extractor(clips, sampling_rate=RATE, padding="max_length", max_length=32_000)
    assert to_length["input_values"].shape[1] == 100
    cut = extractor(clips, sampling_rate=RATE, max_length=3_200, truncation=True)
    assert cut["input_values"].shape[1] == 10 and cut["attention_mask"].sum(1).tolist() == [10, 10, 1]
    assert extractor(clips, sampling_rate=RATE, max_length=3_200)["input_values"].shape[1] == 50  # nothing unasked
    assert extractor(clips, sampling_rate=RATE, pad_to_multiple_of=6_400)["input_values"].shape[1] == 60
    lists = extractor(clips, sampling_rate=RATE, padding=False)
    assert [len(item) for item in lists["input_values"]] == [50, 29, 1]


def test_waveforms_without_mrmf(clips):
    batch = CATFeatureExtractor(do_mrmf=False)(clips, sampling_rate=RATE, return_tensors="pt")
    assert batch["input_values"].shape == (3, 16_000)
    assert batch["attention_mask"].sum(1).tolist() == [16_000, 9_001, 100]
    np.testing.assert_array_equal(batch["input_values"][1, :9_001], clips[1])


@pytest.mark.parametrize("do_mrmf", [True, False])
def test_the_trainers_collator_pads_what_was_extracted(clips, do_mrmf):
    extractor = CATFeatureExtractor(do_mrmf=do_mrmf)
    rows = []
    for label, clip in enumerate(clips):
        features = extractor(clip, sampling_rate=RATE)
        rows.append({name: value[0] for name, value in features.items()} | {"label": label})
    collated = DataCollatorWithPadding(extractor)(rows)
    expected = extractor(clips, sampling_rate=RATE, return_tensors="pt")
    torch.testing.assert_close(collated["input_values"], expected["input_values"], atol=1e-5, rtol=1e-5)
    assert (collated["attention_mask"] == expected["attention_mask"]).all()


@pytest.mark.parametrize(
    "audio, rate, message",
    [
        (np.zeros(100), 44_100, r"44100 Hz.*32000 Hz.*load_audio"),
        (np.zeros((16_000, 2)), RATE, r"\(16000, 2\).*2 channels"),
        ([np.zeros((16_000, 2))], RATE, r"Clip 0 has shape \(16000, 2\).*mono"),
        (np.zeros((2, 3, 4)), RATE, r"\(2, 3, 4\)"),
        (np.zeros(0), RATE, "Clip 0 is empty"),
        ([np.zeros(10), []], RATE, "Clip 1 is empty"),
        ([], RATE, "batch is empty"),
        (np.array([0.0, np.nan]), RATE, "Clip 0 contains NaN"),
        ([np.zeros(9), np.array([np.inf, 0.0])], RATE, "Clip 1 contains NaN or infinite"),
        (np.array([1e300, 0.0]), RATE, "infinite"),
        (np.array([20_000.0, 0.0]), RATE, "20000.*full scale is 1"),
        (np.array([1, 2, 3], dtype=np.int64), RATE, "int64"),
        (np.array([True, False]), RATE, "bool"),
        (np.array([1j, 0]), RATE, "complex"),
        ("dog.wav", RATE, "str.*load_audio"),
        (["a", "b"], RATE, "dtype"),
        ([[0.1, 0.2], 0.3], RATE, "Clip 1"),
        ([[0.1, [0.2]]], RATE, "Clip 0 is not a waveform"),
        (np.float32(0.5), RATE, "float32"),
        (None, RATE, "NoneType"),
    ],
)
def test_bad_input_is_refused_by_name(extractor, audio, rate, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        extractor(audio, sampling_rate=rate)


def test_a_missing_rate_is_a_warning(extractor, clips, caplog):
    extractor(clips)
    assert "sampling_rate" in caplog.text


def test_feat_extract_from_and_save_pretrained(tmp_path):
    extractor = CATFeatureExtractor(filters=("mel",), num_bins=32, do_mrmf=False)
    extractor.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert not any(isinstance(value, (list, dict)) and len(value) > 3 for value in written.values())
    again = AutoFeatureExtractor.from_pretrained(tmp_path)
    assert isinstance(again, CATFeatureExtractor) and again.to_dict() == extractor.to_dict()
    with_mrmf = CATFeatureExtractor.from_pretrained(tmp_path, do_mrmf=True)
    assert with_mrmf.feature_size == 96
    assert with_mrmf(np.zeros(3_200), sampling_rate=RATE)["input_values"].shape == (1, 10, 96)


def test_lengths_of_numpy_are_saved(tmp_path):
    extractor = CATFeatureExtractor(window_lengths=list(np.array([400, 800])), hop_lengths=tuple(np.array([160, 320])))
    extractor.save_pretrained(tmp_path)
    assert CATFeatureExtractor.from_pretrained(tmp_path).hop_lengths == [160, 320]


def test_attributes_that_are_set_count(clips):
    """What is computed is what would be saved."""
    extractor = CATFeatureExtractor()
    extractor(clips, sampling_rate=RATE)
    extractor.normalize_volume, extractor.filters[1:], extractor.num_bins = True, [], 32
    expected = CATFeatureExtractor(normalize_volume=True, filters=("mel",), num_bins=32)
    assert extractor.to_dict() == expected.to_dict() and extractor.feature_size == 96
    for do_mrmf in (True, False):
        extractor.do_mrmf = expected.do_mrmf = do_mrmf
        pair = [each(clips, sampling_rate=RATE, return_tensors="pt")["input_values"] for each in (extractor, expected)]
        assert torch.equal(*pair) and pair[0].ndim == (3 if do_mrmf else 2)
    assert extractor.mrmf is extractor.mrmf


def test_the_front_end_of_a_configuration():
    config = small_config(normalize_volume=True, whitening=0.5, filters=("mel",), num_bins=32)
    extractor = CATFeatureExtractor.from_config(config, do_mrmf=False)
    expected = CATFeatureExtractor(normalize_volume=True, whitening=0.5, filters=("mel",), num_bins=32, do_mrmf=False)
    assert extractor.to_dict() == expected.to_dict()


def test_padding_before_a_clip_is_refused(clips):
    with pytest.raises(ValueError, match="padding_side.*'left'.*right"):
        CATFeatureExtractor(padding_side="left")(clips, sampling_rate=RATE)


def test_normalized_volume_and_whitening_are_the_models_too(clips):
    torch.manual_seed(0)
    model = CATForAudioClassification(small_config(normalize_volume=True, whitening=0.5)).eval()
    outputs = []
    for do_mrmf in (True, False):
        extractor = CATFeatureExtractor(normalize_volume=True, whitening=0.5, do_mrmf=do_mrmf)
        for gain in (1.0, 0.01):
            batch = extractor([gain * clip for clip in clips], sampling_rate=RATE, return_tensors="pt")
            with torch.no_grad():
                outputs.append(model(**batch).logits)
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_devices_agree(extractor, clips, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    expected = extractor(clips, sampling_rate=RATE, return_tensors="pt")
    there = extractor(clips, sampling_rate=RATE, return_tensors="pt", device=device)
    assert there["input_values"].device.type == there["attention_mask"].device.type == device
    torch.testing.assert_close(there["input_values"].cpu(), expected["input_values"], atol=1e-3, rtol=1e-4)


def test_travels_to_data_workers(extractor, clips):
    again = pickle.loads(pickle.dumps(extractor))
    expected = extractor(clips, sampling_rate=RATE)["input_values"]
    np.testing.assert_array_equal(again(clips, sampling_rate=RATE)["input_values"], expected)


def test_a_call_changes_nothing_that_a_cache_sees(clips):
    """`datasets` finds what a map has computed by the pickled feature extractor."""
    extractor = CATFeatureExtractor()
    before = pickle.dumps(extractor)
    extractor(clips, sampling_rate=RATE)
    assert pickle.dumps(extractor) == before


def test_numbers_of_python_have_no_width(extractor):
    integers = [0, 1, -1, 0] * 500
    expected = extractor([float(value) for value in integers], sampling_rate=RATE)["input_values"]
    np.testing.assert_array_equal(extractor(integers, sampling_rate=RATE)["input_values"], expected)
    np.testing.assert_array_equal(extractor([integers], sampling_rate=RATE)["input_values"], expected)
    with pytest.raises(ValueError, match="samples up to 300, but full scale is 1"):
        extractor([0, 300] * 500, sampling_rate=RATE)
    of_16_bits = extractor([np.int16(16384)] * 2000, sampling_rate=RATE)["input_values"]
    np.testing.assert_array_equal(of_16_bits, extractor([0.5] * 2000, sampling_rate=RATE)["input_values"])


def test_filter_banks_are_built_once(extractor, clips, monkeypatch):
    extractor(clips, sampling_rate=RATE)
    monkeypatch.setattr("transformers_cat.mrmf.filter_bank", None)
    extractor(clips, sampling_rate=RATE)


def test_padding_has_the_padding_value():
    clip = torch.randn(2_000) * 0.1
    batch = CATFeatureExtractor(padding_value=-7.0)([clip, clip[:900]], sampling_rate=RATE, return_tensors="pt")
    padding = ~batch["attention_mask"].bool()
    assert padding.any() and (batch["input_values"][padding] == -7).all()


def test_one_call_does_not_spoil_the_next():
    extractor, clip = CATFeatureExtractor(), torch.randn(16_000)
    expected = extractor(clip, sampling_rate=32_000)["input_values"]
    extractor(clip, sampling_rate=32_000, return_tensors="pt", device="meta")
    np.testing.assert_array_equal(extractor(clip, sampling_rate=32_000)["input_values"], expected)
    for use in (lambda extractor: extractor(clip, sampling_rate=32_000), lambda extractor: extractor.mrmf):
        extractor = CATFeatureExtractor()
        with torch.inference_mode():
            use(extractor)
        waveform = clip[None].clone().requires_grad_()
        extractor.mrmf(waveform)[0].sum().backward()
        assert waveform.grad.abs().max() > 0


def test_what_is_done_to_the_dictionary_is_not_done_to_the_extractor():
    extractor = CATFeatureExtractor()
    extractor.to_dict()["filters"].append("other")
    assert extractor.filters == CATFeatureExtractor().filters
