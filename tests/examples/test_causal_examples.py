"""The causal module's own scripts, on written tones in ESC-50's layout."""

import csv
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import ASTForAudioClassification

EXAMPLES = Path(__file__).parents[2] / "examples"
RATE = 16_000


def load_example(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def esc_folder(tmp_path_factory):
    """Twelve tones of half a second: three classes, two folds."""
    folder = tmp_path_factory.mktemp("data") / "esc10"
    (folder / "audio").mkdir(parents=True)
    (folder / "meta").mkdir()
    generator = np.random.default_rng(0)
    rows = []
    for target, frequency in enumerate((300, 1_200, 4_800)):
        for take in range(4):
            name = f"{target}-{take}.wav"
            wave = 0.3 * np.sin(2 * np.pi * frequency * np.arange(RATE // 2) / RATE)
            soundfile.write(folder / "audio" / name, wave + generator.normal(0, 0.01, len(wave)), RATE)
            rows.append((name, take % 2 + 1, target, f"tone {target}"))
    with (folder / "meta" / "esc50.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("filename", "fold", "target", "category"), *rows])
    return folder


def test_ast_trains_with_the_causal_loss_and_stays_an_ast(esc_folder, tmp_path):
    metrics = load_example("causal_module_on_ast").main(
        ["--data", str(esc_folder), "--max_steps", "2", "--output_dir", str(tmp_path)]
    )
    assert metrics["test_clips"] == 6
    saved, report = ASTForAudioClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert saved.config.id2label == {0: "tone 0", 1: "tone 1", 2: "tone 2"}


def test_experiment_measures_each_variant_and_goes_on_where_it_stopped(esc_folder, tmp_path, monkeypatch, capsys):
    experiment = load_example("causal_experiment")
    variants = {name: experiment.VARIANTS[name] for name in ("neither", "l_c interventional 1, l_rs")}
    monkeypatch.setattr(experiment, "VARIANTS", variants)
    command = ["causal_experiment", "--data", str(esc_folder.parent), "--output_dir", str(tmp_path)]
    command += ["--questions", "spurious", "folds", "--epochs", "2", "--seeds", "2"]
    monkeypatch.setattr(sys, "argv", command)
    torch.set_num_threads(1)
    experiment.main()
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert len(runs) == 2 * 2 * (len(experiment.STRENGTHS) + 1)
    assert all(0 <= run["accuracy"] <= 1 for run in runs)
    table = (tmp_path / "table.md").read_text()
    assert table.count("±") == 2 * 4
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs[:-1]))
    capsys.readouterr()
    experiment.main()
    assert capsys.readouterr().out.count("accuracy") == 1  # the one that was missing
    assert (tmp_path / "table.md").read_text() == table
    monkeypatch.setattr(sys, "argv", [*command, "--epochs", "3"])
    with pytest.raises(ValueError, match=r"epochs.*2, 3"):
        experiment.main()
