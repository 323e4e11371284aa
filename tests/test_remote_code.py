"""A checkpoint that carries its code works where the package is not installed."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from transformers_cat import CATConfig, CATFeatureExtractor, CATForAudioClassification, include_code

from .conftest import awaken, small_config

# Any import of the package fails, as it does for a user who has only transformers.
WITHOUT_PACKAGE = "import sys; sys.modules['transformers_cat'] = None\n"
USE = """
import torch
from safetensors.torch import save_file
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForAudioClassification, pipeline
folder, again = sys.argv[1:]
extractor = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForAudioClassification.from_pretrained(folder, trust_remote_code=True)
body = AutoModel.from_pretrained(folder, trust_remote_code=True)
torch.manual_seed(0)
clip = torch.randn(40_000) * 0.1
with torch.no_grad():
    batch = extractor(clip, sampling_rate=32_000, return_tensors="pt")
    outputs = {"logits": model(**batch).logits, "latents": body(**batch).pooler_output}
best = pipeline("audio-classification", model=folder, trust_remote_code=True)(clip.numpy(), top_k=1)
assert best[0]["label"] == model.config.id2label[int(outputs["logits"].argmax())]
model.save_pretrained(again)
extractor.save_pretrained(again)
save_file(outputs, again + "/outputs.safetensors")
"""


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """Folder with weights, configurations and code."""
    for cls, auto_class in (
        (CATConfig, "AutoConfig"),
        (CATForAudioClassification, "AutoModelForAudioClassification"),
        (CATFeatureExtractor, "AutoFeatureExtractor"),
    ):
        monkeypatch.setattr(cls, "_auto_class", auto_class)
    torch.manual_seed(0)
    model = awaken(CATForAudioClassification(small_config())).eval()
    model.config.auto_map = {"AutoModel": "modeling_cat.CATModel"}
    model.save_pretrained(tmp_path / "checkpoint")
    CATFeatureExtractor().save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def use(folder, again, cache) -> None:
    """Loads, runs and saves a checkpoint in a fresh process."""
    environment = {**os.environ, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", WITHOUT_PACKAGE + USE, str(folder), str(again)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr


def test_loads_runs_and_saves_without_the_package(checkpoint, tmp_path):
    code = {"causal", "configuration_cat", "feature_extraction_cat", "linear", "modeling_cat", "mrmf", "whitening"}
    assert {path.stem for path in checkpoint.glob("*.py")} == code
    use(checkpoint, tmp_path / "first", tmp_path / "cache")
    use(tmp_path / "first", tmp_path / "second", tmp_path / "cache")
    torch.manual_seed(0)
    clip = torch.randn(40_000) * 0.1
    batch = CATFeatureExtractor()(clip, sampling_rate=32_000, return_tensors="pt")
    with torch.no_grad():
        expected = CATForAudioClassification.from_pretrained(checkpoint)(**batch)
    for folder in ("first", "second"):
        outputs = load_file(tmp_path / folder / "outputs.safetensors")
        # Another process may sum in another order.
        torch.testing.assert_close(outputs["logits"], expected.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(outputs["latents"], expected.pooler_output, atol=1e-5, rtol=1e-5)
        assert {path.stem for path in (tmp_path / folder).glob("*.py")} == code


TWICE = """
import sys, torch
from transformers import AutoModelForAudioClassification
clip = torch.randn(1, 16_000)
logits = [
    AutoModelForAudioClassification.from_pretrained(folder, trust_remote_code=True).eval()(clip).logits
    for folder in sys.argv[1:]
]
import transformers_cat
logits.append(transformers_cat.CATForAudioClassification.from_pretrained(sys.argv[1]).eval()(clip).logits)
assert all(torch.allclose(logits[0], other, atol=1e-5) for other in logits)
"""


def test_several_checkpoints_bring_their_code_into_one_process(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "other")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", TWICE, str(checkpoint), str(tmp_path / "other")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr


def test_the_package_comes_before_the_code(checkpoint):
    model = CATForAudioClassification.from_pretrained(checkpoint)
    assert type(model) is CATForAudioClassification
    auto_map = json.loads((checkpoint / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForAudioClassification"}


def test_what_is_saved_without_code_names_none(checkpoint, tmp_path, monkeypatch):
    for cls in (CATConfig, CATForAudioClassification, CATFeatureExtractor):
        monkeypatch.setattr(cls, "_auto_class", None)
    model = CATForAudioClassification.from_pretrained(checkpoint)
    extractor = CATFeatureExtractor.from_pretrained(checkpoint)
    assert model.config.auto_map and extractor.auto_map
    model.config.auto_map["AutoModel"] = "user/repository--modeling_cat.CATModel"
    for part in (model, extractor):
        part.save_pretrained(tmp_path / "again")
    assert not list((tmp_path / "again").glob("*.py"))
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert saved["auto_map"] == {"AutoModel": "user/repository--modeling_cat.CATModel"}
    assert "auto_map" not in json.loads((tmp_path / "again" / "preprocessor_config.json").read_text())
    with include_code(model, extractor):
        model.save_pretrained(tmp_path / "with_code")
    assert (tmp_path / "with_code" / "modeling_cat.py").is_file()


def test_each_file_imports_all_that_it_needs_itself(checkpoint):
    """Old releases copy the files that a class's own file imports, but not those that these import."""

    def imports(name: str) -> set[str]:
        return set(re.findall(r"^from \.(\w+) import", (checkpoint / f"{name}.py").read_text(), re.MULTILINE))

    for name in ("configuration_cat", "feature_extraction_cat", "modeling_cat"):
        own = imports(name)
        assert own.union(*map(imports, own)) == own
