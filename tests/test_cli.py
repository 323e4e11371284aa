"""The console command, on small models and real recordings."""

import csv
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    AudioClassificationPipeline,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForSequenceClassification,
    pipeline,
)

from transformers_cat import CATConfig, CATFeatureExtractor, CATForAudioClassification, load_audio
from transformers_cat.cli import SHIPPED, classify_files, cut, describe, find_files, main

from .conftest import awaken, small_config

EXAMPLES = Path(__file__).parents[1] / "examples" / "audio"  # each is named as its class is
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
    assert find_files([str(folder)]) == ([a, b], [])
    assert find_files([str(folder / "*.wav")]) == ([a], [])
    assert find_files([str(folder / "bel*")]) == ([b], [])
    assert find_files([str(folder / "**" / "*.FLAC")]) == ([b], [])
    assert find_files([str(b), str(folder)]) == ([b, a], [])
    assert find_files([str(folder / "notes.txt")]) == ([folder / "notes.txt"], [])  # named by hand: the user's claim


def test_names_that_look_like_globs_and_hidden_files(folder):
    soundfile.write(folder / "take [1].wav", np.zeros(100), 32_000)
    (folder / "._a.wav").write_bytes(b"what a file system keeps beside a.wav")
    assert find_files([str(folder / "take [1].wav")]) == ([folder / "take [1].wav"], [])
    found = [path.name for path in find_files([str(folder)])[0]]
    assert found == ["a.wav", "b.FLAC", "take [1].wav"]


def test_linked_folders_are_searched_and_hidden_ones_are_not(folder):
    for place in (folder / ".trash", folder.parent / "elsewhere"):
        place.mkdir()
        soundfile.write(place / "c.wav", np.zeros(100), 32_000)
    (folder / "linked").symlink_to(folder.parent / "elsewhere")
    (folder.parent / "elsewhere" / "circle").symlink_to(folder)
    found = [str(path.relative_to(folder)) for path in find_files([str(folder)])[0]]
    assert found == ["a.wav", "below/b.FLAC", "linked/c.wav"]


def test_a_glob_goes_around_a_ring_of_links_once(folder):
    (folder / "below" / "ring").symlink_to(folder)
    assert find_files([str(folder / "**" / "*.wav")]) == ([folder / "a.wav"], [])
    (folder / "other name.wav").symlink_to(folder / "a.wav")
    assert find_files([str(folder / "*.wav")]) == ([folder / "a.wav", folder / "other name.wav"], [])


def test_a_link_to_nothing_is_named_by_whichever_way_it_is_reached(folder, capsys, checkpoint):
    (folder / "gone.wav").symlink_to(folder / "nowhere.wav")
    for pattern in (folder, folder / "*.wav"):
        status, _, err = run(capsys, "classify", pattern, "--model", checkpoint)
        assert status == 1 and f"{folder / 'gone.wav'}: " in err


@pytest.mark.parametrize("pattern", ["missing.wav", "*.mp3", "empty"])
def test_what_names_no_file_is_named_and_the_rest_go_on(folder, capsys, checkpoint, pattern):
    (folder / "empty").mkdir()
    status, out, err = run(capsys, "classify", folder / pattern, folder / "a.wav", "--model", checkpoint)
    assert status == 1 and out.startswith(f"{folder / 'a.wav'}: ") and f"{folder / pattern}: there is no" in err


@pytest.mark.parametrize("command", ["classify", "why"])
def test_without_any_file_no_model_is_loaded(folder, capsys, command):
    status, out, err = run(capsys, command, folder / "missing.wav", "--model", folder / "no model either")
    assert status == 2 and not out
    assert "missing.wav: there is no" in err and "No file to classify" in err and "no model either" not in err


@pytest.mark.parametrize(
    "command",
    [("classify", EXAMPLES, "--model"), ("why", EXAMPLES, "--model"), ("info",)],
    ids=["classify", "why", "info"],
)
def test_a_model_that_cannot_be_loaded_is_named(tmp_path, capsys, command):
    status, out, err = run(capsys, *command, tmp_path / "typo")
    assert status == 2 and not out
    assert f"Cannot load the model {tmp_path / 'typo'}, which is no folder here" in err and "config.json" in err
    (tmp_path / "config.json").write_text('{"model_type": "causal-audio-transformer", "embed_dim": -1}')
    status, _, err = run(capsys, *command, tmp_path)
    assert status == 2 and f"Cannot load the model {tmp_path}: " in err and "embed_dim" in err


@pytest.mark.parametrize("command", [("classify", EXAMPLES), ("why", EXAMPLES), ("info",)])
def test_without_the_shipped_model_it_says_so(tmp_path, capsys, monkeypatch, command):
    monkeypatch.setattr("transformers_cat.cli.SHIPPED", tmp_path / "gone")
    status, out, err = run(capsys, *command)
    assert status == 2 and not out
    assert f"comes with this package is missing: there is no folder {tmp_path / 'gone'}" in err
    assert "name another model" in err and "Repo id" not in err


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


def test_recordings_by_a_glob(capsys, checkpoint, data_dir):
    pattern = data_dir / "esc10" / "audio" / "1-1[0-7]*.ogg"
    status, out, _ = run(capsys, "classify", pattern, "--model", checkpoint, "--json", "--batch_size", 4)
    lines = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and len(lines) == len(list(pattern.parent.glob(pattern.name))) > 4
    classifier = pipeline("audio-classification", model=str(checkpoint))
    for line in lines[:3]:
        expected = {item["label"]: item["score"] for item in classifier(load_audio(line["file"]))}
        assert {item["label"]: item["score"] for item in line["scores"]} == pytest.approx(expected, abs=2e-5)


def test_csv_has_a_row_for_each_label(folder, capsys, checkpoint):
    _, out, _ = run(capsys, "classify", folder / "a.wav", "--model", checkpoint, "--csv", "--top", 3)
    rows = list(csv.DictReader(out.splitlines()))
    expected = pipeline("audio-classification", model=str(checkpoint))(load_audio(folder / "a.wav"), top_k=3)
    assert [row["file"] for row in rows] == [str(folder / "a.wav")] * 3
    assert [row["rank"] for row in rows] == ["1", "2", "3"]
    assert [(row["label"], float(row["score"])) for row in rows] == [(one["label"], one["score"]) for one in expected]
    assert "\r" not in out


def test_text_names_the_best_label_first(folder, capsys, checkpoint):
    _, out, err = run(capsys, "classify", folder / "a.wav", "--model", checkpoint, "--top", 1)
    best = pipeline("audio-classification", model=str(checkpoint))(load_audio(folder / "a.wav"), top_k=1)[0]
    assert out == f"{folder / 'a.wav'}: {best['label']} {best['score']:.2f}\n"
    assert "1 of 1 files, 1.0 s of audio" in err


@pytest.mark.parametrize(
    ("samples", "lengths"), [(49, [49]), (100, [100]), (149, [149]), (151, [100, 51]), (349, [100, 100, 149])]
)
def test_pieces_are_of_one_length_but_for_the_last(samples, lengths):
    clip = np.arange(samples)
    pieces = cut(clip, 100)
    assert [len(piece) for piece in pieces] == lengths
    np.testing.assert_array_equal(np.concatenate(pieces), clip)
    (whole,) = cut(clip, None)
    assert whole is clip or np.shares_memory(whole, clip)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_pieces_are_scored_by_themselves(folder, capsys, checkpoint, batch_size):
    options = ("--model", checkpoint, "--top", 2, "--batch_size", batch_size, "--every", 0.4)
    status, out, err = run(capsys, "classify", folder, *options, "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    spans = [("a.wav", 0, 0.4), ("a.wav", 0.4, 1), ("b.FLAC", 0, 0.5)]  # one second, and half of one
    assert status == 0 and "2 of 2 files, 1.5 s of audio" in err
    assert [(Path(line["file"]).name, line["start"], line["end"]) for line in lines] == spans
    classifier = pipeline("audio-classification", model=str(checkpoint))
    for line in lines:
        piece = load_audio(line["file"])[round(32_000 * line["start"]) : round(32_000 * line["end"])]
        expected = {item["label"]: item["score"] for item in classifier(piece, top_k=2)}
        assert {item["label"]: item["score"] for item in line["scores"]} == pytest.approx(expected, 1e-4)
    _, out, _ = run(capsys, "classify", folder, *options, "--csv")
    rows = list(csv.DictReader(out.splitlines()))
    assert [(Path(row["file"]).name, float(row["start"]), float(row["end"])) for row in rows[::2]] == spans
    assert [float(row["score"]) for row in rows] == [item["score"] for line in lines for item in line["scores"]]
    _, out, _ = run(capsys, "classify", folder / "a.wav", *options)
    best = lines[1]["scores"][0]
    assert out.splitlines()[1].startswith(f"{folder / 'a.wav'} 0.4-1.0 s: {best['label']} {best['score']:.2f}, ")


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_a_corrupt_file_is_named_and_the_rest_go_on(folder, capsys, checkpoint, batch_size):
    (folder / "a2.wav").write_bytes(b"RIFF this is no sound")
    status, out, err = run(capsys, "classify", folder, "--model", checkpoint, "--json", "--batch_size", batch_size)
    assert status == 1
    assert [Path(json.loads(line)["file"]).name for line in out.splitlines()] == ["a.wav", "b.FLAC"]
    assert f"{folder / 'a2.wav'}: Cannot read" in err and "2 of 3 files" in err


def test_a_clip_that_the_model_refuses_does_not_stop_its_batch(folder, checkpoint):
    classifier = pipeline("audio-classification", model=str(checkpoint))
    accept = classifier.feature_extractor._as_clip

    def refuse_short(item, index):
        if len(item) < 20_000:
            raise ValueError("too short")
        return accept(item, index)

    classifier.feature_extractor._as_clip = refuse_short
    results = list(classify_files(classifier, find_files([str(folder)])[0], top=1, batch_size=2))
    assert [error and str(error) for *_, error in results] == [None, "too short"]
    assert results[0][2] and results[1][2] is None


def test_scores_that_are_no_numbers_are_an_error(folder, capsys, checkpoint, tmp_path):
    """As of weights that were damaged."""
    model = CATForAudioClassification.from_pretrained(checkpoint)
    torch.nn.init.constant_(model.classifier.weight, torch.nan)
    damaged = shutil.copytree(checkpoint, tmp_path / "damaged")
    model.save_pretrained(damaged)
    status, out, err = run(capsys, "classify", folder / "a.wav", "--model", damaged)
    assert status == 1 and out == "" and "a.wav: the model gives no number" in err


@pytest.mark.parametrize(
    ("problem", "labels"),
    [("multi_label_classification", 3), ("single_label_classification", 3), ("regression", 3), (None, 3), (None, 1)],
)
def test_scores_are_those_of_the_problem_in_every_release(folder, capsys, tmp_path, monkeypatch, problem, labels):
    torch.manual_seed(0)
    model = awaken(CATForAudioClassification(small_config(problem_type=problem, num_labels=labels))).eval()
    model.save_pretrained(tmp_path / "model")
    CATFeatureExtractor().save_pretrained(tmp_path / "model")
    batch = CATFeatureExtractor()(load_audio(folder / "a.wav"), sampling_rate=32_000, return_tensors="pt")
    logits = model(**batch).logits[0]
    expected = {"multi_label_classification": logits.sigmoid(), "single_label_classification": logits.softmax(-1)}
    # As up to transformers 5.22, where the pipeline itself does not look at the problem.
    own = AudioClassificationPipeline.postprocess
    monkeypatch.setattr(
        AudioClassificationPipeline,
        "postprocess",
        lambda self, outputs, top_k=5, function_to_apply="softmax": own(self, outputs, top_k, function_to_apply),
    )
    _, out, _ = run(capsys, "classify", folder / "a.wav", "--model", tmp_path / "model", "--json")
    scores = [item["score"] for item in json.loads(out)["scores"]]
    problem = problem or ("regression" if labels == 1 else "single_label_classification")
    assert scores == pytest.approx(expected.get(problem, logits).sort(descending=True).values.tolist(), abs=1e-5)


@pytest.fixture(scope="module")
def other_models(tmp_path_factory) -> Path:
    """Folder of a small AST and a small Wav2Vec2, both at 16 kHz."""
    folder = tmp_path_factory.mktemp("others")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    ASTForAudioClassification(ASTConfig(**sizes, max_length=64, num_mel_bins=32, num_labels=3)).save_pretrained(
        folder / "ast"
    )
    ASTFeatureExtractor(max_length=64, num_mel_bins=32).save_pretrained(folder / "ast")
    config = Wav2Vec2Config(
        **sizes,
        conv_dim=(8, 8),
        conv_kernel=(10, 3),
        conv_stride=(5, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        num_labels=3,
    )
    Wav2Vec2ForSequenceClassification(config).save_pretrained(folder / "wav2vec2")
    Wav2Vec2FeatureExtractor().save_pretrained(folder / "wav2vec2")
    return folder


@pytest.mark.parametrize("name", ["ast", "wav2vec2"])
def test_other_models_work_at_their_own_rate(folder, capsys, other_models, name):
    status, out, _ = run(capsys, "classify", folder, "--model", other_models / name, "--json")
    assert status == 0 and len(out.splitlines()) == 2
    classifier = pipeline("audio-classification", model=str(other_models / name))
    for line in map(json.loads, out.splitlines()):
        expected = classifier(load_audio(line["file"], 16_000))
        assert [item["label"] for item in line["scores"]] == [item["label"] for item in expected]
        assert [item["score"] for item in line["scores"]] == pytest.approx([item["score"] for item in expected], 1e-4)


def test_why_is_asked_of_cat_alone(folder, capsys, other_models):
    status, out, err = run(capsys, "why", folder, "--model", other_models / "ast")
    assert (status, out) == (2, "")
    assert f"{other_models / 'ast'} is no CAT but ASTForAudioClassification, which `why` cannot ask" in err


# In a batch, Wav2Vec2's clips are padded to the longest, so that it refuses none.
@pytest.mark.parametrize("name, batch_size", [("ast", 1), ("ast", 3), ("wav2vec2", 1)])
def test_a_clip_that_is_too_short_for_the_model_is_named(folder, capsys, other_models, name, batch_size):
    soundfile.write(folder / "a2.wav", np.full(5, 0.5), 16_000)
    options = ("--model", other_models / name, "--json", "--batch_size", batch_size)
    status, out, err = run(capsys, "classify", folder, *options)
    assert status == 1 and [Path(json.loads(line)["file"]).name for line in out.splitlines()] == ["a.wav", "b.FLAC"]
    assert f"{folder / 'a2.wav'}: " in err


def test_an_error_without_words_is_named(folder, capsys, checkpoint, monkeypatch):
    def refuse(self, raw_speech, **options):
        raise AssertionError

    monkeypatch.setattr(CATFeatureExtractor, "__call__", refuse)
    status, _, err = run(capsys, "classify", folder / "a.wav", "--model", checkpoint)
    assert status == 1 and f"{folder / 'a.wav'}: AssertionError\n" in err


def test_files_are_decoded_when_their_batch_is_due(folder, checkpoint, monkeypatch):
    classifier = pipeline("audio-classification", model=str(checkpoint))
    read = []
    monkeypatch.setattr(
        "transformers_cat.cli.load_audio", lambda path, rate: read.append(path) or load_audio(path, rate)
    )
    results = classify_files(classifier, (folder / "a.wav" for _ in iter(int, 1)), top=1, batch_size=2)  # endless
    next(results), next(results)
    assert len(read) == 2
    next(results)
    assert len(read) == 4


def test_info_reads_what_a_folder_says_without_its_weights(checkpoint, capsys, monkeypatch):
    model = CATForAudioClassification.from_pretrained(checkpoint)
    monkeypatch.setattr(torch.nn.Module, "__init__", None)  # nobody makes a module from here on
    facts = describe(checkpoint)
    assert facts["labels"] == ["dog", "rain", "clock", "rooster", "crying"]
    assert facts["architecture"]["depths"] == [2, 2, 1]
    assert facts["front_end"]["window_lengths"] == [400, 800, 1600] and facts["front_end"]["sampling_rate"] == 32_000
    assert facts["parameters"] == model.num_parameters()
    assert facts["bytes"] == (checkpoint / "model.safetensors").stat().st_size
    status, out, _ = run(capsys, "info", checkpoint)
    assert status == 0 and "5: dog, rain, clock" in out and "num_bins: 64" in out and "none stated" in out
    assert f"parameters    {model.num_parameters():,}\n" in out
    assert json.loads(run(capsys, "info", checkpoint, "--json")[1]) == facts


def test_info_shows_the_results_of_the_card(checkpoint, tmp_path, capsys):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    result = EvalResult(
        task_type="audio-classification",
        dataset_type="a/b",
        dataset_name="Some sounds",
        dataset_split="fold 3",
        metric_type="accuracy",
        metric_name="Accuracy",
        metric_value=0.8125,
    )
    data = ModelCardData(model_name="model", eval_results=[result])
    ModelCard(f"---\n{data.to_yaml()}\n---\nText").save(folder / "README.md")
    assert "results       Accuracy 0.8125 (Some sounds, fold 3)\n" in run(capsys, "info", folder)[1]
    result.metric_value = "81 %"
    ModelCard(f"---\n{ModelCardData(model_name='model', eval_results=[result]).to_yaml()}\n---\n").save(
        folder / "README.md"
    )
    assert "results       Accuracy 81 % (Some sounds, fold 3)\n" in run(capsys, "info", folder)[1]
    for wrong in ("model-index:\n- name: without results", "a: ["):
        (folder / "README.md").write_text(f"---\n{wrong}\n---\nText")
        assert "results       none stated\n" in run(capsys, "info", folder)[1]


def test_info_adds_up_shards_and_does_without_weights(checkpoint, tmp_path):
    whole, shards = describe(checkpoint), tmp_path / "shards"
    CATForAudioClassification.from_pretrained(checkpoint).save_pretrained(shards, max_shard_size="100KB")
    assert len(list(shards.glob("*.safetensors"))) > 1
    facts = describe(shards)
    assert facts["parameters"] == whole["parameters"] and facts["bytes"] >= whole["bytes"]
    # The configuration knows the front end where no extractor is saved.
    assert facts["front_end"].items() <= whole["front_end"].items() and "num_bins" in facts["front_end"]
    for file in shards.glob("*.safetensors"):
        file.unlink()
    assert describe(shards)["parameters"] is None


def test_info_of_labels_that_are_numbers(checkpoint, capsys, monkeypatch):
    """As `config.json` may have them for newer releases of transformers."""
    facts = {**describe(checkpoint), "labels": [0, 10]}
    monkeypatch.setattr("transformers_cat.cli.describe", lambda _: facts)
    assert "labels        2: 0, 10\n" in run(capsys, "info", checkpoint)[1]


def test_info_of_other_models(other_models):
    facts = describe(other_models / "ast")
    assert facts["architecture"]["hidden_size"] == 16 and facts["front_end"]["num_mel_bins"] == 32
    assert facts["parameters"] == ASTForAudioClassification.from_pretrained(other_models / "ast").num_parameters()


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "transformers_cat", *map(str, arguments)]


def test_the_command_runs_as_a_module(folder, checkpoint):
    line = command("classify", folder / "a.wav", "--model", checkpoint, "--top", 1)
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.startswith(f"{folder / 'a.wav'}: ")
    assert len(done.stderr.splitlines()) == 1  # no bar where nobody watches


def test_a_terminal_gets_a_bar_that_no_line_is_written_into(folder, checkpoint):
    fcntl, termios = (pytest.importorskip(name, reason="no pseudo-terminals") for name in ("fcntl", "termios"))
    (folder / "b.wav").write_bytes(b"no sound")
    terminal, end = os.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))  # without a size, tqdm shows nothing
    line = command("classify", folder, "--model", checkpoint, "--top", 1)
    subprocess.run(line, stdout=end, stderr=end, timeout=300)
    os.close(end)
    shown = os.read(terminal, 100_000).decode()
    assert "/3 [" in shown
    for name in ("a.wav", "b.wav"):  # each begins where the bar was wiped away
        assert f"\r{folder / name}: " in shown


@pytest.mark.parametrize("arguments", [("classify", "--model"), ("info",)], ids=["classify", "info"])
def test_a_reader_that_has_enough_is_no_error(folder, checkpoint, arguments):
    sound = [folder / "a.wav"] if arguments[0] == "classify" else []
    whole = command(arguments[0], *sound, *arguments[1:], checkpoint)
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}  # so that much of the output is written at the end
    with subprocess.Popen(whole, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=buffered) as process:
        process.stdout.close()
        assert not process.stderr.read()
    assert process.returncode == 1


def test_an_interrupt_ends_the_command(folder, checkpoint, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers_cat.cli.load_audio", interrupt)
    assert main(["classify", str(folder), "--model", str(checkpoint)]) == 130
    assert not capsys.readouterr().out


def test_names_that_the_output_cannot_write_are_escaped(folder, checkpoint):
    shutil.copy(folder / "a.wav", folder / "a日.wav")
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    whole = command("classify", folder, folder / "é日.mp3", "--model", checkpoint)
    result = subprocess.run(whole, capture_output=True, env=environment)
    assert rb"a\u65e5.wav: " in result.stdout and b"b.FLAC: " in result.stdout
    assert b"3 of 3 files" in result.stderr and b"\xe9\\u65e5.mp3: there is no" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--top", "0"],
        ["--top", "two"],
        ["--batch_size", "-1"],
        ["--json", "--csv"],
        ["--every", "0"],
        ["--every", "nan"],
        ["--every", "1e305"],
    ],
)
def test_impossible_flags_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as status:
        main(["classify", "a.wav", *arguments])
    err = capsys.readouterr().err
    assert status.value.code == 2 and arguments[0] in err and "invalid" not in err


@pytest.mark.parametrize(("device", "reason"), [("banana", "banana"), ("cuda:99", "99|NVIDIA|CUDA")])
def test_a_device_that_there_is_not_is_named(folder, checkpoint, capsys, device, reason):
    with pytest.raises(SystemExit) as status:
        main(["classify", str(folder), "--model", str(checkpoint), "--device", device])
    err = capsys.readouterr().err
    assert status.value.code == 2 and f"{device} is no device that PyTorch has here" in err and re.search(reason, err)


def test_names_that_are_not_utf8(folder, checkpoint):
    name, broken = b"h\xe9lico.wav", b"h\xe9las.wav"
    try:
        shutil.copy(folder / "a.wav", folder / os.fsdecode(name))
    except (OSError, UnicodeError):
        pytest.skip("this file system has names in UTF-8 alone")
    (folder / os.fsdecode(broken)).write_text("no sound")
    result = subprocess.run(command("classify", folder, "--model", checkpoint), capture_output=True)
    assert result.returncode == 1 and name in result.stdout and broken in result.stderr
    assert b"Traceback" not in result.stderr and b"3 of 4 files" in result.stderr
    assert b"b'" not in result.stderr  # libsndfile's own message names the file as Python writes bytes


@needs_shipped
def test_the_shipped_model_names_the_shipped_recordings(capsys):
    status, out, _ = run(capsys, "classify", EXAMPLES, "--json", "--top", 1)
    assert status == 0
    heard = {Path(line["file"]).stem: line["scores"][0]["label"] for line in map(json.loads, out.splitlines())}
    assert heard["dog"] == "dog" and heard["rooster"] == "rooster"


@needs_shipped
@pytest.mark.parametrize("name", ["dog", "rooster"])
def test_the_shipped_model_knows_distant_sounds(name):
    """At a tenth of the amplitude, a dog was a clock to a model that had heard little else than its data's volume."""
    classifier = pipeline("audio-classification", model=str(SHIPPED))
    (first,) = classifier(0.1 * load_audio(EXAMPLES / f"{name}.ogg"), top_k=1)
    assert first["label"] == name


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
    right = [scores[0]["label"] == names[file.stem.split("-")[-1]] for file, _, (scores,), _ in results]
    assert sum(right) / len(right) > 0.8


def test_the_device_is_the_pipelines(folder, checkpoint, monkeypatch):
    made = []
    monkeypatch.setattr("transformers_cat.cli.pipeline", lambda *a, **o: made.append(o["device"]) or pipeline(*a, **o))
    assert main(["classify", str(folder / "a.wav"), "--model", str(checkpoint), "--device", "cpu"]) == 0
    assert made == [torch.device("cpu")]
