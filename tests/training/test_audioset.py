"""AudioSet's layout: tables as they are distributed, clips under the names that people give them, many missing."""

import re
import shutil

import numpy as np
import pytest
import soundfile

from transformers_cat.training import is_multi_label, label_names, load_audio_dataset, read_audioset
from transformers_cat.training.clips import decode_audio

INDEX = 'index,mid,display_name\n0,/m/a,"Speech"\n1,/m/b,"Male speech, man speaking"\n2,/m/c,"Dog"\n'
HEADER = "# Segments csv\n# num_ytids=2\n# YTID, start_seconds, end_seconds, positive_labels\n"
TEST = HEADER + '--4gqARaEJE, 0.000, 10.000, "/m/a,/m/c"\nYBfvyPmVMo_, 20.500, 30.500, "/m/b"\n'
BALANCED = HEADER + 'balanced-01, 30.000, 40.000, "/m/c"\n'
UNBALANCED = HEADER + 'unbalanced1, 30.000, 40.000, "/m/a"\nunbalanced2, 0.000, 10.000, "/m/b,/m/a"\n'


def write_clip(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full(400, 0.1), 8000)
    return path


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "class_labels_indices.csv").write_text(INDEX)
    (tmp_path / "eval_segments.csv").write_text(TEST)
    (tmp_path / "balanced_train_segments.csv").write_text(BALANCED)
    (tmp_path / "unbalanced_train_segments.csv").write_text(UNBALANCED)
    for name in ("eval/--4gqARaEJE.wav", "eval/YYBfvyPmVMo_.wav", "train/Ybalanced-01.wav", "train/unbalanced1.flac"):
        write_clip(tmp_path / name)
    write_clip(tmp_path / "train" / "part" / "unbalanced2_0_10.wav")
    write_clip(tmp_path / "train" / "has-no-row-.wav")
    return tmp_path


def names(split):
    return [path.rsplit("/", 1)[1] for path in split["audio"]]


def test_splits_labels_and_files(folder):
    splits = load_audio_dataset(folder)
    assert set(splits) == {"train", "balanced_train", "test"}
    assert names(splits["test"]) == ["--4gqARaEJE.wav", "YYBfvyPmVMo_.wav"]
    assert names(splits["train"]) == ["Ybalanced-01.wav", "unbalanced1.flac", "unbalanced2_0_10.wav"]
    assert names(splits["balanced_train"]) == ["Ybalanced-01.wav"]
    assert splits["test"]["label"][:] == [[0, 2], [1]]
    assert splits["train"]["label"][:] == [[2], [0], [1, 0]]
    for split in splits.values():
        assert is_multi_label(split)
        assert label_names(split) == ["Speech", "Male speech, man speaking", "Dog"]


@pytest.mark.parametrize("form", ["{}", "{}_20", "{}_20_30", "{}_20.500", "{}_20.500_30.500", "{}_20500_30500"])
@pytest.mark.parametrize("prefix", ["", "Y"])
def test_names_of_clips(folder, form, prefix):
    (folder / "eval" / "YYBfvyPmVMo_.wav").unlink()
    write_clip(folder / "elsewhere" / f"{prefix}{form.format('YBfvyPmVMo_')}.ogg")
    assert names(read_audioset(folder)["test"])[1].startswith(f"{prefix}YBfvyPmVMo_")


def test_another_segment_of_the_video_is_not_the_clip(folder):
    (folder / "eval" / "YYBfvyPmVMo_.wav").rename(folder / "eval" / "YBfvyPmVMo_33.wav")
    with pytest.raises(FileNotFoundError, match=r"1 of 2 listed files do not exist: YBfvyPmVMo_\. .*on_missing='skip'"):
        read_audioset(folder)


def test_missing_clips_are_left_out_and_counted(folder, caplog):
    (folder / "eval" / "YYBfvyPmVMo_.wav").unlink()
    (folder / "train" / "unbalanced1.flac").unlink()
    missing = []
    splits = load_audio_dataset(folder, on_missing="skip", missing=missing)
    assert sorted(missing) == ["YBfvyPmVMo_", "unbalanced1"]
    assert [len(splits[name]) for name in ("train", "test")] == [2, 1]
    assert "1 of 2 listed files do not exist" in caplog.text
    shutil.rmtree(folder / "eval")
    with pytest.raises(FileNotFoundError, match="2 of 2 listed files"):
        read_audioset(folder, on_missing="skip")


def test_the_tables_that_are_there(folder):
    (folder / "unbalanced_train_segments.csv").unlink()
    assert set(read_audioset(folder)) == {"train", "test"}
    (folder / "balanced_train_segments.csv").unlink()
    assert set(read_audioset(folder)) == {"test"}
    (folder / "eval_segments.csv").unlink()
    with pytest.raises(FileNotFoundError, match="none of balanced_train_segments.csv, unbalanced_train_segments.csv"):
        read_audioset(folder)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("x, 0.000, 10.000", r"eval_segments\.csv, row 6 has 3 cells, not id, start, end and labels"),
        ('x, 0.000, 10.000, "/m/a,/m/z"', r"row 6: the labels \['/m/z'\] are not in class_labels_indices\.csv"),
        ('x, start, 10.000, "/m/a"', "row 6: 'start' and '10.000' are not times in seconds"),
        ('--4gqARaEJE, 10.000, 20.000, "/m/a"', "lists --4gqARaEJE twice"),
        ('unbalanced2, 0.000, 10.000, "/m/a"', "1 videos are in unbalanced_train_segments.csv and in eval_segments"),
    ],
)
def test_broken_rows(folder, row, message):
    (folder / "eval_segments.csv").write_text(TEST + row + "\n")
    with pytest.raises(ValueError, match=message):
        read_audioset(folder, on_missing="skip")


def test_broken_tables(folder):
    (folder / "eval_segments.csv").write_bytes(TEST.replace("/m/b", "/m/ü").encode("latin-1"))
    with pytest.raises(ValueError, match=r"eval_segments\.csv is not UTF-8 text"):
        read_audioset(folder)
    (folder / "eval_segments.csv").write_text(HEADER)
    with pytest.raises(ValueError, match=r"eval_segments\.csv has no rows"):
        read_audioset(folder)
    (folder / "class_labels_indices.csv").write_text(INDEX.replace("2,/m/c", "7,/m/c"))
    with pytest.raises(ValueError, match="index does not count from 0 to 2"):
        read_audioset(folder)


def test_real_tables(data_dir, tmp_path):
    """The distributed index and evaluation table, with three recordings in place of the first three clips."""
    lines = (data_dir / "audioset" / "eval_segments.csv").read_text().splitlines()
    shutil.copytree(data_dir / "audioset", tmp_path, dirs_exist_ok=True)
    recordings = sorted((data_dir / "esc10" / "audio").glob("*.ogg"))[:3]
    for line, recording in zip(lines[3:], recordings):
        (tmp_path / f"Y{line[:11]}.ogg").symlink_to(recording)
    missing = []
    test = load_audio_dataset(tmp_path, on_missing="skip", missing=missing)["test"]
    assert len(missing) == 20_371 - 3
    assert len(label_names(test)) == 527 and label_names(test)[526] == "Field recording"
    mids = re.findall(r"/m/\w+", lines[3])
    index = (tmp_path / "class_labels_indices.csv").read_text().splitlines()[1:]
    assert [index[i].split(",")[1] for i in test["label"][0]] == mids
    assert decode_audio(test, 32_000)[0]["audio"].size > 150_000
