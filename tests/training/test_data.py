"""Readers, folds and labels, on tiny written files and on the real data where it is present."""

import csv
import os

import datasets
import numpy as np
import pytest
import soundfile
from datasets import Audio, ClassLabel, Dataset, DatasetDict, Features, List, Value

from transformers_cat.training import data
from transformers_cat.training.clips import decode_audio, validate_audio_files
from transformers_cat.training.data import (
    align_labels,
    as_multi_label,
    is_multi_label,
    label_by_recording,
    label_names,
    load_audio_dataset,
    read_audiofolder,
    read_csv,
    read_esc50,
    read_urbansound8k,
    split_folds,
    without_only_split,
    without_recordings_of,
)

RATE = 8000


def write_clip(path, value=0.1, samples=400):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full(samples, value, dtype="float32"), RATE)
    return path


def write_table(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


@pytest.fixture
def esc_folder(tmp_path):
    """Three clips of two classes in two folds, with the numbers of ESC-50, as ESC-10 has them."""
    rows = [("a.wav", 1, 41, "chainsaw"), ("b.wav", 2, 0, "dog"), ("c.wav", 2, 41, "chainsaw")]
    write_table(tmp_path / "meta" / "esc50.csv", [("filename", "fold", "target", "category"), *rows])
    for name, *_ in rows:
        write_clip(tmp_path / "audio" / name)
    return tmp_path


@pytest.fixture
def urban_folder(tmp_path):
    rows = [("x.wav", 3, 7, "jackhammer"), ("y.wav", 5, 1, "car_horn")]
    header = ("slice_file_name", "fold", "classID", "class")
    write_table(tmp_path / "metadata" / "UrbanSound8K.csv", [header, *rows])
    for name, fold, *_ in rows:
        write_clip(tmp_path / "audio" / f"fold{fold}" / name)
    return tmp_path


class TestEsc50:
    def test_ids_are_contiguous_in_order_of_target(self, esc_folder):
        dataset = read_esc50(esc_folder)
        assert label_names(dataset) == ["dog", "chainsaw"]
        assert dataset["label"][:] == [1, 0, 1]
        assert dataset["fold"][:] == [1, 2, 2]
        assert dataset["audio"][0] == str(esc_folder / "audio" / "a.wav")

    def test_ids_do_not_depend_on_which_files_are_there(self, esc_folder):
        (esc_folder / "audio" / "b.wav").unlink()
        dataset = read_esc50(esc_folder, on_missing="skip")
        assert label_names(dataset) == ["dog", "chainsaw"]
        assert dataset["label"][:] == [1, 1]

    def test_real(self, data_dir):
        dataset = load_audio_dataset(data_dir / "esc10")
        assert len(dataset) == 400
        assert label_names(dataset)[:3] == ["dog", "rooster", "rain"]
        labels, folds = np.array(dataset["label"][:]), np.array(dataset["fold"][:])
        for fold in range(1, 6):
            assert np.bincount(labels[folds == fold]).tolist() == [8] * 10


def clips_named(*names, labels=None):
    features = Features({"audio": Value("string"), "label": ClassLabel(names=["a", "b"])})
    return Dataset.from_dict({"audio": list(names), "label": labels or [0] * len(names)}, features=features)


def test_one_split_is_no_split():
    one, other = clips_named("a.wav"), clips_named("b.wav")
    assert without_only_split(DatasetDict(train=one)) is one and without_only_split(one) is one
    both = DatasetDict(train=one, test=other)
    assert without_only_split(both) is both


class TestSharedRecordings:
    def test_clips_of_recordings_of_the_other_are_left_out(self):
        urban = clips_named("fold1/7-3-0-0.wav", "fold1/7-3-0-1.wav", "fold2/11-2-0-0.wav", "fold2/1-7-0-0.wav")
        esc = clips_named("audio/1-7-A-0.ogg", "audio/2-99-B-41.ogg")
        assert without_recordings_of(urban, esc)["audio"][:] == ["fold2/11-2-0-0.wav", "fold2/1-7-0-0.wav"]
        assert without_recordings_of(esc, DatasetDict(train=urban))["audio"][:] == ["audio/2-99-B-41.ogg"]

    def test_other_names_are_refused(self):
        with pytest.raises(ValueError, match="The clip dog.wav is not named as in ESC-50 or UrbanSound8K"):
            without_recordings_of(clips_named("1-7-A-0.ogg", "dog.wav"), clips_named("1-7-A-0.ogg"))

    def test_real(self, data_dir):
        urban, esc = (load_audio_dataset(data_dir / name) for name in ("urbansound8k", "esc10"))
        assert len(urban) - len(without_recordings_of(urban, esc)) == 12  # of 3 recordings
        finer = label_by_recording(urban)
        assert len(label_names(finer)) == 268
        coarse = {name: name.rpartition(" ")[0] for name in label_names(finer)}
        of_class = [label_names(urban)[label] for label in urban["label"]]
        assert [coarse[label_names(finer)[label]] for label in finer["label"]] == of_class

    def test_recordings_are_classes_within_theirs(self):
        clips = clips_named("7-0-0-0.wav", "fold2/7-0-0-1.wav", "7-1-0-0.wav", "11-1-0-0.wav", labels=[0, 0, 1, 1])
        finer = label_by_recording(clips)
        assert label_names(finer) == ["a 7", "b 11", "b 7"]
        assert finer["label"][:] == [0, 0, 2, 1]
        assert finer["audio"][:] == clips["audio"][:]

    def test_several_labels_have_no_recordings(self):
        with pytest.raises(ValueError, match="have several labels each"):
            label_by_recording(as_multi_label(clips_named("7-0-0-0.wav")))


class TestUrbanSound8K:
    def test_folds_are_those_of_the_table(self, urban_folder):
        dataset = read_urbansound8k(urban_folder)
        assert label_names(dataset) == ["car_horn", "jackhammer"]
        assert dataset["label"][:] == [1, 0]
        assert dataset["fold"][:] == [3, 5]

    def test_missing_files_are_named_and_counted(self, urban_folder):
        (urban_folder / "audio" / "fold3" / "x.wav").unlink()
        with pytest.raises(FileNotFoundError, match=r"1 of 2 listed files do not exist: .*fold3/x\.wav.*on_missing"):
            read_urbansound8k(urban_folder)

    def test_missing_files_can_be_skipped(self, urban_folder, caplog):
        (urban_folder / "audio" / "fold3" / "x.wav").unlink()
        dataset = read_urbansound8k(urban_folder, on_missing="skip")
        assert dataset["fold"][:] == [5]
        assert "1 of 2 listed files do not exist" in caplog.text

    def test_all_missing_is_an_error_in_any_case(self, urban_folder):
        for path in (urban_folder / "audio").rglob("*.wav"):
            path.unlink()
        with pytest.raises(FileNotFoundError, match="2 of 2 listed files do not exist"):
            read_urbansound8k(urban_folder, on_missing="skip")

    def test_reshuffled_folds_are_refused(self, urban_folder):
        table = urban_folder / "metadata" / "UrbanSound8K.csv"
        for name, fold in (("7-1-0-0.wav", 3), ("7-1-0-1.wav", 3)):
            write_clip(urban_folder / "audio" / f"fold{fold}" / name)
        text = table.read_text()
        table.write_text(text + "7-1-0-0.wav,3,1,car_horn\n7-1-0-1.wav,3,1,car_horn\n")
        assert len(read_urbansound8k(urban_folder)) == 4
        table.write_text(text + "7-1-0-0.wav,3,1,car_horn\n7-1-0-1.wav,5,1,car_horn\n")
        with pytest.raises(ValueError, match=r"several folds \(1 recordings: 7\), so the folds were reshuffled"):
            read_urbansound8k(urban_folder)

    def test_unknown_choice(self, urban_folder):
        with pytest.raises(ValueError, match="on_missing is 'error' or 'skip', not 'ignore'"):
            read_urbansound8k(urban_folder, on_missing="ignore")

    def test_real(self, data_dir):
        dataset = load_audio_dataset(data_dir / "urbansound8k")
        assert len(dataset) == 1761
        assert sorted(set(dataset["fold"])) == [1, 2]
        assert label_names(dataset)[:2] == ["air_conditioner", "car_horn"]


class TestAudioFolder:
    def test_splits_share_their_ids(self, tmp_path):
        for place in ("train/dog", "train/bird", "test/bird", "test/cat"):
            write_clip(tmp_path / place / "a.wav")
        splits = read_audiofolder(tmp_path)
        assert list(splits) == ["train", "test"]
        assert label_names(splits["train"]) == label_names(splits["test"]) == ["bird", "cat", "dog"]
        assert splits["train"]["label"][:] == [0, 2]
        assert splits["test"]["label"][:] == [0, 1]

    def test_classes_alone_are_one_data_set(self, tmp_path):
        write_clip(tmp_path / "dog" / "deeper" / "a.wav")
        write_clip(tmp_path / "cat" / "a.wav")
        (tmp_path / "cat" / "notes.txt").write_text("no audio")
        dataset = read_audiofolder(tmp_path)
        assert isinstance(dataset, Dataset)
        assert label_names(dataset) == ["cat", "dog"]
        assert dataset["audio"][:] == [str(tmp_path / "cat" / "a.wav"), str(tmp_path / "dog" / "deeper" / "a.wav")]

    def test_splits_in_any_case_beside_a_folder_without_audio(self, tmp_path):
        for place in ("Train/dog", "TEST/dog"):
            write_clip(tmp_path / place / "a.wav")
        (tmp_path / "notes").mkdir()
        splits = read_audiofolder(tmp_path)
        assert list(splits) == ["train", "test"] and label_names(splits["test"]) == ["dog"]

    def test_two_folders_for_one_split(self, tmp_path):
        for place in ("val/dog", "validation/dog"):
            write_clip(tmp_path / place / "a.wav")
        with pytest.raises(ValueError, match="val and .*validation are both for the split validation"):
            read_audiofolder(tmp_path)

    def test_a_class_may_be_called_train(self, tmp_path):
        for place in ("car", "plane", "train/first", "train"):
            write_clip(tmp_path / place / "a.wav")
        dataset = read_audiofolder(tmp_path)
        assert label_names(dataset) == ["car", "plane", "train"] and dataset["label"][:] == [0, 1, 2, 2]

    def test_links_are_followed_but_not_in_circles(self, tmp_path):
        write_clip(tmp_path / "elsewhere" / "b.wav")
        write_clip(tmp_path / "data" / "cat" / "a.wav")
        (tmp_path / "data" / "cat" / "linked").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "elsewhere" / "circle").symlink_to(tmp_path / "data" / "cat")
        (tmp_path / "data" / "dog").symlink_to(tmp_path / "elsewhere")
        dataset = read_audiofolder(tmp_path / "data")
        assert dataset["label"][:] == [0, 0, 1, 1]

    def test_class_folders_without_audio_are_named(self, tmp_path, caplog):
        write_clip(tmp_path / "cat" / "a.caf")
        (tmp_path / "dog").mkdir()
        assert label_names(read_audiofolder(tmp_path)) == ["cat"]
        assert "1 folders" in caplog.text and "no class: dog" in caplog.text

    @pytest.mark.skipif(os.name != "posix", reason="file names are text")
    def test_names_that_are_not_utf8(self, tmp_path, caplog):
        write_clip(tmp_path / "cat" / "a.wav")
        os.rename(write_clip(tmp_path / "cat" / "b.wav"), os.fsencode(tmp_path / "cat") + b"/caf\xe9.wav")
        with pytest.raises(ValueError, match=r"1 of 2 files have names that are not UTF-8: .*caf\\xe9\.wav"):
            load_audio_dataset(tmp_path)
        missing = []
        assert len(load_audio_dataset(tmp_path, on_missing="skip", missing=missing)) == 1
        assert missing == [f"{tmp_path}/cat/caf\\xe9.wav"]

    def test_numbers_are_ordered_by_value(self, tmp_path):
        for name in ("10", "9", "2"):
            write_clip(tmp_path / name / "a.wav")
        assert label_names(read_audiofolder(tmp_path)) == ["2", "9", "10"]

    def test_no_audio(self, tmp_path):
        (tmp_path / "train" / "dog").mkdir(parents=True)
        with pytest.raises(ValueError, match=r"No audio file below .*train: expected one sub-folder per class"):
            read_audiofolder(tmp_path)

    def test_real(self, data_dir):
        splits = load_audio_dataset(data_dir / "fsdd")
        assert {name: len(split) for name, split in splits.items()} == {"train": 2500, "test": 500}
        assert label_names(splits["test"]) == [str(i) for i in range(10)]
        assert all("theo" in path for path in splits["test"]["audio"])


class TestCSV:
    def test_one_label(self, tmp_path):
        write_clip(tmp_path / "clips" / "a.wav")
        write_clip(tmp_path / "clips" / "b.wav")
        rows = [("file", "what", "fold"), ("clips/a.wav", "dog", 2), ("clips/b.wav", "cat", 1)]
        dataset = read_csv(write_table(tmp_path / "t.csv", rows), audio_column="file", label_column="what")
        assert dataset.column_names == ["audio", "label", "fold"]
        assert label_names(dataset) == ["cat", "dog"]
        assert dataset["label"][:] == [1, 0]
        assert not is_multi_label(dataset)
        assert dataset.features["audio"] == Value("string")  # a large string could not be cast to Audio

    def test_several_labels(self, tmp_path):
        for name in "abc":
            write_clip(tmp_path / f"{name}.wav")
        rows = [("audio", "label"), ("a.wav", "dog; rain"), ("b.wav", "rain"), ("c.wav", "")]
        dataset = read_csv(write_table(tmp_path / "t.csv", rows))
        assert is_multi_label(dataset)
        assert label_names(dataset) == ["dog", "rain"]
        assert dataset["label"][:] == [[0, 1], [1], []]
        assert "fold" not in dataset.column_names

    def test_a_label_that_is_named_twice_is_one(self, tmp_path):
        write_clip(tmp_path / "a.wav")
        table = write_table(tmp_path / "t.csv", [("audio", "label"), ("a.wav", "rain; rain")])
        assert load_audio_dataset(table)["label"][:] == [0]

    def test_multi_label_though_no_clip_has_several(self, tmp_path):
        for name in "abc":
            write_clip(tmp_path / f"{name}.wav")
        table = write_table(
            tmp_path / "t.csv", [("audio", "label"), ("a.wav", ""), ("b.wav", "rain"), ("c.wav", "dog")]
        )
        dataset = load_audio_dataset(table, multi_label=True)
        assert is_multi_label(dataset)
        assert dataset["label"][:] == [[], [1], [0]]

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([("file", "label"), ("a.wav", "x")], r"no column \['audio'\]; its columns are \['file', 'label'\]"),
            ([("audio", "label")], "has a header but no rows"),
            ([("audio", "label"), ("a.wav",)], "row 2 has fewer cells"),
            (
                [("audio", "label"), ("a.wav", "x"), ("b.wav", "")],
                "clip number 2 has no label; .* say so by multi_label=True",
            ),
            (
                [("audio", "label"), ("a.wav", "x"), ("a.wav", "y")],
                r"lists .*a\.wav twice; give a clip one row, and .* ';'",
            ),
            ([("audio", "label"), ("a.wav", "")], "has no label at all"),
            ([("audio", "label", "fold"), ("a.wav", "x", "one")], "fold 'one' is not an integer"),
            ([("audio", "label", "fold"), ("a.wav", "x"), ("b.wav", "y", "1")], "fold '' is not an integer"),
            ([("audio", "label", "label"), ("a.wav", "x", "y")], r"several columns \['label'\]"),
        ],
    )
    def test_broken_tables(self, tmp_path, rows, message):
        for name in "ab":
            write_clip(tmp_path / f"{name}.wav")
        with pytest.raises(ValueError, match=message):
            read_csv(write_table(tmp_path / "t.csv", rows))

    def test_not_utf8(self, tmp_path):
        path = tmp_path / "t.csv"
        path.write_bytes("audio,label\na.wav,Möwe\n".encode("latin-1"))
        with pytest.raises(ValueError, match=r"t\.csv is not UTF-8 text .* save it as UTF-8"):
            read_csv(path)

    @pytest.mark.parametrize("again", ["../{folder}/a.wav", "{path}"])
    def test_a_clip_by_two_paths_is_listed_twice(self, tmp_path, again):
        path = write_clip(tmp_path / "a.wav")
        rows = [("a.wav", "gull", 1), (again.format(folder=tmp_path.name, path=path), "gull", 2)]
        table = write_table(tmp_path / "t.csv", [("audio", "label", "fold"), *rows])
        with pytest.raises(ValueError, match=r"lists .*a\.wav twice; give a clip one row"):
            read_csv(table)

    def test_byte_order_mark_is_no_part_of_the_first_column(self, tmp_path):
        write_clip(tmp_path / "a.wav")
        path = tmp_path / "t.csv"
        path.write_text("audio,label\na.wav,gull\n", encoding="utf-8-sig")
        assert label_names(read_csv(path)) == ["gull"]

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            (("d.wav", 1, "dog", "dog"), r"esc50\.csv: target 'dog' is not an integer"),
            (("d.wav", "", 0, "dog"), "fold '' is not an integer"),
            (("a.wav", 1, 0, "dog"), r"lists .*a\.wav twice"),
            (("d.wav", 1, 0, "cat"), "target and category do not belong together one to one"),
            (("d.wav", 1, 3, "dog"), "target and category do not belong together one to one"),
        ],
    )
    def test_broken_rows(self, esc_folder, row, message):
        write_clip(esc_folder / "audio" / "d.wav")
        with (esc_folder / "meta" / "esc50.csv").open("a", newline="") as file:
            csv.writer(file).writerow(row)
        with pytest.raises(ValueError, match=message):
            read_esc50(esc_folder)

    def test_missing_table(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"esc50\.csv does not exist"):
            read_esc50(tmp_path)


class TestLayouts:
    def test_recognised(self, esc_folder):
        write_clip(esc_folder / "folder" / "train" / "dog" / "a.wav")
        table = write_table(esc_folder / "t.csv", [("audio", "label"), ("audio/a.wav", "saw")])
        assert label_names(load_audio_dataset(esc_folder)) == ["dog", "chainsaw"]
        assert label_names(load_audio_dataset(table)) == ["saw"]
        assert isinstance(load_audio_dataset(esc_folder / "folder"), DatasetDict)
        Dataset.from_dict({"embedding": [1.0]}).to_parquet(esc_folder / "embeddings.parquet")
        assert label_names(load_audio_dataset(esc_folder)) == ["dog", "chainsaw"]

    def test_urbansound8k_recognised(self, urban_folder):
        assert load_audio_dataset(urban_folder)["fold"][:] == [3, 5]

    def test_empty_folder(self, tmp_path):
        with pytest.raises(ValueError, match="it has no sub-folders; known layouts: ESC-50"):
            load_audio_dataset(tmp_path)

    def test_folder_of_tables(self, tmp_path):
        write_table(tmp_path / "clips.csv", [("audio", "label")])
        with pytest.raises(ValueError, match=r"name the one to read, e\.g\. .*clips\.csv"):
            load_audio_dataset(tmp_path)

    def test_other_file(self, tmp_path):
        path = tmp_path / "clips.parquet"
        path.touch()
        with pytest.raises(ValueError, match=r"clips\.parquet is not a data set that can be read; known layouts"):
            load_audio_dataset(path)

    def test_missing_path_is_not_looked_up_on_the_hub(self, monkeypatch, tmp_path):
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the Hub"))
        for path in (tmp_path / "esc10", "../nowhere/esc10", "./esc10"):
            with pytest.raises(FileNotFoundError, match="does not exist; check the path"):
                load_audio_dataset(path)


class TestHub:
    @pytest.fixture
    def hub(self, monkeypatch, tmp_path):
        """Stands for the Hub: two splits with encoded clips and labels as text."""
        encoded = write_clip(tmp_path / "a.wav", value=0.25).read_bytes()

        def load_dataset(path, **kwargs):
            if path == "nobody/nothing":
                raise FileNotFoundError(path)
            assert kwargs == {"name": "small"}
            clip = {"bytes": encoded, "path": "a.wav"}
            splits = {"train": ["dog", "cat"], "test": ["emu", "cat"]}
            return DatasetDict(
                {
                    split: Dataset.from_dict({"sound": [clip, clip], "what": labels, "other": [1, 2]}).cast_column(
                        "sound", Audio(decode=False)
                    )
                    for split, labels in splits.items()
                }
            )

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    def test_columns_and_labels(self, hub):
        splits = load_audio_dataset("someone/sounds", audio_column="sound", label_column="what", name="small")
        assert splits["train"].column_names == ["audio", "label"]
        assert label_names(splits["train"]) == label_names(splits["test"]) == ["cat", "dog", "emu"]
        assert splits["train"]["label"][:] == [1, 0]
        assert splits["test"]["label"][:] == [2, 0]
        assert validate_audio_files(splits["train"]) == (splits["train"], [])
        waveform = decode_audio(splits["test"], RATE)[0]["audio"]
        np.testing.assert_allclose(waveform, 0.25, atol=1e-4)
        assert waveform.shape == (400,)

    def test_wrong_column(self, hub):
        with pytest.raises(ValueError, match=r"no column \['audio', 'label'\]; its columns are"):
            load_audio_dataset("someone/sounds", name="small")

    def test_unknown_name(self, hub):
        with pytest.raises(FileNotFoundError, match="neither a file or folder here nor a data set on the Hub"):
            load_audio_dataset("nobody/nothing")

    def test_downloaded_parquet_files_are_read_by_datasets(self, tmp_path):
        features = datasets.Features(
            {"audio": {"bytes": Value("binary"), "path": Value("string")}, "label": ClassLabel(names=["dog", "rain"])}
        )
        clip = {"bytes": write_clip(tmp_path / "elsewhere" / "a.wav").read_bytes(), "path": "a.wav"}
        for split, label in (("train", 0), ("test", 1)):
            rows = Dataset.from_dict({"audio": [clip] * 2, "label": [label] * 2}, features=features)
            (tmp_path / "downloaded" / "data").mkdir(parents=True, exist_ok=True)
            rows.to_parquet(tmp_path / "downloaded" / "data" / f"{split}-00000-of-00001.parquet")
        loaded = load_audio_dataset(tmp_path / "downloaded", cache_dir=str(tmp_path / "cache"))
        assert set(loaded) == {"train", "test"} and label_names(loaded["test"]) == ["dog", "rain"]
        decoded = decode_audio(loaded["test"], RATE)[0]
        assert decoded["label"] == 1 and decoded["audio"].shape == (400,)

    @pytest.mark.parametrize(
        ("labels", "feature"),
        [
            (["dog", None], Value("string")),
            ([0, None], ClassLabel(names=["dog"])),
            ([["dog"], None], List(Value("string"))),
            ([[0], [None]], List(ClassLabel(names=["dog"]))),
        ],
    )
    def test_no_label_is_no_class(self, labels, feature):
        part = Dataset.from_dict({"label": labels}, features=datasets.Features({"label": feature}))
        with pytest.raises(ValueError, match=r"train: clip number 2 has no label"):
            data._with_class_labels({"train": part})

    def test_a_split_without_any_label_is_left_out(self, caplog):
        parts = {
            split: Dataset.from_dict(
                {"clip": [0, 1], "label": labels},
                features=datasets.Features({"clip": Value("int64"), "label": Value("string")}),
            )
            for split, labels in (("train", ["dog", "cat"]), ("test", [None, None]))
        }
        assert data._with_class_labels(parts)["train"]["label"][:] == [1, 0]
        assert list(data._with_class_labels(parts)) == ["train"] and "['test'] have no labels" in caplog.text

    @pytest.mark.parametrize("value", ["int64", "float32", "bool", "string"])
    def test_places_of_classes_are_no_labels(self, value):
        rows = np.array([[0, 1, 0], [1, 1, 1]]).astype(value if value != "string" else str).tolist()
        part = Dataset.from_dict({"label": rows}, features=datasets.Features({"label": List(Value(value))}))
        with pytest.raises(ValueError, match="a label twice, as in lists of 0 and 1 with a place for each class"):
            data._with_class_labels({"train": part})

    def test_class_labels_are_kept(self):
        feature = ClassLabel(names=["z", "a"])
        part = Dataset.from_dict({"label": [0, 1]}).cast_column("label", feature)
        assert data._with_class_labels({"train": part})["train"].features["label"] == feature

    def test_lists_of_text(self):
        parts = data._with_class_labels(
            {"train": Dataset.from_dict({"audio": ["x", "y"], "label": [["b", "a"], ["c"]]})}
        )
        assert parts["train"].features["label"] == List(ClassLabel(names=["a", "b", "c"]))
        assert parts["train"]["label"][:] == [[1, 0], [2]]


class TestFolds:
    @pytest.fixture
    def dataset(self):
        return Dataset.from_dict({"audio": list("abcdef"), "fold": [1, 1, 2, 2, 3, 3]})

    def test_parts(self, dataset):
        splits = split_folds(dataset, test_folds=[2], validation_folds=[3])
        assert {name: split["audio"][:] for name, split in splits.items()} == {
            "train": ["a", "b"],
            "validation": ["e", "f"],
            "test": ["c", "d"],
        }

    def test_no_empty_parts(self, dataset):
        assert list(split_folds(dataset, [2])) == ["train", "test"]
        assert list(split_folds(dataset, [1, 2, 3])) == ["test"]

    def test_every_clip_of_a_fold_stays_with_it(self, data_dir):
        splits = split_folds(load_audio_dataset(data_dir / "esc10"), [1], [2])
        # One source recording never crosses the folds; a clip's name begins with its fold and its recording.
        recordings = [
            {path.rsplit("/", 1)[1].split("-")[1] for path in splits[name]["audio"]}
            for name in ("train", "validation", "test")
        ]
        assert [len(splits[name]) for name in ("train", "validation", "test")] == [240, 80, 80]
        assert not recordings[0] & recordings[1] and not recordings[0] & recordings[2]

    @pytest.mark.parametrize(
        ("test", "validation", "message"),
        [
            ([4], [], r"test folds \[4\] do not exist; the data set has the folds \[1, 2, 3\]"),
            ([1], [0], r"validation folds \[0\] do not exist"),
            ([1, 2], [2], r"Folds \[2\] are named for test and for validation"),
        ],
    )
    def test_errors(self, dataset, test, validation, message):
        with pytest.raises(ValueError, match=message):
            split_folds(dataset, test, validation)

    def test_no_fold_column(self, dataset):
        with pytest.raises(ValueError, match="no column `fold`"):
            split_folds(dataset.remove_columns("fold"), [1])

    def test_one_split_is_no_split(self, dataset):
        splits = split_folds(DatasetDict(train=dataset), [2])
        assert splits["test"]["audio"][:] == ["c", "d"]
        with pytest.raises(ValueError, match="name splits instead"):
            split_folds(DatasetDict(train=dataset, test=dataset), [2])


class TestAlignLabels:
    def test_single(self):
        dataset = Dataset.from_dict({"audio": list("xyz"), "label": [0, 1, 1]}).cast_column(
            "label", ClassLabel(names=["a", "b"])
        )
        aligned = align_labels(dataset, ["b", "c", "a"])
        assert aligned["label"][:] == [2, 0, 0]
        assert label_names(aligned) == ["b", "c", "a"]

    def test_multi(self):
        dataset = Dataset.from_dict({"audio": ["x", "y"], "label": [[0, 1], []]})
        dataset = dataset.cast_column("label", List(ClassLabel(names=["a", "b"])))
        assert align_labels(dataset, ["b", "a"])["label"][:] == [[1, 0], []]

    @pytest.mark.parametrize("several", [False, True])
    def test_no_label_is_not_the_last_class(self, several):
        feature = ClassLabel(names=["a", "b"])
        features = datasets.Features({"label": List(feature) if several else feature})
        dataset = Dataset.from_dict({"label": [[-1] if several else -1]}, features=features)
        with pytest.raises(ValueError, match="clips without a label, which is stored as -1"):
            align_labels(dataset, ["b", "a"])

    def test_unknown_class(self):
        dataset = Dataset.from_dict({"label": [0]}).cast_column("label", ClassLabel(names=["a"]))
        with pytest.raises(ValueError, match=r"classes \['a'\], unknown among \['b'\]"):
            align_labels(dataset, ["b"])


def test_as_multi_label():
    dataset = Dataset.from_dict({"audio": ["x", "y"], "label": [1, 0]}).cast_column(
        "label", ClassLabel(names=["a", "b"])
    )
    several = as_multi_label(dataset)
    assert several["label"][:] == [[1], [0]]
    assert is_multi_label(several) and label_names(several) == ["a", "b"]
    assert as_multi_label(several) is several
