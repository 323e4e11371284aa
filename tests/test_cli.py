"""The console command, on small models and real recordings."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification, pipeline

from transformers_cat import CATConfig, CATFeatureExtractor, CATForAudioClassification, load_audio
from transformers_cat.cli import SHIPPED, classify_files, describe, find_files, main

from .conftest import awaken, small_config

EXAMPLE = Path(__file__).parents[1] / "examples" / "audio" / "helicopter.flac"
needs_shipped = pytest.mark.skipif(
    not (SHIPPED / "model.safetensors").is_file(), reason=f"there is no checkpoint in {SHIPPED}"
)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two sounds of different lengths, one of them in a sub-folder, and a file that is no audio."""
    rng = np.random.default_rng(0)
    (tmp_path / "sounds" / "below").mkdir(parents=True)
    soundfile.write(tmp_path / "sounds" / "a.wav", 0.1 * rng.standard_normal(32_000), 32_000)
    soundfile.write(tmp_path / "sounds" / "below" / "b.FLAC", 0.1 * rng.standard_normal((22_050, 2)), 44_100)
    (tmp_path / "sounds" / "notes.txt").write_text("no sound")
    return tmp_path / "sounds"


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_files_folders_and_globs_are_found_once(folder):
    a, b = folder / "a.wav", folder / "below" / "b.FLAC"
    assert find_files([str(folder)]) == [a, b]
    assert find_files([str(folder / "*.wav")]) == [a]
    assert find_files([str(folder / "**" / "*.FLAC")]) == [b]
    assert find_files([str(b), str(folder)]) == [b, a]
    assert find_files([str(folder / "notes.txt")]) == [folder / "notes.txt"]  # named by hand: the user's own claim


@pytest.mark.parametrize("pattern", ["missing.wav", "*.mp3", "empty"])
def test_a_pattern_that_names_nothing_is_an_error(folder, capsys, checkpoint, pattern):
    (folder / "empty").mkdir()
    status, out, err = run(capsys, "classify", folder / pattern, folder, "--model", checkpoint)
    assert status == 2 and not out and pattern in err


@pytest.mark.parametrize("batch_size", [1, 3])
def test_scores_are_the_pipelines(folder, capsys, checkpoint, batch_size):
    options = ("--model", checkpoint, "--json", "--top", 2, "--batch_size", batch_size)
    status, out, _ = run(capsys, "classify", folder, *options)
    assert status == 0
    lines = [json.loads(line) for line in out.splitlines()]
    assert [Path(line["file"]).name for line in lines] == ["a.wav", "b.FLAC"]
    classifier = pipeline("audio-classification", model=str(checkpoint))
    for line in lines:
        expected = classifier(load_audio(line["file"]), top_k=2)
        assert [item["label"] for item in line["scores"]] == [item["label"] for item in expected]
        assert [item["score"] for item in line["scores"]] == pytest.approx([item["score"] for item in expected], 1e-4)


def test_csv_has_a_row_for_each_label(folder, capsys, checkpoint):
    _, out, _ = run(capsys, "classify", folder / "a.wav", "--model", checkpoint, "--csv", "--top", 3)
    rows = list(csv.DictReader(out.splitlines()))
    assert len(rows) == 3 and {row["file"] for row in rows} == {str(folder / "a.wav")}
    assert sum(float(row["score"]) for row in rows) <= 1


def test_text_names_the_best_label_first(folder, capsys, checkpoint):
    _, out, err = run(capsys, "classify", folder / "a.wav", "--model", checkpoint, "--top", 1)
    best = pipeline("audio-classification", model=str(checkpoint))(load_audio(folder / "a.wav"), top_k=1)[0]
    assert out == f"{folder / 'a.wav'}: {best['label']} {best['score']:.2f}\n"
    assert "1.0 s of audio" in err and "0 of 1 files failed" in err


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_a_corrupt_file_is_named_and_the_rest_go_on(folder, capsys, checkpoint, batch_size):
    (folder / "a2.wav").write_bytes(b"RIFF this is no sound")
    status, out, err = run(capsys, "classify", folder, "--model", checkpoint, "--json", "--batch_size", batch_size)
    assert status == 1
    assert [Path(json.loads(line)["file"]).name for line in out.splitlines()] == ["a.wav", "b.FLAC"]
    assert "a2.wav" in err and "1 of 3 files failed" in err


def test_a_clip_that_the_model_refuses_does_not_stop_its_batch(folder, checkpoint):
    classifier = pipeline("audio-classification", model=str(checkpoint))
    accept = classifier.feature_extractor._as_clip

    def refuse_short(item, index):
        if len(item) < 20_000:
            raise ValueError("too short")
        return accept(item, index)

    classifier.feature_extractor._as_clip = refuse_short
    results = list(classify_files(classifier, find_files([str(folder)]), top=1, batch_size=2))
    assert [error and str(error) for *_, error in results] == [None, "too short"]
    assert results[0][2] and results[1][2] is None


def test_several_labels_have_scores_of_their_own(folder, capsys, tmp_path):
    torch.manual_seed(0)
    model = awaken(CATForAudioClassification(small_config(problem_type="multi_label_classification"))).eval()
    model.save_pretrained(tmp_path / "model")
    CATFeatureExtractor().save_pretrained(tmp_path / "model")
    _, out, _ = run(capsys, "classify", folder / "a.wav", "--model", tmp_path / "model", "--json")
    batch = CATFeatureExtractor()(load_audio(folder / "a.wav"), sampling_rate=32_000, return_tensors="pt")
    expected = model(**batch).logits[0].sigmoid().sort(descending=True).values.tolist()
    assert [item["score"] for item in json.loads(out)["scores"]] == pytest.approx(expected, abs=1e-5)


def test_other_models_work_at_their_own_rate(folder, capsys, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = ASTConfig(**sizes, max_length=64, num_mel_bins=32, num_labels=3)
    ASTForAudioClassification(config).save_pretrained(tmp_path / "ast")
    ASTFeatureExtractor(max_length=64, num_mel_bins=32).save_pretrained(tmp_path / "ast")
    status, out, _ = run(capsys, "classify", folder, "--model", tmp_path / "ast", "--json")
    assert status == 0 and len(out.splitlines()) == 2
    classifier = pipeline("audio-classification", model=str(tmp_path / "ast"))
    expected = classifier(load_audio(folder / "a.wav", 16_000))[0]["score"]
    assert json.loads(out.splitlines()[0])["scores"][0]["score"] == pytest.approx(expected, 1e-4)


def test_info_reads_what_a_folder_says_without_its_weights(checkpoint, capsys, tmp_path):
    facts = describe(checkpoint)
    model = CATForAudioClassification.from_pretrained(checkpoint)
    assert facts["labels"] == ["dog", "rain", "clock", "rooster", "crying"]
    assert facts["architecture"]["depths"] == [2, 2, 1] and facts["front_end"]["window_lengths"] == [400, 800, 1600]
    buffers = sum(buffer.numel() for name, buffer in model.named_buffers() if name in model.state_dict())
    assert facts["parameters"] == model.num_parameters() + buffers
    status, out, _ = run(capsys, "info", checkpoint)
    assert status == 0 and "dog, rain, clock" in out and "num_bins: 64" in out
    assert json.loads(run(capsys, "info", checkpoint, "--json")[1]) == facts


def test_the_command_runs_as_a_module(folder, checkpoint):
    command = [sys.executable, "-m", "transformers_cat", "classify", str(folder / "a.wav"), "--model", str(checkpoint)]
    done = subprocess.run([*command, "--top", "1"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.startswith(str(folder / "a.wav") + ": ")
    assert "|" not in done.stderr  # no bar where nobody watches


@pytest.mark.parametrize("arguments", [["--top", "0"], ["--batch_size", "-1"], ["--json", "--csv"]])
def test_impossible_flags_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as status:
        main(["classify", "a.wav", *arguments])
    assert status.value.code == 2 and arguments[0] in capsys.readouterr().err


@needs_shipped
def test_the_shipped_model_hears_the_shipped_recording(capsys):
    status, out, _ = run(capsys, "classify", EXAMPLE, "--json", "--top", 1)
    assert status == 0 and json.loads(out)["scores"][0]["label"] == EXAMPLE.stem


@needs_shipped
def test_the_shipped_code_is_that_of_the_package():
    package = SHIPPED.parents[1]
    travelling = sorted(SHIPPED.glob("*.py"))
    assert {"modeling_cat.py", "feature_extraction_cat.py"} <= {file.name for file in travelling}
    for file in travelling:
        assert file.read_text() == (package / file.name).read_text(), f"save the checkpoint again: {file.name} changed"
    assert CATConfig.from_pretrained(SHIPPED).auto_map


@needs_shipped
def test_the_shipped_model_names_the_clips_that_it_learnt(data_dir):
    """A floor only: it was trained on these clips."""
    files = sorted((data_dir / "esc10" / "audio").glob("5-*.ogg"))[::4]
    classifier = pipeline("audio-classification", model=str(SHIPPED))
    results = list(classify_files(classifier, files, top=1, batch_size=4))
    names = {"0": "dog", "1": "rooster", "10": "rain", "11": "sea_waves", "12": "crackling_fire", "20": "crying_baby"}
    names |= {"21": "sneezing", "38": "clock_tick", "40": "helicopter", "41": "chainsaw"}
    right = [scores[0]["label"] == names[file.stem.split("-")[-1]] for file, _, scores, _ in results]
    assert sum(right) / len(right) > 0.8
