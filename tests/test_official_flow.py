"""transformers' own audio-classification script, step by step: what it calls works on CAT as it is."""

import importlib.util
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)

from transformers_cat import CATFeatureExtractor, CATForAudioClassification

from .conftest import awaken, small_config

datasets = pytest.importorskip("datasets")

SCRIPT = Path(__file__).parents[1] / "examples" / "run_audio_classification.py"
TONES = {"high": 3_000, "low": 300, "middle": 1_000}  # Hz
RATE = 16_000  # not the model's


def tone(name: str, index: int) -> np.ndarray:
    time = np.arange(int(RATE * (0.3 + 0.05 * index))) / RATE
    noise = np.random.default_rng(index).normal(0, 0.01, len(time))
    return (0.3 * np.sin(2 * np.pi * TONES[name] * time + index) + noise).astype(np.float32)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    """A checkpoint with two classes, whose head does not fit the data."""
    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(0)
    awaken(CATForAudioClassification(small_config(num_labels=2))).save_pretrained(folder)
    CATFeatureExtractor().save_pretrained(folder)
    return folder


@pytest.fixture
def decoding(tmp_path) -> None:
    """`datasets` decodes audio by torchcodec, which needs FFmpeg's libraries."""
    decoders = pytest.importorskip("torchcodec.decoders", exc_type=ImportError)
    soundfile.write(tmp_path / "probe.wav", tone("low", 0), RATE)
    try:
        decoders.AudioDecoder(str(tmp_path / "probe.wav")).get_all_samples()
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"torchcodec cannot decode here: {str(error).splitlines()[0]}")


def arrays() -> "datasets.DatasetDict":
    """Tones that are decoded and at the model's rate already, as dictionaries with `array` and `sampling_rate`."""
    from transformers_cat.audio import resample

    splits = {}
    for split, indices in {"train": range(3), "validation": range(3, 5)}.items():
        rows = [(resample(tone(name, i), RATE, 32_000), name) for name in TONES for i in indices]
        audio = [{"array": clip, "sampling_rate": 32_000} for clip, _ in rows]
        labels = [sorted(TONES).index(name) for _, name in rows]
        splits[split] = datasets.Dataset.from_dict({"audio": audio, "label": labels}).cast_column(
            "label", datasets.ClassLabel(names=sorted(TONES))
        )
    return datasets.DatasetDict(splits)


def written_tones(folder: Path) -> "datasets.DatasetDict":
    """The tones as files of another rate than the model's, one folder for each split and class."""
    for split, indices in {"train": range(3), "validation": range(3, 5)}.items():
        for name in TONES:
            (folder / split / name).mkdir(parents=True)
            for i in indices:
                soundfile.write(folder / split / name / f"{i}.wav", tone(name, i), RATE)
    return datasets.load_dataset("audiofolder", data_dir=str(folder), cache_dir=str(folder / "cache"))


def spoken_digits(folder: Path, data_dir: Path) -> "datasets.DatasetDict":
    """Recordings at 8 kHz of three digits."""
    for split, source in {"train": "train", "validation": "test"}.items():
        for digit in "012":
            (folder / split / digit).mkdir(parents=True)
            for path in sorted((data_dir / "fsdd" / source / digit).iterdir())[:3]:
                (folder / split / digit / path.name).symlink_to(path)
    return datasets.load_dataset("audiofolder", data_dir=str(folder), cache_dir=str(folder / "cache"))


def test_a_mask_that_was_dropped_is_seen_in_the_features(small_model):
    """The script keeps `input_values` alone of the clips that it pads together."""
    extractor = CATFeatureExtractor()
    clips = [np.random.default_rng(0).normal(0, 0.1, length) for length in (32_000, 9_000, 20_001)]
    batch = extractor(clips, sampling_rate=32_000, return_tensors="pt")
    batch["input_values"][2, 3] = extractor(np.zeros(320), sampling_rate=32_000, return_tensors="pt")["input_values"][0]
    with torch.no_grad():
        expected, given = small_model(**batch).logits, small_model(batch["input_values"]).logits
    torch.testing.assert_close(given, expected, rtol=0, atol=0)
    for model in (small_model, small_model.train()):
        assert torch.equal(model.cat.features(batch["input_values"], None)[1], batch["attention_mask"].bool())
        assert model.cat.features(batch["input_values"][:1], None)[1] is None  # nothing is padding


def test_silence_whose_features_are_zero_is_no_padding():
    """As that of the `log_offset` 1 is."""
    model = CATForAudioClassification(small_config(log_offset=1.0)).eval()
    batch = CATFeatureExtractor(log_offset=1.0)([np.zeros(3_200), np.ones(3_200)], 32_000, return_tensors="pt")
    assert not batch["input_values"][0].any()
    assert model.cat.features(batch["input_values"], None)[1] is None


def random_crop(clip: np.ndarray, seconds: float, rate: int) -> np.ndarray:
    length = int(rate * seconds)
    start = random.randint(0, max(0, len(clip) - length))
    return clip[start : start + length]


def fine_tune(pretrained: Path, output: Path, data: "datasets.DatasetDict", attention_mask: bool) -> Trainer:
    """What the script does between its arguments and its end, with its calls and settings."""
    extractor = AutoFeatureExtractor.from_pretrained(pretrained, return_attention_mask=attention_mask)
    name = extractor.model_input_names[0]
    rate = extractor.sampling_rate
    if isinstance(data["train"].features["audio"], datasets.Audio):
        data = data.cast_column("audio", datasets.Audio(sampling_rate=rate))

    def transform(rows: dict, seconds: float | None) -> dict:
        clips = [audio["array"] for audio in rows["audio"]]
        if seconds is not None:
            clips = [random_crop(clip, seconds, rate) for clip in clips]
        inputs = extractor(clips, sampling_rate=rate)
        return {name: inputs.get(name), "labels": list(rows["label"])}

    labels = data["train"].features["label"].names
    config = AutoConfig.from_pretrained(
        pretrained,
        num_labels=len(labels),
        label2id={label: str(i) for i, label in enumerate(labels)},
        id2label={str(i): label for i, label in enumerate(labels)},
        finetuning_task="audio-classification",
    )
    model = AutoModelForAudioClassification.from_pretrained(pretrained, config=config, ignore_mismatched_sizes=True)
    model.freeze_feature_encoder()
    data["train"].set_transform(lambda rows: transform(rows, 0.25), output_all_columns=False)
    data["validation"].set_transform(lambda rows: transform(rows, None), output_all_columns=False)
    arguments = TrainingArguments(
        str(output),
        do_train=True,
        do_eval=True,
        use_cpu=True,
        num_train_epochs=1,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        learning_rate=1e-3,
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        compute_metrics=lambda p: {"accuracy": float(np.mean(np.argmax(p.predictions, axis=1) == p.label_ids))},
        processing_class=extractor,
    )
    result = trainer.train()
    trainer.save_model()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    trainer.create_model_card(
        finetuned_from=str(pretrained), tasks="audio-classification", dataset="tones", tags=["audio-classification"]
    )
    return trainer


def check(trainer: Trainer, pretrained: Path, output: Path, labels: list[str]) -> None:
    """The run has left a model that is trained, complete and can be served."""
    left = {path.name for path in output.iterdir()}
    assert left >= {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "trainer_state.json",
        "all_results.json",
        "train_results.json",
        "eval_results.json",
        "README.md",
    }
    metrics = json.loads((output / "all_results.json").read_text())
    assert np.isfinite([metrics["train_loss"], metrics["eval_loss"]]).all()
    assert 0 <= metrics["eval_accuracy"] <= 1
    before = CATForAudioClassification.from_pretrained(pretrained).cat.state_dict()
    after = AutoModelForAudioClassification.from_pretrained(output)
    moved = {key for key, value in after.cat.named_parameters() if not torch.equal(value, before[key])}
    assert moved and not any(key.startswith("embeddings.") for key in moved)  # those were frozen
    assert after.config.id2label == dict(enumerate(labels))
    assert after.config.label2id == {label: str(i) for i, label in enumerate(labels)}  # as the script gives them
    assert after.config.problem_type == "single_label_classification"
    clip = tone("low", 0)
    scores = pipeline("audio-classification", model=str(output))({"array": clip, "sampling_rate": RATE})
    assert {item["label"] for item in scores} == set(labels)
    expected = trainer.model.eval()
    batch = CATFeatureExtractor()(trainer.eval_dataset.with_format(None)[0]["audio"]["array"], sampling_rate=32_000)
    values = torch.as_tensor(batch["input_values"])
    with torch.no_grad():
        torch.testing.assert_close(after.eval()(values).logits, expected(values).logits)


@pytest.mark.parametrize("attention_mask", [True, False])
def test_on_arrays(pretrained, tmp_path, attention_mask):
    trainer = fine_tune(pretrained, tmp_path, arrays(), attention_mask)
    check(trainer, pretrained, tmp_path, sorted(TONES))
    batch = next(iter(trainer.get_eval_dataloader()))
    assert set(batch) == {"input_values", "labels"} | ({"attention_mask"} if attention_mask else set())
    assert batch["input_values"].shape[::2] == (4, 384) and batch["input_values"].dtype == torch.float32
    assert batch["labels"].dtype == torch.int64
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["return_attention_mask"] is attention_mask


def test_on_a_folder_of_files(pretrained, tmp_path, decoding):
    trainer = fine_tune(pretrained, tmp_path / "out", written_tones(tmp_path / "data"), attention_mask=True)
    check(trainer, pretrained, tmp_path / "out", sorted(TONES))


def test_on_recordings(pretrained, tmp_path, data_dir, decoding):
    trainer = fine_tune(pretrained, tmp_path / "out", spoken_digits(tmp_path / "data", data_dir), attention_mask=True)
    check(trainer, pretrained, tmp_path / "out", ["0", "1", "2"])


def test_decoded_columns_are_at_the_models_rate(tmp_path, decoding):
    files = [str(tmp_path / f"{i}.wav") for i in range(2)]
    for i, path in enumerate(files):
        soundfile.write(path, np.stack([tone("low", i)] * 2, axis=1), RATE)
    rows = datasets.Dataset.from_dict({"audio": files}).cast_column("audio", datasets.Audio(sampling_rate=32_000))
    clips = [row["audio"]["array"] for row in rows]
    batch = CATFeatureExtractor()(clips, sampling_rate=32_000)
    assert [mask.sum() for mask in batch["attention_mask"]] == [30, 35]
    assert isinstance(batch["input_values"], np.ndarray) and batch["input_values"].dtype == np.float32


FLAGS = {
    "model_name_or_path": "a/model",
    "config_name": "a/config",
    "cache_dir": "cache",
    "model_revision": "v1",
    "feature_extractor_name": "an/extractor",
    "freeze_feature_encoder": True,
    "attention_mask": False,
    "token": "secret",
    "trust_remote_code": True,
    "ignore_mismatched_sizes": True,
    "dataset_name": "a/dataset",
    "dataset_config_name": "part",
    "train_split_name": "training",
    "eval_split_name": "validation",
    "audio_column_name": "clip",
    "label_column_name": "class",
    "max_train_samples": 10,
    "max_eval_samples": 5,
    "max_length_seconds": 1.5,
    "do_train": True,
    "learning_rate": 3e-5,
    "num_train_epochs": 5.0,
    "warmup_steps": 0.1,
    "gradient_accumulation_steps": 4,
    "per_device_train_batch_size": 32,
    "dataloader_num_workers": 4,
    "logging_steps": 10,
    "metric_for_best_model": "accuracy",
    "save_total_limit": 3,
    "seed": 1,
    "hub_model_id": "me/mine",
}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("run_audio_classification", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their types up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize("kind", ["flags", "json"])
def test_our_script_takes_the_same_flags(script, tmp_path, kind):
    flags = {**FLAGS, "output_dir": str(tmp_path / "out")}
    arguments = [item for name, value in flags.items() for item in (f"--{name}", str(value))]
    if kind == "json":
        arguments = [str(tmp_path / "arguments.json")]
        Path(arguments[0]).write_text(json.dumps(flags))
    parsed = {name: value for part in script.parse_arguments(arguments) for name, value in vars(part).items()}
    assert {name: parsed[name] for name in flags} == flags


def test_our_script_takes_files_of_clips(script, tmp_path):
    arguments = f"--train_file a.csv --eval_file b.csv --do_train --output_dir {tmp_path}"
    _, data, _ = script.parse_arguments(arguments.split())
    assert (data.train_file, data.eval_file) == ("a.csv", "b.csv")
