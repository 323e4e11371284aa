"""What goes wrong without a word in models that live outside of transformers, one test for each trap."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tomllib
import torch
import transformers
from packaging.version import Version
from transformers import Trainer, TrainingArguments, pipeline
from transformers.loss.loss_utils import ForSequenceClassificationLoss
from transformers.utils.generic import find_labels

import transformers_cat
from transformers_cat import CATConfig, CATFeatureExtractor, CATForAudioClassification, CATModel

from .conftest import awaken, small_config

ROOT = Path(__file__).parents[1]
PACKAGE = Path(transformers_cat.__file__).parent
CLIP = np.random.default_rng(0).uniform(-0.5, 0.5, 16_000).astype(np.float32)


def save_small_checkpoint(folder: Path, **overrides) -> Path:
    torch.manual_seed(0)
    awaken(CATForAudioClassification(small_config(**overrides))).save_pretrained(folder)
    CATFeatureExtractor().save_pretrained(folder)
    return folder


def run_in_fresh_process(code: str, *arguments) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_trainer_divides_the_loss_by_its_accumulation_steps(tmp_path):
    """A forward with **kwargs would pass for one that divides by itself; see also `test_distributed.py`."""
    trainer = Trainer(CATForAudioClassification(small_config()), TrainingArguments(tmp_path, use_cpu=True))
    assert trainer.model_accepts_loss_kwargs is False


WITHOUT_TORCHAUDIO = """
import sys
sys.modules["torchaudio"] = None
import numpy as np
import torch
from transformers import pipeline
from transformers_cat import CATFeatureExtractor, CATForAudioClassification
clip = np.sin(np.arange(16_000) / 10).astype(np.float32)
batch = CATFeatureExtractor()(clip, sampling_rate=32_000, return_tensors="pt")
model = CATForAudioClassification.from_pretrained(sys.argv[1])
scores = pipeline("audio-classification", model=sys.argv[1])(clip, top_k=5)
assert abs(scores[0]["score"] - model(**batch).logits.softmax(-1).max().item()) < 1e-5
"""


def test_works_without_torchaudio(tmp_path):
    run_in_fresh_process(WITHOUT_TORCHAUDIO, save_small_checkpoint(tmp_path))


def test_torch_is_bounded_by_the_last_torchaudio():
    """An installed torchaudio that cannot be imported breaks all of transformers' audio."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert any(item.startswith("torch>=") and "<2.15" in item for item in dependencies)
    assert any(item.startswith("torchaudio>=") and "<2.12" in item for item in dependencies)


def test_loading_leaves_no_buffer_in_uninitialised_memory(tmp_path, poisoned_memory):
    loaded = CATForAudioClassification.from_pretrained(save_small_checkpoint(tmp_path))
    fresh = CATForAudioClassification(small_config())
    constants = {name for name, _ in fresh.named_buffers()} - fresh.state_dict().keys()
    assert any("mrmf" in name for name in constants) and any("index" in name for name in constants)
    for name in constants:
        assert torch.equal(loaded.get_buffer(name), fresh.get_buffer(name)), name
    with torch.no_grad():
        assert loaded(torch.randn(1, 16_000) * 0.1).logits.isfinite().all()


@pytest.mark.parametrize("model_class", [CATModel, CATForAudioClassification])
def test_the_attention_mask_is_a_parameter_of_forward(model_class):
    """Among the kwargs it would reach the attention kernels, which have a mask of their own."""
    assert inspect.signature(model_class.forward).parameters["attention_mask"].default is None
    model = model_class(small_config()).eval()
    model(input_values=torch.randn(2, 16, 384), attention_mask=torch.ones(2, 16, dtype=torch.long))


def test_only_one_parameter_of_forward_is_a_label():
    """With a second one, the Trainer would drop the loss and the metrics of evaluation."""
    assert find_labels(CATForAudioClassification) == ["labels"]
    assert find_labels(CATModel) == []


def test_the_class_name_says_which_loss():
    model = CATForAudioClassification(small_config())
    assert "ForAudioClassification" in type(model).__name__
    assert model.loss_function is ForSequenceClassificationLoss


def test_multi_label_scores_of_the_pipeline_are_sigmoids(tmp_path):
    folder = save_small_checkpoint(tmp_path, problem_type="multi_label_classification")
    model = CATForAudioClassification.from_pretrained(folder)
    batch = CATFeatureExtractor()(CLIP, sampling_rate=32_000, return_tensors="pt")
    expected = model(**batch).logits.sigmoid()[0].sort(descending=True).values.tolist()
    by_itself = Version(transformers.__version__) >= Version("5.23")
    for arguments in [{"function_to_apply": "sigmoid"}] + [{}] * by_itself:
        scores = pipeline("audio-classification", model=str(folder))(CLIP, top_k=5, **arguments)
        assert [item["score"] for item in scores] == pytest.approx(expected, abs=1e-5)


def test_top_k_counts_in_the_call_of_the_pipeline(tmp_path):
    classifier = pipeline("audio-classification", model=str(save_small_checkpoint(tmp_path)))
    assert [len(classifier(CLIP, top_k=k)) for k in (1, 3, 99)] == [1, 3, 5]
    # Given to `pipeline(...)` it has no effect, so nothing here shows it there.
    documents = [ROOT / "README.md", *PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.md"), *(ROOT / "examples").glob("*.py")]
    for path in documents:
        for line in path.read_text().splitlines():
            made, _, called = line.partition("pipeline(")[2].partition(")")
            assert "top_k" not in made or "top_k" in called, f"{path.name}: {line}"


FORBIDDEN = {"transformers_cat", "torchaudio", "datasets", "evaluate", "soundfile"}


def test_files_that_travel_with_a_checkpoint_are_flat():
    """transformers copies what `from .name import x` names, into one folder, and nothing else."""
    waiting, seen = ["configuration_cat", "feature_extraction_cat", "modeling_cat"], set()
    while waiting:
        name = waiting.pop()
        seen.add(name)
        for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text())):
            if isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & FORBIDDEN, name
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] not in FORBIDDEN, name
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1 and node.module and "." not in node.module, (name, ast.unparse(node))
                assert (PACKAGE / f"{node.module}.py").is_file(), node.module
                waiting += {node.module} - seen
    others = {"causal", "configuration_cat", "feature_extraction_cat", "linear", "mrmf", "whitening"}
    assert seen == {"modeling_cat", *others}


BEFORE_AND_AFTER_IMPORT = """
import sys
from transformers import AutoConfig, AutoModelForAudioClassification
try:
    AutoConfig.from_pretrained(sys.argv[1])
except ValueError as error:
    assert "causal-audio-transformer" in str(error), error
else:
    raise AssertionError("known without an import")
import transformers_cat
print(type(AutoModelForAudioClassification.from_pretrained(sys.argv[1])).__name__)
"""


def test_importing_the_package_once_is_what_registers_it(tmp_path):
    output = run_in_fresh_process(BEFORE_AND_AFTER_IMPORT, save_small_checkpoint(tmp_path))
    assert output.split()[-1] == "CATForAudioClassification"


def test_two_processes_on_cpus_are_started_by_torchrun():
    """`accelerate launch --cpu --num_processes 2` starts one, without a word. `test_distributed.py` counts them."""
    text = (ROOT / "README.md").read_text()
    assert "torchrun --nproc_per_node" in text and "accelerate launch --cpu" not in text


def test_derived_values_are_not_saved_and_follow_overrides(tmp_path):
    derived = [name for name, value in vars(CATConfig).items() if isinstance(value, property)]
    assert {"hidden_size", "num_hidden_layers", "feature_size"} <= set(derived)
    assert not set(derived) & CATConfig().to_dict().keys()
    small_config().save_pretrained(tmp_path)
    config = CATConfig.from_pretrained(tmp_path, embed_dim=32, filters=["mel"])
    assert (config.hidden_size, config.feature_size) == (128, 192)
    assert CATModel(config).eval()(torch.randn(1, 8, 192)).pooler_output.shape == (1, 128)
