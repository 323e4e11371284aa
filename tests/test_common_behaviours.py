"""What transformers' own tests ask of every configuration and model, under the names that they have there.

Its test classes are not part of the installed package, so the behaviours are tested anew. CAT differs as Swin does:
attentions and hidden states are one for each stage, and what it embeds is sound.
"""

import copy
import inspect
import json
import shutil
import warnings

import pytest
import torch
import transformers
from accelerate import cpu_offload, disk_offload, infer_auto_device_map
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils import prune
from transformers import GenerationMixin
from transformers.utils.output_capturing import OutputRecorder

from transformers_cat import CATConfig, CATForAudioClassification, CATModel, modeling_cat
from transformers_cat.linear import make_plain
from transformers_cat.mrmf import MRMFSpectrogram

from .conftest import awaken, small_config

RELEASE = Version(transformers.__version__)
FRAMES = 50


@pytest.fixture(params=[CATModel, CATForAudioClassification], ids=lambda cls: cls.__name__)
def model_class(request):
    return request.param


def build(model_class: type, **overrides):
    """A small model in evaluation mode with random values in every parameter."""
    torch.manual_seed(0)
    return awaken(model_class(small_config(**overrides))).eval()


def inputs_for(model_class: type, labels: bool = False) -> dict[str, torch.Tensor]:
    """Three clips of 50, 31 and 3 frames."""
    torch.manual_seed(1)
    inputs = {
        "input_values": torch.randn(3, FRAMES, 384),
        "attention_mask": (torch.arange(FRAMES) < torch.tensor([FRAMES, 31, 3])[:, None]).int(),
    }
    if labels and model_class is CATForAudioClassification:
        inputs["labels"] = torch.tensor([0, 4, 2])
    return inputs


def main_output(output) -> torch.Tensor:
    return output.logits if "logits" in output else output.last_hidden_state


def total(output) -> torch.Tensor:
    """A scalar that every parameter takes part in."""
    if "loss" in output:
        return output.loss
    torch.manual_seed(2)
    return (output.last_hidden_state * torch.randn_like(output.last_hidden_state)).sum()


def assert_same_weights(left: nn.Module, right: nn.Module) -> None:
    expected = dict(left.named_parameters()) | dict(left.named_buffers())
    found = dict(right.named_parameters()) | dict(right.named_buffers())
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


# Configuration


def test_config_common_properties():
    config = small_config()
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (64, 3, (2, 4, 8))
    config.num_attention_heads = [4, 8, 16]
    assert config.num_heads == [4, 8, 16]
    for name in ("hidden_size", "num_hidden_layers"):
        with pytest.raises(NotImplementedError, match=f"{name}.*7.*(embed_dim|depths)"):
            setattr(config, name, 7)
        with pytest.raises(NotImplementedError, match=name):
            CATConfig(**{name: 7})


def test_config_to_json_string():
    config = small_config(f_max=12_000)
    values = json.loads(config.to_json_string())
    assert values["embed_dim"] == 16 and values["f_max"] == 12_000 and values["filters"] == ["mel", "linear"]


def test_config_to_json_file(tmp_path):
    config = small_config(window_lengths=(800,), hop_lengths=(320,))
    config.to_json_file(tmp_path / "config.json")
    assert CATConfig.from_json_file(tmp_path / "config.json").to_dict() == config.to_dict()


def test_config_from_and_save_pretrained_subfolder(tmp_path):
    config = small_config(num_labels=7)
    config.save_pretrained(tmp_path / "audio")
    assert CATConfig.from_pretrained(tmp_path, subfolder="audio").to_dict() == config.to_dict()


def test_config_with_num_labels():
    config = CATConfig(num_labels=5)
    assert len(config.id2label) == len(config.label2id) == 5
    config.num_labels = 3
    assert len(config.id2label) == len(config.label2id) == 3
    assert CATForAudioClassification(small_config(num_labels=3)).classifier.out_features == 3


COMMON_ARGUMENTS = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "is_encoder_decoder": False,
    "architectures": ["CATModel"],
    "id2label": {0: "dog", 1: "rain"},
    "label2id": {"dog": 0, "rain": 1},
    "problem_type": "multi_label_classification",
}


def test_config_arguments_init(tmp_path):
    config = CATConfig(**COMMON_ARGUMENTS)
    config.save_pretrained(tmp_path)
    for found in (config, CATConfig.from_pretrained(tmp_path)):
        assert {name: getattr(found, name) for name in COMMON_ARGUMENTS if name != "dtype"} == {
            name: value for name, value in COMMON_ARGUMENTS.items() if name != "dtype"
        }
        assert found.dtype in ("float16", torch.float16)
    assert CATConfig.from_pretrained(tmp_path, problem_type="regression").problem_type == "regression"


def test_config_can_be_init_without_params(caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CATConfig()
    assert caplog.text == ""


# Saving and loading


def test_num_layers_is_small():
    assert small_config().num_hidden_layers <= 5


def test_model_is_small(model_class):
    assert build(model_class).num_parameters() < 1_000_000


def test_save_load(model_class, tmp_path):
    model, inputs = build(model_class), inputs_for(model_class)
    model.save_pretrained(tmp_path)
    loaded, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not loaded.training
    assert_same_weights(model, loaded)
    with torch.no_grad():
        assert torch.equal(main_output(model(**inputs)), main_output(loaded(**inputs)))


def test_from_pretrained_no_checkpoint(model_class):
    model = build(model_class)
    loaded = model_class.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert_same_weights(model, loaded)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_keep_in_fp32_modules(model_class, tmp_path, dtype):
    build(model_class).save_pretrained(tmp_path)
    model = model_class.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    # The front end stays in single precision by itself: the power of a spectrum overflows half precision.
    fresh = MRMFSpectrogram()
    for name, buffer in model.base_model.mrmf.named_buffers():
        assert torch.equal(buffer, fresh.get_buffer(name)), name


def test_keep_in_fp32_modules_exist(model_class):
    model = build(model_class)
    names = [*(model._keep_in_fp32_modules or []), *(model._keep_in_fp32_modules_strict or [])]
    parts = {part for name in model.state_dict() for part in name.split(".")}
    assert set(names) <= parts


def test_save_load_keys_to_ignore_on_save(model_class, tmp_path):
    model = build(model_class)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == model.state_dict().keys()
    constants = {name for name, _ in model.named_buffers()} - model.state_dict().keys()
    assert constants and not constants & saved.keys()


def test_load_contiguous_weights(model_class, tmp_path):
    build(model_class).save_pretrained(tmp_path)
    assert all(value.is_contiguous() for value in model_class.from_pretrained(tmp_path).parameters())


def test_can_use_safetensors(model_class, tmp_path):
    model = build(model_class)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert_same_weights(model, model_class.from_pretrained(tmp_path, use_safetensors=True))


def test_load_save_without_tied_weights(model_class, tmp_path):
    model = build(model_class, tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    loaded, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert_same_weights(model, loaded)


def test_tied_weights_keys(model_class):
    model = build(model_class, tie_word_embeddings=True)
    assert model._tied_weights_keys is None and not model.all_tied_weights_keys
    addresses = [value.data_ptr() for value in model.state_dict().values()]
    assert len(set(addresses)) == len(addresses)


def test_model_weights_reload_no_missing_tied_weights(model_class, tmp_path):
    model = build(model_class)
    model.save_pretrained(tmp_path)
    save_file({"placeholder": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    _, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["unexpected_keys"]) == {"placeholder"}
    # Nothing is excused but the reconstruction block, which only training needs.
    needed = {name for name in model.state_dict() if not name.startswith("reconstruction.")}
    assert set(report["missing_keys"]) == needed


def test_torch_save_load(model_class, tmp_path):
    model = build(model_class)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    loaded = model_class(small_config())
    loaded.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert_same_weights(model, loaded)


def test_correct_missing_keys(tmp_path):
    build(CATModel).save_pretrained(tmp_path)
    _, report = CATForAudioClassification.from_pretrained(tmp_path, num_labels=5, output_loading_info=True)
    assert set(report["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert not report["unexpected_keys"]


def test_base_model_prefix_loads_base_weights(tmp_path):
    model = build(CATForAudioClassification)
    model.save_pretrained(tmp_path / "head")
    body, report = CATModel.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert not report["missing_keys"]
    assert_same_weights(model.cat, body)
    body.save_pretrained(tmp_path / "body")
    again = CATForAudioClassification.from_pretrained(tmp_path / "body")
    assert_same_weights(model.cat, again.cat)


def test_model_base_model_prefix(model_class):
    model = build(model_class)
    assert isinstance(model.base_model, CATModel)
    assert CATForAudioClassification.base_model_prefix == "cat"


def test_model_main_input_name(model_class):
    first = list(inspect.signature(model_class.forward).parameters)[1]
    assert first == model_class.main_input_name == "input_values"


def foreign_checkpoint(model: nn.Module, folder) -> dict[str, str]:
    """Saves `model` with its stages under another name; returns the mapping that brings them back."""
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights = {name.replace("stages.", "layers."): value for name, value in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return {r"layers\.": "stages."}


def test_reverse_loading_mapping(model_class, tmp_path):
    model = build(model_class)
    mapping = foreign_checkpoint(model, tmp_path)
    loaded, report = model_class.from_pretrained(tmp_path, key_mapping=mapping, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert_same_weights(model, loaded)


def test_can_load_from_already_mapped_keys(model_class, tmp_path):
    model = build(model_class)
    mapping = foreign_checkpoint(model, tmp_path / "foreign")
    model.save_pretrained(tmp_path / "own")
    assert_same_weights(model, model_class.from_pretrained(tmp_path / "own", key_mapping=mapping))


# Initial values, devices and types


@pytest.fixture
def seeded_modules(monkeypatch):
    """The initial values of a module do not depend on the order in which modules get theirs."""
    original = CATModel._init_weights

    def seeded(self, module):
        torch.manual_seed(0)
        original(self, module)

    monkeypatch.setattr(CATModel, "_init_weights", seeded)
    monkeypatch.setattr(CATForAudioClassification, "_init_weights", seeded)


def test_can_init_all_missing_weights(model_class, seeded_modules, poisoned_memory):
    expected = model_class(small_config())
    loaded = model_class.from_pretrained(None, config=small_config(), state_dict={})
    assert_same_weights(expected, loaded)


def test_init_weights_can_init_buffers(model_class, seeded_modules, poisoned_memory):
    expected = model_class(small_config())
    with torch.device("meta"):
        model = model_class(small_config())
    model.to_empty(device="cpu").init_weights()
    assert_same_weights(expected, model)


def test_all_tensors_are_parameter_or_buffer(model_class, tmp_path):
    def tensors(value):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            for item in value:
                yield from tensors(item)
        elif isinstance(value, dict):
            yield from tensors(list(value.values()))

    build(model_class).save_pretrained(tmp_path)
    for name, module in model_class.from_pretrained(tmp_path).named_modules():
        for attribute, value in vars(module).items():
            if attribute not in ("_parameters", "_buffers"):
                assert not list(tensors(value)), f"{name}.{attribute}"


def test_can_be_initialized_on_meta(model_class):
    with torch.device("meta"):
        model = model_class(small_config())
    assert {value.device.type for value in model.parameters()} == {"meta"}


def test_can_be_initialized_of_fake_tensors(model_class):
    """As tools do that estimate memory: nothing of the construction may depend on the values of tensors."""
    with FakeTensorMode():
        model = model_class(small_config())
    assert {type(value.data) for value in model.parameters()} == {FakeTensor}


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]


@pytest.mark.parametrize("device", DEVICES)
def test_can_load_with_device_context_manager(model_class, tmp_path, device):
    model = build(model_class)
    model.save_pretrained(tmp_path)
    with torch.device(device):
        loaded = model_class.from_pretrained(tmp_path)
    assert {value.device.type for value in [*loaded.parameters(), *loaded.buffers()]} == {device}
    assert_same_weights(model, loaded.cpu())


@pytest.mark.parametrize("device", DEVICES)
def test_can_load_with_global_device_set(model_class, tmp_path, device):
    model = build(model_class)
    model.save_pretrained(tmp_path)
    torch.set_default_device(device)
    try:
        loaded = model_class.from_pretrained(tmp_path)
    finally:
        torch.set_default_device(None)
    assert {value.device.type for value in [*loaded.parameters(), *loaded.buffers()]} == {device}
    assert_same_weights(model, loaded.cpu())


def test_cannot_load_with_meta_device_context_manager(model_class, tmp_path):
    build(model_class).save_pretrained(tmp_path)
    with torch.device("meta"), pytest.raises(RuntimeError, match="meta"):
        model_class.from_pretrained(tmp_path)


@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
def test_bc_torch_dtype(model_class, tmp_path, argument):
    build(model_class).save_pretrained(tmp_path / "full")
    half = model_class.from_pretrained(tmp_path / "full", **{argument: torch.bfloat16})
    assert half.dtype == torch.bfloat16
    half.save_pretrained(tmp_path / "half")
    assert model_class.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_load_with_mismatched_shapes(tmp_path):
    build(CATForAudioClassification).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size"):
        CATForAudioClassification.from_pretrained(tmp_path, num_labels=7)


def test_can_load_ignoring_mismatched_shapes(tmp_path, poisoned_memory):
    model = build(CATForAudioClassification)
    model.save_pretrained(tmp_path)
    other, report = CATForAudioClassification.from_pretrained(
        tmp_path, num_labels=400, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {name for name, *_ in report["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}
    assert other.classifier.weight.std().item() == pytest.approx(0.02, rel=0.05) and not other.classifier.bias.any()
    assert_same_weights(model.cat, other.cat)
    with torch.no_grad():
        assert other(**inputs_for(CATForAudioClassification)).logits.shape == (3, 400)


def disk_offloaded(model: nn.Module, folder) -> nn.Module:
    return disk_offload(model, folder / "offloaded", execution_device=torch.device("cpu"))


def load_with_everything_on_disk(model: nn.Module, folder) -> nn.Module:
    model.save_pretrained(folder / "saved")
    device_map = {name: "disk" for name, _ in model.named_children()}
    loaded = type(model).from_pretrained(folder / "saved", device_map=device_map, offload_folder=folder / "offloaded")
    assert {value.device.type for value in loaded.parameters()} == {"meta"}
    return loaded


def assert_offloaded_gives_the_same(model: nn.Module, offload) -> None:
    inputs = inputs_for(type(model))
    with torch.no_grad():
        expected = main_output(model(**inputs))
        assert torch.equal(main_output(offload(model)(**inputs)), expected)


def test_disk_offload_bin(model_class, tmp_path):
    assert_offloaded_gives_the_same(build(model_class), lambda model: disk_offloaded(model, tmp_path))


def test_disk_offload_reaches_the_head_of_the_pns(tmp_path):
    model, inputs = build(CATForAudioClassification), inputs_for(CATForAudioClassification)
    with torch.no_grad():
        expected = model(**inputs, output_pns=True).pns
        offloaded = disk_offloaded(model, tmp_path)(**inputs, output_pns=True).pns
    assert expected.max() > 0
    torch.testing.assert_close(offloaded, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(RELEASE < Version("5.17"), reason="transformers 5.4 runs no model that lies on disk as a whole")
def test_disk_offload_safetensors(model_class, tmp_path):
    assert_offloaded_gives_the_same(build(model_class), lambda model: load_with_everything_on_disk(model, tmp_path))


def test_cpu_offload(model_class):
    assert_offloaded_gives_the_same(
        build(model_class), lambda model: cpu_offload(model, execution_device=torch.device("cpu"))
    )


def test_model_parallelism(model_class, tmp_path):
    model = build(model_class)
    stages = {name for name, module in model.named_modules() if type(module).__name__ in model._no_split_modules}
    assert len(stages) == 1 + small_config().num_hidden_layers
    weights, constants = (sum(value.nbytes for value in of()) for of in (model.parameters, model.buffers))
    # Two places that any machine has, with room in the first for half of the weights.
    device_map = infer_auto_device_map(
        model,
        {"cpu": constants + weights // 2, "disk": constants + weights},
        no_split_module_classes=model._no_split_modules,
    )
    assert set(device_map.values()) == {"cpu", "disk"}
    for placed in device_map:
        assert not any(placed.startswith(f"{stage}.") for stage in stages), placed
    model.save_pretrained(tmp_path / "saved")
    inputs = inputs_for(model_class)
    split = model_class.from_pretrained(
        tmp_path / "saved", device_map=device_map, offload_folder=tmp_path / "offloaded"
    )
    with torch.no_grad():
        assert torch.equal(main_output(split(**inputs)), main_output(model(**inputs)))


# Forward


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("spread", [False, True])
def test_devices_of_labels_and_of_parts(monkeypatch, training, masked, spread):
    """Labels on the CPU, as AST takes them, and stages on another device: each tensor goes where it is needed."""
    monkeypatch.setattr(modeling_cat, "transformed", lambda: True)  # there are no values to look at
    monkeypatch.setattr(CATForAudioClassification, "validate_labels", lambda *_: None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda:0"):
            model = build(CATForAudioClassification, problem_type="single_label_classification").train(training)
            inputs = {"input_values": torch.zeros(2, FRAMES, 384)}
            if masked:
                inputs["attention_mask"] = torch.ones(2, FRAMES)
        parts = [*model.cat.stages, model.cat.norm, model.classifier, model.reconstruction]
        for part in parts if spread else []:
            for module in part.modules():
                for name, value in module.named_parameters(recurse=False):
                    module._parameters[name] = nn.Parameter(value.detach().to("cuda:1"))
            add_hook_to_module(part, AlignDevicesHook(execution_device=1, io_same_device=False))
        labels = torch.zeros(2, dtype=torch.long, device="cpu")
        output = model(**inputs, labels=labels, output_pns=True, output_frame_logits=True)
        assert output.loss.device == output.logits.device == torch.device("cuda", int(spread))
        assert not training or output.reconstruction_loss.device == output.loss.device


def test_determinism(model_class):
    model, inputs = build(model_class), inputs_for(model_class)
    with torch.no_grad():
        assert torch.equal(main_output(model(**inputs)), main_output(model(**inputs)))


@pytest.mark.parametrize("masked", [False, True])
def test_batching_equivalence(model_class, masked):
    model, inputs = build(model_class), inputs_for(model_class)
    lengths = inputs["attention_mask"].sum(1).tolist()
    if not masked:
        lengths = [FRAMES] * 3
        del inputs["attention_mask"]
    requests = {"output_hidden_states": True}
    if model_class is CATForAudioClassification:
        requests["output_frame_logits"] = True
    with torch.no_grad():
        together = model(**inputs, **requests)
        for index, length in enumerate(lengths):
            alone = model(inputs["input_values"][index : index + 1, :length], **requests)
            assert alone.keys() - {"token_mask"} == together.keys() - {"token_mask", "frame_mask"}
            for name, expected in alone.items():
                states = zip(expected, together[name]) if name == "hidden_states" else [(expected, together[name])]
                for one, of_batch in states:
                    # What a batch holds beyond a clip's own length is padding.
                    of_batch = of_batch[index, : one.shape[1]] if one.ndim > 2 else of_batch[index]
                    torch.testing.assert_close(of_batch, one[0], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: n + m)


def test_model_forward_default_config_values(model_class):
    inputs = inputs_for(model_class)
    asked = build(model_class, output_hidden_states=True, output_attentions=True, attn_implementation="eager")
    plain = build(model_class, attn_implementation="eager")
    with torch.no_grad():
        by_config, by_call = asked(**inputs), plain(**inputs, output_hidden_states=True, output_attentions=True)
        assert by_config.keys() == by_call.keys() and len(by_config.attentions) == 3
        for left, right in zip(by_config.hidden_states, by_call.hidden_states):
            assert torch.equal(left, right)
        assert "hidden_states" not in asked(**inputs, output_hidden_states=False)
        assert isinstance(build(model_class, return_dict=False)(**inputs), tuple)


@pytest.mark.parametrize("requests", [{}, {"output_hidden_states": True}, {"output_attentions": True}], ids=str)
@pytest.mark.parametrize("labels", [False, True])
def test_model_outputs_equivalence(model_class, requests, labels):
    def same(left, right):
        if isinstance(left, tuple):
            return len(left) == len(right) and all(map(same, left, right))
        return torch.equal(left, right)

    model = build(model_class, attn_implementation="eager")
    inputs = inputs_for(model_class, labels=labels) | requests
    with torch.no_grad():
        assert same(model(**inputs, return_dict=False), model(**inputs, return_dict=True).to_tuple())


PROBLEMS = {
    "single label": ("single_label_classification", 5, torch.tensor([1, 4])),
    "soft labels": (
        "single_label_classification",
        5,
        torch.tensor([[0.3, 0.7, 0, 0, 0], [0, 0, 0, 0, 1.0]]),
    ),
    "multi label": ("multi_label_classification", 5, torch.tensor([[1.0, 1, 0, 0, 0.5], [0, 0, 0, 0, 0]])),
    "regression": ("regression", 5, torch.randn(2, 5)),
    "regression of one value": ("regression", 1, torch.tensor([0.3, -2.0])),
}
LOSSES = {
    "single_label_classification": nn.functional.cross_entropy,
    "multi_label_classification": nn.functional.binary_cross_entropy_with_logits,
    "regression": nn.functional.mse_loss,
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_problem_types(problem, training):
    """The classification part of the loss; the others have tests of their own."""
    problem_type, num_labels, labels = PROBLEMS[problem]
    config = small_config(num_labels=num_labels)
    config.problem_type = problem_type
    torch.manual_seed(0)
    model = awaken(CATForAudioClassification(config)).train(training)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns where a loss broadcasts labels to logits
        output = model(torch.randn(2, 16, 384), labels=labels)
        output.loss.backward()
    expected = LOSSES[problem_type](output.logits.view(labels.shape) if num_labels == 1 else output.logits, labels)
    torch.testing.assert_close(output.classification_loss, expected)
    assert ("causal_loss" in output) == (training and problem_type != "regression")


@pytest.mark.parametrize(
    "num_labels, labels, inferred",
    [
        (5, torch.tensor([1, 4]), "single_label_classification"),
        (5, torch.zeros(2, 5), "multi_label_classification"),
        (1, torch.zeros(2), "regression"),
    ],
)
def test_problem_type_is_inferred_as_everywhere(num_labels, labels, inferred):
    model = build(CATForAudioClassification, num_labels=num_labels)
    model(torch.randn(2, 16, 384), labels=labels)
    assert model.config.problem_type == inferred


def test_attention_outputs(model_class):
    model, inputs = build(model_class, attn_implementation="eager"), inputs_for(model_class)
    output = model(**inputs, output_attentions=True)
    # Windows of 8x8, 8x8 and 16x4 tokens on maps of 13x16, 7x8 and 4x4; the last map lies in a quarter of its window.
    assert [tuple(weights.shape) for weights in output.attentions] == [
        (3 * 4, 2, 64, 64),
        (3 * 1, 4, 64, 64),
        (3 * 1, 8, 16, 16),
    ]
    for weights in output.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    both = model(**inputs, output_attentions=True, output_hidden_states=True)
    assert len(both) == len(output) + 1 and len(both.attentions) == 3
    assert "attentions" not in model(**inputs)


def test_hidden_states_output(model_class):
    output = build(model_class)(**inputs_for(model_class), output_hidden_states=True)
    assert [tuple(state.shape) for state in output.hidden_states] == [
        (3, 13, 16, 16),
        (3, 7, 8, 32),
        (3, 4, 4, 64),
        (3, 4, 4, 64),
    ]
    assert len(output.hidden_states) == small_config().num_hidden_layers + 1


def test_retain_grad_hidden_states_attentions(model_class):
    model = build(model_class, attn_implementation="eager")
    output = model(**inputs_for(model_class), output_hidden_states=True, output_attentions=True)
    kept = [*output.hidden_states, *output.attentions]
    for tensor in kept:
        tensor.retain_grad()
    main_output(output).pow(3).sum().backward()
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in kept)


def test_capture_outputs_decorator():
    model = build(CATForAudioClassification, attn_implementation="eager")
    requests = {"output_hidden_states": True, "output_attentions": True}
    inputs = inputs_for(CATForAudioClassification)
    # The head passes on what its body captures: all of it, and once.
    with torch.no_grad():
        of_head, of_body = model(**inputs, **requests), model.cat(**inputs, **requests)
    for name in ("hidden_states", "attentions"):
        assert len(of_head[name]) == len(of_body[name])
        assert all(torch.equal(*pair) for pair in zip(of_head[name], of_body[name]))


def test_format_of_can_record_outputs(model_class):
    model = build(model_class)
    for name, recorder in model._can_record_outputs.items():
        assert name in ("hidden_states", "attentions")
        assert isinstance(recorder, OutputRecorder)
        recorded = [module for module in model.modules() if isinstance(module, recorder.target_class)]
        assert len(recorded) == small_config().num_hidden_layers


@pytest.mark.skipif(RELEASE < Version("5.23"), reason="a choice of hidden states exists from transformers 5.23 on")
@pytest.mark.parametrize("layers", [[0], [1, 3], [-1], [-3]])
def test_can_capture_specific_layers_hidden_states(model_class, layers):
    model, inputs = build(model_class), inputs_for(model_class)
    with torch.no_grad():
        every = model(**inputs, output_hidden_states=True).hidden_states
        chosen = model(**inputs, output_hidden_states=layers).hidden_states
    found = [state for state in chosen if state is not None]
    assert len(found) == len(layers)
    assert all(torch.equal(every[layer], state) for layer, state in zip(layers, found))


def test_feed_forward_chunking(model_class):
    inputs = inputs_for(model_class)
    with torch.no_grad():
        whole = main_output(build(model_class)(**inputs))
        # The option is one of every configuration. CAT leaves it out of account, and must not change by it.
        assert torch.equal(main_output(build(model_class, chunk_size_feed_forward=1)(**inputs)), whole)


def test_model_get_set_embeddings(model_class):
    model, inputs = build(model_class), inputs_for(model_class)
    embeddings = model.get_input_embeddings()
    assert embeddings is model.base_model.embeddings
    calls = []
    embeddings.register_forward_hook(lambda module, arguments, output: calls.append(output))
    model(**inputs)
    assert len(calls) == 1 and isinstance(calls[0], torch.Tensor)
    assert model.get_output_embeddings() is None
    other = build(model_class).get_input_embeddings()
    model.set_input_embeddings(other)
    assert model.get_input_embeddings() is model.base_model.embeddings is other


def test_generation_tester_mixin_inheritance(model_class, tmp_path):
    model = build(model_class)
    assert not model.can_generate() and not isinstance(model, GenerationMixin)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "generation_config.json").exists()


# Training


def gradients_of(model: nn.Module, inputs: dict) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    total(model.train()(**inputs)).backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    return {name: gradient.clone() for name, gradient in gradients.items() if gradient is not None}


def assert_every_parameter_is_trained(model: nn.Module, gradients: dict[str, torch.Tensor]) -> None:
    untrained = [name for name, _ in model.named_parameters() if name not in gradients or not gradients[name].any()]
    assert untrained == []


def test_training(model_class):
    model = build(model_class)
    assert_every_parameter_is_trained(model, gradients_of(model, inputs_for(model_class, labels=True)))


def check_gradient_checkpointing(model_class, arguments: dict | None) -> None:
    inputs, gradients = inputs_for(model_class, labels=True), []
    for checkpointing in (False, True):
        model = build(model_class, drop_path_rate=0.0)
        if checkpointing:
            model.gradient_checkpointing_enable(arguments)
        gradients.append(gradients_of(model, inputs))
    assert_every_parameter_is_trained(model, gradients[1])
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-4, rtol=1e-4)


def test_training_gradient_checkpointing(model_class):
    check_gradient_checkpointing(model_class, None)


def test_training_gradient_checkpointing_use_reentrant_false(model_class):
    check_gradient_checkpointing(model_class, {"use_reentrant": False})


def test_training_gradient_checkpointing_use_reentrant_true(model_class):
    check_gradient_checkpointing(model_class, {"use_reentrant": True})


def checkpointed_blocks(model: nn.Module) -> list[bool]:
    return [module.gradient_checkpointing for module in model.modules() if hasattr(module, "gradient_checkpointing")]


def test_gradient_checkpointing_enable_disable(model_class):
    model = build(model_class)
    blocks = sum(small_config().depths)
    for enabled in (True, False):
        model.gradient_checkpointing_enable() if enabled else model.gradient_checkpointing_disable()
        assert model.is_gradient_checkpointing is enabled
        assert checkpointed_blocks(model) == [enabled] * blocks


def test_gradient_checkpointing_backward_compatibility(model_class):
    assert build(model_class, gradient_checkpointing=True).is_gradient_checkpointing


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_peft_gradient_checkpointing_enable_disable(use_reentrant):
    peft = pytest.importorskip("peft")
    inputs, gradients = inputs_for(CATForAudioClassification, labels=True), []
    for checkpointing in (False, True):
        model = build(CATForAudioClassification, drop_path_rate=0.0)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        adapted = peft.get_peft_model(
            model, peft.LoraConfig(r=2, target_modules=r".*\.attention\.(qkv\.\d|output)", init_lora_weights=False)
        )
        assert any(checkpointed_blocks(adapted)) is checkpointing
        gradients.append(gradients_of(adapted, inputs))
    assert len(gradients[1]) == 2 * 3 * sum(small_config().depths)  # A and B of two filters and of the output
    assert all("lora" in name and gradient.any() for name, gradient in gradients[1].items())
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("option", ["labels", "output_pns"])
def test_a_head_that_is_not_linear_is_refused(option):
    torch.manual_seed(0)
    model = CATForAudioClassification(small_config(num_labels=3)).train()
    width = model.config.hidden_size
    model.classifier = nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, 3))
    clips, labels = torch.randn(4, 40, 384), torch.tensor([0, 1, 2, 0])
    argument = {"labels": labels} if option == "labels" else {"output_pns": True}
    with pytest.raises(ValueError, match="need a linear head, which Sequential is not"):
        model(clips, **argument)
    assert model.classifier.training
    model.config.causal_loss_weight = 0.0
    assert model(clips, labels=labels).loss.isfinite()


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification"])
def test_a_new_head_of_other_classes_trains(problem_type):
    model = CATForAudioClassification(small_config(problem_type=problem_type)).train()
    model.config.num_labels = 3
    model.classifier = nn.Linear(model.config.hidden_size, 3)
    labels = torch.tensor([0, 2]) if problem_type.startswith("single") else torch.eye(3)[:2]
    output = model(torch.randn(2, 40, 384), labels=labels, output_pns=True)
    assert output.loss.isfinite() and model.num_labels == output.logits.shape[1] == 3


def test_causal_loss_and_pns_of_an_adapted_head():
    """They are of the head that makes the logits, as after merging the adapter into it."""
    peft = pytest.importorskip("peft")
    inputs = inputs_for(CATForAudioClassification, labels=True)
    model = build(CATForAudioClassification, drop_path_rate=0.0)
    lora = peft.LoraConfig(r=2, target_modules=["classifier"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, lora).train()
    outputs = adapted(**inputs, output_pns=True)
    merged = adapted.merge_and_unload()(**inputs, output_pns=True)
    for name in ("causal_loss", "pns"):
        torch.testing.assert_close(outputs[name], merged[name])


@pytest.mark.parametrize("hook", ["input", "output", "pruning", "forward"])
def test_layers_with_hooks_have_their_gradients(hook):
    """What a layer computes in the forward pass, whoever has changed it, is what the backward pass is of."""
    gradients = []
    for bare in (True, False):
        model = build(CATForAudioClassification, problem_type="single_label_classification").train()
        if bare:
            make_plain(model)
        for block in (block for stage in model.cat.stages for block in stage.blocks):
            layer = block.mlp[0]
            if hook == "input":
                layer.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
            elif hook == "output":
                layer.register_forward_hook(lambda module, inputs, output: output.tanh())
            elif hook == "pruning":
                prune.l1_unstructured(layer, "weight", 0.5)
            else:
                layer.forward = lambda tokens, own=layer.forward: own(2 * tokens)
        if bare:  # the plain way: everything is kept
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(modeling_cat, "linear_after", lambda prepare, layer, tokens: layer(prepare(tokens)))
                model(**inputs_for(CATForAudioClassification, labels=True)).loss.backward()
        else:
            model(**inputs_for(CATForAudioClassification, labels=True)).loss.backward()
        gradients.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_pns_of_a_quantised_head():
    model, inputs = build(CATForAudioClassification), inputs_for(CATForAudioClassification)
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})
    with torch.no_grad():
        expected, pns = (each(**inputs, output_pns=True).pns for each in (model, quantised))
    torch.testing.assert_close(pns, expected, atol=0.02, rtol=0.1)


def test_enable_input_require_grads(model_class):
    model = build(model_class).requires_grad_(False)
    model.enable_input_require_grads()
    assert main_output(model(**inputs_for(model_class))).requires_grad
    model.disable_input_require_grads()
    assert not main_output(model(**inputs_for(model_class))).requires_grad


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_enable_input_require_grads_with_gradient_checkpointing(model_class, use_reentrant):
    model = build(model_class)
    model.base_model.embeddings.requires_grad_(False)  # a checkpoint that re-enters needs an input with a gradient
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    gradients = gradients_of(model, inputs_for(model_class, labels=True))
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    assert [name for name in trained if name not in gradients or not gradients[name].any()] == []


# Attention kernels and compilation

TOLERANCES = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}


@pytest.mark.parametrize("output_attentions", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_eager_matches_sdpa_inference(model_class, dtype, masked, output_attentions):
    model, inputs = build(model_class).to(dtype), inputs_for(model_class)
    if not masked:
        del inputs["attention_mask"]
    outputs = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            output = model(**inputs, output_hidden_states=True, output_attentions=output_attentions)
        if implementation == "eager" and output_attentions:
            assert len(output.attentions) == 3
        outputs.append([main_output(output), *output.hidden_states])
    tolerance = TOLERANCES[dtype]
    assert outputs[0][0].dtype == dtype
    for index, (eager, sdpa) in enumerate(zip(*outputs)):
        if masked and index:  # hidden states: those of the first clip, which has no padding
            eager, sdpa = eager[0], sdpa[0]
        scale = eager.float().abs().max().clamp(min=1)
        assert (eager.float() - sdpa.float()).abs().max() <= tolerance * scale


def test_sdpa_can_dispatch_non_composite_models(model_class, tmp_path):
    build(model_class).save_pretrained(tmp_path)
    assert model_class.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
    eager = model_class.from_pretrained(tmp_path, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    assert "attn_implementation" not in (tmp_path / "config.json").read_text()


def test_can_set_attention_dynamically(model_class, monkeypatch):
    model = build(model_class)
    model.set_attn_implementation("eager")
    attentions = [module for module in model.modules() if type(module).__name__ == "CATAttention"]
    assert {module.config._attn_implementation for module in attentions} == {"eager"}
    monkeypatch.setattr("transformers_cat.modeling_cat.eager_attention_forward", None)
    with pytest.raises(TypeError):  # so the change has reached the layers
        model(**inputs_for(model_class))
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        model(**inputs_for(model_class))


def test_config_attn_implementation_setter(model_class):
    config = small_config(attn_implementation="eager")
    assert config._attn_implementation == "eager"
    assert model_class(config).config._attn_implementation == "eager"
    config._attn_implementation = "sdpa"
    assert model_class(config).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("implementation", ["flex_attention", "flash_attention_2"])
def test_flex_attention_with_grads(model_class, implementation):
    """Neither takes the windows' bias; who asks for them is told so."""
    with pytest.raises(ValueError, match=f"{model_class.__name__} does not support"):
        model_class(small_config(attn_implementation=implementation))
    with pytest.raises((ValueError, ImportError)):
        build(model_class).set_attn_implementation(implementation)


# Compilation ends before code is generated for the machine: that takes minutes, and is not CAT's.


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_sdpa_can_compile_dynamic(backend):
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    model = build(CATForAudioClassification, depths=(2, 1), num_heads=(2, 4), depthwise_kernel_size=0, stem_channels=())
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = torch.compile(model, dynamic=True, backend=backend)
    graphs = []
    with torch.no_grad():
        for frames in (48, 80, 101, 144, 203):
            features = torch.randn(2, frames, 384)
            torch.testing.assert_close(compiled(features).logits, model(features).logits, atol=1e-4, rtol=1e-4)
            graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[2], "a graph for each length"


def test_waveforms_of_any_length_can_be_compiled():
    model = build(CATForAudioClassification, depths=(1, 1), num_heads=(2, 4), depthwise_kernel_size=0, stem_channels=())
    torch.compiler.reset()
    compiled = torch.compile(model, dynamic=True, backend="eager")
    with torch.no_grad():
        for samples in (20_000, 31_111):
            waveforms = torch.randn(2, samples)
            mask = (torch.arange(samples) < torch.tensor([[samples], [9_000]])).int()
            torch.testing.assert_close(compiled(waveforms, mask).logits, model(waveforms, mask).logits)


def test_torch_compile_for_training():
    overrides = {"depths": (2, 1), "num_heads": (2, 4), "drop_path_rate": 0.0, "depthwise_kernel_size": 0}
    inputs, gradients = inputs_for(CATForAudioClassification, labels=True), []
    torch.compiler.reset()
    for compiled in (False, True):
        model = build(CATForAudioClassification, problem_type="single_label_classification", **overrides)
        run = torch.compile(model.train(), backend="aot_eager") if compiled else model.train()
        torch.manual_seed(3)
        run(**inputs).loss.backward()
        gradients.append({name: value.grad for name, value in model.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-4, rtol=1e-3)
