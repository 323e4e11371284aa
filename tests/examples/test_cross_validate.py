"""Cross-validation, transfer and the ablations, on short tones."""

import copy
import csv
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from datasets import DatasetDict

from transformers_cat import CATConfig, CATForAudioClassification
from transformers_cat.training import read_scores

EXAMPLES = Path(__file__).parents[2] / "examples"
RATE = 32_000
CONFIG = {
    "model_type": "causal-audio-transformer",
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "num_bins": 16,
}


@pytest.fixture
def example(monkeypatch):
    """Imports a script of the examples."""
    monkeypatch.syspath_prepend(EXAMPLES)
    for name in ("run_audio_classification", "cross_validate", "transfer", "ablate", "compare_models"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A configuration, and tones of two classes in three folds."""
    folder = tmp_path_factory.mktemp("tones")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    rows = []
    for label, frequency in (("low", 300), ("high", 4800)):
        for i in range(6):
            tone = 0.3 * np.sin(2 * np.pi * frequency * np.arange(RATE // 5) / RATE + i)
            soundfile.write(folder / f"{label}{i}.wav", tone, RATE)
            rows.append((f"{label}{i}.wav", label, i % 3 + 1))
    for name in ("clips", "others"):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("audio", "label", "fold"), *rows])
    return folder


def flags(folder, output, *more):
    run = f"--data {folder}/clips.csv --config_name {folder} --output_dir {output} --num_train_epochs 1 --freq_mask 4"
    size = "--per_device_train_batch_size 4 --dataloader_num_workers 0 --use_cpu --disable_tqdm true --report_to none"
    return [*run.split(), *size.split(), *more]


def test_every_fold_and_seed_runs_once(example, folder, tmp_path, monkeypatch):
    script = example("cross_validate")
    summary = script.main(flags(folder, tmp_path, "--folds", "1", "2", "--token", "hf_old"))
    assert "hf_old" not in (tmp_path / "flags.json").read_text()
    assert {(run["seed"], run["fold"]) for run in summary["runs"]} == {(0, 1), (0, 2)}
    scores = [run["metrics"]["eval_accuracy"] for run in summary["runs"]]
    assert summary["mean"] == pytest.approx(np.mean(scores)) and summary["deviation_of"] == "folds"
    assert summary["note"] == "2 of 3 given folds."
    loss = np.mean([run["metrics"]["eval_loss"] for run in summary["runs"]])
    assert summary["seeds"][0]["loss"] == pytest.approx(loss)
    lines = (tmp_path / "summary.md").read_text().splitlines()
    assert lines[2] == "| seed | fold 1 | fold 2 | mean ± standard deviation | loss |"
    assert lines[4].startswith(f"| 0 | {100 * scores[0]:.1f} | ") and lines[4].endswith(f" | {loss:.2f} |")
    together = read_scores(tmp_path / "seed0" / "predictions.csv")
    assert together.folds == [1] * 4 + [2] * 4
    assert {Path(p).stem[-1] for p, fold in zip(together.paths, together.folds) if fold == 1} == {"0", "3"}

    # What is finished is kept; what is missing, and only that, is run.
    started, main = [], script.run.main
    monkeypatch.setattr(script.run, "main", lambda argv: started.append(argv) or main(argv))
    (tmp_path / "seed0" / "fold2" / "results.json").unlink()
    again = script.main(flags(folder, tmp_path, "--folds", "1", "2", "--token", "hf_renewed"))
    assert [argv[argv.index("--test_folds") + 1] for argv in started] == ["2"]
    assert again["mean"] == pytest.approx(summary["mean"])
    with pytest.raises(ValueError, match="holds runs with other flags"):
        script.main(flags(folder, tmp_path, "--folds", "1", "--learning_rate", "1"))
    # Nor is what has changed under the same name mixed with it: the configuration, the clips.
    command = flags(folder, tmp_path, "--folds", "1", "2")
    changed = shutil.copytree(folder, tmp_path / "changed")
    settings = json.loads((tmp_path / "flags.json").read_text())
    settings["flags"] = [part.replace(str(folder), str(changed)) for part in settings["flags"]]
    (tmp_path / "flags.json").write_text(json.dumps(settings))
    command = flags(changed, tmp_path, "--folds", "1", "2")
    script.main(command)
    (changed / "config.json").write_text(json.dumps({**CONFIG, "whitening": 0.5}))
    with pytest.raises(ValueError, match=r"'config.whitening': \(0.0, 0.5\)"):
        script.main(command)
    (changed / "config.json").write_text(json.dumps(CONFIG))
    table = (changed / "clips.csv").read_text()
    (changed / "clips.csv").write_text(table.replace("low0.wav,low,1", "low0.wav,low,2"))
    with pytest.raises(ValueError, match="'fingerprint': "):
        script.main(command)
    (changed / "clips.csv").write_text(table)
    soundfile.write(changed / "low0.wav", np.zeros(999), RATE)
    with pytest.raises(ValueError, match="'fingerprint': "):
        script.main(command)
    assert len(started) == 1


def test_several_seeds_have_a_row_of_means(example):
    seeds = {
        0: {"folds": {1: 0.5, 2: 0.75}, "mean": 0.625, "deviation": 0.2, "loss": 0.5},
        1: {"folds": {1: 0.75, 2: 1.0}, "mean": 0.875, "deviation": 0.2, "loss": 0.25},
    }
    summary = {"seeds": seeds, "mean": 0.75, "deviation": 0.1}
    assert example("cross_validate").table(summary).splitlines()[4:] == ["| mean | 62.5 | 87.5 | 75.0 ± 10.0 | 0.38 |"]


def test_prepared_clips_keep_their_folds(example, folder, tmp_path):
    """Shards come as a data set of one split, which is no split."""
    prepared = tmp_path / "prepared"
    example("prepare_audio").main(
        ["--data", f"{folder}/clips.csv", "--output_dir", str(prepared), "--num_workers", "1"]
    )
    command = flags(folder, tmp_path / "runs", "--folds", "2", "--check_audio", "false")
    command[1] = str(prepared)
    summary = example("cross_validate").main(command)
    assert summary["note"] == "1 of 3 given folds."
    scores = read_scores(tmp_path / "runs/seed0/predictions.csv")
    assert {Path(path).stem for path in scores.paths} == {"low1", "low4", "high1", "high4"}


def test_the_tested_fold_never_chooses_the_epoch(example, folder, tmp_path):
    script = example("cross_validate")
    script.main(flags(folder, tmp_path, "--folds", "3", "--choose_epoch"))
    results = json.loads((tmp_path / "seed0" / "fold3" / "results.json").read_text())
    assert results["arguments"]["data"]["test_folds"] == [3]
    assert results["arguments"]["data"]["validation_folds"] == [1]
    assert results["arguments"]["training"]["load_best_model_at_end"] is True
    for fold in (1, 2, 3):
        assert "--validation_folds" not in script.fold_flags(fold, [1, 2, 3], choose_epoch=False)
        tested, validation = script.fold_flags(fold, [1, 2, 3], choose_epoch=True)[1::2]
        assert tested != validation


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--folds", "7"], r"--folds names \[7\]; the data have the folds \[1, 2, 3\]"),
        (["--test_folds", "1"], "sets --test_folds, .* itself"),
        (["--load_best_model_at_end"], "sets --test_folds, .* itself"),
        (["--seed", "3"], "sets --test_folds, .* itself"),
        (["--choose_epoch", "--eval_strategy", "no"], "to be the same, not no and epoch"),
        (
            "--choose_epoch --eval_strategy steps --save_strategy steps --eval_steps 2 --save_steps 3".split(),
            "--save_steps to be a multiple of --eval_steps, not 3 and 2",
        ),
        (["--choose_epoch", "--average_last_epochs", "2"], "no --average_last_epochs"),
    ],
)
def test_what_would_spoil_the_protocol_is_refused(example, folder, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        example("cross_validate").main(flags(folder, tmp_path, *more))


def test_robustness(example, folder, tmp_path):
    script = example("robustness")
    command = [
        "--data",
        f"{folder}/clips.csv",
        "--runs",
        str(tmp_path / "tones"),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    with pytest.raises(FileNotFoundError, match="tones holds no seed.*of a finished run"):
        script.main([*command, "--decibels", "0"])
    summary = example("cross_validate").main(flags(folder, tmp_path / "tones", "--num_train_epochs", "4"))
    (results,) = script.main([*command, "--decibels", "-120", "0"]).values()
    assert results["0 dB"] == pytest.approx(summary["mean"])  # folds of one size
    assert results["-120 dB"] == 0.5  # silence: one class for all
    assert (tmp_path / "out" / "table.md").read_text().startswith("|  | -120 dB | 0 dB |")
    again = shutil.copytree(tmp_path / "tones", tmp_path / "again" / "tones")
    command[command.index("--runs") + 1 : command.index("--runs") + 2] = [str(tmp_path / "tones"), str(again)]
    both = script.main([*command, "--seconds", "0.001", "100"])
    assert set(both) == {str(tmp_path / "tones"), str(again)}
    assert all(own["100 s"] == results["0 dB"] for own in both.values())
    precise = script.main([*command, "--precisions", "int8", "bfloat16"])[str(tmp_path / "tones")]
    assert precise["float32"] == results["0 dB"]
    for precision in ("int8", "bfloat16"):
        assert abs(precise[precision] - precise["float32"]) <= 1 - precise[f"{precision}, class as in float32"]
    with pytest.raises(SystemExit):
        script.main(command)
    with pytest.raises(SystemExit):
        script.main([*command, "--seconds", "0"])
    with pytest.raises(ValueError, match=r"come in the splits \['train', 'test'\]"):
        script.tested_clips(tmp_path / "tones", DatasetDict(dict.fromkeys(("train", "test"))))
    header, *clips = (line.split(",") for line in (folder / "clips.csv").read_text().splitlines())
    other_folds = [(f"{folder}/{path}", label, str(int(fold) % 3 + 1)) for path, label, fold in clips]
    (tmp_path / "other_folds.csv").write_text("".join(f"{','.join(row)}\n" for row in (header, *other_folds)))
    command[command.index("--data") + 1] = str(tmp_path / "other_folds.csv")
    with pytest.raises(ValueError, match=r"seed0.fold\d was not tested on .*pass the --data and folds of the run"):
        script.main([*command, "--decibels", "0"])


def test_precisions(example, folder, tmp_path):
    """What a precision is called it is; the share of clips that are named alike is counted clip by clip."""
    script = example("robustness")
    model = CATForAudioClassification(CATConfig(**{key: value for key, value in CONFIG.items() if key != "model_type"}))
    quantised = script.PRECISIONS["int8"](copy.deepcopy(model))
    assert {type(layer).__module__ for name, layer in quantised.named_modules() if name.endswith("classifier")} == {
        "torch.ao.nn.quantized.dynamic.modules.linear"
    }
    for precision in ("float16", "bfloat16", "float32"):
        assert script.PRECISIONS[precision](model).dtype == getattr(torch, precision)
    ones, others = (
        [script.Scores(["a", "b"], ["x", "y"], np.array(values)), script.Scores(["c"], ["x", "y"], np.eye(2)[:1])]
        for values in ([[0.9, 0.1], [0.2, 0.8]], [[0.6, 0.4], [0.7, 0.3]])
    )
    assert script.agreement(ones, others) == pytest.approx(2 / 3)


def test_the_loudest_part(example):
    loudest = example("robustness").loudest
    clip = torch.tensor([0.0, 3.0, -3.0, 1.0, 0.0, 4.0, 0.0])
    assert loudest(clip, 2, 1.0).tolist() == [3.0, -3.0]  # two samples at 2 Hz
    assert loudest(clip, 2, 1.5).tolist() == [3.0, -3.0, 1.0]
    assert loudest(clip, 2, 0.5).tolist() == [4.0]
    assert loudest(clip, 2, 9.0) is clip


def test_elsewhere(example, folder, tmp_path):
    """Models that tell the tones hear those of another data set, where they have other names."""
    script = example("elsewhere")
    rows = "".join(
        f"{folder}/{label}{i}.wav,{name}\n" for label, name in (("low", "hum"), ("high", "hiss")) for i in (0, 1)
    )
    (tmp_path / "other.csv").write_text(f"audio,label\n{rows}")
    runs, expected, out = tmp_path / "tones", ("--expected", "low"), ("--output_dir", str(tmp_path / "out"))
    command = ["--runs", str(runs), "--data", str(tmp_path / "other.csv"), "--label", "hum"]
    with pytest.raises(FileNotFoundError, match="tones holds neither a model nor the finished runs"):
        script.main([*command, *expected, *out])
    example("cross_validate").main(flags(folder, runs, "--num_train_epochs", "4", "--folds", "1", "2"))
    for path in runs.glob("seed0/fold*/config.json"):  # as transformers leaves it where `id2label` is replaced
        path.write_text(json.dumps({**json.loads(path.read_text()), "label2id": {"other": 0}}))
    (results,) = script.main([*command, *expected, *out]).values()
    assert results == [{"low": 2}, {"low": 2}]
    assert "| 2 | 2 | 2 | 2 to 2 |  |" in (tmp_path / "out" / "table.md").read_text()
    # Clips in splits, with several labels.
    for split in ("train", "test"):
        for name in ("hum", "hiss"):
            (tmp_path / "splits" / split / name).mkdir(parents=True)
    for name, label, i, split in (("hum", "low", 0, "train"), ("hum", "low", 1, "test"), ("hiss", "high", 0, "test")):
        shutil.copy(folder / f"{label}{i}.wav", tmp_path / "splits" / split / name)
    assert len(script.clips_of(str(tmp_path / "splits"), "hum")) == 2
    (tmp_path / "several.csv").write_text(f"audio,label\n{folder}/low0.wav,hum;hiss\n{folder}/high0.wav,hiss\n")
    assert [len(script.clips_of(str(tmp_path / "several.csv"), name)) for name in ("hum", "hiss")] == [1, 2]
    command[1] = str(runs / "seed0" / "fold1")
    deaf = ("--feature_extractor_overrides", '{"log_offset": 1000000.0}')
    for more, alike in (((), False), (deaf, True)):
        hum, hiss = (script.main([*command[:-1], name, *expected, *out, *more]) for name in ("hum", "hiss"))
        assert (hum == hiss) == alike
    for arguments, message in (
        ([*command[:-1], "rain", *expected], r"has no class 'rain', only \['hiss', 'hum'\]"),
        ([*command, "--expected", "hum"], r"has no class 'hum', only \['high', 'low'\]"),
        ([*command, *expected, "--feature_extractor_overrides", '{"volume": 1}'], "has no 'volume'"),
    ):
        with pytest.raises(ValueError, match=message):
            script.main([*arguments, *out])


def test_publish(example, folder, tmp_path):
    """A model of all clips, with the scores of the cross-validation of its recipe and of no other."""
    example("cross_validate").main(flags(folder, tmp_path / "cv", "--folds", "1", "2", "--eval_strategy", "no"))
    shown = ("--disable_tqdm", "false", "--logging_steps", "7")  # which are no part of a recipe
    own = flags(folder, tmp_path / "all", "--eval_strategy", "no", *shown)
    example("run_audio_classification").main([*own, "--do_train"])
    command = ["--model", tmp_path / "all", "--cross_validation", tmp_path / "cv", "--output_dir", tmp_path / "out"]
    publish = example("publish_checkpoint").main
    publish([*map(str, command), "--dataset", "esc10"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "ESC-10" in card and "license: cc-by-3.0" in card and "fold 1, fold 2" in card
    assert {"model.safetensors", "modeling_cat.py", "preprocessor_config.json"} <= set(os.listdir(tmp_path / "out"))
    example("cross_validate").main(flags(folder, tmp_path / "cv2", "--folds", "1", "--gain_db", "1"))
    command[3] = tmp_path / "cv2"
    with pytest.raises(ValueError, match=r"had other arguments than the model: \['gain_db'\]"):
        publish([*map(str, command)])
    results = json.loads((tmp_path / "all" / "results.json").read_text())
    results["arguments"]["data"].update(data=None, train_file="tones.csv")
    (tmp_path / "all" / "results.json").write_text(json.dumps(results))
    publish([*map(str, command[:2]), *map(str, command[4:])])
    assert "tones.csv" in (tmp_path / "out" / "README.md").read_text()
    results["arguments"]["data"] = json.loads((tmp_path / "cv/seed0/fold1/results.json").read_text())["arguments"][
        "data"
    ]
    results["arguments"]["model"]["init_from"] = "someone/swin"
    (tmp_path / "all" / "results.json").write_text(json.dumps(results))
    command[3] = tmp_path / "cv"
    with pytest.raises(ValueError, match="another --init_from"):
        publish([*map(str, command)])


def test_transfer(example, folder, tmp_path, monkeypatch):
    for name in ("clips", "others"):  # with a column of another name
        _, *rows = (folder / f"{name}.csv").read_text().splitlines()
        (tmp_path / f"{name}.csv").write_text("\n".join(["audio,sound,fold", *(f"{folder}/{row}" for row in rows)]))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    renamed = ("--label_column_name", "sound")
    command = flags(tmp_path, tmp_path, "--source", str(tmp_path / "others.csv"), *renamed)
    shapes, transfer = [], example("transfer")
    fit = transfer.linear_probe
    monkeypatch.setattr(transfer, "linear_probe", lambda z, *more: (shapes.append(z.shape[1:]), fit(z, *more))[1])
    summary = transfer.main(command)
    (of_z,), (speeds, width), (of_layers,), last = shapes  # in the order of PROBES
    assert (speeds, width) == (len(transfer.SPEEDS), of_z) and last == (speeds, of_layers) and of_z < of_layers
    for name in transfer.PROBES:
        assert set(summary[name]["seeds"][0]["folds"]) == {1, 2, 3}
    assert set(summary["fine-tuned"]["seeds"][0]["folds"]) == {1, 2, 3}
    assert {"fingerprint", "config.embed_dim"} <= json.loads((tmp_path / "flags.json").read_text()).keys()
    source = json.loads((tmp_path / "seed0" / "source" / "results.json").read_text())
    assert source["clips"] == {"train": 12}  # all of them
    tuned = json.loads((tmp_path / "seed0" / "fine_tuned" / "seed0" / "fold1" / "results.json").read_text())
    assert tuned["config"]["reconstruction_loss_weight"] == 1  # the saved source has it at 0


def test_a_transfer_to_several_labels_is_refused_before_it_begins(example, folder, tmp_path):
    rows = [f"{folder}/{name}0.wav,low;high,{fold}" for fold, name in enumerate(("low", "high"), 1)]
    (tmp_path / "several.csv").write_text("\n".join(["audio,label,fold", *rows]))
    command = flags(folder, tmp_path, "--source", str(folder / "others.csv"), "--data", f"{tmp_path}/several.csv")
    with pytest.raises(ValueError, match="needs folds, and clips of one label"):
        example("transfer").main(command)
    assert not (tmp_path / "seed0").exists()


def test_the_scripts_know_the_peers():
    """In a process of its own: here, another test may have imported them."""
    code = "import run_audio_classification, transformers; transformers.AutoConfig.for_model('cat-peer')"
    subprocess.run([sys.executable, "-c", code], cwd=EXAMPLES, check=True)


def test_transfer_of_a_peer(example, folder, tmp_path):
    peer = str(tmp_path / "cnn")
    same_sounds = ["--normalize_volume", "--whitening", "0.5"]
    example("peers").main(["--kind", "cnn", "--max_length_seconds", "0.15", "--output_dir", peer, *same_sounds])
    front_end = json.loads((tmp_path / "cnn/preprocessor_config.json").read_text())
    assert front_end["normalize_volume"] is True and front_end["whitening"] == 0.5
    assert json.loads((tmp_path / "cnn/config.json").read_text())["num_frames"] == 15  # of 10 ms
    command = flags(folder, tmp_path, "--source", str(folder / "others.csv"), "--config_name", peer)
    summary = example("transfer").main(command)
    for name in example("transfer").PROBES:
        assert set(summary[name]["seeds"][0]["folds"]) == {1, 2, 3}
    # A head of another size, and one of the same size for other classes, start anew.
    source = tmp_path / "seed0" / "source"
    model = example("peers").PeerForAudioClassification
    more = {"num_labels": 7, "ignore_mismatched_sizes": True}
    weight = model.from_pretrained(source, **more).classifier.weight
    assert 0 < weight.abs().max() <= weight.shape[1] ** -0.5


@pytest.mark.parametrize(("labels", "classes"), [([], 2), (["--recordings_as_labels"], 8)])
def test_transfer_without_shared_recordings(example, folder, tmp_path, labels, classes):
    """Recordings 0 and 1 are in the target; of the source's six recordings, two clips each, four remain."""
    for name, count, pattern in (("clips", 2, "1-{}-A-{}.wav"), ("others", 6, "{}-{}-0-0.wav")):
        rows = [("audio", "label", "fold")]
        for recording in range(count):
            for i, label in enumerate(("low", "high")):
                rows.append((pattern.format(recording, i), label, recording % 2 + 1))
                (tmp_path / rows[-1][0]).write_bytes((folder / f"{label}{recording}.wav").read_bytes())
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    more = ("--source", str(tmp_path / "others.csv"), "--leave_out_shared_recordings")
    example("transfer").main(flags(tmp_path, tmp_path / "runs", *more, *labels))
    source = json.loads((tmp_path / "runs" / "seed0" / "source" / "results.json").read_text())
    assert source["clips"] == {"train": 8} and len(source["config"]["id2label"]) == classes
    (tuned,) = (tmp_path / "runs" / "seed0" / "fine_tuned").glob("seed0/fold1/results.json")
    assert len(json.loads(tuned.read_text())["config"]["id2label"]) == 2


def test_ablation_table(example, folder, tmp_path):
    results = example("ablate").main(flags(folder, tmp_path, "--table", "a", "--folds", "1", "--max_steps", "1"))
    assert list(results) == ["w/o CL", "w. CL"]
    rows = list(csv.DictReader((tmp_path / "table.csv").open(newline="")))
    kept = json.loads((tmp_path / "results.json").read_text())
    assert {(row["row"], row["column"]): float(row["mean"]) for row in rows} == {
        (row, column): one["mean"] for row, own in kept.items() for column, one in own.items()
    }
    assert [float(row["mean"]) for row in rows] == [own["CAT"]["mean"] for own in results.values()]
    assert (tmp_path / "table.png").stat().st_size
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[0] == "|  | CAT | CAT, loss |"
    for row, line, name, weight in zip(rows, lines[2:], ("CAT_w_o_CL", "CAT_w_CL"), (0, 1)):
        run = json.loads((tmp_path / name / "seed0" / "fold1" / "results.json").read_text())
        assert float(row["loss"]) == run["metrics"]["eval_loss"] and line.endswith(f" {float(row['loss']):.2f} |")
        assert run["config"]["causal_loss_weight"] == run["config"]["reconstruction_loss_weight"] == weight


def test_both_rows_of_table_b_have_one_optimizer(example, folder, tmp_path, monkeypatch):
    script = example("ablate")
    commands = []
    monkeypatch.setattr(script.cross_validate, "main", commands.append)
    for more, expected in (([], False), (["--muon", "true"], True)):
        commands.clear()
        named = {"config_name": str(folder), "config_overrides": "{}", "data": str(folder), "output_dir": tmp_path}
        script.measure_models(SimpleNamespace(table="b", init_from="SWIN", **named), ["--folds", "1", *more])
        given = [[*script.cross_validate.parse_arguments(command)[1], "--output_dir", "x"] for command in commands]
        parsed = [script.cross_validate.run.parse_arguments([*command, "--do_train"]) for command in given]
        assert [args.muon for *_, args in parsed] == [expected] * 2
        assert [model_args.init_from for model_args, *_ in parsed] == [None, "SWIN"]


def test_an_ablation_of_transfer_has_no_loss(example):
    one = {"mean": 0.5, "deviation": None, "seeds": {0: {"folds": {1: 0.5}, "mean": 0.5, "deviation": None}}}
    script = example("ablate")
    assert script.kept(one) == {"mean": 0.5, "deviation": None}
    assert script.table({"w/o CL": {"CAT": script.kept(one)}}).splitlines()[::2] == ["|  | CAT |", "| w/o CL | 50.0 |"]


def test_rows_of_table_c(example):
    script = example("ablate")
    args = type("", (), {"table": "c", "config_name": str(EXAMPLES.parent / "model_cards" / "cat-nano")})
    args.config_overrides = "{}"
    cells = script.cells(args)
    assert list(cells) == ["plain", "+ MRMF", "+ MRMF + CL"] and list(cells["plain"]) == ["AST", "CAT"]
    causal = {"causal_loss_weight": 1, "reconstruction_loss_weight": 1}
    assert cells["+ MRMF + CL"]["CAT"] == (causal, [])
    shape = {"window_size": None, "depths": [3], "num_heads": [8], "embed_dim": 256, "patch_size": [16, 16]}
    assert cells["+ MRMF + CL"]["AST"] == ({**shape, "stem_channels": [], **causal}, [])


@pytest.mark.parametrize("size", ["cat-nano", "cat-tiny"])
def test_each_row_of_table_e_is_another_possible_model(example, size):
    config = CATConfig.from_pretrained(EXAMPLES.parent / "model_cards" / size)
    rows = example("ablate").parts(config)
    made = {name: CATConfig(**{**config.to_dict(), **overrides}).to_dict() for name, overrides in rows.items()}
    assert made.pop("as configured") == config.to_dict()
    for name, values in made.items():
        changed = {key for key in values if values[key] != config.to_dict()[key]}
        assert changed <= set(rows[name]) and (changed or name in ("no convolutions", "w. CL")), name


@pytest.mark.parametrize("embed_dim", [6, 36, 50, 96])
def test_global_attention_has_heads_that_divide_its_width(example, embed_dim):
    config = CATConfig(embed_dim=embed_dim, depths=[1, 1, 1], num_heads=[2, 2, 2])
    shape = example("ablate").global_attention(config)
    assert CATConfig(**shape).hidden_size == 4 * embed_dim
    if embed_dim == 96:
        assert shape["num_heads"] == [12]


def test_models_are_trained_alike_and_one_fold_chooses_the_learning_rate(example, folder, tmp_path):
    script = example("compare_models")
    own = ["--models", "cat", "cnn", "--folds", "1", "2", "--max_length_seconds", "0.15"]
    results = script.main(flags(folder, tmp_path, *own, "--learning_rates", "1e-9", "1e-3"))
    assert list(results) == ["cat", "cnn"]
    for model, own in results.items():
        assert own["learning_rate"] == max(own["tuning"], key=own["tuning"].get)
        assert set(own["folds"]) == {"2"} and own["mean"] == own["folds"]["2"]
        done = {path.parent.name for path in (tmp_path / model).glob("*/seed0/*/results.json")}
        assert done == {"fold1", "fold2"}
    table = (tmp_path / "table.md").read_text()
    assert "| cnn | 0.39 M |" in table
    assert "| fold that chose the learning rate | chosen | fold 2 | mean | loss | behind CAT by |" in table
    behind, _ = results["cnn"]["behind_cat"]
    assert (
        behind == pytest.approx(results["cat"]["mean"] - results["cnn"]["mean"]) and "behind_cat" not in results["cat"]
    )
    assert (tmp_path / "table.png").stat().st_size > 1000


@pytest.mark.slow
def test_models_are_compared_in_two_processes(folder, tmp_path):
    """As torchrun starts them: both wait for what the first one writes, and each test clip counts once."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", EXAMPLES / "compare_models.py"]
    own = ["--models", "cat", "cnn", "--folds", "1", "2", "--max_length_seconds", "0.15", "--learning_rates", "1e-3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([*command, *flags(folder, tmp_path, *own)], capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert {model: set(own["folds"]) for model, own in results.items()} == {"cat": {"1", "2"}, "cnn": {"1", "2"}}
    for model in results:
        summary = json.loads((tmp_path / model / "0.001" / "summary.json").read_text())
        assert [run["metrics"]["eval_clips"] for run in summary["runs"]] == [4, 4]


def test_with_one_learning_rate_no_fold_chooses_it_and_seeds_are_averaged(example, folder, tmp_path, monkeypatch):
    own = ["--models", "cnn", "--folds", "1", "2", "--max_length_seconds", "0.15", "--learning_rates", "1e-3"]
    script = example("compare_models")
    main = script.cross_validate.main

    def with_different_scores(argv):
        summary = main(argv)
        for seed, scores in ((1, {1: 0.25, 2: 0.5}), (2, {1: 0.75, 2: 1.0})):
            summary["seeds"][seed]["folds"] = scores
        return summary

    monkeypatch.setattr(script.cross_validate, "main", with_different_scores)
    results = script.main(flags(folder, tmp_path, *own, "--seeds", "1", "2"))["cnn"]
    assert results["tuning"] == {} and results["learning_rate"] == "0.001" and results["seeds"] == 2
    runs = json.loads((tmp_path / "cnn/0.001/summary.json").read_text())["runs"]
    assert results["folds"] == {"1": 0.5, "2": 0.75}
    assert results["mean"] == 0.625 and results["deviation"] == pytest.approx(0.25 / 2**0.5)  # of the folds
    assert results["loss"] == pytest.approx(np.mean([run["metrics"]["eval_loss"] for run in runs]))
    assert "| model | parameters | seeds | fold 1 | fold 2 | mean | loss |" in (tmp_path / "table.md").read_text()
    with pytest.raises(SystemExit):
        example("compare_models").main(flags(folder, tmp_path, "--folds", "1"))

    # Another model joins those that were compared before, but not by another recipe or on other folds.
    own[own.index("cnn")] = "hts-at"
    monkeypatch.setattr(script, "measure", lambda *_: results)
    assert list(script.main(flags(folder, tmp_path, *own))) == ["cnn", "hts-at"]
    for more in (["--folds", "2"], ["--speed", "1"]):
        with pytest.raises(ValueError, match="holds runs with other flags"):
            script.main(flags(folder, tmp_path, *own, *more))


@pytest.mark.parametrize("kind", ["cnn", "hts-at", "ast"])
def test_peers_read_long_clips_in_pieces_and_learn_from_soft_labels(example, kind):
    peers = example("peers")
    torch.manual_seed(0)
    model = peers.PeerForAudioClassification(peers.PeerConfig(kind=kind, num_frames=64, num_labels=3)).eval()
    first, second = torch.randn(2, 2, 64, 64).unbind()
    logits = [model(piece).logits for piece in (first, second)]
    together = model(torch.cat([first, second], dim=1)).logits
    assert together.shape == (2, 3)
    both, alone = (
        model.base_model(clip, output_hidden_states=True).hidden_states
        for clip in (torch.cat([first, second], 1), first)
    )
    assert len(alone) > 2 and all(state.ndim == 3 for state in alone)
    for state, own in zip(both, alone, strict=True):
        assert state.shape[1] == 2 * own.shape[1]
        if kind != "cnn":  # whose convolutions see beyond a piece
            torch.testing.assert_close(state[:, : own.shape[1]], own)
    assert copy.deepcopy(model).bfloat16()(first).logits.dtype == torch.bfloat16
    if kind != "cnn":
        torch.testing.assert_close(together, (logits[0] + logits[1]) / 2)
        # Silence has no say.
        silent = torch.full_like(second, -11.5129)
        torch.testing.assert_close(model(torch.cat([first, silent], 1)).logits, logits[0], atol=1e-3, rtol=1e-3)
    model.train()(first, labels=torch.tensor([[0.5, 0.5, 0], [0, 0, 1.0]])).loss.backward()
    assert all(value.grad is not None for name, value in model.named_parameters() if "position" not in name)
    with pytest.raises(ValueError, match="There is no peer 'resnet'"):
        peers.write_peer("resnet", 1.0, "nowhere")
    if kind != "cnn":
        with pytest.raises(ValueError, match=f"{kind} sees clips of one length: give it, instead of 0"):
            peers.write_peer(kind, 0, "nowhere")
    model.config.problem_type = "multi_label_classification"
    several = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    output = model.eval()(first, labels=several)
    torch.testing.assert_close(
        output.loss, torch.nn.functional.binary_cross_entropy_with_logits(output.logits, several)
    )
