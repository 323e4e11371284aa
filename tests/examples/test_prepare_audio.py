"""Shards of clips: what is in them, what was left out and why, interruptions, and training from them."""

import csv
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import soundfile
from datasets import Dataset

from transformers_cat import load_audio
from transformers_cat.training import label_names, load_audio_dataset
from transformers_cat.training.clips import decode_audio
from transformers_cat.training.report import data_fingerprint

SCRIPT = Path(__file__).parents[2] / "examples" / "prepare_audio.py"
RATE = 32_000


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("prepare_audio", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # processes of the pool are told its name
    sys.path.insert(0, str(SCRIPT.parent))
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]
    sys.path.remove(str(SCRIPT.parent))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven clips of two labels and three folds; of five more rows, one has no file and four have broken ones."""
    folder = tmp_path_factory.mktemp("downloads")
    generator = np.random.default_rng(0)
    rows = [("audio", "label", "fold")]
    for i in range(7):
        name = f"{i}.{('wav', 'flac', 'ogg')[i % 3]}"
        rate = RATE if i < 3 else 44_100
        soundfile.write(folder / name, generator.normal(0, 0.1, (rate // 10 + i, 1 + i % 2)), rate)
        rows.append((name, "ab"[i % 2], i % 3 + 1))
    for name, content in {"text.wav": b"no audio", "nothing.m4a": b""}.items():
        (folder / name).write_bytes(content)
    soundfile.write(folder / "empty.wav", np.zeros(0), RATE)
    (folder / "half.flac").write_bytes((folder / "1.flac").read_bytes()[:3000])
    rows += [(name, "a", 1) for name in ("text.wav", "nothing.m4a", "empty.wav", "half.flac", "absent.wav")]
    with (folder / "clips.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


def command(folder, output):
    return [
        "--data",
        f"{folder}/clips.csv",
        "--output_dir",
        str(output),
        "--clips_per_shard",
        "4",
        "--num_workers",
        "1",
    ]


@pytest.fixture(scope="module")
def prepared(script, folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("prepared")
    counts = script.main(command(folder, output))
    return output, counts


def test_report(prepared, folder):
    output, counts = prepared
    assert counts == {"listed": 12, "missing": 1, "unreadable": 4, "written": 7}
    assert json.loads((output / "report.json").read_text()) == counts
    with (output / "report.csv").open(newline="") as file:
        reasons = {Path(row["clip"]).name: row["reason"] for row in csv.DictReader(file)}
    assert reasons["absent.wav"] == "there is no such file, or its name is not UTF-8"
    assert reasons["empty.wav"] == "it holds no samples"
    assert "half.flac is damaged" in reasons["half.flac"]
    assert "Cannot read the audio file" in reasons["text.wav"] and set(reasons) >= {"nothing.m4a"}


def test_clips_are_those_of_the_files(prepared, folder):
    output, _ = prepared
    assert len(list(output.glob("train-0000?-of-00003.arrow"))) == 3
    dataset = load_audio_dataset(output)["train"]
    assert dataset["label"][:] == [i % 2 for i in range(7)] and label_names(dataset) == ["a", "b"]
    assert dataset["fold"][:] == [i % 3 + 1 for i in range(7)]
    for row, encoded in zip(decode_audio(dataset, RATE), dataset):
        expected = load_audio(encoded["audio"]["path"])
        assert encoded["audio"]["bytes"][:4] == b"fLaC"
        np.testing.assert_allclose(row["audio"], expected, atol=2**-15)  # 16 bits


def test_clips_without_a_label(script, folder, tmp_path):
    table = folder / "negatives.csv"
    table.write_text((folder / "clips.csv").read_text().replace(",b,", ",,"))
    with pytest.raises(ValueError, match="clip number 2 has no label"):
        script.main([*command(folder, tmp_path / "refused"), "--data", str(table)])
    script.main([*command(folder, tmp_path / "negatives"), "--data", str(table), "--multi_label"])
    assert load_audio_dataset(tmp_path / "negatives")["train"]["label"][:] == [[0], [], [0], [], [0], [], [0]]


def test_several_labels_of_a_folder_of_classes(script, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "clips" / name).mkdir(parents=True)
        soundfile.write(tmp_path / "clips" / name / "1.wav", np.zeros(800), RATE)
    folders = ["--data", str(tmp_path / "clips"), "--output_dir", str(tmp_path / "shards"), "--num_workers", "1"]
    script.main([*folders, "--multi_label"])
    assert load_audio_dataset(tmp_path / "shards")["train"]["label"][:] == [[0], [1]]


def test_source_is_known(prepared, folder):
    """What is prepared has the fingerprint of the recordings, but for their sizes."""
    recordings = load_audio_dataset(folder / "clips.csv", on_missing="skip").select(range(7))
    prepared = load_audio_dataset(prepared[0])
    assert data_fingerprint(recordings, sizes=False) == data_fingerprint(prepared, sizes=False)
    assert data_fingerprint(recordings) != data_fingerprint(prepared)


def test_what_is_not_complete_is_refused(prepared, tmp_path):
    """Its splits may be missing, which nothing but the last file tells."""
    begun = shutil.copytree(prepared[0], tmp_path / "begun")
    (begun / "report.json").unlink()
    with pytest.raises(FileNotFoundError, match="begun is not complete: run the command that prepares it again"):
        load_audio_dataset(begun)


def test_memory_is_mapped(prepared):
    """Opening the shards, and reading a row, allocates next to nothing for the clips."""
    before = pyarrow.total_allocated_bytes()
    dataset = load_audio_dataset(prepared[0])["train"]
    size = len(dataset[3]["audio"]["bytes"])
    assert pyarrow.total_allocated_bytes() - before < size


def test_goes_on_where_it_was_interrupted(script, prepared, folder, tmp_path):
    output = tmp_path / "again"
    shutil.copytree(prepared[0], output)
    (output / "train-00001-of-00003.arrow").rename(output / "train-00001-of-00003.partial")
    with pytest.raises(FileNotFoundError, match="has 2 of 3 shards of train: run the command"):
        load_audio_dataset(output)
    kept = (output / "train-00000-of-00003.arrow").stat().st_mtime_ns
    assert script.main(command(folder, output)) == prepared[1]
    assert (output / "train-00000-of-00003.arrow").stat().st_mtime_ns == kept
    whole, again = (load_audio_dataset(path)["train"] for path in (prepared[0], output))
    assert [row["audio"]["bytes"] for row in whole] == [row["audio"]["bytes"] for row in again]
    with pytest.raises(ValueError, match="shards of other clips, of these as they were before, or of another size"):
        script.main([*command(folder, output), "--clips_per_shard", "5"])
    repaired = shutil.copytree(folder, tmp_path / "clips")
    one = script.fingerprint({"train": load_audio_dataset(repaired / "clips.csv", on_missing="skip")}, 5)
    shutil.copy(repaired / "0.wav", repaired / "text.wav")
    assert script.fingerprint({"train": load_audio_dataset(repaired / "clips.csv", on_missing="skip")}, 5) != one


def test_clips_given_as_bytes_have_a_fingerprint(script):
    one, other = (
        script.fingerprint({"train": Dataset.from_dict({"audio": [{"bytes": clip, "path": "a.wav"}], "label": [0]})}, 4)
        for clip in (b"\xff", b"\xfe")
    )
    assert one != other


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="m4a needs the ffmpeg program")
def test_m4a(script, folder, tmp_path):
    import subprocess

    source, clip = tmp_path / "a.wav", tmp_path / "clips" / "a" / "a.m4a"
    clip.parent.mkdir(parents=True)
    soundfile.write(source, 0.3 * np.sin(np.arange(RATE) / 10), RATE)
    subprocess.run(["ffmpeg", "-loglevel", "error", "-i", str(source), str(clip)], check=True)
    output = tmp_path / "out"
    flags = ["--data", str(clip.parents[1]), "--output_dir", str(output), "--num_workers", "1"]
    assert script.main(flags)["written"] == 1
    assert abs(len(decode_audio(load_audio_dataset(output)["train"], RATE)[0]["audio"]) - RATE) < 4096


def test_audioset_keeps_its_balanced_split(script, tmp_path):
    root, output = tmp_path / "audioset", tmp_path / "out"
    root.mkdir()
    (root / "class_labels_indices.csv").write_text('index,mid,display_name\n0,/m/a,"A"\n1,/m/b,"B"\n')
    for split, videos in (("balanced_train", "ab"), ("unbalanced_train", "cde"), ("eval", "f")):
        (root / f"{split}_segments.csv").write_text("".join(f'{v}, 0.000, 10.000, "/m/a"\n' for v in videos))
        for video in videos.replace("e", ""):  # one clip is missing
            soundfile.write(root / f"{video}.wav", np.full(RATE // 10, 0.1), RATE)
    counts = script.main(["--data", str(root), "--output_dir", str(output), "--num_workers", "1"])
    assert counts == {"listed": 6, "missing": 1, "unreadable": 0, "written": 5}
    splits = load_audio_dataset(output)
    assert {name: len(split) for name, split in splits.items()} == {"train": 4, "balanced_train": 2, "test": 1}
