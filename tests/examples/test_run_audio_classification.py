"""The training script, run in this process on written tones and on real clips where they are present."""

import csv
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification, SwinConfig, SwinModel

from transformers_cat import CATConfig, CATFeatureExtractor, CATForAudioClassification, load_audio

SCRIPT = Path(__file__).parents[2] / "examples" / "run_audio_classification.py"
TONES = {"low": 300, "middle": 1200, "high": 4800}  # Hz
RATE = 32000
CONFIG = {
    "model_type": "causal-audio-transformer",
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "num_bins": 16,
    "drop_path_rate": 0.1,
}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("run_audio_classification", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their types up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A configuration and eighteen short tones with noise: three classes, three folds."""
    folder = tmp_path_factory.mktemp("tones")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    generator = np.random.default_rng(0)
    rows = [("audio", "label", "fold")]
    for name, frequency in TONES.items():
        for i in range(6):
            time = np.arange(int((0.2 + 0.02 * i) * RATE)) / RATE
            tone = 0.3 * np.sin(2 * np.pi * frequency * time + i) + generator.normal(0, 0.01, len(time))
            soundfile.write(folder / f"{name}{i}.wav", tone, RATE)
            rows.append((f"{name}{i}.wav", name, i % 3 + 1))
    with (folder / "clips.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


def arguments(folder, output, *more):
    """A run of three steps per epoch; later flags override earlier ones."""
    own = f"--data {folder}/clips.csv --config_name {folder} --output_dir {output} --test_folds 1 --freq_mask 4"
    size = (
        "--per_device_train_batch_size 4 --num_train_epochs 2 --dataloader_num_workers 0 --use_cpu --disable_tqdm true"
    )
    return [*own.split(), *size.split(), *more]


@pytest.fixture(scope="module")
def run(script, folder, tmp_path_factory):
    """Output folder and metrics of one run with all augmentations."""
    output = tmp_path_factory.mktemp("run") / "out"
    metrics = script.main(arguments(folder, output, "--do_train", "--do_eval", "--token", "hf_confidential"))
    return output, metrics


def read_predictions(output):
    with (output / "predictions.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


class TestRun:
    def test_leaves_everything_behind(self, run):
        output, _ = run
        names = (
            "config.json model.safetensors preprocessor_config.json trainer_state.json all_results.json results.json "
            "predictions.csv learning_curve.png confusion_matrix.png"
        )
        for name in names.split():
            assert (output / name).stat().st_size > 0, name

    def test_results(self, run):
        output, metrics = run
        results = json.loads((output / "results.json").read_text())
        assert results["metrics"] == metrics
        assert results["clips"] == {"train": 12, "test": 6}
        assert results["labels"] == ["high", "low", "middle"]
        assert results["arguments"]["data"]["mixup_probability"] == 0.5
        assert results["arguments"]["training"]["learning_rate"] == 1e-3
        assert results["environment"]["torch"]
        everything = json.loads((output / "all_results.json").read_text())
        assert everything["eval_accuracy"] == metrics["eval_accuracy"]
        assert everything["eval_clips"] == 6

    def test_muon_is_what_trained_it(self, run):
        output, _ = run
        state = torch.load(next(output.glob("checkpoint-*/optimizer.pt")), weights_only=True)
        assert {"momentum", "exp_avg"} <= {name for own in state["state"].values() for name in own}
        assert json.loads((output / "results.json").read_text())["arguments"]["training"]["muon"] is True
        assert "--muon True" in (output / "README.md").read_text()

    def test_the_token_is_not_written(self, run):
        for path in run[0].rglob("*.json"):
            assert "hf_confidential" not in path.read_text(), path

    def test_predictions_are_those_of_the_saved_model(self, run, folder):
        output, metrics = run
        model = AutoModelForAudioClassification.from_pretrained(output).eval()
        extractor = AutoFeatureExtractor.from_pretrained(output)
        rows = read_predictions(output)
        assert len(rows) == 6
        for row in rows:
            inputs = extractor(load_audio(row["path"]), sampling_rate=RATE, return_tensors="pt")
            with torch.no_grad():
                probabilities = model(**inputs).logits[0].softmax(-1)
            assert model.config.id2label[int(probabilities.argmax())] == row["predicted"]
            assert float(row["probability"]) == pytest.approx(float(probabilities.max()), abs=1e-4)
            assert Path(row["path"]).name.startswith(row["label"])
        right = np.mean([row["label"] == row["predicted"] for row in rows])
        assert metrics["eval_accuracy"] == pytest.approx(right)

    def test_the_test_clips_are_those_of_the_fold(self, run, folder):
        names = {Path(row["path"]).name for row in read_predictions(run[0])}
        assert names == {f"{name}{i}.wav" for name in TONES for i in (0, 3)}

    def test_problem_type_is_that_of_the_task_in_spite_of_soft_labels(self, run):
        config = json.loads((run[0] / "config.json").read_text())
        assert config["problem_type"] == "single_label_classification"

    def test_reported_is_the_last_epoch(self, run):
        output, metrics = run
        history = json.loads((output / "trainer_state.json").read_text())["log_history"]
        evaluations = [entry for entry in history if "eval_loss" in entry]
        assert [entry["epoch"] for entry in evaluations] == [1.0, 2.0]
        assert metrics["eval_loss"] == pytest.approx(evaluations[-1]["eval_loss"], abs=1e-6)
        assert metrics["eval_loss"] != pytest.approx(evaluations[0]["eval_loss"], abs=1e-6)

    def test_the_parts_of_the_loss_are_logged(self, run):
        history = json.loads((run[0] / "trainer_state.json").read_text())["log_history"]
        for entry in (entry for entry in history if "loss" in entry):
            parts = [entry[f"{name}_loss"] for name in ("classification", "causal", "reconstruction")]
            assert sum(parts) == pytest.approx(entry["loss"], rel=1e-3)  # their weights are 1

    def test_resumed_is_the_same_as_uninterrupted(self, run, script, folder, tmp_path, capsys):
        whole, metrics = run
        interrupted = tmp_path / "out"
        shutil.copytree(whole / "checkpoint-3", interrupted / "checkpoint-3")  # all there is after the first epoch
        written = (interrupted / "checkpoint-3" / "trainer_state.json").stat().st_mtime_ns
        resumed = script.main(arguments(folder, interrupted, "--do_train", "--do_eval"))
        assert "checkpoint-3 is of this command is not known" in capsys.readouterr().err
        # The first epoch was not trained again.
        assert (interrupted / "checkpoint-3" / "trainer_state.json").stat().st_mtime_ns == written
        expected, got = load_file(whole / "model.safetensors"), load_file(interrupted / "model.safetensors")
        before = load_file(whole / "checkpoint-3" / "model.safetensors")
        assert expected.keys() == got.keys()
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-6)
        assert not torch.equal(got["classifier.weight"], before["classifier.weight"])
        assert resumed["eval_loss"] == pytest.approx(metrics["eval_loss"], abs=1e-6)
        state = json.loads((interrupted / "trainer_state.json").read_text())
        assert [entry["epoch"] for entry in state["log_history"] if "loss" in entry] == [1.0, 2.0]

    def test_evaluation_alone_repeats_it_for_any_seed(self, run, script, folder, tmp_path):
        output, metrics = run
        flags = ["--do_eval", "--model_name_or_path", str(output), "--seed", "7"]
        command = arguments(folder, tmp_path, *flags)
        at = command.index("--config_name")
        del command[at : at + 2]
        again = script.main(command)
        assert again["eval_loss"] == pytest.approx(metrics["eval_loss"], abs=1e-6)
        assert read_predictions(tmp_path) == read_predictions(output)
        assert not (tmp_path / "model.safetensors").exists()


def test_loss_falls_and_tones_are_learnt(script, folder, tmp_path):
    flags = "--do_train --do_eval --num_train_epochs 25 --learning_rate 5e-3 --save_strategy no --mixup_probability 0"
    metrics = script.main(arguments(folder, tmp_path, *flags.split(), "--time_mask", "0"))
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    losses = [entry["classification_loss"] for entry in history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    assert metrics["eval_accuracy"] > 0.8


def test_real_clips(script, folder, data_dir, tmp_path):
    """Two steps on the twelve clips of two folds and three classes; the loss on them falls."""
    with (data_dir / "esc10" / "meta" / "esc50.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["category"] in ("dog", "rain", "clock_tick")]
    chosen = [row for fold in ("1", "2") for row in [r for r in rows if r["fold"] == fold][:6:2]]
    table = tmp_path / "clips.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["audio", "label", "fold"])
        writer.writerows((data_dir / "esc10" / "audio" / r["filename"], r["category"], r["fold"]) for r in chosen)
    flags = "--do_train --do_eval --max_length_seconds 2 --mixup_probability 0 --warmup_steps 0 --learning_rate 3e-3"
    metrics = script.main(arguments(folder, tmp_path / "out", "--data", str(table), *flags.split()))
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert metrics["eval_clips"] == 3


def test_several_labels_and_validation(script, folder, tmp_path):
    """Multi-label by the CSV's semicolons; the validation fold chooses the epoch, the test fold is reported."""
    with (folder / "clips.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    table = folder / "multi.csv"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, "label": row["label"] + (";tone" if i % 2 else "")} for i, row in enumerate(rows))
    flags = ["--data", str(table), "--validation_folds", "2", "--do_train", "--do_eval"]
    metrics = script.main(arguments(folder, tmp_path, *flags))
    assert {"eval_mAP", "eval_AUC", "eval_d_prime"} <= metrics.keys()
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["clips"] == {"train": 6, "validation": 6, "test": 6}
    assert results["arguments"]["training"]["load_best_model_at_end"] is True
    assert results["arguments"]["training"]["metric_for_best_model"] == "mAP"
    assert json.loads((tmp_path / "config.json").read_text())["problem_type"] == "multi_label_classification"
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    validated = [entry["eval_mAP"] for entry in state["log_history"] if "eval_mAP" in entry]
    assert state["best_metric"] == max(validated)
    assert {Path(row["path"]).name[-5] for row in read_predictions(tmp_path)} == {"0", "3"}


def assert_same_weights(one, other):
    expected, got = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert expected.keys() == got.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-6, msg=name)


def launch(processes, command):
    """The script in processes of its own; returns when all have ended."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), *command], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]


class TestInterruption:
    """Every draw, mask and mixture of a training that was killed is that of one that was not."""

    FLAGS = "--do_train --do_eval --num_train_epochs 3 --save_strategy steps --save_steps 2 --average_last_epochs 2"

    def test_a_broken_checkpoint_is_passed_over(self, script, folder, tmp_path):
        for step in (2, 4):
            (tmp_path / f"checkpoint-{step}").mkdir()
            (tmp_path / f"checkpoint-{step}" / "model.safetensors").write_bytes(b"")
        (tmp_path / "checkpoint-2" / "trainer_state.json").write_text("{}")
        _, _, args = script.parse_arguments(arguments(folder, tmp_path, "--do_train"))
        assert script.checkpoint_to_resume(args) == str(tmp_path / "checkpoint-2")
        args.save_only_model = True
        with pytest.raises(ValueError, match="checkpoint-2 cannot be resumed from: --save_only_model"):
            script.checkpoint_to_resume(args)
        (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()
        assert script.checkpoint_to_resume(args) is None

    def test_a_finished_training_keeps_its_results(self, script, folder, tmp_path):
        command = arguments(folder, tmp_path, *self.FLAGS.split())
        metrics = script.main(command)
        written = {name: (tmp_path / name).read_text() for name in ("train_results.json", "results.json")}
        weights = load_file(tmp_path / "model.safetensors")
        again = script.main([*command, "--logging_strategy", "steps", "--logging_steps", "1", "--token", "hf_new"])
        assert again["train_loss"] == metrics["train_loss"] > 0
        assert again["eval_loss"] == pytest.approx(metrics["eval_loss"], abs=1e-6)
        assert (tmp_path / "train_results.json").read_text() == written["train_results.json"]
        assert json.loads((tmp_path / "all_results.json").read_text())["train_loss"] == metrics["train_loss"]
        assert json.loads((tmp_path / "results.json").read_text())["metrics"]["train_loss"] == metrics["train_loss"]
        for name, value in load_file(tmp_path / "model.safetensors").items():
            torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-6)

    def test_a_folder_that_was_moved_keeps_the_chosen_epoch(self, script, folder, tmp_path):
        flags = ["--do_train", "--do_eval", "--validation_folds", "2", "--num_train_epochs", "3"]
        flags += ["--metric_for_best_model", "eval_loss", "--greater_is_better", "true"]  # so it is the first
        command = arguments(folder, tmp_path / "one", *flags)
        script.main(command)
        shutil.move(tmp_path / "one", tmp_path / "other")
        weights = load_file(tmp_path / "other/model.safetensors")
        command = arguments(folder, tmp_path / "other", *flags)
        script.main(command)
        state = json.loads((tmp_path / "other/trainer_state.json").read_text())
        assert state["best_global_step"] < state["global_step"]
        again = load_file(tmp_path / "other/model.safetensors")
        assert all(again[name].equal(weights[name]) for name in weights)
        shutil.rmtree(tmp_path / "other" / Path(state["best_model_checkpoint"]).name)
        with pytest.raises(FileNotFoundError, match="is gone, which had the best epoch"):
            script.main(command)

    def test_neither_another_training_nor_an_evaluation_takes_its_place(self, script, run, folder, tmp_path):
        output = shutil.copytree(run[0], tmp_path / "out")
        with pytest.raises(ValueError, match=r"holds runs.*'test_folds': \(\[1\], \[2\]\).*another --output_dir"):
            script.main(arguments(folder, output, "--do_train", "--do_eval", "--test_folds", "2"))
        assert (output / "results.json").read_text() == (run[0] / "results.json").read_text()
        with pytest.raises(ValueError, match="holds the results of a training, which an evaluation would replace"):
            script.main(arguments(folder, output, "--do_eval", "--model_name_or_path", str(output)))
        assert (output / "results.json").read_text() == (run[0] / "results.json").read_text()

    def test_clips_of_the_training_are_no_test(self, script, run, folder, tmp_path):
        command = arguments(folder, tmp_path, "--do_eval", "--model_name_or_path", str(run[0]), "--test_folds")
        with pytest.raises(ValueError, match=r"was trained on the folds \[2\] of these data"):
            script.main([*command, "1", "2"])

    def test_after_a_kill_in_mid_epoch_the_weights_are_the_same(self, script, folder, tmp_path):
        """SIGKILL in the second epoch, one step after a checkpoint; the mean of the last epochs is the same, too."""
        command = [*arguments(folder, tmp_path / "killed", *self.FLAGS.split())]
        # A process that ends itself at the start of the sixth step, as if from outside.
        program = f"""
import os, runpy, signal, sys
from transformers import Trainer
step = Trainer.training_step
def kill_at_the_sixth(self, *args, **kwargs):
    if self.state.global_step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)
Trainer.training_step = kill_at_the_sixth
sys.argv = {["script", *command]!r}
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        killed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
        assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
        folders = {path.name for path in (tmp_path / "killed").glob("checkpoint-*")}
        assert folders == {"checkpoint-2", "checkpoint-4"}
        resumed = script.main(command)
        whole = script.main(arguments(folder, tmp_path / "whole", *self.FLAGS.split()))
        assert resumed["eval_loss"] == pytest.approx(whole["eval_loss"], abs=1e-6)
        assert_same_weights(tmp_path / "whole", tmp_path / "killed")


@pytest.fixture
def settings(script, folder, tmp_path):
    """What decides the training of a command with further flags."""

    def settings(*flags):
        model_args, data_args, args = script.parse_arguments(arguments(folder, tmp_path, "--do_train", *flags))
        clips = script.load_clips(data_args, model_args, args)
        args = script.prepare_evaluation(args, clips, script.SINGLE_LABEL)
        return script.training_settings(model_args, data_args, args, clips, script.load_config(model_args))

    return settings


CHOSEN = "--validation_folds 2"


@pytest.mark.parametrize(
    ("before", "now", "differing"),
    [
        ("", "--learning_rate 1", "learning_rate"),
        ("", "--num_train_epochs 3", "num_train_epochs"),
        ("", "--config_overrides {}", "config_overrides"),
        ("", '--config_overrides {"whitening":0.5}', "config_overrides config.whitening"),
        ("", "--speed 1", "speed"),
        ("", "--max_train_samples 3", "max_train_samples fingerprints"),
        (CHOSEN, "--validation_folds 3", "validation_folds fingerprints"),
        (CHOSEN, f"{CHOSEN} --eval_delay 1", "eval_delay"),
        ("", "--eval_strategy no --save_strategy steps --save_steps 2 --save_total_limit 9", ""),
        ("", "--logging_steps 3 --report_to none --output_dir other --do_eval --dataloader_num_workers 2", ""),
        ("--push_to_hub --hub_token x", "--token x --per_device_eval_batch_size 2 --on_bad_audio skip", ""),
    ],
)
def test_what_decides_a_training(settings, before, now, differing):
    before, now = settings(*before.split()), settings(*now.split())
    assert {name for name in before.keys() & now.keys() if before[name] != now[name]} == set(differing.split())


@pytest.mark.parametrize("several", ["world_size", "n_gpu"])
def test_more_processes_are_another_training(script, folder, tmp_path, monkeypatch, several):
    """A step then has other clips, and an epoch fewer steps."""
    model_args, data_args, args = script.parse_arguments(arguments(folder, tmp_path, "--do_train"))
    given = model_args, data_args, args, script.load_clips(data_args, model_args, args), script.load_config(model_args)
    one = script.training_settings(*given)
    monkeypatch.setattr(script.RecipeArguments, several, 2)
    two = script.training_settings(*given)
    assert {name for name in two if two[name] != one[name]} == {"processes"} and two["processes"] == 2


def test_other_clips_under_the_same_name_are_another_training(settings, folder, tmp_path):
    header, *rows = (folder / "clips.csv").read_text().splitlines()
    rows = "\n".join([header, *(f"{folder}/{row}" for row in rows)])
    prints = []
    for table in (rows, rows.replace("low,2", "high,2")):
        (tmp_path / "clips.csv").write_text(table)
        prints.append(settings("--data", f"{tmp_path}/clips.csv")["fingerprints"])
    assert prints[0] != prints[1]


def test_mean_of_the_last_epochs(script, folder, tmp_path):
    flags = "--do_train --do_eval --num_train_epochs 3 --average_last_epochs 2 --learning_rate 1e-2"
    metrics = script.main(arguments(folder, tmp_path, *flags.split()))
    saved = load_file(tmp_path / "model.safetensors")
    second, third = (load_file(tmp_path / "epoch_weights" / f"{epoch}.safetensors") for epoch in (2, 3))
    torch.testing.assert_close(
        saved["classifier.weight"], (second["classifier.weight"] + third["classifier.weight"]) / 2
    )
    assert not torch.equal(second["classifier.weight"], third["classifier.weight"])
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    watched = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    assert metrics["last_epoch_loss"] == pytest.approx(watched[-1], abs=1e-6)
    assert metrics["eval_loss"] != pytest.approx(metrics["last_epoch_loss"], abs=1e-6)
    assert json.loads((tmp_path / "results.json").read_text())["metrics"]["last_epoch_accuracy"] >= 0


def test_a_training_that_logs_no_loss_leaves_its_model(script, folder, tmp_path):
    output, silent = tmp_path / "out", "--logging_strategy no --eval_strategy no".split()
    script.main(arguments(folder, output, "--do_train", "--max_steps", "1", *silent))
    assert (output / "model.safetensors").is_file() and (output / "results.json").is_file()
    assert not (output / "learning_curve.png").exists()


def test_averaging_chooses_no_epoch(script, folder, tmp_path):
    flags = ["--do_train", "--validation_folds", "2", "--average_last_epochs", "2"]
    model_args, data_args, args = script.parse_arguments(arguments(folder, tmp_path, *flags))
    clips = script.load_clips(data_args, model_args, args)
    assert script.prepare_evaluation(args, clips, script.SINGLE_LABEL).load_best_model_at_end is False
    with pytest.raises(ValueError, match="name two final models"):
        script.parse_arguments(arguments(folder, tmp_path, *flags, "--load_best_model_at_end"))


@pytest.mark.parametrize(
    "flags, averaged",
    [
        ("--num_train_epochs 10", 5),
        ("--num_train_epochs 9", 0),
        ("--num_train_epochs 10 --max_steps 3", 0),
        ("--num_train_epochs 10 --validation_folds 2", 0),
        ("--num_train_epochs 10 --average_last_epochs 0", 0),
        ("--num_train_epochs 9 --average_last_epochs 3", 3),
    ],
)
def test_epochs_that_are_averaged_by_default(script, folder, tmp_path, flags, averaged):
    model_args, data_args, args = script.parse_arguments(arguments(folder, tmp_path, "--do_train", *flags.split()))
    clips = script.load_clips(data_args, model_args, args)
    assert script.prepare_evaluation(args, clips, script.SINGLE_LABEL).average_last_epochs == averaged


@pytest.fixture(scope="module")
def audioset(tmp_path_factory):
    """The tones in AudioSet's layout: four labels, one of which all clips have; a clip that is missing."""
    root = tmp_path_factory.mktemp("audioset")
    mids = {name: f"/m/{name}" for name in (*TONES, "tone")}
    index = ["index,mid,display_name", *(f'{i},{mid},"{name}, a tone"' for i, (name, mid) in enumerate(mids.items()))]
    (root / "class_labels_indices.csv").write_text("\n".join(index))
    generator = np.random.default_rng(0)
    for split, count in (("balanced_train", 2), ("unbalanced_train", 3), ("eval", 2)):
        rows = ["# Segments csv", "# YTID, start_seconds, end_seconds, positive_labels"]
        for name, frequency in TONES.items():
            for i in range(count):
                video = f"{split[:5]}{name[:3]}{i:03}"
                rows.append(f'{video}, 30.000, 40.000, "{mids[name]}{"" if i % 2 else ",/m/tone"}"')
                time = np.arange(RATE // 5) / RATE
                tone = 0.3 * np.sin(2 * np.pi * frequency * time + i) + generator.normal(0, 0.01, len(time))
                soundfile.write(root / f"Y{video}.wav", tone, RATE)
        (root / f"{split}_segments.csv").write_text("\n".join(rows))
    (root / "Yunballow001.wav").unlink()
    return root


def test_audioset(script, folder, audioset, tmp_path):
    flags = "--do_train --do_eval --on_bad_audio skip --balanced_sampling --features_on_device"
    command = arguments(folder, tmp_path, "--data", str(audioset), *flags.split())
    at = command.index("--test_folds")
    del command[at : at + 2]
    with pytest.raises(FileNotFoundError, match="1 of 9 listed files do not exist: unballow001"):
        script.main([*command, "--on_bad_audio", "error"])
    metrics = script.main(command)
    assert {"eval_mAP", "eval_AUC", "eval_d_prime"} <= metrics.keys()
    assert metrics["eval_clips"] == 6 and metrics["eval_mAP_classes"] == 4
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["clips"] == {"train": 14, "test": 6} and results["skipped"] == ["unballow001"]
    assert results["labels"] == [f"{name}, a tone" for name in (*TONES, "tone")]
    # What is saved takes audio of any kind: its extractor makes spectrograms.
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["do_mrmf"] is True

    command = [*command, "--train_split_name", "balanced_train", "--output_dir", str(tmp_path / "20k")]
    script.main(command)
    assert json.loads((tmp_path / "20k" / "results.json").read_text())["clips"]["train"] == 6


def test_urbansound8k_has_its_own_folds(script, data_dir, tmp_path):
    flags = ["--data", str(data_dir / "urbansound8k"), "--do_train", "--do_eval", "--output_dir", str(tmp_path)]
    model_args, data_args, args = script.parse_arguments([*flags, "--check_audio", "false"])
    with pytest.raises(ValueError, match=r"come with the folds \[1, 2\]. Give --test_folds"):
        script.load_clips(data_args, model_args, args)


TWO_PROCESSES = "--do_train --do_eval --num_train_epochs 3 --learning_rate 3e-3 --per_device_eval_batch_size 2"


@pytest.fixture(scope="module")
def configuration(tmp_path_factory):
    """Two processes drop the same branches, one process drops others: without, both can be compared."""
    path = tmp_path_factory.mktemp("configuration")
    (path / "config.json").write_text(json.dumps({**CONFIG, "drop_path_rate": 0.0}))
    return path


def two_processes(folder, configuration, output, *more):
    """Five test clips in batches of two: the last batches of the two processes are uneven."""
    flags = [*TWO_PROCESSES.split(), "--config_name", str(configuration), "--max_eval_samples", "5"]
    return arguments(folder, output, *flags, "--per_device_train_batch_size", "2", *more)


@pytest.fixture(scope="module")
def run_of_two(folder, configuration, tmp_path_factory):
    output = tmp_path_factory.mktemp("two")
    launch(2, two_processes(folder, configuration, output))
    return output


@pytest.mark.slow
class TestTwoProcesses:
    """torchrun starts two; each takes every other batch."""

    def test_each_clip_counts_once(self, run_of_two):
        assert len({row["path"] for row in read_predictions(run_of_two)}) == len(read_predictions(run_of_two)) == 5
        assert json.loads((run_of_two / "eval_results.json").read_text())["eval_clips"] == 5

    def test_the_same_as_one_process_on_the_same_batches(self, script, run_of_two, folder, configuration, tmp_path):
        """One process that accumulates two batches sees in a step what two processes see."""
        script.main(two_processes(folder, configuration, tmp_path, "--gradient_accumulation_steps", "2"))
        states = [json.loads((output / "trainer_state.json").read_text()) for output in (run_of_two, tmp_path)]
        assert states[0]["global_step"] == states[1]["global_step"] == 9
        losses = [[entry["loss"] for entry in state["log_history"] if "loss" in entry] for state in states]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        two, one = (load_file(output / "model.safetensors") for output in (run_of_two, tmp_path))
        for name in one:
            if "feature_norm" not in name:  # its running average moves twice as often in one process
                torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-4, msg=name)
        metrics = [json.loads((output / "eval_results.json").read_text()) for output in (run_of_two, tmp_path)]
        assert metrics[0]["eval_loss"] == pytest.approx(metrics[1]["eval_loss"], abs=0.05)

    def test_metrics_are_those_of_one_process(self, script, run_of_two, folder, tmp_path):
        """Also for the clips that the second process evaluated, and although the last batch is filled up."""
        command = two_processes(
            folder, run_of_two, tmp_path, "--model_name_or_path", str(run_of_two), "--do_train", "false"
        )
        at = command.index("--config_name")
        del command[at : at + 2]
        script.main(command)
        two, one = (json.loads((output / "eval_results.json").read_text()) for output in (run_of_two, tmp_path))
        for name in ("eval_loss", "eval_accuracy", "eval_clips"):
            assert two[name] == pytest.approx(one[name], abs=1e-5), name
        for pair in zip(read_predictions(run_of_two), read_predictions(tmp_path), strict=True):
            assert pair[0]["path"] == pair[1]["path"]
            assert float(pair[0]["probability"]) == pytest.approx(float(pair[1]["probability"]), abs=1e-5)

    def test_resumption_in_mid_epoch(self, folder, configuration, tmp_path):
        flags = "--save_strategy steps --save_steps 5 --save_total_limit 9 --balanced_sampling"
        launch(2, two_processes(folder, configuration, tmp_path / "whole", *flags.split()))
        shutil.copytree(tmp_path / "whole" / "checkpoint-5", tmp_path / "resumed" / "checkpoint-5")
        launch(2, two_processes(folder, configuration, tmp_path / "resumed", *flags.split()))
        assert_same_weights(tmp_path / "whole", tmp_path / "resumed")


class TestArguments:
    def parse(self, script, tmp_path, *flags):
        return script.parse_arguments([*flags, "--output_dir", str(tmp_path), "--do_train"])

    def test_recipe(self, script, tmp_path):
        _, data_args, args = self.parse(script, tmp_path, "--data", "x")
        assert (data_args.max_length_seconds, data_args.speed, data_args.time_mask) == (2.5, 1.25, 48)
        assert (args.num_train_epochs, args.per_device_train_batch_size, args.learning_rate) == (75, 16, 1e-3)
        assert (args.weight_decay, args.lr_scheduler_type, args.get_warmup_steps(100)) == (0.05, "cosine", 10)
        assert (args.seed, args.max_grad_norm, args.save_total_limit) == (0, 1.0, 2)
        assert args.label_names == ["labels"] and args.remove_unused_columns is False

    def test_json_file_has_the_same_defaults(self, script, tmp_path):
        path = tmp_path / "run.json"
        path.write_text(json.dumps({"data": "x", "test_folds": [2], "output_dir": str(tmp_path), "do_train": True}))
        _, data_args, args = script.parse_arguments([str(path)])
        assert data_args.test_folds == [2] and args.num_train_epochs == 75

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ([], "Give one of --data, --dataset_name, --train_file, not none"),
            (["--data", "x", "--dataset_name", "y"], "not data and dataset_name"),
            (["--data", "x", "--eval_file", "y"], "--eval_file needs --train_file"),
            (["--data", "x", "--muon", "true", "--optim", "adafactor"], "--optim adafactor does not"),
            (["--data", "x", "--prediction_loss_only"], "leave no predictions to measure"),
            (["--data", "x", "--model_name_or_path", "y", "--init_from", "z"], "use one of the two"),
            (["--data", "x", "--max_train_samples", "0"], "--max_train_samples 0 leaves no clip"),
            (["--data", "x", "--max_eval_samples", "-1"], "--max_eval_samples -1 leaves no clip"),
            (["--data", "x", "--eval_do_concat_batches", "false"], "leave no predictions to measure"),
            (["--data", "x", "--bf16_full_eval", "--use_cpu"], "would round the weights that are saved"),
        ],
    )
    def test_contradictions(self, script, tmp_path, flags, message):
        with pytest.raises(ValueError, match=message):
            self.parse(script, tmp_path, *flags)

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ([], "Nothing to do"),
            (["--eval_strategy", "no"], "Nothing to do"),
            (["--do_eval", "--config_name", "y"], "name the model to evaluate by --model_name_or_path"),
        ],
    )
    def test_nothing_to_train_or_to_evaluate(self, script, tmp_path, flags, message):
        with pytest.raises(ValueError, match=message):
            script.parse_arguments(["--data", "x", "--output_dir", str(tmp_path), *flags])

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--test_folds", "9"], r"test folds \[9\] do not exist"),
            (["--test_folds", "1", "2", "3"], "Every fold or split is held out"),
            (["--problem_type", "regression"], None),
            (["--data", "nowhere"], "--data nowhere does not exist; for the Hub use --dataset_name"),
        ],
    )
    def test_wrong_values(self, script, folder, tmp_path, flags, message):
        command = arguments(folder, tmp_path, "--do_train", *flags)
        with pytest.raises((ValueError, FileNotFoundError, SystemExit), match=message):
            script.main(command)

    def test_folds_must_be_named(self, script, folder, tmp_path):
        command = arguments(folder, tmp_path, "--do_train", "--do_eval")
        at = command.index("--test_folds")
        del command[at : at + 2]
        with pytest.raises(ValueError, match=r"the folds \[1, 2, 3\]. Give --test_folds"):
            script.main(command)

    def test_no_model(self, script, folder, tmp_path):
        command = arguments(folder, tmp_path, "--do_train")
        at = command.index("--config_name")
        del command[at : at + 2]
        with pytest.raises(ValueError, match="Give a checkpoint as --model_name_or_path, or --config_name"):
            script.main(command)


class TestClips:
    def clips(self, script, folder, tmp_path, *flags):
        model_args, data_args, args = script.parse_arguments(arguments(folder, tmp_path, *flags))
        return script.load_clips(data_args, model_args, args), args

    def test_without_validation_no_clip_chooses_the_epoch(self, script, folder, tmp_path):
        clips, args = self.clips(script, folder, tmp_path, "--do_train")
        assert script.prepare_evaluation(args, clips, script.SINGLE_LABEL).load_best_model_at_end is False
        assert clips.watched is clips.reported

    def test_with_validation_it_is_not_the_test_clips(self, script, folder, tmp_path):
        clips, args = self.clips(script, folder, tmp_path, "--do_train", "--validation_folds", "3")
        args = script.prepare_evaluation(args, clips, script.SINGLE_LABEL)
        assert args.load_best_model_at_end is True and args.metric_for_best_model == "accuracy"
        assert set(clips.watched["fold"]) == {3} and set(clips.reported["fold"]) == {1}

    @pytest.mark.parametrize(
        ("flags", "lacking"),
        [
            ("--eval_strategy no", "to be the same, not no and epoch"),
            ("--average_last_epochs 2", "no --average_last_epochs"),
            ("--eval_strategy steps --save_strategy steps --eval_steps 2 --save_steps 3", "multiple .*, not 3 and 2"),
            (
                "--eval_strategy steps --save_strategy steps --eval_steps 0.5 --save_steps 2",
                "multiple .*, not 2 and 0.5",
            ),
            ("--eval_strategy steps --save_strategy steps --eval_steps 2 --save_steps 6", None),
            ("--eval_strategy steps --save_strategy steps --eval_steps 0.1 --save_steps 0.3", None),
        ],
    )
    def test_validation_that_chooses_nothing_is_a_warning(self, script, folder, tmp_path, caplog, flags, lacking):
        clips, args = self.clips(script, folder, tmp_path, "--do_train", "--validation_folds", "3", *flags.split())
        assert script.prepare_evaluation(args, clips, script.SINGLE_LABEL).load_best_model_at_end is (lacking is None)
        assert lacking is None or re.search(f"choose no epoch: that needs .*{lacking}", caplog.text)

    def test_limits(self, script, folder, tmp_path):
        flags = ["--do_train", "--max_train_samples", "5", "--max_eval_samples", "2"]
        clips, _ = self.clips(script, folder, tmp_path, *flags)
        assert {name: len(split) for name, split in clips.splits.items()} == {"train": 5, "test": 2}
        again, _ = self.clips(script, folder, tmp_path, *flags)
        assert again.splits["train"]["audio"][:] == clips.splits["train"]["audio"][:]
        assert len(set(clips.splits["train"]["label"])) > 1  # drawn, not the first ones

    def test_limits_leave_prepared_clips_alone(self, script, folder, tmp_path):
        flags = ["--data", f"{folder}/clips.csv", "--output_dir", f"{tmp_path}/shards", "--num_workers", "1"]
        subprocess.run([sys.executable, SCRIPT.with_name("prepare_audio.py"), *flags], check=True)
        before = sorted((tmp_path / "shards").iterdir())
        flags = ["--do_train", "--max_train_samples", "5", "--data", str(tmp_path / "shards")]
        clips, _ = self.clips(script, folder, tmp_path, *flags)
        assert len(clips.splits["train"]) == 5 and sorted((tmp_path / "shards").iterdir()) == before

    def audio_folder(self, folder, *splits):
        for split in splits:
            for name in ("a", "b"):
                (folder / split / name).mkdir(parents=True)
                soundfile.write(folder / split / name / f"{split}.wav", np.zeros(100), RATE)

    def splits_of_a_folder(self, script, folder, *flags):
        command = ["--do_train", "--do_eval", "--data", str(folder), "--output_dir", str(folder / "out"), *flags]
        model_args, data_args, args = script.parse_arguments(command)
        return script.load_clips(data_args, model_args, args).splits

    def test_links_to_clips_of_the_training_are_no_test(self, script, tmp_path):
        self.audio_folder(tmp_path, "train", "test")
        assert set(self.splits_of_a_folder(script, tmp_path)) == {"train", "test"}
        for name in ("a", "b"):
            (tmp_path / "test" / name / "again.wav").symlink_to(tmp_path / "train" / name / "train.wav")
        with pytest.raises(ValueError, match="2 clips are in training and in test"):
            self.splits_of_a_folder(script, tmp_path)

    def test_the_splits_are_named_where_none_is_left_to_test(self, script, tmp_path):
        self.audio_folder(tmp_path, "train", "test")
        with pytest.raises(ValueError, match=r"the splits \['train', 'test'\], of which 'test' is trained on"):
            self.splits_of_a_folder(script, tmp_path, "--train_split_name", "test")

    def test_bad_audio(self, script, folder, tmp_path):
        with (folder / "clips.csv").open() as file:
            table = file.read() + "broken.wav,low,2\nabsent.wav,low,2\n"
        (folder / "bad.csv").write_text(table)
        (folder / "broken.wav").write_text("not audio")
        flags = ["--do_train", "--data", str(folder / "bad.csv"), "--on_bad_audio"]
        with pytest.raises(FileNotFoundError, match=r"1 of 20 listed files do not exist: .*absent\.wav"):
            self.clips(script, folder, tmp_path, *flags, "error")
        clips, _ = self.clips(script, folder, tmp_path, *flags, "skip")
        assert [Path(name).name for name in clips.skipped] == ["absent.wav", "broken.wav"]
        assert len(clips.splits["train"]) == 12
        clips, _ = self.clips(script, folder, tmp_path, *flags, "skip", "--check_audio", "false")
        assert len(clips.splits["train"]) == 13 and len(clips.skipped) == 1

    def splits_of_two_files(self, script, folder, tmp_path, eval_rows):
        (folder / "train.csv").write_text("audio,label\nlow0.wav,low\nhigh0.wav,high\n")
        (folder / "eval.csv").write_text(f"audio,label\n{eval_rows}\n")
        flags = ["--train_file", str(folder / "train.csv"), "--eval_file", str(folder / "eval.csv"), "--do_train"]
        model_args, data_args, args = script.parse_arguments([*flags, "--do_eval", "--output_dir", str(tmp_path)])
        return script.load_clips(data_args, model_args, args).splits

    @pytest.mark.parametrize(
        ("label", "train", "test"), [("low", [1, 0], [1]), ("low;high", [[1], [0]], [[1, 0]])], ids=["single", "multi"]
    )
    def test_train_and_eval_files(self, script, folder, tmp_path, label, train, test):
        splits = self.splits_of_two_files(script, folder, tmp_path, f"low1.wav,{label}")
        assert script.label_names(splits["test"]) == ["high", "low"]  # the training file's classes
        assert (splits["train"]["label"][:], splits["test"]["label"][:]) == (train, test)
        assert {script.is_multi_label(split) for split in splits.values()} == {label != "low"}

    def test_a_clip_of_both_files_is_refused(self, script, folder, tmp_path):
        rows = f"low1.wav,low\n../{folder.name}/low0.wav,low"
        with pytest.raises(ValueError, match=r"1 clips are in training and in test: .*low0\.wav\. Remove"):
            self.splits_of_two_files(script, folder, tmp_path, rows)

    def test_audio_folder(self, script, tmp_path):
        for split in ("train", "test"):
            for name in ("a", "b"):
                (tmp_path / split / name).mkdir(parents=True)
                soundfile.write(tmp_path / split / name / "x.wav", np.zeros(100), RATE)
        flags = ["--data", str(tmp_path), "--do_train", "--do_eval", "--output_dir", str(tmp_path / "out")]
        model_args, data_args, args = script.parse_arguments(flags)
        assert list(script.load_clips(data_args, model_args, args).splits) == ["train", "test"]
        data_args.eval_split_name = "dev"
        with pytest.raises(ValueError, match=r"no split 'dev', only \['train', 'test'\]"):
            script.load_clips(data_args, model_args, args)

    @pytest.mark.parametrize(
        ("given", "flags", "splits"),
        [
            (["train", "balanced_train"], ["--do_train", "--eval_strategy", "no"], ["train"]),
            (["validation", "test"], ["--do_eval", "--model_name_or_path", "x"], ["test", "validation"]),
            (["train", "validation", "test"], ["--do_train"], ["train", "test", "validation"]),
            (["train", "validation", "test"], ["--do_train", "--eval_split_name", "validation"], ["train", "test"]),
            (["train", "validation", "test"], ["--do_train", "--train_split_name", "validation"], ["train", "test"]),
            (
                ["train", "validation"],
                ["--do_train", "--train_split_name", "validation", "--do_eval"],
                "Nothing is held",
            ),
            (["train", "test"], ["--do_eval", "--eval_split_name", "train", "--model_name_or_path", "x"], ["test"]),
            (["validation", "test"], ["--do_train"], "Every fold or split is held out"),
            (["train", "balanced_train"], ["--do_train"], "Nothing is held out"),
        ],
    )
    def test_splits_that_are_not_needed_may_be_missing(self, script, tmp_path, given, flags, splits):
        clips = Dataset.from_dict({"audio": ["a.wav"], "label": [0]})
        loaded = DatasetDict(dict.fromkeys(given, clips))
        _, data_args, args = script.parse_arguments(["--data", "x", "--output_dir", str(tmp_path), *flags])
        if isinstance(splits, str):
            with pytest.raises(ValueError, match=splits):
                script._split(loaded, data_args, args)
        else:
            assert list(script._split(loaded, data_args, args)) == splits


def test_validation_clips_without_a_label_choose_no_epoch(script, folder, tmp_path, capsys):
    names = list(TONES)
    rows = [f"{folder}/{name}{i}.wav,{'' if i % 3 == 1 else name},{i % 3 + 1}" for name in names for i in range(6)]
    (tmp_path / "clips.csv").write_text("\n".join(["audio,label,fold", *rows]))
    flags = ["--do_train", "--do_eval", "--problem_type", "multi_label_classification", "--validation_folds", "2"]
    script.main(arguments(folder, tmp_path / "out", *flags, "--data", str(tmp_path / "clips.csv")))
    assert "chose no epoch, since their mAP is no number" in capsys.readouterr().err
    card = " ".join((tmp_path / "out/README.md").read_text().split())
    assert "The last epoch is reported; no epoch was chosen" in card


def test_a_resumed_training_claims_no_mean_of_the_whole(script, folder, tmp_path):
    command = arguments(folder, tmp_path, "--do_train", "--do_eval")
    assert "train_loss" in script.main(command)
    for name in ("train_results.json", "results.json", "model.safetensors"):
        (tmp_path / name).unlink()
    metrics = script.main(command)
    assert "train_loss" not in metrics and "eval_loss" in metrics


def test_recordings_left_out_may_not_be_all(script, folder, tmp_path):
    rows = ["audio,label,fold"]
    for i, label in enumerate(("low", "high")):
        shutil.copy(folder / f"{label}0.wav", tmp_path / f"1-7-A-{i}.wav")
        rows.append(f"1-7-A-{i}.wav,{label},{i + 1}")
    (tmp_path / "clips.csv").write_text("\n".join(rows))
    table = f"{tmp_path}/clips.csv"
    command = arguments(folder, tmp_path, "--do_train", "--data", table, "--leave_out_recordings_of", table)
    with pytest.raises(ValueError, match="leaves nothing to train on: it holds the recordings of all clips"):
        script.main(command)
    others = tmp_path / "others.csv"
    others.write_text("\n".join([*rows, "1-8-A-0.wav,low,1"]))  # of which one is missing
    command = [*command, "--leave_out_recordings_of", str(others)]
    with pytest.raises(FileNotFoundError, match="1-8-A-0.wav"):
        script.main(command)
    with pytest.raises(ValueError, match="leaves nothing to train on"):
        script.main([*command, "--on_bad_audio", "skip"])


def test_recordings_as_labels_leave_nothing_to_evaluate(script, folder, tmp_path):
    for more in (["--do_eval"], ["--eval_strategy", "epoch"]):
        with pytest.raises(ValueError, match="leave out --do_eval, and give --eval_strategy no"):
            script.main(arguments(folder, tmp_path, "--do_train", "--recordings_as_labels", *more))


def test_one_class_is_no_task(script, folder, tmp_path):
    (tmp_path / "clips.csv").write_text(f"audio,label,fold\n{folder}/low0.wav,low,1\n{folder}/low1.wav,low,2\n")
    command = arguments(folder, tmp_path, "--do_train", "--data", f"{tmp_path}/clips.csv")
    with pytest.raises(ValueError, match=r"one class alone, \['low'\]: is --data the folder of a class"):
        script.main(command)


class TestLabels:
    class Config:
        num_labels = 3
        id2label = {0: "c", 1: "a", 2: "b"}

    def test_a_checkpoint_keeps_its_order(self, script):
        assert script.choose_labels(self.Config, ["a", "b", "c"], from_scratch=False, do_train=True) == ["c", "a", "b"]

    def test_other_classes_make_a_new_head(self, script):
        assert script.choose_labels(self.Config, ["a", "b"], from_scratch=False, do_train=True) == ["a", "b"]

    @pytest.mark.parametrize(
        ("names", "kept"), [(["x", "y"], False), (["x", "y", "z"], False), (["high", "low", "middle"], True)]
    )
    def test_a_model_of_other_classes_has_a_new_head(self, script, run, names, kept):
        model_args, _, _ = script.parse_arguments(
            ["--data", "x", "--output_dir", "y", "--do_eval", "--model_name_or_path", str(run[0])]
        )
        model = script.load_model(model_args, script.load_config(model_args), names, script.SINGLE_LABEL)
        before = CATForAudioClassification.from_pretrained(run[0])
        assert torch.equal(model.classifier.weight, before.classifier.weight) == kept
        assert len(model.classifier.weight) == len(names)
        assert model.classifier.weight.abs().max() > 0 and list(model.config.id2label.values()) == names
        for (name, ours), theirs in zip(model.cat.named_parameters(), before.cat.parameters()):
            assert torch.equal(ours, theirs), name

    def test_evaluation_on_some_of_the_classes(self, script):
        assert script.choose_labels(self.Config, ["a", "b"], from_scratch=False, do_train=False) == ["c", "a", "b"]

    def test_evaluation_on_unknown_classes(self, script):
        with pytest.raises(ValueError, match=r"does not know the classes \['d'\]"):
            script.choose_labels(self.Config, ["a", "d"], from_scratch=False, do_train=False)

    def test_problem_type(self, script, folder):
        dataset = script.load_audio_dataset(folder / "clips.csv")
        assert script.resolve_problem_type(None, dataset) == script.SINGLE_LABEL
        assert script.resolve_problem_type(script.MULTI_LABEL, dataset) == script.MULTI_LABEL
        several = script.as_multi_label(dataset)
        assert script.resolve_problem_type(None, several) == script.MULTI_LABEL
        with pytest.raises(ValueError, match="clips have several labels"):
            script.resolve_problem_type(script.SINGLE_LABEL, several)
        assert script.resolve_problem_type(None, dataset, script.MULTI_LABEL) == script.MULTI_LABEL
        assert script.resolve_problem_type(script.SINGLE_LABEL, dataset, script.MULTI_LABEL) == script.SINGLE_LABEL

    def test_a_multi_label_model_of_clips_with_one_label(self, script, folder, tmp_path):
        flags = ["--do_train", "--do_eval", "--problem_type", script.MULTI_LABEL, "--num_train_epochs", "1"]
        metrics = script.main(arguments(folder, tmp_path, *flags, "--mixup_probability", "0"))
        assert metrics["eval_mAP_classes"] == 3
        assert json.loads((tmp_path / "config.json").read_text())["problem_type"] == script.MULTI_LABEL
        # It stays what it is where nothing but these clips says otherwise; the other classes of a new head do not.
        flags = ["--do_eval", "--model_name_or_path", str(tmp_path)]
        (tmp_path / "again").mkdir()
        (tmp_path / "again" / "results.json").write_text('{"arguments": {}}')  # of another script, which may go
        again = script.main(arguments(folder, tmp_path / "again", *flags))
        assert again["eval_mAP"] == metrics["eval_mAP"]

    def test_a_clip_without_a_label_where_none_has_several(self, script, folder, tmp_path):
        table = folder / "negatives.csv"
        table.write_text((folder / "clips.csv").read_text().replace(",low,", ",,"))
        flags = ["--data", str(table), "--do_train", "--do_eval", "--max_steps", "1", "--mixup_probability", "0"]
        metrics = script.main(arguments(folder, tmp_path, *flags, "--problem_type", script.MULTI_LABEL))
        assert metrics["eval_mAP_classes"] == 2
        assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 1 + 6

    def test_the_classes_are_those_of_the_weights(self, script, run, folder):
        """A configuration beside the checkpoint does not know them."""
        flags = ["--data", "x", "--output_dir", "y", "--do_eval", "--model_name_or_path", str(run[0])]
        model_args, _, _ = script.parse_arguments([*flags, "--config_name", str(folder)])
        assert list(script.load_config(model_args).id2label.values()) == ["high", "low", "middle"]


GLOBAL = {"window_size": None, "depths": [2], "num_heads": [2]}
SINGLE = {"filters": ["mel"], "window_lengths": [800], "hop_lengths": [320], "exchange_dim": 0}
WITHOUT_CAUSAL = {"causal_loss_weight": 0, "reconstruction_loss_weight": 0}


@pytest.mark.parametrize("backbone", [{}, GLOBAL], ids=["CAT", "AST"])
@pytest.mark.parametrize(
    "row", [{**SINGLE, **WITHOUT_CAUSAL}, WITHOUT_CAUSAL, {}], ids=["-", "+ MRMF", "+ MRMF + causal"]
)
def test_rows_of_table_2c_are_flags(script, folder, tmp_path, backbone, row):
    flags = ["--do_train", "--max_steps", "1", "--config_overrides", json.dumps({**backbone, **row})]
    script.main(arguments(folder, tmp_path, *flags))
    config = json.loads((tmp_path / "config.json").read_text())
    assert len(config["filters"]) == (1 if row.keys() >= SINGLE.keys() else 2)
    assert (config["window_size"] is None) == (backbone is GLOBAL)
    (logged,) = [
        entry for entry in json.loads((tmp_path / "trainer_state.json").read_text())["log_history"] if "loss" in entry
    ]
    assert ("causal_loss" in logged) == (row == {})


def test_training_starts_from_another_trunk(script, folder, tmp_path, capsys):
    source = SwinModel(SwinConfig(image_size=32, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=8))
    source.save_pretrained(tmp_path / "swin")
    flags = ["--do_train", "--max_steps", "1", "--learning_rate", "0", "--init_from", str(tmp_path / "swin")]
    script.main(arguments(folder, tmp_path / "out", *flags))
    assert "tensors taken as they are" in capsys.readouterr().err
    saved = load_file(tmp_path / "out" / "model.safetensors")
    kernel = source.embeddings.patch_embeddings.projection.weight
    assert torch.equal(saved["cat.embeddings.projection.weight"], kernel)
    assert saved["cat.embeddings.position.gate"] == 0


def test_unknown_overrides_are_refused_by_name(script, folder, tmp_path):
    with pytest.raises(ValueError, match="embed_dims"):
        script.main(arguments(folder, tmp_path, "--do_train", "--config_overrides", '{"embed_dims": 8}'))


def test_a_new_head_may_lack_a_bias(script):
    model = torch.nn.Module()
    model.config, model.base_model_prefix = CATConfig(num_labels=3), "body"
    model.body, model.head = torch.nn.Sequential(torch.nn.Linear(4, 3)), torch.nn.Linear(4, 3, bias=False)
    body, head = model.body[0].weight.clone(), model.head.weight.clone()
    script.renew_head(model)
    assert torch.equal(model.body[0].weight, body) and not torch.equal(model.head.weight, head)


@pytest.mark.parametrize(("given", "normalize", "gain_db"), [(None, False, 12), (None, True, 0), (3.0, True, 3)])
def test_gain_is_for_front_ends_that_know_the_volume(script, given, normalize, gain_db):
    arguments = script.DataArguments(data="clips", gain_db=given)
    extractor = CATFeatureExtractor(normalize_volume=normalize)
    assert script.build_collator(arguments, extractor, 10, training=True).gain_db == gain_db


@pytest.mark.parametrize(
    ("flags", "from_scratch", "muon"),
    [
        ([], True, True),
        ([], False, False),
        (["--optim", "adafactor"], True, False),
        (["--muon", "false"], True, False),
        (["--muon", "true"], False, True),
    ],
)
def test_muon_is_for_training_from_scratch(script, tmp_path, flags, from_scratch, muon):
    *_, args = script.parse_arguments(["--data", "x", "--do_train", "--output_dir", str(tmp_path), *flags])
    assert script.choose_muon(args, from_scratch) == muon


@pytest.mark.parametrize("asked", ["by the arguments", "by FSDP's launch", "by DeepSpeed's launch"])
def test_sharded_weights_are_neither_averaged_nor_matrices(script, tmp_path, monkeypatch, asked):
    *_, args = script.parse_arguments(["--data", "x", "--do_train", "--output_dir", str(tmp_path)])
    if asked == "by the arguments":
        args.fsdp = "full_shard"
    else:  # as `accelerate launch --use_fsdp` does, which leaves the arguments as they are
        monkeypatch.setenv("ACCELERATE_USE_FSDP" if "FSDP" in asked else "ACCELERATE_USE_DEEPSPEED", "true")
    clips = script.Clips(script.DatasetDict(), [], "", "")
    assert script.prepare_evaluation(args, clips, "single_label_classification").average_last_epochs == 0
    assert not script.choose_muon(args, from_scratch=True)


def test_overrides_are_for_the_feature_extractor_too(script, run, folder, tmp_path):
    overrides = ("--config_overrides", '{"normalize_volume": true}')
    tuned = ("--do_train", "--max_steps", "1", "--model_name_or_path", str(run[0]), *overrides)
    script.main(arguments(folder, tmp_path, *tuned))
    assert AutoFeatureExtractor.from_pretrained(tmp_path).normalize_volume
    with pytest.raises(ValueError, match=r"'normalize_volume': \(False, True\)"):
        script.main(arguments(folder, tmp_path / "other", *tuned, "--feature_extractor_name", str(run[0])))
