"""Model cards, written from what a run measured, and the facts on data sets that they state."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, nan, sqrt
from pathlib import Path
from statistics import mean, stdev

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from .configuration_cat import class_names, implied_problem_type

TEMPLATE = Path(__file__).with_name("model_card.md")
TASK = "audio-classification"
# By itself, the pipeline applies the softmax to everything up to transformers 5.22.
FUNCTIONS = {"multi_label_classification": "sigmoid", "regression": "none"}

# Metrics of results.json, best known first: identifier, name, format.
METRICS = (
    ("accuracy", "Accuracy", "{:.1%}"),
    ("mAP", "Mean average precision", "{:.3f}"),
    ("AUC", "Mean area under the ROC curve", "{:.3f}"),
    ("d_prime", "d'", "{:.2f}"),
)
# What makes the recipe, of transformers' TrainingArguments.
TRAINING_ARGUMENTS = (
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "label_smoothing_factor",
    "bf16",
    "fp16",
    "seed",
    "average_last_epochs",
    "muon",
)
# Their defaults.
UNSET = {("max_steps", -1), ("label_smoothing_factor", 0.0), ("bf16", False), ("fp16", False)}
UNSET |= {("recordings_as_labels", False)}
PACKAGES = ("transformers-cat", "torch", "torchaudio", "transformers")
# Data arguments that say which clips are read and how, not what is done with them.
SOURCE_ARGUMENTS = {
    "data",
    "dataset_name",
    "dataset_config_name",
    "train_file",
    "eval_file",
    "train_split_name",
    "eval_split_name",
    "test_folds",
    "validation_folds",
    "audio_column_name",
    "label_column_name",
    "problem_type",
    "on_bad_audio",
    "check_audio",
}


@dataclass(frozen=True)
class DatasetFacts:
    """What a card states about a data set.

    Attributes:
        name: As its authors write it.
        hub_id: A copy on the Hub, for the card's links.
        marker: The file that tells its layout, relative to its folder.
        labels: Number of classes.
        clips: Number of clips of the whole data set.
        folds: Number of given folds; 0 where the splits are given instead.
        license: The Hub's identifier of its licence.
        terms: The licence in words.
        description: What it holds.
        protocol: The figure that papers report on it.
        credit: Whom to credit.
        citation: BibTeX.
    """

    name: str
    hub_id: str
    marker: str
    labels: int
    clips: int
    folds: int
    license: str
    terms: str
    description: str
    protocol: str
    credit: str
    citation: str


_ESC_CITATION = """@inproceedings{piczak2015esc,
  title     = {{ESC}: Dataset for Environmental Sound Classification},
  author    = {Piczak, Karol J.},
  booktitle = {Proceedings of the 23rd ACM International Conference on Multimedia},
  year      = {2015}
}"""

DATASETS = {
    "esc10": DatasetFacts(
        name="ESC-10",
        hub_id="ashraq/esc50",
        marker="meta/esc50.csv",
        labels=10,
        clips=400,
        folds=5,
        license="cc-by-3.0",
        terms="CC BY 3.0",
        description="the ten classes of ESC-50 that its author released on their own: clips of 5 s from Freesound",
        protocol="the mean accuracy over the five given folds",
        credit="Karol J. Piczak and the Freesound users whose recordings the clips are from",
        citation=_ESC_CITATION,
    ),
    "esc50": DatasetFacts(
        name="ESC-50",
        hub_id="ashraq/esc50",
        marker="meta/esc50.csv",
        labels=50,
        clips=2000,
        folds=5,
        license="cc-by-nc-3.0",
        terms="CC BY-NC 3.0, which excludes commercial use",
        description="environmental sounds of 50 classes, 40 clips of 5 s each, from Freesound",
        protocol="the mean accuracy over the five given folds",
        credit="Karol J. Piczak and the Freesound users whose recordings the clips are from",
        citation=_ESC_CITATION,
    ),
    "urbansound8k": DatasetFacts(
        name="UrbanSound8K",
        hub_id="danavery/urbansound8K",
        marker="metadata/UrbanSound8K.csv",
        labels=10,
        clips=8732,
        folds=10,
        license="cc-by-nc-3.0",
        terms="CC BY-NC 3.0, which excludes commercial use",
        description="urban sounds of ten classes, clips of at most 4 s, from Freesound",
        protocol="the mean accuracy over the ten given folds; splits that mix them give figures that are far too high",
        credit="Justin Salamon, Christopher Jacoby, Juan Pablo Bello and the Freesound users whose clips these are",
        citation="""@inproceedings{salamon2014urbansound,
  title     = {A Dataset and Taxonomy for Urban Sound Research},
  author    = {Salamon, Justin and Jacoby, Christopher and Bello, Juan Pablo},
  booktitle = {Proceedings of the 22nd ACM International Conference on Multimedia},
  year      = {2014}
}""",
    ),
    "audioset": DatasetFacts(
        name="AudioSet",
        hub_id="agkphysics/AudioSet",
        marker="class_labels_indices.csv",
        labels=527,
        clips=2_084_320,
        folds=0,
        license="cc-by-4.0",
        terms="CC BY 4.0 (the annotations; the rights in the recordings are those of the videos' owners)",
        description="segments of 10 s from YouTube videos with 527 labels, several for a clip; some videos vanish "
        "every year, so nobody has quite the same clips",
        protocol="the mean average precision over the 527 classes on the evaluation segments",
        credit="the AudioSet team at Google",
        citation="""@inproceedings{gemmeke2017audioset,
  title     = {Audio Set: An Ontology and Human-Labeled Dataset for Audio Events},
  author    = {Gemmeke, Jort F. and Ellis, Daniel P. W. and Freedman, Dylan and Jansen, Aren and Lawrence, Wade and
               Moore, R. Channing and Plakal, Manoj and Ritter, Marvin},
  booktitle = {IEEE International Conference on Acoustics, Speech and Signal Processing (ICASSP)},
  year      = {2017}
}""",
    ),
}


def known_dataset(source: str | Path, num_labels: int) -> DatasetFacts | None:
    """The facts on a data set, if it is one of `DATASETS`.

    Args:
        source: Its folder, or its id on the Hub.
        num_labels: Number of classes, which tells ESC-10 from ESC-50.
    """
    for facts in DATASETS.values():
        is_it = facts.hub_id == str(source) or (Path(source) / facts.marker).is_file()
        if is_it and facts.labels == num_labels:
            return facts
    return None


def model_card(
    model: PreTrainedModel,
    name: str,
    results: Sequence[Mapping] = (),
    dataset: DatasetFacts | str | None = None,
    license: str | None = None,
) -> ModelCard:
    """A card that says what the model is, how to use it, how it was trained and what was measured.

    It states nothing that is not in the results or in `DATASETS`; what was not measured, it says.

    Args:
        model: The model that the card is about.
        name: Its id on the Hub, "user/name", or the folder to load it from.
        results: The contents of `results.json` of the runs of the recipe; the first is that of this checkpoint, whose
            metrics alone go into the metadata. If it was trained on everything, and so has none, the others are its
            cross-validation, and their mean goes there. Without any, the card says that nothing was measured.
        dataset: What it was trained on: one of `DATASETS` or its key. By default the first run's own data, by name.
        license: Licence of the weights, an identifier of the Hub's. By default that of the data set.

    Returns:
        The card; `card.save(path)` writes it.

    Raises:
        ValueError: The data set is not a key of `DATASETS`.
    """
    if isinstance(dataset, str):
        if dataset not in DATASETS:
            raise ValueError(f"No facts on a data set {dataset!r}; known are {', '.join(DATASETS)}.")
        dataset = DATASETS[dataset]
    own = results[0] if results else None
    dataset_name = dataset.name if dataset else _dataset_name(own)
    license = license or (dataset.license if dataset else None)
    measured = [run for run in results if "eval_clips" in run["metrics"]]
    metrics = [
        metric
        for metric in METRICS
        if measured and all(isfinite(run["metrics"].get(f"eval_{metric[0]}", nan)) for run in measured)
    ]
    reported = measured[:1] if measured and own is measured[0] else measured
    short_name = Path(name).name
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=TASK,
        license=license,
        tags=["causal-audio-transformer", "sound-event-classification"],
        datasets=[dataset.hub_id] if dataset else _hub_dataset(own),
        metrics=[key for key, _, _ in metrics] or None,
        base_model=_base_model(own),
        model_name=short_name if metrics else None,
        eval_results=[
            EvalResult(
                task_type=TASK,
                dataset_type=dataset.hub_id if dataset else (_hub_dataset(own) or ["audiofolder"])[0],
                dataset_name=dataset_name,
                dataset_split=", ".join(_by_split(reported)),
                dataset_args={"clips": sum(runs[0]["metrics"]["eval_clips"] for runs in _by_split(reported).values())},
                metric_type=key,
                metric_name=title,
                metric_value=round(mean(_means(reported, key)), 4),
            )
            for key, title, _ in metrics
        ]
        or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        short_name=short_name,
        parameters=f"{model.num_parameters() / 1e6:.1f}",
        labels=class_names(model.config),
        multi_label=model.config.problem_type == "multi_label_classification",
        regression=implied_problem_type(model.config) == "regression",
        function=FUNCTIONS.get(implied_problem_type(model.config)),
        sampling_rate=model.config.sampling_rate,
        normalize_volume=model.config.normalize_volume,
        whitening=model.config.whitening,
        facts=dataset,
        dataset_name=dataset_name,
        own=own,
        runs=[_row(run, metrics) for run in measured],
        cross_validated=own is not None and own not in measured,
        metric_titles=[title for _, title, _ in metrics],
        summary=_summary(measured, metrics),
        error=_standard_error(own),
        folds=sorted({fold for run in results for fold in _data(run).get("test_folds") or ()}),
        epoch=_chosen_epoch(own),
        start=_start(own),
        recipe=_recipe(own),
        packages=[package for package in PACKAGES if own and package in own["environment"]],
    )


def _data(run: Mapping) -> Mapping:
    return run["arguments"]["data"]


def _dataset_name(run: Mapping | None) -> str | None:
    """The last part of the path or id: a whole path would tell more of a machine than a card should."""
    if run is None:
        return None
    source = next(_data(run)[key] for key in ("data", "dataset_name", "train_file") if _data(run).get(key))
    return Path(source).name


def _hub_dataset(run: Mapping | None) -> list[str] | None:
    name = _data(run).get("dataset_name") if run else None
    return None if _is_path(name) else [name]


def _source(run: Mapping | None) -> str | None:
    """What the training started from: a checkpoint or another model's trunk; None is from scratch."""
    model = run["arguments"]["model"] if run else {}
    return model.get("model_name_or_path") or model.get("init_from")


def _base_model(run: Mapping | None) -> str | None:
    """The source, where it is one of the Hub."""
    source = _source(run)
    return None if _is_path(source) else source


def _is_path(name: str | None) -> bool:
    """Whether a name, or none, is no id on the Hub."""
    return name is None or name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()


def _start(run: Mapping | None) -> str:
    """Where the weights came from, in words."""
    source = _source(run)
    if source is None:
        return "from scratch"
    what = "the checkpoint" if run["arguments"]["model"].get("model_name_or_path") else "the trunk of"
    return f"from {what} {_base_model(run) or Path(source).name}"


def _evaluated_on(run: Mapping) -> str:
    folds = _data(run).get("test_folds")
    if folds:
        return f"fold{'s' if len(folds) > 1 else ''} {', '.join(map(str, folds))}"
    return _data(run).get("eval_split_name") or ("test" if "test" in run["clips"] else "validation")


def _trained(run: Mapping) -> bool:
    """Whether the run trained the model; otherwise it says nothing of how that was done."""
    return run["arguments"]["training"].get("do_train", True)


def _chosen_epoch(run: Mapping | None) -> str | None:
    """Which epoch is reported, and whether the reported clips had a say in it."""
    if run is None or not _trained(run):
        return None
    if averaged := run["arguments"]["training"].get("average_last_epochs"):
        return f"The weights are the mean of the last {averaged} epochs'; no epoch was chosen by its score."
    if not run["arguments"]["training"].get("load_best_model_at_end"):
        return "The last epoch is reported; no epoch was chosen by its score."
    if {"validation", "test"} <= set(run["clips"]):
        return "Validation clips, which are not reported on, chose the epoch."
    return "The epoch was chosen on the clips that are reported on, so the figures are too good."


def _row(run: Mapping, metrics: Sequence) -> dict:
    """One line of the table of runs."""
    return {
        "on": _evaluated_on(run),
        "trained": run["clips"].get("train", 0) if _trained(run) else "not known",
        "clips": run["metrics"].get("eval_clips", 0),
        "seed": run["arguments"]["training"]["seed"],
        "values": [form.format(run["metrics"][f"eval_{key}"]) for key, _, form in metrics],
    }


def _by_split(runs: Sequence[Mapping]) -> dict[str, list[Mapping]]:
    """The runs on each set of clips, in their order."""
    splits = {}
    for run in runs:
        splits.setdefault(_evaluated_on(run), []).append(run)
    return splits


def _means(runs: Sequence[Mapping], key: str) -> list[float]:
    """A metric's mean over the runs on the same clips, as they are not independent; of single runs if all are such."""
    splits = list(_by_split(runs).values())
    groups = splits if len(splits) > 1 else [[run] for run in runs]
    return [mean(run["metrics"][f"eval_{key}"] for run in group) for group in groups]


def _summary(runs: Sequence[Mapping], metrics: Sequence) -> dict | None:
    """Mean and standard error of each metric over several runs, and in words of what."""
    if len(runs) < 2:
        return None
    splits = len(_by_split(runs))
    between = f", of the means on {splits} sets of clips" if 1 < splits < len(runs) else ""
    columns = [(_means(runs, key), form) for key, _, form in metrics]
    return {
        "of": f"{len(runs)} runs{between}",
        "values": [
            f"{form.format(mean(column))} ± {form.format(stdev(column) / sqrt(len(column)))}"
            for column, form in columns
        ],
    }


def _standard_error(run: Mapping | None) -> str | None:
    """Binomial standard error of an accuracy, in points: how far it may be off for the number of clips alone."""
    if run is None or "eval_accuracy" not in run["metrics"]:
        return None
    accuracy, clips = run["metrics"]["eval_accuracy"], run["metrics"]["eval_clips"]
    return f"{100 * sqrt(accuracy * (1 - accuracy) / clips):.1f}"


def _recipe(run: Mapping | None) -> dict | None:
    """The arguments of the training script that make the recipe; paths are left out."""
    if run is None:
        return None
    training = run["arguments"]["training"]
    recipe = {key: training.get(key) for key in TRAINING_ARGUMENTS}
    recipe |= {key: value for key, value in _data(run).items() if key not in SOURCE_ARGUMENTS}
    recipe = {key: value for key, value in recipe.items() if value is not None and (key, value) not in UNSET}
    return {key: value for key, value in recipe.items() if "/" not in str(value) and "\\" not in str(value)}
