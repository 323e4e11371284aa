"""Model cards say what was measured, in a form that the Hub reads back."""

import copy
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from transformers_cat import CATForAudioClassification, model_card
from transformers_cat.cards import DATASETS, known_dataset

from .conftest import small_config

RUN = {
    "metrics": {"train_loss": 1.4, "eval_loss": 0.7, "eval_accuracy": 0.775, "eval_clips": 80},
    "clips": {"train": 320, "test": 80},
    "skipped": [],
    "config": {
        "causal_loss_weight": 0.5,
        "causal_estimator": "closed_form",
        "causal_reduction": "sum",
        "reconstruction_loss_weight": 0.25,
    },
    "arguments": {
        "model": {"model_name_or_path": None, "config_name": "model_cards/cat-nano"},
        "data": {"data": "/home/jane/esc10", "dataset_name": None, "test_folds": [1], "mixup_probability": 0.5},
        "training": {"seed": 3, "learning_rate": 0.001, "do_train": True, "load_best_model_at_end": False},
    },
    "environment": {"torch": "2.14.1", "transformers": "5.23.0", "platform": "Linux of jane"},
}


def run(**changes):
    """The run above with other values: `clips={"train": 1}` updates, dots go deeper."""
    changed = copy.deepcopy(RUN)
    for path, value in changes.items():
        *parents, last = path.split("__")
        owner = changed
        for parent in parents:
            owner = owner[parent]
        owner[last] = value
    return changed


@pytest.fixture(scope="module")
def model():
    return CATForAudioClassification(small_config())


def reload(card, tmp_path) -> ModelCard:
    """The card as written and read again; a copy, so nothing of the original helps."""
    card.save(tmp_path / "README.md")
    return ModelCard.load(tmp_path / "README.md")


def words(card) -> str:
    """The text without its line breaks."""
    return " ".join(card.text.split())


def test_metadata_come_back(model, tmp_path):
    card = reload(model_card(model, "someone/cat-esc10", [run()], "esc10"), tmp_path)
    assert card.data.pipeline_tag == "audio-classification"
    assert card.data.library_name == "transformers"
    assert card.data.license == "cc-by-3.0"
    assert card.data.datasets == ["ashraq/esc50"]
    assert card.data.metrics == ["accuracy"]
    assert card.data.base_model is None
    (result,) = card.data.eval_results
    assert card.data.model_name == "cat-esc10"
    assert (result.task_type, result.dataset_name, result.dataset_split) == ("audio-classification", "ESC-10", "fold 1")
    assert (result.metric_type, result.metric_value, result.dataset_args) == ("accuracy", 0.775, {"clips": 80})


def test_the_text_has_the_numbers_of_the_run(model):
    text = words(model_card(model, "someone/cat-esc10", [run()], "esc10"))
    assert "| 1 | fold 1 | 80 | 320 | 3 | 77.5% |" in text
    assert "standard error of 4.7 points" in text  # sqrt(0.775 * 0.225 / 80)
    assert "1 of the 5 was run, so this is not that figure" in text
    assert "no epoch was chosen by its score" in text
    assert "Trained from scratch on 320 clips of ESC-10" in text
    assert (
        "0.5 times the causal loss (closed_form, sum over the features) and 0.25 times the reconstruction loss" in text
    )
    assert "--learning_rate 0.001" in text and "--mixup_probability 0.5" in text
    assert f"{model.num_parameters() / 1e6:.1f} million parameters" in text


def test_a_normalised_volume_is_said(model):
    normalised = CATForAudioClassification(small_config(normalize_volume=True))
    said = "How loud a recording is makes no difference"
    assert said in words(model_card(normalised, "someone/cat", [run()], "esc10"))
    assert said not in words(model_card(model, "someone/cat", [run()], "esc10"))


def test_whitening_is_said(model):
    whitening = CATForAudioClassification(small_config(whitening=0.25))
    said = "25 % of each clip's own average spectrum, in decibels, are taken away"
    assert said in words(model_card(whitening, "someone/cat", [run()], "esc10"))
    assert "average spectrum" not in words(model_card(model, "someone/cat", [run()], "esc10"))


def test_nothing_of_the_machine_is_told(model):
    text = str(model_card(model, "someone/cat-esc10", [run()]))
    assert "jane" not in text
    assert "trained on esc10" in text  # without facts, the name of its folder


def test_several_runs(model, tmp_path):
    runs = [
        run(metrics__eval_accuracy=score, arguments__data__test_folds=[i + 1]) for i, score in enumerate((0.7, 0.8))
    ]
    card = reload(model_card(model, "someone/cat-esc10", runs, "esc10"), tmp_path)
    assert [result.metric_value for result in card.data.eval_results] == [0.7]  # of this checkpoint alone
    text = words(card)
    assert "| 1 (this checkpoint) | fold 1 |" in text and "| 2 | fold 2 |" in text
    assert "mean ± standard error of 2 runs | | | | | 75.0% ± 5.0% |" in text
    assert "2 of the 5 were run" in text
    runs = [run(arguments__data__test_folds=[fold]) for fold in range(1, 6)]
    assert "all 5 folds were run" in words(model_card(model, "x", runs, "esc10"))


def test_several_seeds_of_a_cross_validation(model, tmp_path):
    everything = run(metrics={"train_loss": 1.0}, clips={"train": 400})
    scores = {(0, 1): 0.7, (0, 2): 0.8, (1, 1): 0.8, (1, 2): 1.0}
    runs = [
        run(metrics__eval_accuracy=score, arguments__data__test_folds=[fold], arguments__training__seed=seed)
        for (seed, fold), score in scores.items()
    ]
    card = reload(model_card(model, "someone/cat-esc10", [everything, *runs], "esc10"), tmp_path)
    (result,) = card.data.eval_results
    assert (result.metric_value, result.dataset_split) == (0.825, "fold 1, fold 2")
    assert result.dataset_args == {"clips": 160}  # each clip once, however many seeds heard it
    # Two runs on the same clips are no two samples: folds of 75 and 90 %.
    assert "error of 4 runs, of the means on 2 sets of clips | | | | | 82.5% ± 7.5% |" in words(card)


def test_several_seeds_on_the_same_clips(model):
    runs = [run(metrics__eval_accuracy=score, arguments__training__seed=i) for i, score in enumerate((0.7, 0.8))]
    assert "mean ± standard error of 2 runs | | | | | 75.0% ± 5.0% |" in words(model_card(model, "x", runs, "esc10"))


def test_trained_on_everything_has_the_score_of_its_cross_validation(model, tmp_path):
    own = run(clips={"train": 400}, metrics={"train_loss": 1.0}, arguments__data__test_folds=None)
    folds = [
        run(metrics={"eval_accuracy": accuracy, "eval_clips": 80}, arguments__data__test_folds=[fold])
        for fold, accuracy in ((1, 0.75), (2, 0.85))
    ]
    card = reload(model_card(model, "user/all", [own, *folds], "esc10"), tmp_path)
    (result,) = card.data.eval_results
    assert result.metric_value == pytest.approx(0.8) and result.dataset_args == {"clips": 160}
    assert result.dataset_split == "fold 1, fold 2"
    text = words(card)
    assert "trained on all clips" in text and "this checkpoint)" not in text
    assert "| 1 | fold 1 | 80 | 320 | 3 | 75.0% |" in text and "80.0% ± 5.0%" in text
    assert "on 400 clips" in text
    assert "trained on all clips" not in words(model_card(model, "user/one", folds, "esc10"))
    for fold, accuracy in zip(folds, (0.1, 0.2)):  # whose mean is 0.15000000000000002
        fold["metrics"]["eval_accuracy"] = accuracy
    (result,) = model_card(model, "user/all", [own, *folds], "esc10").data.eval_results
    assert result.metric_value == 0.15


@pytest.mark.parametrize("stated", ["regression", None])
def test_regression(tmp_path, stated):
    """Which names no class."""
    config = small_config(problem_type=stated, num_labels=1)
    text = words(reload(model_card(CATForAudioClassification(config), "x", []), tmp_path))
    assert "million parameters that gives every clip 1 number." in text and "names one of" not in text
    assert text.count('function_to_apply="none"') == 2


def test_multi_label(model, tmp_path):
    scores = {"eval_mAP": 0.25, "eval_AUC": 0.9, "eval_d_prime": 1.81, "eval_clips": 17_000}
    config = small_config(problem_type="multi_label_classification")
    measured = run(metrics=scores, arguments__data__test_folds=None, clips={"train": 20_000, "test": 17_000})
    card = reload(model_card(CATForAudioClassification(config), "x", [measured], "audioset"), tmp_path)
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {
        "mAP": 0.25,
        "AUC": 0.9,
        "d_prime": 1.81,
    }
    text = words(card)
    assert "| 1 | test | 17000 | 20000 | 3 | 0.250 | 0.900 | 1.81 |" in text
    assert "This run used 37000 of its 2084320 clips" in text
    assert text.count('function_to_apply="sigmoid"') == 2


@pytest.mark.parametrize(
    ("clips", "best", "expected"),
    [
        ({"train": 1, "validation": 1, "test": 1}, True, "Validation clips, which are not reported on, chose"),
        ({"train": 1, "test": 1}, True, "so the figures are too good"),
        ({"train": 1, "test": 1}, False, "The last epoch is reported"),
    ],
)
def test_what_chose_the_epoch(model, clips, best, expected):
    measured = run(clips=clips, arguments__training__load_best_model_at_end=best)
    assert expected in words(model_card(model, "x", [measured]))


def test_a_run_that_trained_nothing_says_nothing_of_training(model):
    text = words(model_card(model, "m", [run(arguments__training__do_train=False, clips={"train": 8, "test": 80})]))
    assert "no epoch was chosen" not in text and "None" not in text and "| not known |" in text


def test_a_local_folder_is_no_data_set_of_the_hub(model):
    card = model_card(model, "m", [run(arguments__data__dataset_name="/home/jane/esc10")])
    assert "jane" not in str(card) and card.data.datasets is None


def test_averaged_weights_are_said(model):
    text = words(model_card(model, "user/mean", [run(arguments__training__average_last_epochs=5)]))
    assert "mean of the last 5 epochs'" in text and "--average_last_epochs 5" in text
    assert "The last epoch is reported" not in text


def test_a_start_from_the_hub_is_a_base_model(model, tmp_path):
    card = model_card(model, "x", [run(arguments__model__model_name_or_path="someone/cat-audioset")])
    assert card.data.base_model == "someone/cat-audioset"
    assert "from the checkpoint someone/cat-audioset" in words(card)
    card = model_card(model, "x", [run(arguments__model__model_name_or_path=str(tmp_path))])
    assert card.data.base_model is None
    assert str(tmp_path.parent) not in str(card)


@pytest.mark.parametrize("dataset", [None, *DATASETS])
def test_without_results_nothing_is_claimed(model, tmp_path, dataset):
    card = reload(model_card(model, "someone/cat", dataset=dataset), tmp_path)
    assert card.data.eval_results is None
    assert "No result is recorded for this checkpoint" in card.text
    assert "recorded here" in card.text  # neither is the training
    if dataset:
        assert card.data.license == DATASETS[dataset].license
        assert DATASETS[dataset].credit in words(card) and DATASETS[dataset].citation in card.text
    else:
        assert card.data.license is None and "not known to this card" in card.text


def test_an_unknown_data_set_is_named(model):
    with pytest.raises(
        ValueError, match="No facts on a data set 'esc'; known are esc10, esc50, urbansound8k, audioset"
    ):
        model_card(model, "x", dataset="esc")


def test_data_sets_are_known_by_layout_and_classes(tmp_path):
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "esc50.csv").touch()
    assert known_dataset(tmp_path, 10) is DATASETS["esc10"]
    assert known_dataset(tmp_path, 50) is DATASETS["esc50"]
    assert known_dataset(tmp_path, 7) is None
    assert known_dataset("agkphysics/AudioSet", 527) is DATASETS["audioset"]


def test_real_data_sets_are_known(data_dir):
    assert known_dataset(data_dir / "esc10", 10) is DATASETS["esc10"]
    assert known_dataset(data_dir / "urbansound8k", 10) is DATASETS["urbansound8k"]
    assert known_dataset(data_dir / "fsdd", 10) is None


def test_the_template_lies_with_the_models():
    template = Path(__file__).parents[1] / "model_cards" / "template.md"
    assert "{{ card_data }}" in template.read_text(encoding="utf-8")


def test_a_license_of_ones_own_counts(model):
    assert model_card(model, "x", [run()], "esc10", license="mit").data.license == "mit"


def test_the_recipe_has_what_is_zero_or_off(model):
    training = {**RUN["arguments"]["training"], "muon": False, "weight_decay": 0.0, "warmup_steps": 0.0, "seed": 0}
    training |= {"max_steps": -1, "bf16": False, "average_last_epochs": 0}
    data = {**RUN["arguments"]["data"], "recordings_as_labels": False, "check_audio": False, "mixup_probability": 0}
    text = model_card(model, "x", [run(arguments__training=training, arguments__data=data)]).text
    assert "--mixup_probability 0\n" in text and "--recordings_as_labels" not in text and "--check_audio" not in text
    for flag in ("muon False", "weight_decay 0.0", "warmup_steps 0.0", "seed 0", "average_last_epochs 0"):
        assert f"--{flag}\n" in text
    assert "--max_steps" not in text and "--bf16" not in text


def test_a_metric_that_is_no_number_is_left_out(model):
    for value, metrics in ((2.5, ["accuracy", "d_prime"]), (float("inf"), ["accuracy"]), (float("nan"), ["accuracy"])):
        runs = [run(metrics__eval_d_prime=1.5), run(metrics__eval_d_prime=value)]
        assert model_card(model, "x", runs).data.metrics == metrics


def test_labels_by_text_as_the_official_script_leaves_them():
    model = CATForAudioClassification(small_config())
    model.config.id2label = {str(number): f"class {number}" for number in range(model.config.num_labels)}
    assert "class 0, class 1" in words(model_card(model, "x"))
