"""Score files and ensembles: what is written is read, and only what belongs together is averaged."""

import csv
from dataclasses import replace

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from transformers_cat.training import Scores, align_scores, average_scores, read_scores, write_scores
from transformers_cat.training.metrics import PROBLEM_TYPES
from transformers_cat.training.scores import accuracy_difference, concatenate_scores

SINGLE, MULTI = PROBLEM_TYPES
ONE = Scores(
    paths=["x/a.wav", "x/b.wav", "x/c.wav"],
    names=["dog, small", "label", "emu"],  # a comma, and the name of a column
    values=np.array([[0.75, 0.125, 0.125], [0.25, 0.5, 0.25], [0.5, 0.25, 0.25]]),
    labels=[["dog, small"], ["label"], ["emu"]],
    folds=[1, 1, 2],
)
# The same clips elsewhere, in another order of clips and classes, of which nothing else is known.
TWO = Scores(
    paths=["y/c.wav", "y/a.wav", "y/b.wav"],
    names=["emu", "dog, small", "label"],
    values=np.array([[1, 0, 0], [0, 0.5, 0.5], [0, 0, 1]]),
)


@pytest.mark.parametrize(
    "scores",
    [
        ONE,
        TWO,
        replace(ONE, labels=[["emu", "label"], [], ["emu"]], folds=None),
        replace(ONE, names=["fold", "label", "emu"], labels=[["fold"], ["label"], ["emu"]], folds=None),
    ],
)
def test_what_is_written_is_read(scores, tmp_path):
    again = read_scores(write_scores(scores, tmp_path / "scores.csv"))
    assert (again.paths, again.names, again.labels, again.folds) == (
        scores.paths,
        scores.names,
        scores.labels,
        scores.folds,
    )
    np.testing.assert_array_equal(again.values, scores.values)


def test_the_likeliest_class_is_named(tmp_path):
    with write_scores(ONE, tmp_path / "scores.csv").open(newline="") as file:
        rows = [(row["predicted"], row["probability"]) for row in csv.DictReader(file)]
    assert rows == [("dog, small", "0.75"), ("label", "0.5"), ("dog, small", "0.5")]


def test_parts_with_their_classes_in_another_order():
    last = replace(ONE.select([2]), names=ONE.names[::-1], values=ONE.values[2:, ::-1])
    again = concatenate_scores([ONE.select([0, 1]), last])
    assert again.names == ONE.names
    np.testing.assert_array_equal(again.values, ONE.values)
    with pytest.raises(ValueError, match="classes of another part, differ: 1 lacking: emu; 1 more: gnu"):
        concatenate_scores([ONE, replace(ONE, names=["dog, small", "label", "gnu"])])


def test_clips_inside_of_parquet_files_may_share_a_name(tmp_path):
    features = Features(
        {"audio": {"bytes": Value("binary"), "path": Value("string")}, "label": ClassLabel(names=["dog", "rain"])}
    )
    clips = [{"bytes": b"", "path": path} for path in ("1.wav", "2.wav", "1.wav")]
    dataset = Dataset.from_dict({"audio": clips, "label": [0, 0, 1]}, features=features)
    scores = Scores.of(dataset, np.full((3, 2), 0.5), ["dog", "rain"])
    assert scores.paths == ["1.wav", "2.wav", "1.wav (2)"]
    folds = [read_scores(write_scores(scores.select(clips), tmp_path / "scores.csv")) for clips in ([0, 1], [0, 2])]
    whole = concatenate_scores(folds)
    assert read_scores(write_scores(whole, tmp_path / "scores.csv")).paths == whole.paths
    assert len(set(whole.paths)) == 4


def test_small_probabilities_keep_their_order(tmp_path):
    values = np.array([[1e-9, 2e-9], [1e-12, 0.9999999]])
    again = read_scores(write_scores(Scores(["a", "b"], ["x", "y"], values), tmp_path / "scores.csv"))
    np.testing.assert_allclose(again.values, values, rtol=1e-6)


def test_average_matches_clips_and_classes_by_name():
    average = average_scores(align_scores({"two": TWO, "one": ONE}))
    assert (average.paths, average.names) == (TWO.paths, TWO.names)
    np.testing.assert_allclose(average.values, [[0.625, 0.5 / 2, 0.125], [0.0625, 0.625, 0.3125], [0.125, 0.125, 0.75]])
    assert average.labels == [["emu"], ["dog, small"], ["label"]] and average.folds == [2, 1, 1]
    assert average.metrics(SINGLE) == {"accuracy": 1.0, "clips": 3}
    assert ONE.metrics(SINGLE)["accuracy"] == pytest.approx(2 / 3)


def test_an_ensemble_of_one_model_is_the_model():
    average = average_scores(align_scores({"one": ONE, "again": ONE}))
    np.testing.assert_array_equal(average.values, ONE.values)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            replace(ONE, names=["dog, small", "label", "gnu"]),
            "classes of other, .* differ: 1 lacking: emu; 1 more: gnu",
        ),
        (ONE.select([0, 1]), r"clips of other, .* differ: 1 lacking: c\.wav"),
        (replace(ONE, labels=[["emu"], ["label"], ["emu"]]), r"other labels: x/a\.wav \(dog, small or emu\)"),
    ],
)
def test_what_differs_is_listed(other, message):
    with pytest.raises(ValueError, match=message):
        align_scores({"one": ONE, "other": other})


def test_equal_file_names_are_told_apart_by_their_folders():
    scores = Scores(["dog/1.wav", "cat/1.wav"], ["x"], np.array([[0.0], [1.0]]))
    average = average_scores(align_scores({"one": scores, "two": scores.select([1, 0])}))
    np.testing.assert_array_equal(average.values, scores.values)


def test_several_labels():
    scores = replace(ONE, labels=[["dog, small", "emu"], ["label"], []])
    assert scores.problem_type == MULTI and ONE.problem_type == SINGLE
    assert scores.metrics(MULTI)["mAP_classes"] == 3
    with pytest.raises(ValueError, match="one label each, but not so: x/a.wav, x/c.wav"):
        scores.metrics(SINGLE)


class TestDifference:
    """Two models, by the clips that they are right on."""

    PATHS = ["1-0-0-0.wav", "1-0-0-1.wav", "1-0-0-2.wav", "2-0-0-0.wav", "3-0-0-0.wav", "other.wav"]

    def scores(self, right):
        values = np.array([[0.9, 0.1] if one else [0.1, 0.9] for one in right])
        return Scores(self.PATHS, ["a", "b"], values, labels=[["a"]] * len(right))

    def test_clips_and_runs_are_averaged(self):
        one = [self.scores([1, 1, 1, 1, 0, 1]), self.scores([0, 1, 1, 1, 0, 1])]
        other = [self.scores([0, 0, 0, 1, 1, 0]).select([5, 4, 3, 2, 1, 0])]  # in any order
        difference, _ = accuracy_difference(one, other)
        assert difference == pytest.approx((0.5 + 1 + 1 + 0 - 1 + 1) / 6)
        assert accuracy_difference(other, one)[0] == pytest.approx(-difference)
        assert accuracy_difference(one, one) == (0.0, 0.0)

    def test_error_is_that_of_a_bootstrap_over_recordings(self):
        generator = np.random.default_rng(0)
        sizes = generator.integers(1, 12, 200)
        recordings = np.repeat(np.arange(200), sizes)
        paths = [f"{recording}-0-0-{i}.wav" for i, recording in enumerate(recordings)]
        right = (generator.random((2, 200)) < 0.6)[:, recordings] ^ (generator.random((2, len(paths))) < 0.1)
        scores = [Scores(paths, ["a", "b"], np.stack([own, 1 - own], 1), [["a"]] * len(paths)) for own in right * 1.0]
        _, error = accuracy_difference(scores[:1], scores[1:])
        gains = np.bincount(recordings, right[0] * 1.0 - right[1])
        drawn = generator.multinomial(200, np.full(200, 1 / 200), size=4000)
        assert error == pytest.approx(np.std(drawn @ gains / (drawn @ sizes)), rel=0.05)
        assert error > 2 * np.std(right[0] * 1.0 - right[1]) / len(paths) ** 0.5  # as if each clip were by itself

    def test_one_recording_has_no_error(self):
        scores = self.scores([1, 1, 0, 1, 1, 1]).select([0, 1, 2])
        assert accuracy_difference([scores], [scores]) == (0.0, None)


def test_a_class_may_have_the_separator_in_its_name(tmp_path):
    scores = Scores(["x", "y"], ["rock;pop", "jazz"], np.eye(2), labels=[["rock;pop"], ["jazz"]])
    assert read_scores(write_scores(scores, tmp_path / "scores.csv")).labels == scores.labels


def test_unknown_labels():
    with pytest.raises(ValueError, match="no class of the scores: gnu"):
        replace(ONE, labels=[["gnu"]] * 3).targets()
    with pytest.raises(ValueError, match="labels are not known"):
        TWO.metrics(SINGLE)


def test_folds_come_apart_and_together():
    parts = ONE.by_fold()
    assert [part.paths for part in parts.values()] == [["x/a.wav", "x/b.wav"], ["x/c.wav"]]
    again = concatenate_scores(list(parts.values()))
    assert again.paths == ONE.paths and again.labels == ONE.labels
    np.testing.assert_array_equal(again.values, ONE.values)
    assert TWO.by_fold() == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no score file"),
        ("clip,dog\na,1\n", "no score file"),
        ("path,label\na,dog\n", "no score file"),
        ("path,dog\na,1\na,0\n", "clips more than once: a"),
        ("path,dog,dog\na,1,1\n", "classes more than once: dog"),
        ("path,dog\na,high\n", "not a number"),
        ("path,dog\na,1\nb,-2.5\n", "row 3 has a score outside of"),
        ("path,dog\na,nan\n", "row 2 has a score outside of"),
        ("path,dog\n\na,1,1\n", "row 3 has 3 cells, not the 2"),
        ("path,fold,dog\na,,1\n", "scores.csv: fold '' is not an integer"),
        ("path,dog\ncaf\xe9,1\n", "scores.csv is not UTF-8"),
    ],
)
def test_bad_files(text, message, tmp_path):
    (tmp_path / "scores.csv").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=message):
        read_scores(tmp_path / "scores.csv")


def test_an_empty_line_is_no_clip(tmp_path):
    (tmp_path / "scores.csv").write_text("path,dog\na,1\n\n")
    assert read_scores(tmp_path / "scores.csv").paths == ["a"]
