"""Whatever comes in: a finite result of the right shape, or an error that names what is wrong."""

import json
import math
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForAudioClassification

from tests.conftest import awaken, small_config
from transformers_cat import CATConfig, CATFeatureExtractor, CATForAudioClassification, CATModel, load_audio
from transformers_cat.audio import resample

RATE = 32_000
SINGLE_LABEL = "single_label_classification"
CLEAR = (ValueError, TypeError, OSError, StrictDataclassError)
EXTRACTOR = CATFeatureExtractor()


def fuzz(examples: int):
    """The same examples in every run; fixtures are only read."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def mostly(possible: list, impossible: list):
    """Five times in six what is possible: of several values any impossible one refuses them all."""
    return st.sampled_from(possible * math.ceil(5 * len(impossible) / len(possible)) + impossible)


def noise(samples: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, samples).astype(np.float32)


@pytest.fixture(scope="module")
def model() -> CATForAudioClassification:
    torch.manual_seed(0)
    return awaken(CATForAudioClassification(small_config())).eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, model) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path, checkpoint) -> Path:
    """A copy of the checkpoint, to be damaged."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


class TestWeights:
    class Bomb:
        """What leaves a file behind when it is unpickled."""

        def __init__(self, path: Path):
            self.path = path

        def __reduce__(self):
            return Path.touch, (self.path,)

    @pytest.fixture
    def bomb(self, folder):
        """(The folder with weights whose unpickling runs code, in place of the safetensors; what that would make)."""
        (folder / "model.safetensors").unlink()
        torch.save({"classifier.bias": self.Bomb(folder / "exploded")}, folder / "pytorch_model.bin")
        return folder, folder / "exploded"

    def test_the_bomb_is_live(self, bomb):
        folder, exploded = bomb
        torch.load(folder / "pytorch_model.bin", weights_only=False)
        assert exploded.exists()

    @pytest.mark.parametrize("model_class", [CATModel, CATForAudioClassification, AutoModelForAudioClassification])
    @pytest.mark.parametrize("options", [{}, {"use_safetensors": True}, {"use_safetensors": None}])
    def test_a_folder_of_pickled_weights_is_refused(self, bomb, model_class, options):
        folder, exploded = bomb
        with pytest.raises(OSError, match="no file named model.safetensors"):
            model_class.from_pretrained(folder, **options)
        assert not exploded.exists()

    @pytest.mark.parametrize("options", [{"use_safetensors": False}, {"weights_only": False}])
    def test_asking_for_pickles_is_refused_rather_than_overridden(self, bomb, options):
        folder, exploded = bomb
        with pytest.raises(ValueError, match=f"safetensors alone.*{next(iter(options))}=False"):
            CATForAudioClassification.from_pretrained(folder, **options)
        assert not exploded.exists()

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "weights"])
    def test_a_path_to_pickled_weights_is_refused(self, bomb, name):
        folder, exploded = bomb
        path = (folder / "pytorch_model.bin").rename(folder / name)
        config = CATConfig.from_pretrained(folder)
        with pytest.raises(ValueError, match=f"{name}.*safetensors alone"):
            CATForAudioClassification.from_pretrained(path, config=config)
        with pytest.raises(CLEAR):
            AutoModelForAudioClassification.from_pretrained(path, config=config)
        assert not exploded.exists()

    def test_an_index_that_points_at_pickled_weights_runs_nothing(self, bomb):
        folder, exploded = bomb
        index = {"metadata": {}, "weight_map": {"classifier.bias": "pytorch_model.bin"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises((pickle.UnpicklingError, *CLEAR)):
            CATForAudioClassification.from_pretrained(folder)
        assert not exploded.exists()

    def test_a_configuration_that_names_pickled_weights_runs_nothing(self, bomb):
        folder, exploded = bomb
        (folder / "pytorch_model.bin").rename(folder / "adapter_model.bin")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "adapter_model.bin"}))
        with pytest.raises((pickle.UnpicklingError, *CLEAR)):
            CATForAudioClassification.from_pretrained(folder)
        assert not exploded.exists()

    @pytest.mark.parametrize("reader", [CATForAudioClassification, CATModel, CATConfig])
    def test_a_folder_without_configuration_is_named(self, folder, reader):
        (folder / "config.json").unlink()
        with pytest.raises(OSError, match=f"config.json.*{folder.name}"):
            reader.from_pretrained(folder)

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": "cat_audio"', "\x00\x01"])
    def test_a_broken_configuration_is_an_error(self, folder, text):
        (folder / "config.json").write_text(text)
        with pytest.raises((OSError, ValueError, TypeError)):
            CATForAudioClassification.from_pretrained(folder)

    @fuzz(40)
    @given(data=st.data())
    def test_truncated_weights_are_an_error(self, checkpoint, tmp_path_factory, data):
        content = (checkpoint / "model.safetensors").read_bytes()
        last = len(content) - 1
        kept = data.draw(st.one_of(st.sampled_from([0, 1, 7, 8, 9, last]), st.integers(0, last)))
        with pytest.raises((SafetensorError, *CLEAR)):
            self.load(checkpoint, tmp_path_factory, content[:kept])

    @fuzz(60)
    @given(data=st.data())
    def test_a_flipped_byte_is_an_error_or_loaded_as_it_is(self, checkpoint, tmp_path_factory, data):
        content = bytearray((checkpoint / "model.safetensors").read_bytes())
        header = 8 + int.from_bytes(content[:8], "little")
        place = data.draw(st.one_of(st.integers(0, header - 1), st.integers(header, len(content) - 1)))
        content[place] ^= data.draw(st.integers(1, 255))
        try:
            loaded, path = self.load(checkpoint, tmp_path_factory, bytes(content))
        except (SafetensorError, RuntimeError, *CLEAR) as error:
            assert str(error)
            assert place < header, "a value has no wrong bytes"
            return
        stored, weights = load_file(path), loaded.state_dict()
        for name in stored.keys() & weights.keys():
            expected = stored[name].to(weights[name].dtype)
            torch.testing.assert_close(weights[name], expected, rtol=0, atol=0, equal_nan=True)

    @staticmethod
    def load(checkpoint: Path, tmp_path_factory, content: bytes):
        folder = tmp_path_factory.mktemp("damaged")
        shutil.copy(checkpoint / "config.json", folder)
        (folder / "model.safetensors").write_bytes(content)
        return CATForAudioClassification.from_pretrained(folder), folder / "model.safetensors"


class TestFeatureExtractor:
    dtypes = mostly(
        "float16 float32 float64 int16 int32 int8 uint8".split(), "bool uint16 int64 complex64 U4 O".split()
    )
    layouts = st.sampled_from(["plain", "reversed", "strided", "read-only", "big-endian", "list", "tensor"])

    @fuzz(120)
    @given(
        shape=st.one_of(
            st.tuples(st.sampled_from([1, 2, 9, 159, 160, 161, 320, 321, 1600, 8000])),
            st.tuples(st.integers(1, 3), st.sampled_from([9, 159, 160, 161, 320, 321, 1600])),
            st.lists(st.sampled_from([0, 1, 2, 9, 700]), max_size=4).map(tuple).filter(lambda s: math.prod(s) < 10_000),
        ),
        dtype=dtypes,
        layout=layouts,
        scale=mostly([0.0, 1e-40, 1e-3, 1.0, 99.0], [1.0, 101.0, 1e30, math.inf, math.nan]),
        rate=mostly([RATE, float(RATE)], [None, 0, -1, 44_100, "32000", math.nan]),
        waveform=st.booleans(),
    )
    @pytest.mark.filterwarnings("ignore")  # casts to integers of what is none
    def test_an_array_is_features_or_refused(self, model, shape, dtype, layout, scale, rate, waveform):
        with np.errstate(all="ignore"):
            values = np.asarray(np.random.default_rng(0).uniform(-1, 1, shape) * scale).astype(dtype)
        audio = self.lay_out(values, layout)
        before = values.tobytes()
        extractor = CATFeatureExtractor(do_mrmf=not waveform)
        try:
            batch = extractor(audio, sampling_rate=rate, return_tensors="pt")
        except (ValueError, TypeError) as error:
            assert re.search(r"Clip \d|shape|sampling rate|empty|Expected", str(error)), error
            return
        finally:
            assert values.tobytes() == before
        clips, samples = (1, *shape)[-2:] if len(shape) else (1, 1)
        steps = samples if waveform else -(-samples // 320)
        assert batch["input_values"].shape[:2] == batch["attention_mask"].shape == (clips, steps)
        assert batch["input_values"].isfinite().all() and batch["attention_mask"].all()
        logits = model(**batch).logits
        assert logits.shape == (clips, 5) and logits.isfinite().all()

    @staticmethod
    def lay_out(values: np.ndarray, layout: str):
        if layout == "reversed" and values.ndim:
            return values[::-1][..., ::-1] if values.ndim > 1 else values[::-1]
        if layout == "strided":
            return np.repeat(values, 2, axis=-1)[..., ::2] if values.ndim else values
        if layout == "read-only":
            values = values.copy()
            values.flags.writeable = False
        elif layout == "big-endian":
            return values.astype(values.dtype.newbyteorder(">"))
        elif layout == "list":
            return values.tolist()
        elif layout == "tensor" and values.dtype.kind in "iufbc":
            return torch.from_numpy(values.copy())
        return values

    nested = st.recursive(
        st.one_of(
            st.none(),
            st.text(max_size=3),
            st.binary(max_size=3),
            st.booleans(),
            st.integers(),
            st.floats(),
            st.builds(object),
        ),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.tuples(inner, inner),
            st.dictionaries(st.text(max_size=2), inner, max_size=2),
        ),
        max_leaves=6,
    )

    @fuzz(150)
    @given(audio=nested)
    def test_any_nesting_is_features_or_refused(self, audio):
        try:
            batch = EXTRACTOR(audio, sampling_rate=RATE, return_tensors="np")
        except (ValueError, TypeError) as error:
            assert len(str(error)) > 20
            return
        assert np.isfinite(batch["input_values"]).all() and batch["input_values"].shape[1:] == (
            1,
            EXTRACTOR.feature_size,
        )

    @pytest.mark.parametrize("order", [1, -1])
    def test_what_is_not_contiguous_or_writeable_counts_by_its_values(self, order):
        clip = noise(1000)
        read_only = clip[::order]
        read_only.flags.writeable = False
        expected = EXTRACTOR(clip[::order].copy(), sampling_rate=RATE)["input_values"]
        columns = np.stack([clip[::order], clip], axis=1)
        for same in (read_only, columns[:, 0], clip[::order].astype(">f4"), clip[::order].tolist()):
            np.testing.assert_array_equal(EXTRACTOR(same, sampling_rate=RATE)["input_values"], expected)

    @fuzz(60)
    @given(
        padding=mostly([True, False, "longest", "max_length", "do_not_pad"], ["nonsense", None, 3]),
        max_length=mostly([None, 1, 500, 2000], [0, -1, 2.5, "9", True]),
        multiple=mostly([None, 1, 7, 320], [0, -3, 1.5, "9"]),
        truncation=st.booleans(),
    )
    def test_any_padding_is_features_or_refused(self, padding, max_length, multiple, truncation):
        options = {
            "padding": padding,
            "max_length": max_length,
            "pad_to_multiple_of": multiple,
            "truncation": truncation,
        }
        try:
            batch = EXTRACTOR([noise(1000), noise(400)], sampling_rate=RATE, **options)
        except (ValueError, TypeError) as error:
            assert re.search("max_length|pad_to_multiple_of|adding", str(error)), error
            return
        assert all(np.isfinite(values).all() for values in batch["input_values"])
        assert all(mask.sum() >= 1 for mask in batch["attention_mask"])

    @pytest.mark.slow
    def test_an_hour_of_silence(self, model):
        batch = EXTRACTOR(np.zeros(3600 * RATE, dtype=np.float32), sampling_rate=RATE, return_tensors="pt")
        assert batch["input_values"].shape == (1, 360_000, EXTRACTOR.feature_size)
        silence = math.log(EXTRACTOR.log_offset)
        assert batch["input_values"].sub_(silence).abs_().max() < 1e-3


class TestForward:
    @fuzz(80)
    @given(
        shape=st.one_of(
            st.tuples(st.integers(1, 3), st.integers(1, 40), st.just(384)),
            st.tuples(st.integers(1, 3), st.sampled_from([1, 319, 320, 321, 5000])),
            st.tuples(st.integers(0, 3), st.integers(0, 40), st.sampled_from([384, 0, 1, 383])),
            st.lists(st.integers(0, 3), max_size=4).map(tuple),
        ),
        dtype=st.sampled_from(
            [torch.float32] * 4 + [torch.float64, torch.float16, torch.int16, torch.bool, torch.cfloat]
        ),
        value=mostly([0.0, -11.5, 1e-30, 50.0], [1e6, 1e30, math.inf, math.nan]),
        mask=mostly(["none", "ones", "zeros", "half", "floats"], ["wrong", "list", "array"]),
    )
    def test_any_tensor_is_logits_or_refused(self, model, shape, dtype, value, mask):
        values = torch.full(shape, value).to(dtype)
        steps = shape[:2]
        masks = {
            "none": None,
            "ones": torch.ones(steps),
            "zeros": torch.zeros(steps, dtype=torch.long),
            "half": torch.arange(math.prod(steps)).reshape(steps) % 2 == 0,
            "floats": torch.full(steps, 0.5),
            "wrong": torch.ones(7, 7),
            "list": [1, 1],
            "array": np.ones(steps, dtype=np.int32),
        }
        try:
            with torch.no_grad():
                logits = model(values, attention_mask=masks[mask]).logits
        except ValueError as error:
            assert re.search("`input_values`|`attention_mask`", str(error)), error
            return
        assert logits.shape == (shape[0], 5) and logits.isfinite().all()

    def test_features_without_a_batch_are_no_waveforms(self, model):
        with pytest.raises(ValueError, match=r"shape \(40, 384\), but must be MRMF features \(clips, frames, 384\)"):
            model(torch.zeros(40, 384))

    @pytest.mark.parametrize("bad", [None, [[0.0]], np.zeros((1, 400), np.float32), "audio"])
    def test_what_is_no_tensor_is_refused(self, model, bad):
        with pytest.raises(ValueError, match="`input_values`"):
            model(bad)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_what_is_not_finite_is_refused_unless_it_is_padding(self, model, bad):
        values = torch.randn(2, 40, 384)
        expected = model(values[:, :32]).logits
        values[:, 32:] = bad
        mask = torch.arange(40).expand(2, -1) < 32
        torch.testing.assert_close(model(values, attention_mask=mask).logits, expected)
        with pytest.raises(ValueError, match="NaN, infinite or huge"):
            model(values)

    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("shape", [(2, 40, 384), (2, 12_800)])
    def test_meta_tensors_pass(self, shape, training):
        with torch.device("meta"):
            model = CATForAudioClassification(small_config()).to("meta").train(training)
            mask = torch.ones(shape[:2], dtype=torch.int32)
            outputs = model(torch.empty(shape), attention_mask=mask, labels=torch.zeros(2, dtype=torch.long))
        assert outputs.logits.shape == (2, 5) and outputs.loss.is_meta


class TestLabels:
    @pytest.mark.parametrize(
        "num_labels, labels, message",
        [
            (3, [[1.0, 1, 0], [0, 1, 0]], "do not sum to 1.*'multi_label_classification'"),
            (3, [[0.0, 0, 0], [0, 1, 0]], "do not sum to 1.*'multi_label_classification'"),
            (1, [[0.3], [2.0]], "as in a regression.*'regression'"),
            (1, [0.3, 2.0], "as in a regression.*'regression'"),
        ],
    )
    @pytest.mark.parametrize("training", [True, False])
    def test_labels_of_another_problem_than_the_checkpoint_had(self, num_labels, labels, message, training):
        config = small_config(problem_type=SINGLE_LABEL)
        config.num_labels = num_labels  # as `from_pretrained` sets it
        model = CATForAudioClassification(config)
        with pytest.raises(ValueError, match=message):
            model.train(training)(torch.randn(2, 8, 384), labels=torch.tensor(labels))

    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("bad", [5, 7, -1, -99, 2**40])
    @pytest.mark.parametrize("problem_type", [None, "single_label_classification"])
    def test_a_class_that_there_is_not_is_named(self, problem_type, bad, training):
        model = CATForAudioClassification(small_config(problem_type=problem_type)).train(training)
        with pytest.raises(ValueError, match=f"class index {bad}, but `num_labels` is 5"):
            model(torch.randn(2, 8, 384), labels=torch.tensor([4, bad]))

    @pytest.mark.parametrize(
        "problem_type, num_labels, labels",
        [
            (None, 5, torch.zeros(2)),
            (None, 5, torch.zeros(2, 4)),
            (None, 5, torch.zeros(2, 5, dtype=torch.long)),
            (None, 5, torch.zeros(3, dtype=torch.long)),
            (None, 5, torch.tensor(1)),
            (None, 1, torch.zeros(2, 2)),
            ("single_label_classification", 5, torch.zeros(2)),
            ("multi_label_classification", 5, torch.zeros(2)),
            ("multi_label_classification", 5, torch.zeros(2, dtype=torch.long)),
            ("multi_label_classification", 5, torch.zeros(1, 5)),
            ("multi_label_classification", 1, torch.zeros(2)),
            ("regression", 5, torch.zeros(2)),
            ("regression", 1, torch.zeros(3)),
        ],
    )
    def test_a_wrong_shape_is_named(self, problem_type, num_labels, labels):
        model = CATForAudioClassification(small_config(problem_type=problem_type, num_labels=num_labels)).eval()
        with pytest.raises(
            ValueError, match=rf"(?s)shape {re.escape(str(tuple(labels.shape)))}.*`num_labels` {num_labels}"
        ):
            model(torch.randn(2, 8, 384), labels=labels)
        with pytest.raises(ValueError, match="must be a tensor, not list"):
            model(torch.randn(2, 8, 384), labels=labels.tolist() if labels.ndim else [0])

    @pytest.mark.parametrize(
        "problem_type, num_labels, labels",
        [
            (None, 5, torch.tensor([0, 4])),
            (None, 5, torch.tensor([[0], [4]])),
            (None, 5, torch.tensor([-100, 4])),
            (None, 1, torch.tensor([2.5, 3.0])),
            (None, 1, torch.zeros(2, 1)),
            ("single_label_classification", 5, torch.full((2, 5), 0.2)),
            ("multi_label_classification", 5, torch.ones(2, 5)),
            ("multi_label_classification", 1, torch.ones(2, 1)),
            ("multi_label_classification", 5, torch.ones(2, 5, dtype=torch.long)),
            ("regression", 5, torch.randn(2, 5)),
        ],
    )
    def test_what_the_loss_takes_stays_allowed(self, problem_type, num_labels, labels):
        model = CATForAudioClassification(small_config(problem_type=problem_type, num_labels=num_labels)).eval()
        for mode in (model.eval(), model.train()):
            output = mode(torch.randn(2, 8, 384), labels=labels, output_pns=True)
            assert output.loss.isfinite() and output.pns.isfinite().all()


class TestResample:
    @pytest.mark.parametrize(
        "rate, sampling_rate", [(44_101, 32_000), (32_000, 44_101), (31_999, 32_000), (96_001, 32_000)]
    )
    def test_rates_without_a_common_divisor_need_no_gigabytes(self, rate, sampling_rate, monkeypatch):
        import torchaudio

        asked, inner = [], torchaudio.functional.resample
        monkeypatch.setattr(
            torchaudio.functional, "resample", lambda wave, *rates: asked.append(rates) or inner(wave, *rates)
        )
        time = np.arange(rate // 2) / rate
        audio = resample(np.sin(2 * np.pi * 440 * time).astype(np.float32), rate, sampling_rate)
        assert max(asked[0]) <= 2000
        assert asked[0][0] / asked[0][1] == pytest.approx(rate / sampling_rate, rel=5e-4)
        assert len(audio) == pytest.approx(sampling_rate / 2, rel=5e-4, abs=2)
        place = np.abs(np.fft.rfft(audio, 2**19)).argmax() * sampling_rate / 2**19
        assert place == pytest.approx(440, rel=1e-3)

    @pytest.mark.parametrize("rate", [8000, 11_025, 16_000, 22_050, 24_000, 44_100, 48_000, 88_200, 96_000, 192_000])
    def test_usual_rates_are_exact(self, rate):
        import torchaudio

        clip = noise(1000)
        expected = torchaudio.functional.resample(torch.from_numpy(clip), rate, RATE).numpy()
        np.testing.assert_array_equal(resample(clip, rate, RATE), expected)

    @fuzz(40)
    @given(rate=st.integers(321, 3_199_999))
    def test_every_ratio_is_within_its_tolerance(self, rate):
        audio = resample(np.ones(50, np.float32), rate, RATE)
        assert abs(len(audio) - 50 * RATE / rate) <= 1 + 50 * RATE / rate * 5e-4 and np.isfinite(audio).all()

    @pytest.mark.parametrize("rate, sampling_rate", [(1, RATE), (319, RATE), (RATE, 3_200_001), (0, RATE), (RATE, -1)])
    def test_a_damaged_rate_is_refused(self, rate, sampling_rate):
        with pytest.raises(ValueError, match="fold apart|rate` must be within"):
            resample(noise(10), rate, sampling_rate)


class TestConfiguration:
    OWN = sorted(CATConfig.__annotations__)
    IMPOSSIBLE = (
        -1,
        -1.5,
        10**12,
        1e300,
        math.nan,
        math.inf,
        -math.inf,
        "7",
        b"7",
        object,
        {"a": 1},
        [[1]],
        [],
        (0,),
        [-1],
    )

    @pytest.mark.parametrize("value", IMPOSSIBLE, ids=repr)
    @pytest.mark.parametrize("name", OWN)
    def test_an_impossible_value_of_any_field_is_named(self, name, value):
        if name == "stem_channels" and value == []:
            return  # no stem
        with pytest.raises((ValueError, TypeError, StrictDataclassError), match=f"(?s)`?{name}"):
            small_config(**{name: value})

    sizes = st.sampled_from([0, 1, 2, 3, 4, 5, 8, 16, 32, 64, 65, 160, 320, 400])
    lists = st.lists(sizes, max_size=3)
    values = {
        "window_lengths": lists,
        "hop_lengths": lists,
        "frame_shift": sizes,
        "filters": st.lists(st.sampled_from(["mel", "linear", "bark"]), max_size=3),
        "num_bins": sizes,
        "f_min": st.sampled_from([0, 50.0, 20_000.0]),
        "f_max": st.sampled_from([0, 50.0, 16_000, 16_001.0]),
        "patch_size": st.tuples(sizes, sizes),
        "embed_dim": sizes,
        "exchange_dim": st.sampled_from([0, 1, 3, 4]),
        "stem_channels": st.sampled_from([(), (4,), (4, 8)]),
        "depths": st.lists(st.integers(0, 2), max_size=3),
        "num_heads": lists,
        "window_size": st.sampled_from([None, 0, 1, 2, 3, 4, 7, 8]),
        "mlp_ratio": st.sampled_from([0, 0.1, 1, 1.5, 4.0]),
        "depthwise_kernel_size": st.integers(0, 4),
        "hidden_act": st.sampled_from(["gelu", "relu", "silu", "none"]),
        "drop_path_rate": st.sampled_from([0, 0.5, 1]),
        "num_donors": st.sampled_from([None, 0, 1, 4]),
        "reconstruction_loss_weight": st.sampled_from([0, 1]),
        "num_labels": st.sampled_from([0, 1, 2, 5]),
        "problem_type": st.sampled_from([None, "regression", "multi_label_classification", "foo"]),
    }
    # Few at a time: of many, hardly any would fit together.
    changes = st.sets(st.sampled_from(sorted(values)), min_size=1, max_size=2).flatmap(
        lambda names, values=values: st.fixed_dictionaries({name: values[name] for name in sorted(names)})
    )

    @fuzz(120)
    @given(changes=changes, pairs=st.booleans())
    def test_what_is_accepted_builds_and_runs(self, changes, pairs):
        if pairs and "depths" in changes:  # otherwise hardly any would fit
            changes = {**changes, "num_heads": [2 ** (stage + 1) for stage in range(len(changes["depths"]))]}
        if pairs and "window_lengths" in changes:
            changes = {**changes, "hop_lengths": changes["window_lengths"]}
        try:
            config = small_config(**changes)
        except (ValueError, TypeError, StrictDataclassError) as error:
            assert len(str(error)) > 20
            return
        model = CATForAudioClassification(config)
        values = torch.randn(2, 9, config.feature_size)
        labels = torch.rand(2, config.num_labels) if config.problem_type else torch.zeros(2, dtype=torch.long)
        if config.num_labels == 1 and not config.problem_type:
            labels = labels.float()
        for mode in (model.train(), model.eval()):
            outputs = mode(values, labels=labels)
            assert outputs.logits.shape == (2, config.num_labels)
            assert outputs.logits.isfinite().all() and outputs.loss.isfinite()

    @pytest.mark.parametrize(
        "changes, named",
        [
            ({"num_heads": (3, 4, 8)}, "3 heads of stage 0"),
            ({"num_heads": (32, 4, 8)}, "multiple of its 32 heads"),
            ({"depths": (2, 2)}, "one entry for each stage"),
            ({"window_lengths": (400,)}, "same length"),
            ({"hop_lengths": (160, 320, 1601)}, "1601"),
            ({"f_min": 14_000}, "Nyquist"),
            ({"patch_size": (4, 5)}, "multiple of the patch"),
            ({"problem_type": "classification"}, "problem_type"),
            ({"num_labels": 0}, "num_labels"),
        ],
    )
    def test_a_contradiction_is_named(self, changes, named):
        with pytest.raises((ValueError, StrictDataclassError), match=f"(?s){named}"):
            small_config(**changes)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A clip in every format that soundfile reads by itself."""
    folder = tmp_path_factory.mktemp("files")
    for extension in ("wav", "flac", "ogg", "mp3", "aiff"):
        soundfile.write(folder / f"clip.{extension}", noise(6000), 16_000)
    return folder


class TestFiles:
    def test_not_a_number_is_refused_by_the_name_of_its_file(self, tmp_path):
        clip = noise(1000)
        for bad in (np.nan, np.inf):
            clip[500] = bad
            soundfile.write(tmp_path / "broken.wav", clip, 44_100, subtype="FLOAT")
            with pytest.raises(ValueError, match="broken.wav holds NaN or infinite"):
                load_audio(tmp_path / "broken.wav")

    @pytest.mark.parametrize("rate", [1, 100, 319])
    @pytest.mark.parametrize("extension", ["wav", "flac"])
    def test_a_rate_that_is_none_is_refused_by_the_name_of_its_file(self, tmp_path, rate, extension):
        soundfile.write(tmp_path / f"slow.{extension}", noise(5000), rate)
        with pytest.raises(ValueError, match=f"slow.{extension}: Audio at {rate} Hz"):
            load_audio(tmp_path / f"slow.{extension}")

    @pytest.mark.parametrize("rate", [0, -1, 2.5, 32_000.0, "32000", None, math.nan, True])
    def test_a_wrong_target_rate_is_refused(self, tmp_path, rate):
        soundfile.write(tmp_path / "clip.wav", noise(1000), RATE)
        with pytest.raises(ValueError, match="`sampling_rate`"):
            load_audio(tmp_path / "clip.wav", sampling_rate=rate)

    def test_samples_without_a_header_are_refused_by_name(self, tmp_path, monkeypatch):
        monkeypatch.setattr(shutil, "which", lambda program: None)
        (tmp_path / "clip.raw").write_bytes(noise(1000).tobytes())
        with pytest.raises(ValueError, match="clip.raw.*ffmpeg"):
            load_audio(tmp_path / "clip.raw")

    def test_a_header_that_claims_more_than_memory_holds_is_refused(self, tmp_path):
        soundfile.write(tmp_path / "clip.flac", noise(1000), RATE)
        content = bytearray((tmp_path / "clip.flac").read_bytes())
        content[21] |= 0x0F  # the 36 bits of STREAMINFO that count the samples
        content[22:26] = b"\xff" * 4
        (tmp_path / "clip.flac").write_bytes(content)
        try:
            assert len(load_audio(tmp_path / "clip.flac")) <= 1000
        except ValueError as error:
            assert "clip.flac" in str(error)

    @fuzz(150)
    @given(data=st.data())
    def test_a_damaged_file_is_audio_or_refused_by_name(self, files, data):
        extension = data.draw(st.sampled_from(["wav", "flac", "ogg", "mp3", "aiff"]))
        content = bytearray((files / f"clip.{extension}").read_bytes())
        for _ in range(data.draw(st.integers(0, 3))):
            place = data.draw(st.one_of(st.integers(0, 60), st.integers(0, len(content) - 1)))
            content[place] = data.draw(st.integers(0, 255))
        path = files / f"damaged.{extension}"
        path.write_bytes(content[: data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shutil, "which", lambda program: None)
            try:
                audio = load_audio(path)
            except ValueError as error:
                assert path.name in str(error)
                return
        assert audio.ndim == 1 and audio.dtype == np.float32 and len(audio) > 0 and np.isfinite(audio).all()

    @fuzz(60)
    @given(content=st.binary(max_size=200), extension=st.sampled_from(["wav", "mp3", "raw", "flac", "m4a", ""]))
    def test_garbage_is_refused_by_name(self, files, content, extension):
        path = files / f"garbage.{extension}"
        path.write_bytes(content)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shutil, "which", lambda program: None)
            with pytest.raises(ValueError, match=path.name):
                load_audio(path)

    def test_a_truncated_recording_is_what_is_left_of_it(self, data_dir, tmp_path):
        content = (data_dir / "esc10" / "audio" / "1-100032-A-0.ogg").read_bytes()
        (tmp_path / "half.ogg").write_bytes(content[: len(content) // 2])
        audio = load_audio(tmp_path / "half.ogg")
        assert 0 < len(audio) < 160_000 and np.isfinite(audio).all()
