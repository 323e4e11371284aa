"""Checkpoints go to a local stand-in of the Hub and come back: through the helper, a Trainer and the example script."""

import csv
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import soundfile
import torch
import transformers
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load, load_file
from transformers import (
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    pipeline,
)

from transformers_cat import (
    CATConfig,
    CATFeatureExtractor,
    CATForAudioClassification,
    CATModel,
    include_code,
    model_card,
    push_to_hub,
)

from .conftest import awaken
from .hub_stand_in import HubStandIn

REPO = "someone/cat"
TOKEN, FOREIGN_TOKEN = "hf_someone", "hf_another"
MODULES = ("causal", "configuration_cat", "feature_extraction_cat", "modeling_cat", "linear", "mrmf", "whitening")
CODE = {f"{name}.py" for name in MODULES}
CHECKPOINT = {"config.json", "preprocessor_config.json", "model.safetensors", "README.md"}

# Any import of the package fails, as it does for a user who has only transformers.
USE = """
import sys
sys.modules["transformers_cat"] = None
import torch
from safetensors.torch import save_file
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForAudioClassification, pipeline
repo, revision, output = sys.argv[1:]
try:
    AutoModelForAudioClassification.from_pretrained(repo, revision=revision)
    sys.exit("the code ran without being trusted")
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
trust = {"revision": revision, "trust_remote_code": True}
extractor = AutoFeatureExtractor.from_pretrained(repo, **trust)
model = AutoModelForAudioClassification.from_pretrained(repo, **trust)
body = AutoModel.from_pretrained(repo, **trust)
torch.manual_seed(0)
clip = torch.randn(20_000) * 0.1
with torch.no_grad():
    batch = extractor(clip, sampling_rate=32_000, return_tensors="pt")
    save_file({"logits": model(**batch).logits, "latents": body(**batch).pooler_output}, output)
    best = pipeline("audio-classification", model=repo, **trust)(clip.numpy(), top_k=1)[0]
    assert best["label"] == model.config.id2label[int(model(**batch).logits.argmax())]
"""


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub with two users, and huggingface_hub set to it, with an empty cache and no token."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with HubStandIn({TOKEN: "someone", FOREIGN_TOKEN: "another"}) as hub:
        settings = {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
        }
        for name, value in settings.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        # transformers keeps a client, which keeps the address that it was made with.
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
        yield hub
        # What the client asks of the Hub in general does not count.
        assert [route for route in hub.unknown if "someone" in route] == []


@pytest.fixture
def extractor():
    return CATFeatureExtractor()


def cached(tmp_path, token=None, **arguments):
    """Arguments of from_pretrained with a cache of their own, so that nothing is found that was not downloaded now."""
    return {"cache_dir": tmp_path / f"cache of {token}", "token": token, **arguments}


class TestPush:
    def test_one_commit_has_everything(self, hub, small_model, extractor):
        commit = push_to_hub(small_model, extractor, REPO, token=TOKEN, commit_message="Upload CAT")
        repository = hub.repositories[REPO]
        assert repository.messages["main"] == ["initial commit", "Upload CAT"]
        assert commit.oid == repository.branches["main"]
        assert set(repository.files()) == CODE | CHECKPOINT | {".gitattributes"}
        assert not repository.private

    def test_weights_arrive_bit_by_bit_as_large_file(self, hub, small_model, extractor):
        push_to_hub(small_model, extractor, REPO, token=TOKEN)
        weights = hub.repositories[REPO].files()["model.safetensors"]
        assert list(hub.large_files) == [hashlib.sha256(weights).hexdigest()]
        uploaded, expected = load(weights), small_model.state_dict()
        assert uploaded.keys() == expected.keys()
        assert all(torch.equal(uploaded[name], expected[name]) for name in expected)

    def test_code_is_that_of_the_package(self, hub, small_model, extractor):
        push_to_hub(small_model, extractor, REPO, token=TOKEN)
        for name in CODE:
            source = Path(sys.modules[CATModel.__module__].__file__).with_name(name)
            assert hub.repositories[REPO].files()[name] == source.read_bytes()

    def test_nothing_new_is_no_commit(self, hub, small_model, extractor):
        first = push_to_hub(small_model, extractor, REPO, token=TOKEN)
        assert push_to_hub(small_model, extractor, REPO, token=TOKEN).oid == first.oid
        assert len(hub.repositories[REPO].commits) == 2

    def test_card(self, hub, small_model, extractor):
        push_to_hub(small_model, extractor, REPO, token=TOKEN)
        default = hub.repositories[REPO].files()["README.md"].decode()
        assert ModelCard(default).data.pipeline_tag == "audio-classification"
        assert "No result is recorded" in default and f'model="{REPO}"' in default
        card = model_card(small_model, name="mine", license="mit")
        push_to_hub(small_model, extractor, REPO, card=card, token=TOKEN)
        assert hub.repositories[REPO].files()["README.md"].decode() == str(card)
        push_to_hub(small_model, extractor, REPO, token=TOKEN)  # the card that is there, stays
        assert hub.repositories[REPO].files()["README.md"].decode() == str(card)

    def test_revision(self, hub, small_model, extractor, tmp_path):
        push_to_hub(small_model, extractor, REPO, token=TOKEN)
        before = {name: value.clone() for name, value in small_model.state_dict().items()}
        awaken(small_model)
        push_to_hub(small_model, extractor, REPO, token=TOKEN, revision="longer")
        push_to_hub(small_model, extractor, REPO, token=TOKEN, revision="longer")  # the branch exists by now
        assert len(hub.repositories[REPO].messages["main"]) == 2
        for revision, expected in (("main", before), ("longer", small_model.state_dict())):
            loaded = CATForAudioClassification.from_pretrained(REPO, revision=revision, **cached(tmp_path)).state_dict()
            assert all(torch.equal(loaded[name], expected[name]) for name in expected)
        with pytest.raises(OSError, match="shorter is not a valid git identifier"):
            CATForAudioClassification.from_pretrained(REPO, revision="shorter", **cached(tmp_path))

    @pytest.mark.parametrize(
        ("repo", "token", "status"),
        [(REPO, None, 401), (REPO, "hf_invented", 401), (REPO, FOREIGN_TOKEN, 403)],
    )
    def test_without_the_right_token(self, hub, small_model, extractor, repo, token, status):
        with pytest.raises(HfHubHTTPError) as raised:
            push_to_hub(small_model, extractor, repo, token=token)
        assert raised.value.response.status_code == status
        assert hub.repositories == {}

    def test_another_model_is_refused_before_anything_is_sent(self, hub, extractor):
        other = ViTForImageClassification(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
        with pytest.raises(TypeError, match="not that of a ViTForImageClassification"):
            push_to_hub(other, extractor, REPO, token=TOKEN)
        assert hub.requests == []

    def test_a_private_repository_needs_its_owners_token(self, hub, small_model, extractor, tmp_path):
        push_to_hub(small_model, extractor, REPO, token=TOKEN, private=True)
        assert hub.repositories[REPO].private
        for token in (None, "hf_invented", FOREIGN_TOKEN):
            for cls in (AutoModelForAudioClassification, AutoFeatureExtractor):
                with pytest.raises(OSError, match="someone/cat"):
                    cls.from_pretrained(REPO, **cached(tmp_path, token))
        model = AutoModelForAudioClassification.from_pretrained(REPO, **cached(tmp_path, TOKEN))
        assert all(torch.equal(model.state_dict()[k], v) for k, v in small_model.state_dict().items())


class TestDownload:
    def test_without_the_package(self, hub, small_model, extractor, tmp_path):
        """In a fresh process that knows the Hub by its environment alone: a private repository, and a branch of it."""
        push_to_hub(small_model, extractor, REPO, token=TOKEN, private=True, revision="longer")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
        }
        command = [sys.executable, "-c", USE, REPO, "longer", str(tmp_path / "outputs.safetensors")]
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr
        torch.manual_seed(0)
        batch = extractor(torch.randn(20_000) * 0.1, sampling_rate=32_000, return_tensors="pt")
        with torch.no_grad():
            expected = small_model(**batch)
        outputs = load_file(tmp_path / "outputs.safetensors")
        # Equal but for rounding, which depends on where the weights lie in memory.
        torch.testing.assert_close(outputs["logits"], expected.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(outputs["latents"], expected.pooler_output, atol=1e-5, rtol=1e-5)

    def test_with_the_package_no_flag_is_needed(self, hub, small_model, extractor, tmp_path):
        push_to_hub(small_model, extractor, REPO, token=TOKEN)
        download = cached(tmp_path)
        assert type(AutoModelForAudioClassification.from_pretrained(REPO, **download)) is CATForAudioClassification
        assert type(AutoModel.from_pretrained(REPO, **download)) is CATModel
        assert type(AutoFeatureExtractor.from_pretrained(REPO, **download)) is CATFeatureExtractor
        classifier = pipeline("audio-classification", model=REPO, model_kwargs={"cache_dir": download["cache_dir"]})
        assert type(classifier.model) is CATForAudioClassification
        clip = np.random.default_rng(0).normal(0, 0.1, 20_000)
        with torch.no_grad():
            logits = small_model(**extractor(clip, sampling_rate=32_000, return_tensors="pt")).logits[0]
        best = classifier(clip, top_k=1)[0]
        assert best["label"] == small_model.config.id2label[int(logits.argmax())]
        assert best["score"] == pytest.approx(float(logits.softmax(-1).max()), abs=1e-5)
        assert not any(path.endswith(".py") for _, path, _ in hub.requests)  # nobody fetched code


class TestIncludeCode:
    def names(self, model, extractor, folder):
        model.save_pretrained(folder)
        extractor.save_pretrained(folder)
        return {path.name for path in folder.iterdir()}

    def test_only_inside(self, small_model, extractor, tmp_path):
        plain = {"config.json", "preprocessor_config.json", "model.safetensors"}
        with include_code(small_model, extractor):
            assert self.names(small_model, extractor, tmp_path / "inside") == plain | CODE
        assert self.names(small_model, extractor, tmp_path / "outside") == plain
        for name in ("config.json", "preprocessor_config.json"):
            assert "auto_map" in json.loads((tmp_path / "inside" / name).read_text())
            assert "auto_map" not in json.loads((tmp_path / "outside" / name).read_text())

    def test_ends_with_an_error_too(self, small_model, extractor):
        with pytest.raises(KeyError), include_code(small_model, extractor):
            raise KeyError
        assert CATConfig._auto_class is None and CATForAudioClassification._auto_class is None

    def test_a_class_of_the_users_own_is_refused(self, small_model, extractor):
        """Whose own file would be there without those that it needs."""

        class Own(CATForAudioClassification):
            pass

        with pytest.raises(TypeError, match="not that of a Own"), include_code(Own(small_model.config), extractor):
            raise AssertionError("nothing may be saved")
        remote = type("Remote", (CATForAudioClassification,), {"__module__": "transformers_modules.a.modeling_cat"})
        with pytest.raises(TypeError, match="trust_remote_code"), include_code(remote(small_model.config), extractor):
            raise AssertionError("nothing may be saved")
        sharded = type("FSDPOwn", (CATForAudioClassification,), {"__module__": "torch.distributed.fsdp"})
        with include_code(sharded(small_model.config), extractor):
            pass

    def test_what_the_user_registered_stays(self, small_model, extractor, monkeypatch):
        monkeypatch.setattr(CATModel, "_auto_class", "AutoModel")
        with include_code(small_model, extractor):
            pass
        assert CATModel._auto_class == "AutoModel"


def test_any_trainer_pushes_a_complete_checkpoint(hub, small_model, extractor, tmp_path):
    arguments = TrainingArguments(str(tmp_path / "run"), hub_model_id=REPO, hub_token=TOKEN, use_cpu=True)
    trainer = Trainer(small_model, arguments, processing_class=extractor)
    with include_code(small_model, extractor):
        trainer.push_to_hub()
    assert set(hub.repositories[REPO].files()) >= CODE | CHECKPOINT


class TestScript:
    @pytest.fixture
    def script(self):
        path = Path(__file__).parents[1] / "examples" / "run_audio_classification.py"
        spec = importlib.util.spec_from_file_location("run_audio_classification", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their types up there
        spec.loader.exec_module(module)
        yield module
        del sys.modules[spec.name]

    @pytest.fixture
    def data(self, tmp_path):
        """Two tones in two folds, and a configuration."""
        rows = [("audio", "label", "fold")]
        for name, frequency in (("high", 4000), ("low", 400)):
            for fold in (1, 2):
                tone = 0.3 * np.sin(2 * np.pi * frequency * np.arange(8_000) / 32_000)
                soundfile.write(tmp_path / f"{name}{fold}.wav", tone, 32_000)
                rows.append((f"{name}{fold}.wav", name, fold))
        with (tmp_path / "clips.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
        config = {"model_type": CATConfig.model_type, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2]}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    def arguments(self, data, *more):
        flags = f"--data {data}/clips.csv --config_name {data} --output_dir {data}/run --test_folds 1 --report_to none"
        size = "--num_train_epochs 1 --dataloader_num_workers 0 --use_cpu --disable_tqdm true --do_train --do_eval"
        return [*flags.split(), *size.split(), *more]

    def test_push_to_hub(self, hub, script, data):
        hub_flags = (
            f"--push_to_hub --hub_model_id {REPO} --hub_token {TOKEN} --hub_private_repo true --hub_revision tones"
        )
        command = [*self.arguments(data, *hub_flags.split()), "--num_train_epochs", "2", "--average_last_epochs", "2"]
        metrics = script.main(command)
        repository = hub.repositories[REPO]
        assert repository.private and repository.messages["main"] == ["initial commit"]
        assert repository.messages["tones"] == ["End of training"]  # one commit
        files = repository.files("tones")
        assert set(files) >= CODE | CHECKPOINT
        card = ModelCard(files["README.md"].decode())
        (result,) = card.data.eval_results
        assert result.metric_value == metrics["eval_accuracy"] and result.dataset_args == {"clips": 2}
        assert f'model="{REPO}"' in card.text
        assert [name for name in files if name.endswith(".safetensors")] == ["model.safetensors"]
        # Neither the token nor where things lie on this machine is told to anyone; nothing is pickled.
        for name, content in files.items():
            assert TOKEN.encode() not in content and str(data).encode() not in content, name
            assert not name.endswith((".bin", ".pt", ".pth", ".pkl")), name
        for path in (data / "run").rglob("*.bin"):
            assert TOKEN.encode() not in path.read_bytes(), path
        script.main(command)  # which finds more files in the folder
        assert set(repository.files("tones")) == set(files)
        model = CATForAudioClassification.from_pretrained(
            REPO, revision="tones", cache_dir=data / "cache of its own", token=TOKEN
        )
        assert model.config.id2label == {0: "high", 1: "low"}

    def test_without_the_hub_the_folder_is_as_complete(self, script, data):
        metrics = script.main(self.arguments(data))
        assert {path.name for path in (data / "run").iterdir()} >= CODE | CHECKPOINT | {"results.json"}
        card = ModelCard.load(data / "run" / "README.md")
        assert card.data.eval_results[0].metric_value == metrics["eval_accuracy"]
        assert "1.0 times the reconstruction loss" in card.text  # as it was trained, not as it was saved
        config = json.loads((data / "run" / "config.json").read_text())
        assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForAudioClassification"}


class TestStandIn:
    """The stand-in refuses what it should, or the tests above would mean less."""

    def send(self, hub, method, path, content, token=TOKEN):
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        request = urllib.request.Request(hub.url + path, data=body, headers=headers, method=method)
        try:
            with urllib.request.urlopen(request) as response:
                return response.status
        except urllib.error.HTTPError as error:
            return error.code

    def test_uploads_with_another_content_than_announced(self, hub, small_model, extractor):
        push_to_hub(small_model, extractor, REPO, token=TOKEN)
        oid = hashlib.sha256(b"announced").hexdigest()
        assert self.send(hub, "PUT", f"/upload/{REPO}/{oid}/9", b"delivered") == 400
        lines = [
            {"key": "header", "value": {"summary": "x"}},
            {"key": "lfsFile", "value": {"path": "model.safetensors", "algo": "sha256", "oid": oid, "size": 9}},
        ]
        commit = "\n".join(map(json.dumps, lines)).encode()
        assert self.send(hub, "POST", f"/api/models/{REPO}/commit/main", commit) == 400
        assert self.send(hub, "PUT", f"/upload/{REPO}/{oid}/9", b"announced") == 200
        assert self.send(hub, "POST", f"/api/models/{REPO}/commit/main", commit) == 200
        assert self.send(hub, "POST", f"/api/models/{REPO}/commit/none", commit) == 404
        assert self.send(hub, "POST", f"/api/models/{REPO}/commit/main", commit, FOREIGN_TOKEN) == 403
        assert self.send(hub, "POST", f"/api/models/{REPO}/commit/main", commit, token=None) == 401

    def test_metadata_that_is_not_yaml(self, hub):
        broken = {"content": "---\nlicense: [mit\n---\ntext", "repoType": "model"}
        assert self.send(hub, "POST", "/api/validate-yaml", broken) == 400
