#!/usr/bin/env python
r"""Train and evaluate a Causal Audio Transformer on a folder, a CSV file or a data set of the Hub.

From scratch, on one fold of ESC-10:

    python examples/run_audio_classification.py --data ../shared/data/esc10 --test_folds 1 \
        --config_name model_cards/cat-nano --output_dir runs/esc10 --do_train --do_eval

`--model_name_or_path` starts from a checkpoint instead; `torchrun --nproc_per_node 2` trains in two processes; one
argument that ends in .json is a file with all of them. The flags are those of Transformers' own script plus the ones
of the recipe, whose defaults stand in `RecipeArguments` and `DataArguments`. The same command given again goes on from
the last checkpoint; one that would train something else needs another `--output_dir`.

The number reported is that of the final model on the test clips: the mean of the last epochs' weights
(`--average_last_epochs`) or, with `--validation_folds` (or a `validation` beside a `test` split), the epoch that the
validation clips choose. No test clip chooses it, unless `--load_best_model_at_end` is given without validation clips.

AudioSet (a folder with its tables and clips, or better, what `prepare_audio.py` makes of it), on 4 GPUs:

    torchrun --nproc_per_node 4 examples/run_audio_classification.py --data /data/audioset --on_bad_audio skip \
        --config_name model_cards/cat-tiny --output_dir runs/audioset --do_train --do_eval --max_length_seconds 10 \
        --balanced_sampling --features_on_device --bf16 --dataloader_num_workers 8

Other models of `AutoModelForAudioClassification` run with `--mixup_probability 0 --time_mask 0 --freq_mask 0`: their
losses may not take soft labels, and the masks need this package's features.
"""

import copy
import dataclasses
import json
import logging
import sys
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import datasets
import torch
import transformers
from accelerate.utils import parse_flag_from_env
from datasets import Dataset, DatasetDict
from huggingface_hub import HfApi
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import is_tensorboard_available
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from transformers_cat import CATConfig, CATFeatureExtractor, CATForAudioClassification, include_code, model_card
from transformers_cat.cards import known_dataset
from transformers_cat.configuration_cat import MRMF_ARGUMENTS, class_names
from transformers_cat.convert import load_trunk
from transformers_cat.training import (
    AudioCollator,
    AudioTrainer,
    SpecAugment,
    WeightAveraging,
    align_labels,
    as_multi_label,
    balanced_weights,
    compute_metrics_for,
    decode_audio,
    environment,
    is_multi_label,
    label_by_recording,
    label_names,
    load_audio_dataset,
    main_metric,
    plot_learning_curves,
    split_folds,
    validate_audio_files,
    without_only_split,
    without_recordings_of,
    write_predictions,
)
from transformers_cat.training.data import refuse_shared_clips
from transformers_cat.training.metrics import MULTI_LABEL, PROBLEM_TYPES, SINGLE_LABEL, probabilities
from transformers_cat.training.protocol import refuse_training_clips, training_in
from transformers_cat.training.report import data_fingerprint, git_state, refuse_changes, write_history, write_json
from transformers_cat.training.scores import Scores

with suppress(ModuleNotFoundError):  # where this script was copied to without it
    import peers  # noqa: F401  registers its models with transformers

logger = logging.getLogger(__name__)

ADAMW = (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED)
TRAINING_NAME = "training.json"  # what decides the training whose checkpoints lie beside it
# How the names of the arguments begin that do not decide what is trained; what is skipped, fingerprints tell.
INCIDENTAL = tuple(
    (
        "output_dir resume_from_checkpoint do_ token cache_dir trust_remote_code check_audio on_bad_audio "
        "log disable_tqdm report_to run_name project trackio_ include_ skip_memory_metrics debug push_to_hub hub_ "
        "save_total_limit save_on_each_node per_device_eval_batch_size eval_accumulation_steps "
        "dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor dataloader_multiprocessing_context "
        "dataloader_in_order use_cpu local_rank ddp_ torch_compile parallelism_config"
    ).split()
)
# These do where the best epoch is chosen.
EVALUATION = ("eval_strategy", "eval_steps", "eval_delay", "save_strategy", "save_steps")


@dataclass
class ModelArguments:
    """Which model to train."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint to start from: a folder or an id on the Hub."}
    )
    config_name: str | None = field(
        default=None,
        metadata={"help": "Folder or id with a config.json; without a checkpoint, it is trained from scratch."},
    )
    init_from: str | None = field(
        default=None,
        metadata={"help": "With --config_name: a Swin or CLAP (HTS-AT) checkpoint whose trunk is the start."},
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "JSON that replaces values of the configuration, as in '{\"causal_loss_weight\": 0}'."},
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the checkpoint."})
    feature_extractor_name: str | None = field(
        default=None, metadata={"help": "Feature extractor, if it is not the checkpoint's or the configuration's own."}
    )
    freeze_feature_encoder: bool = field(
        default=False, metadata={"help": "Call the model's freeze_feature_encoder() before training."}
    )
    attention_mask: bool = field(default=True, metadata={"help": "Whether the feature extractor returns masks."})
    token: str | None = field(default=None, metadata={"help": "Token for private repositories of the Hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes with a checkpoint."})
    ignore_mismatched_sizes: bool = field(
        default=False,
        metadata={
            "help": "Replace weights of the checkpoint that have another shape; the head of other classes always is."
        },
    )


@dataclass
class DataArguments:
    """Which clips to train and evaluate on, and how they are augmented."""

    data: str | None = field(
        default=None,
        metadata={
            "help": "A folder (in the layout of ESC-50, UrbanSound8K, AudioSet or an audio folder, or made by "
            "prepare_audio.py) or a CSV file."
        },
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Id of a data set on the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that data set."})
    train_file: str | None = field(default=None, metadata={"help": "CSV file with the training clips."})
    eval_file: str | None = field(default=None, metadata={"help": "CSV file with the test clips."})
    train_split_name: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split_name: str | None = field(
        default=None, metadata={"help": "Split to report on. Default: test if there is one, else validation."}
    )
    test_folds: list[int] | None = field(default=None, metadata={"help": "Given folds to report on."})
    validation_folds: list[int] | None = field(default=None, metadata={"help": "Given folds to choose the epoch on."})
    audio_column_name: str = field(default="audio", metadata={"help": "Column of the clips (CSV and Hub)."})
    label_column_name: str = field(default="label", metadata={"help": "Column of the labels (CSV and Hub)."})
    problem_type: str | None = field(
        default=None,
        metadata={"help": "Default: multi-label if a clip has several labels.", "choices": list(PROBLEM_TYPES)},
    )
    leave_out_recordings_of: str | None = field(
        default=None,
        metadata={
            "help": "Data of ESC-50 or UrbanSound8K whose recordings on Freesound are left out of training, as where "
            "what is trained is later tested on them."
        },
    )
    recordings_as_labels: bool = field(
        default=False,
        metadata={
            "help": "Train a model of ESC-50 or UrbanSound8K to tell apart, within each class, the recordings on "
            "Freesound that the clips were cut from. CAT's embedding was then better for other classes, but no better "
            "to start a fine-tuning from."
        },
    )
    on_bad_audio: str = field(
        default="error",
        metadata={"help": "What to do with missing and unreadable files.", "choices": ["error", "skip"]},
    )
    check_audio: bool = field(
        default=True,
        metadata={"help": "Look at every file first; what prepare_audio.py made needs no check."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on this many clips, drawn by seed."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on this many clips, drawn by seed."})
    max_length_seconds: float = field(
        default=2.5, metadata={"help": "Training cuts longer clips to this length, at random; 0 never cuts."}
    )
    balanced_sampling: bool = field(
        default=False,
        metadata={"help": "Draw clips with replacement, by the inverse frequency of their classes."},
    )
    features_on_device: bool = field(
        default=False,
        metadata={"help": "Compute spectrograms and SpecAugment on the model's device instead of in the data workers."},
    )
    mixup_probability: float = field(default=0.5, metadata={"help": "Share of clips mixed with another; 0: no mixup."})
    mixup_alpha: float = field(default=1.0, metadata={"help": "Mixing shares come from Beta(alpha, alpha)."})
    time_roll: float = field(default=1.0, metadata={"help": "Largest cyclic shift, as a share of the clip; 0: none."})
    gain_db: float | None = field(
        default=None,
        metadata={
            "help": "Largest random gain, up or down, in dB; 0: none. Default: 12, or none where the feature extractor "
            "normalises the volume."
        },
    )
    speed: float = field(default=1.25, metadata={"help": "Largest factor of playing faster or slower; 1: none."})
    time_mask: int = field(default=48, metadata={"help": "SpecAugment: bound of the time band in frames; 0: none."})
    freq_mask: int = field(
        default=12,
        metadata={"help": "SpecAugment: bound of the frequency band in bins of the first filter bank; 0: none."},
    )

    def __post_init__(self):
        sources = [name for name in ("data", "dataset_name", "train_file") if getattr(self, name)]
        if self.eval_file and not self.train_file:
            raise ValueError("--eval_file needs --train_file: both files together define the classes")
        if len(sources) != 1:
            raise ValueError(f"Give one of --data, --dataset_name, --train_file, not {' and '.join(sources) or 'none'}")
        for name in ("max_train_samples", "max_eval_samples"):
            if (limit := getattr(self, name)) is not None and limit < 1:
                raise ValueError(f"--{name} {limit} leaves no clip: give at least 1")


def _recipe(name: str, default):
    """A field of TrainingArguments with another default."""
    return field(default=default, metadata=TrainingArguments.__dataclass_fields__[name].metadata)


@dataclass
class RecipeArguments(TrainingArguments):
    """TrainingArguments with the defaults of the recipe for small data sets."""

    num_train_epochs: float = _recipe("num_train_epochs", 75.0)
    per_device_train_batch_size: int = _recipe("per_device_train_batch_size", 16)
    learning_rate: float = _recipe("learning_rate", 1e-3)
    weight_decay: float = _recipe("weight_decay", 0.05)
    lr_scheduler_type: SchedulerType | str = _recipe("lr_scheduler_type", "cosine")
    warmup_steps: float = _recipe("warmup_steps", 0.1)
    max_grad_norm: float = _recipe("max_grad_norm", 1.0)
    eval_strategy: IntervalStrategy | str = _recipe("eval_strategy", "epoch")
    save_strategy: SaveStrategy | str = _recipe("save_strategy", "epoch")
    save_total_limit: int | None = _recipe("save_total_limit", 2)
    logging_strategy: IntervalStrategy | str = _recipe("logging_strategy", "epoch")
    remove_unused_columns: bool = _recipe("remove_unused_columns", False)
    dataloader_num_workers: int = _recipe("dataloader_num_workers", 1)
    dataloader_pin_memory: bool = _recipe("dataloader_pin_memory", torch.cuda.is_available())
    label_names: list[str] | None = field(
        default_factory=lambda: ["labels"], metadata=TrainingArguments.__dataclass_fields__["label_names"].metadata
    )
    seed: int = _recipe("seed", 0)
    average_last_epochs: int | None = field(
        default=None,
        metadata={
            "help": "Average the weights after so many last epochs; 0: take the last ones. Default: 5, where no clips "
            "choose the epoch and at least 10 are trained."
        },
    )
    muon: bool | None = field(
        default=None,
        metadata={
            "help": "Whether Muon updates the matrices of the model's body, and AdamW the rest; otherwise --optim does "
            "all. Default: Muon does, where a model is trained from scratch without FSDP, DeepSpeed or another --optim."
        },
    )
    report_to: None | str | list[str] = _recipe("report_to", "tensorboard" if is_tensorboard_available() else "none")
    hub_strategy: HubStrategy | str = _recipe("hub_strategy", "end")  # a repository is complete, or it is not there

    def __post_init__(self):
        if not (self.do_train or self.do_eval):  # asked before `eval_strategy` turns do_eval on
            raise ValueError("Nothing to do: give --do_train, --do_eval or both")
        super().__post_init__()

    def __getstate__(self):
        """Without the token: the Trainer pickles its arguments beside each checkpoint."""
        return {**self.__dict__, "hub_token": None}


@dataclass
class Clips:
    """The clips of a run: `splits` has train, validation and test as far as they exist, without what was `skipped`.

    `source` is the fingerprint of the data that they are from, whether recordings or what was prepared of them, and
    `folds` that with their folds.
    """

    splits: DatasetDict
    skipped: list[str]
    source: str
    folds: str

    @property
    def some(self) -> Dataset:
        """Some split, for what all have in common."""
        return next(iter(self.splits.values()))

    @property
    def reported(self) -> Dataset | None:
        """What the final number is about."""
        return self.splits.get("test", self.splits.get("validation"))

    @property
    def watched(self) -> Dataset | None:
        """What is evaluated during training."""
        return self.splits.get("validation", self.splits.get("test"))

    @property
    def choose_epoch(self) -> bool:
        """Whether there are clips that may choose the epoch without being reported on."""
        return "validation" in self.splits and "test" in self.splits


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------
def load_clips(data_args: DataArguments, model_args: ModelArguments, args: TrainingArguments) -> Clips:
    """Load, check and split the clips."""
    skipped = []
    # One process fills the caches that the others then read.
    with args.main_process_first(desc="loading the data set"):
        loaded = load_data(data_args, model_args, skipped)
        others = data_args.leave_out_recordings_of and load_audio_dataset(
            data_args.leave_out_recordings_of, on_missing=data_args.on_bad_audio
        )
    splits = _split(loaded, data_args, args)
    if isinstance(loaded, DatasetDict) and "train" in splits:
        for name in splits.keys() - {"train"}:
            refuse_shared_clips(splits["train"], splits[name])
    if not args.do_train and model_args.model_name_or_path:
        for name in splits.keys() - {"train"}:
            refuse_training_clips(model_args.model_name_or_path, loaded, splits[name])
    if others and "train" in splits:
        splits["train"] = without_recordings_of(splits["train"], others)
        if not len(splits["train"]):
            raise ValueError(
                f"--leave_out_recordings_of {data_args.leave_out_recordings_of} leaves nothing to train on: it holds "
                "the recordings of all clips"
            )
    if data_args.recordings_as_labels:
        splits = DatasetDict(train=label_by_recording(splits["train"]))
    limits = {"train": data_args.max_train_samples}
    for name, split in splits.items():
        limit = limits.get(name, data_args.max_eval_samples)
        if limit is not None and limit < len(split):
            # In memory, since the folder of prepared clips may be read-only.
            split = split.shuffle(seed=args.seed, keep_in_memory=True).select(range(limit))
        splits[name] = split
        if data_args.check_audio:
            splits[name], unreadable = validate_audio_files(split, data_args.on_bad_audio)
            skipped += unreadable
    source, folds = (data_fingerprint(loaded, sizes=False, folds=folds) for folds in (False, True))
    return Clips(splits, skipped, source, folds)


def load_data(
    data_args: DataArguments, model_args: ModelArguments, missing: list[str] | None = None
) -> Dataset | DatasetDict:
    """The data set or its splits, with nothing held out yet; names of missing clips are appended to `missing`."""
    return without_only_split(_load(data_args, model_args, missing))


def _load(data_args: DataArguments, model_args: ModelArguments, missing: list[str] | None) -> Dataset | DatasetDict:
    columns = {
        "audio_column": data_args.audio_column_name,
        "label_column": data_args.label_column_name,
        "on_missing": data_args.on_bad_audio,
        "missing": missing,
        "multi_label": data_args.problem_type == MULTI_LABEL,
    }
    if data_args.train_file:
        files = {"train": data_args.train_file, "test": data_args.eval_file}
        parts = {split: load_audio_dataset(path, **columns) for split, path in files.items() if path}
        if "test" in parts:
            refuse_shared_clips(parts["train"], parts["test"])
        if any(is_multi_label(part) for part in parts.values()):
            parts = {split: as_multi_label(part) for split, part in parts.items()}
        names = label_names(parts["train"])
        return DatasetDict({split: align_labels(part, names) for split, part in parts.items()})
    if data_args.data:
        if not Path(data_args.data).exists():
            raise FileNotFoundError(f"--data {data_args.data} does not exist; for the Hub use --dataset_name")
        return load_audio_dataset(data_args.data, **columns)
    return load_audio_dataset(
        data_args.dataset_name,
        **columns,
        name=data_args.dataset_config_name,
        cache_dir=model_args.cache_dir,
        token=model_args.token,
    )


def _split(loaded: Dataset | DatasetDict, data_args: DataArguments, args: TrainingArguments) -> DatasetDict:
    """train, validation and test, as far as they exist, from folds or from named splits."""
    folds = data_args.test_folds or data_args.validation_folds
    if isinstance(loaded, DatasetDict):
        if folds:
            raise ValueError(f"The data come with the splits {list(loaded)}: leave out the folds")
        splits = _named_splits(loaded, data_args, args.do_train)
    elif folds:
        splits = split_folds(loaded, data_args.test_folds or (), data_args.validation_folds or ())
    elif args.do_train or "fold" in loaded.column_names:
        splits = DatasetDict(train=loaded)
    else:
        splits = DatasetDict(test=loaded)
    if args.do_train and "train" not in splits:
        raise ValueError("Every fold or split is held out; leave at least one to train on, see --train_split_name")
    if args.do_eval and not {"test", "validation"} & set(splits):
        given = "neither folds nor splits"
        if isinstance(loaded, DatasetDict):
            given = f"the splits {list(loaded)}, of which {data_args.train_split_name!r} is trained on"
        elif "fold" in loaded.column_names:
            given = f"the folds {sorted(set(loaded['fold']))}"
        raise ValueError(
            f"Nothing is held out for the evaluation; the data come with {given}. Give --test_folds or, beside "
            "--train_file, an --eval_file, put clips into a folder test/<class>/ beside train/<class>/, or train on "
            "everything: with --eval_strategy no and without --do_eval"
        )
    return splits


def _named_splits(loaded: DatasetDict, data_args: DataArguments, do_train: bool) -> DatasetDict:
    """Those that are there, and none twice; an error about one that was asked for by name and is not."""
    train, test = data_args.train_split_name, data_args.eval_split_name
    for flag, name in (("--train_split_name", train), ("--eval_split_name", test)):
        if name not in (None, "train", *loaded):
            raise ValueError(f"The data have no split {name!r}, only {list(loaded)}; choose one with {flag}")
    test = test or ("test" if "test" in loaded else "validation")
    names = {"test": test, "validation": "validation" if test != "validation" else None}
    if do_train:  # what is trained on neither tests nor chooses the epoch
        names = {"train": train} | {split: name for split, name in names.items() if name != train}
    return DatasetDict({split: loaded[name] for split, name in names.items() if name in loaded})


def resolve_problem_type(requested: str | None, dataset: Dataset, learnt: str | None = None) -> str:
    """The problem type, checked against the labels; that of a checkpoint whose classes are kept is the `learnt` one."""
    if requested is None:
        return MULTI_LABEL if is_multi_label(dataset) or learnt == MULTI_LABEL else SINGLE_LABEL
    if requested == SINGLE_LABEL and is_multi_label(dataset):
        raise ValueError(f"--problem_type {SINGLE_LABEL}, but clips have several labels: use {MULTI_LABEL}")
    return requested


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------
def load_config(model_args: ModelArguments) -> PreTrainedConfig:
    """The configuration as it is stored, but for what the command line replaces."""
    name = model_args.config_name or model_args.model_name_or_path
    if name is None:
        raise ValueError("Give a checkpoint as --model_name_or_path, or --config_name to train from scratch")
    config = AutoConfig.from_pretrained(name, **_hub_arguments(model_args))
    if model_args.model_name_or_path not in (None, name):  # the weights are of the checkpoint's classes
        checkpoint = AutoConfig.from_pretrained(model_args.model_name_or_path, **_hub_arguments(model_args))
        for name in ("id2label", "label2id", "problem_type"):
            setattr(config, name, getattr(checkpoint, name))
    if model_args.config_overrides is None:
        return config
    overrides = json.loads(model_args.config_overrides)
    unknown = sorted(set(overrides) - set(config.to_dict()))
    if unknown:
        raise ValueError(f"--config_overrides names {unknown}, which {type(config).__name__} does not have")
    # A new object: values that only fit together, such as depths and heads, cannot be set one after the other.
    return type(config)(**{**config.to_dict(), **overrides})


def choose_labels(config: PreTrainedConfig, names: list[str], from_scratch: bool, do_train: bool) -> list[str]:
    """The classes of the model: the checkpoint's own, in its order, where they fit the data; else those of the data."""
    known = class_names(config)
    if from_scratch:
        return names
    if set(known) == set(names) or (not do_train and set(names) <= set(known)):
        return known
    if not do_train:
        unknown = sorted(set(names) - set(known))
        raise ValueError(f"The checkpoint does not know the classes {unknown[:5]}; evaluate it on its own classes")
    return names


def load_model(
    model_args: ModelArguments, config: PreTrainedConfig, names: list[str], problem_type: str
) -> PreTrainedModel:
    """A model for the given classes, with a checkpoint's weights or new ones."""
    known = class_names(config)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}
    config.problem_type = problem_type  # never inferred: mixup's labels are floats in a single-label problem too
    if model_args.model_name_or_path is None:
        model = AutoModelForAudioClassification.from_config(config, trust_remote_code=model_args.trust_remote_code)
        if model_args.init_from:
            report = load_trunk(model, model_args.init_from, cache_dir=model_args.cache_dir, token=model_args.token)
            logger.info("Started from %s: %s", model_args.init_from, report)
        return model
    model = AutoModelForAudioClassification.from_pretrained(
        model_args.model_name_or_path,
        config=config,
        ignore_mismatched_sizes=model_args.ignore_mismatched_sizes or len(known) != len(names),
        **_hub_arguments(model_args),
    )
    if known != names:
        if len(known) == len(names):  # another number has replaced the head already
            renew_head(model)
        logger.warning("The checkpoint knows other classes (%s, ...): its head is replaced by a new one.", known[0])
    return model


@torch.no_grad()
def renew_head(model: PreTrainedModel) -> None:
    """New weights for the linear layers outside of the body that give one score for each class."""
    for name, module in model.named_modules():
        outside = not name.startswith(f"{model.base_model_prefix}.")
        if outside and isinstance(module, torch.nn.Linear) and module.out_features == model.config.num_labels:
            torch.nn.init.normal_(module.weight, std=getattr(model.config, "initializer_range", 0.02))
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)


def load_feature_extractor(model_args: ModelArguments, config: PreTrainedConfig):
    """The named feature extractor, the checkpoint's, or one made from a CAT configuration, with which it agrees."""
    name = model_args.feature_extractor_name or model_args.model_name_or_path
    if name is None and isinstance(config, CATConfig):
        return CATFeatureExtractor.from_config(config, return_attention_mask=model_args.attention_mask)
    extractor = AutoFeatureExtractor.from_pretrained(
        name or model_args.config_name,
        return_attention_mask=model_args.attention_mask,
        **_hub_arguments(model_args),
    )
    if not (isinstance(config, CATConfig) and isinstance(extractor, CATFeatureExtractor)):
        return extractor
    own, described = extractor.to_dict(), CATFeatureExtractor.from_config(config).to_dict()
    settings = {argument: described[argument] for argument in MRMF_ARGUMENTS}
    differing = {key: (own[key], value) for key, value in settings.items() if own[key] != value}
    if differing and model_args.feature_extractor_name:
        raise ValueError(f"--feature_extractor_name differs from the model in (its value, the model's): {differing}")
    return CATFeatureExtractor.from_dict({**own, **settings})  # --config_overrides is for both


def _hub_arguments(model_args: ModelArguments) -> dict:
    return {
        "cache_dir": model_args.cache_dir,
        "revision": model_args.model_revision,
        "token": model_args.token,
        "trust_remote_code": model_args.trust_remote_code,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------------
def collect_results(
    metrics: dict,
    clips: Clips,
    config: PreTrainedConfig,
    model_args: ModelArguments,
    data_args: DataArguments,
    args: TrainingArguments,
) -> dict:
    """All that is needed to read the numbers and to repeat the run: the content of results.json."""
    model = {key: value for key, value in asdict(model_args).items() if key != "token"}
    return {
        "metrics": metrics,
        "clips": {name: len(split) for name, split in clips.splits.items()},
        "skipped": clips.skipped,
        "fingerprints": {name: data_fingerprint(split) for name, split in clips.splits.items()},
        "source": clips.source,
        "folds": clips.folds,
        "labels": class_names(config),
        "config": config.to_dict(),
        "arguments": {"model": model, "data": asdict(data_args), "training": args.to_dict()},
        "environment": environment(),
        "git": git_state(),
    }


def publish(trainer: AudioTrainer, results: dict) -> None:
    """Save the model with its code and its card in the output folder; upload the folder if asked to."""
    model, folder, args = trainer.model, Path(trainer.args.output_dir), trainer.args
    is_cat = isinstance(model, CATForAudioClassification)
    if trainer.is_world_process_zero():
        if is_cat:
            data = results["arguments"]["data"]
            facts = known_dataset(data["dataset_name"] or data["data"] or data["train_file"], len(results["labels"]))
            model_card(model, trainer.hub_model_id or folder.name, [results], facts).save(folder / "README.md")
        if args.push_to_hub:
            # Pickles, weights to resume with, and what names local paths.
            private = ("training_args.bin", "epoch_weights/*", "*.csv", "results.json", TRAINING_NAME)
            (folder / ".gitignore").write_text("\n".join(private) + "\n", encoding="utf-8")
            if args.hub_revision:
                hub = HfApi(token=args.hub_token)
                hub.create_branch(trainer.hub_model_id, branch=args.hub_revision, exist_ok=True)
    with include_code(model, trainer.processing_class) if is_cat else nullcontext():
        if args.push_to_hub:
            trainer.push_to_hub()  # which saves, too
        else:
            trainer.save_model()


def evaluate(trainer: AudioTrainer, clips: Clips, names: list[str], problem_type: str) -> dict[str, float]:
    """Predict the reported clips; write predictions and figures."""
    output = trainer.predict(clips.reported, metric_key_prefix="eval")
    trainer.log_metrics("eval", output.metrics)
    trainer.save_metrics("eval", output.metrics)
    if trainer.is_world_process_zero():
        logits = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
        scores = Scores.of(clips.reported, probabilities(logits, problem_type), names)
        write_predictions(scores, problem_type, trainer.args.output_dir)
    return output.metrics


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------
def parse_arguments(argv: list[str] | None) -> tuple[ModelArguments, DataArguments, RecipeArguments]:
    """Arguments from the command line or from a single .json file."""
    parser = HfArgumentParser((ModelArguments, DataArguments, RecipeArguments))
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) == 1 and argv[0].endswith(".json"):
        model_args, data_args, args = parser.parse_json_file(argv[0])
    else:
        model_args, data_args, args = parser.parse_args_into_dataclasses(argv)
    if args.average_last_epochs and args.load_best_model_at_end:
        raise ValueError("--average_last_epochs and --load_best_model_at_end name two final models; use one of the two")
    if not args.eval_do_concat_batches or args.prediction_loss_only:
        raise ValueError("--eval_do_concat_batches false and --prediction_loss_only leave no predictions to measure")
    if args.do_train and (args.bf16_full_eval or args.fp16_full_eval):
        raise ValueError(
            "--bf16_full_eval and --fp16_full_eval would round the weights that are saved: use them without --do_train"
        )
    if args.muon and args.optim not in ADAMW:
        raise ValueError(
            f"--muon true trains by Muon and AdamW, --optim {args.optim.value} does not: use one of the two"
        )
    if model_args.init_from and model_args.model_name_or_path:
        raise ValueError(
            "--init_from starts a new model, --model_name_or_path goes on with a whole one: use one of the two"
        )
    if args.do_eval and data_args.recordings_as_labels:
        raise ValueError(
            "--recordings_as_labels leaves nothing to evaluate, since what is held out is of other recordings: leave "
            "out --do_eval, and give --eval_strategy no"
        )
    if not (args.do_train or model_args.model_name_or_path):
        raise ValueError("Without --do_train nothing is trained: name the model to evaluate by --model_name_or_path")
    return model_args, data_args, args


def keep_the_training_of(output_dir: str | Path) -> None:
    """Refuse to put an evaluation's results in the place of those of a training."""
    if training_in(output_dir):
        raise ValueError(
            f"{output_dir} holds the results of a training, which an evaluation would replace: choose another "
            "--output_dir"
        )


def set_up_logging(args: TrainingArguments) -> None:
    """The main process reports; the others only warn."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S", force=True)
    for name in ("transformers_cat", __name__):
        logging.getLogger(name).setLevel(logging.INFO if args.should_log else logging.WARNING)
    datasets.utils.logging.set_verbosity_warning()
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity(args.get_process_log_level())


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """The named checkpoint, or the last one in the output folder."""
    if args.resume_from_checkpoint:
        return args.resume_from_checkpoint
    # The state is what a checkpoint ends with: without it, its writing was interrupted.
    states = Path(args.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")
    complete = {int(state.parent.name.rsplit("-", 1)[1]): str(state.parent) for state in states}
    if not complete:
        return None
    last = complete[max(complete)]
    if args.save_only_model:
        raise ValueError(
            f"{last} cannot be resumed from: --save_only_model left no optimizer there. Choose another --output_dir"
        )
    logger.info("Resuming from %s; choose another --output_dir to start afresh.", last)
    return last


def training_settings(
    model_args: ModelArguments, data_args: DataArguments, args: RecipeArguments, clips: Clips, config: PreTrainedConfig
) -> dict:
    """What decides the training: arguments by their names, fingerprints of the clips that have a say, the model."""
    given = {**asdict(model_args), **asdict(data_args), **args.to_dict()}
    incidental = INCIDENTAL if args.load_best_model_at_end else INCIDENTAL + EVALUATION
    settings = {name: value for name, value in given.items() if not name.startswith(incidental)}
    fingerprints = {name: data_fingerprint(split) for name, split in clips.splits.items() if name != "test"}
    # Each of which has batches of its own.
    settings["processes"] = args.world_size * max(args.n_gpu, 1)
    return {**settings, "fingerprints": fingerprints, **configuration(config)}


def configuration(config: PreTrainedConfig) -> dict:
    """What a configuration says of the model, by "config.<name>"; not where it is from and what wrote it."""
    values = config.to_dict()
    return {f"config.{name}": values[name] for name in values if name not in ("_name_or_path", "transformers_version")}


def remember_training(settings: dict, checkpoint: str | None, output_dir: str | Path) -> None:
    """Write down what decides the training; refuse to go on from a checkpoint of another one."""
    if checkpoint:
        before = Path(checkpoint).parent / TRAINING_NAME
        if before.is_file():
            refuse_changes(settings, before)
        else:
            logger.warning("There is no %s: whether %s is of this command is not known.", before, checkpoint)
    write_json(Path(output_dir) / TRAINING_NAME, settings)


def find_best_checkpoint(checkpoint: str) -> TrainerState:
    """The state of a checkpoint, after the path of the best one so far was corrected in it: the folder of the run may
    have been moved, or may be named from another place.

    Raises:
        FileNotFoundError: the best one is gone, so that it cannot be chosen.
    """
    path = Path(checkpoint, TRAINER_STATE_NAME)
    state = TrainerState.load_from_json(str(path))
    if state.best_model_checkpoint is None:
        return state
    best = Path(checkpoint).parent / Path(state.best_model_checkpoint).name
    if not best.is_dir():
        raise FileNotFoundError(
            f"{best} is gone, which had the best epoch so far: put it back, or use a new --output_dir"
        )
    if str(best) != state.best_model_checkpoint:
        state.best_model_checkpoint = str(best)
        state.save_to_json(str(path))
    return state


def train(trainer: AudioTrainer, checkpoint: str | None) -> dict[str, float]:
    """Train to the end, and write and return the metrics; those of before if there was nothing left to train."""
    before = 0
    if checkpoint:
        with trainer.args.main_process_first():
            before = find_best_checkpoint(checkpoint).global_step
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    written = Path(trainer.args.output_dir) / "train_results.json"
    if trainer.state.global_step == before and written.is_file():
        logger.info("This training had ended already.")
        return json.loads(written.read_text(encoding="utf-8"))
    if before:  # these are of what was left to train
        metrics = {name: value for name, value in metrics.items() if name in ("epoch", "total_flos")}
    if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is None:
        trainer.args.load_best_model_at_end = False  # as the card says
        logger.warning(
            "The validation clips chose no epoch, since their %s is no number: the last epoch's model is kept.",
            trainer.args.metric_for_best_model,
        )
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    return metrics


def choice_lacks(args: RecipeArguments) -> str | None:
    """What must change before validation clips can choose the epoch; None if they can."""
    if args.average_last_epochs:
        return "no --average_last_epochs"
    if not args.eval_strategy == args.save_strategy != IntervalStrategy.NO:
        strategies = f"{args.eval_strategy.value} and {args.save_strategy.value}"
        return f"--eval_strategy and --save_strategy to be the same, not {strategies}"
    if args.eval_strategy == IntervalStrategy.STEPS:
        saved, evaluated = args.save_steps, args.eval_steps  # below 1: shares of the training
        if (saved < 1) != (evaluated < 1) or round(1e6 * saved) % round(1e6 * evaluated):
            return f"--save_steps to be a multiple of --eval_steps, not {saved} and {evaluated}"
    return None


def prepare_evaluation(args: RecipeArguments, clips: Clips, problem_type: str) -> RecipeArguments:
    """Evaluate during training only if there is something to evaluate; choose the epoch only by validation clips."""
    if clips.watched is None:
        args.eval_strategy = IntervalStrategy.NO
    elif args.load_best_model_at_end:
        if not clips.choose_epoch:
            logger.warning("The epoch is chosen on the clips that are reported on: the result will be too good.")
    elif not (clips.choose_epoch and args.do_train):
        pass
    elif lacking := choice_lacks(args):
        logger.warning("The validation clips choose no epoch: that needs %s.", lacking)
    else:
        args.load_best_model_at_end = True
        args.metric_for_best_model = args.metric_for_best_model or main_metric(problem_type)
        # TrainingArguments derives this only from a metric that is named on the command line.
        if args.greater_is_better is None:
            args.greater_is_better = not args.metric_for_best_model.endswith("loss")
    if args.average_last_epochs is None:
        whole = args.max_steps <= 0 and args.num_train_epochs >= 10
        args.average_last_epochs = 5 if whole and not is_sharded(args) and not args.load_best_model_at_end else 0
    return args


def is_sharded(args: TrainingArguments) -> bool:
    """Whether FSDP or DeepSpeed is asked for, by the arguments or by `accelerate launch`."""
    launched = any(parse_flag_from_env(f"ACCELERATE_USE_{name}") for name in ("FSDP", "DEEPSPEED"))
    return bool(args.fsdp or args.deepspeed or launched)


def choose_muon(args: RecipeArguments, from_scratch: bool) -> bool:
    """Whether to train by Muon, where the command line does not say so."""
    if args.muon is not None:
        return args.muon
    return from_scratch and args.optim in ADAMW and not is_sharded(args)


def build_collator(data_args: DataArguments, feature_extractor, num_labels: int, training: bool) -> AudioCollator:
    """The collator with the augmentations of the command line."""
    return AudioCollator(
        feature_extractor,
        training=training,
        num_labels=num_labels,
        mixup_probability=data_args.mixup_probability,
        mixup_alpha=data_args.mixup_alpha,
        time_roll=data_args.time_roll,
        gain_db=data_args.gain_db,
        speed=data_args.speed,
        # Without spectrograms there is nothing to mask yet.
        time_mask=0 if data_args.features_on_device else data_args.time_mask,
        freq_mask=0 if data_args.features_on_device else data_args.freq_mask,
        max_length_seconds=data_args.max_length_seconds or None,
    )


def without_spectrograms(feature_extractor) -> CATFeatureExtractor:
    """The extractor that leaves spectrograms to the model."""
    if not isinstance(feature_extractor, CATFeatureExtractor):
        name = type(feature_extractor).__name__
        raise ValueError(
            f"--features_on_device needs a model that takes waveforms and a CATFeatureExtractor, not {name}"
        )
    return CATFeatureExtractor.from_dict({**feature_extractor.to_dict(), "do_mrmf": False})


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run the script.

    Args:
        argv: command line without the program's name; by default that of the process.

    Returns:
        The metrics of training and evaluation.
    """
    model_args, data_args, args = parse_arguments(argv)
    set_up_logging(args)
    set_seed(args.seed)

    if not args.do_train:
        keep_the_training_of(args.output_dir)
    clips = load_clips(data_args, model_args, args)
    config = load_config(model_args)
    from_scratch = model_args.model_name_or_path is None
    names = choose_labels(config, label_names(clips.some), from_scratch, args.do_train)
    kept = not from_scratch and names == class_names(config)
    problem_type = resolve_problem_type(data_args.problem_type, clips.some, config.problem_type if kept else None)
    if problem_type == SINGLE_LABEL and len(names) < 2:
        raise ValueError(f"There is one class alone, {names}: is --data the folder of a class, or above all classes?")
    clips.splits = DatasetDict({key: align_labels(split, names) for key, split in clips.splits.items()})
    if problem_type == MULTI_LABEL:
        clips.splits = DatasetDict({key: as_multi_label(split) for key, split in clips.splits.items()})
    for split, dataset in clips.splits.items():
        logger.info("%s: %d clips", split, len(dataset))

    feature_extractor = load_feature_extractor(model_args, config)
    model = load_model(model_args, config, names, problem_type)
    if model_args.freeze_feature_encoder:
        model.freeze_feature_encoder()
    args = prepare_evaluation(args, clips, problem_type)
    args.muon = choose_muon(args, from_scratch and not model_args.init_from)

    decoded = {key: decode_audio(split, feature_extractor.sampling_rate) for key, split in clips.splits.items()}
    clips = dataclasses.replace(clips, splits=DatasetDict(decoded))
    front_end, spec_augment, weights = feature_extractor, None, None
    if data_args.features_on_device:
        front_end = without_spectrograms(feature_extractor)
        spec_augment = SpecAugment(front_end, data_args.time_mask, data_args.freq_mask)
    if args.do_train and data_args.balanced_sampling:
        weights = balanced_weights(clips.splits["train"].with_format(None)["label"][:], len(names))
    trainer = AudioTrainer(
        model=model,
        args=args,
        data_collator=build_collator(data_args, front_end, len(names), training=True),
        eval_collator=build_collator(data_args, front_end, len(names), training=False),
        sampling_weights=weights,
        spec_augment=spec_augment,
        muon=args.muon,
        train_dataset=clips.splits["train"] if args.do_train else None,
        eval_dataset=clips.watched,
        compute_metrics=compute_metrics_for(problem_type),
        processing_class=feature_extractor,
    )

    averaging = None
    if args.do_train and args.average_last_epochs:
        averaging = WeightAveraging(trainer, args.average_last_epochs)
        trainer.add_callback(averaging)

    metrics = {}
    if args.do_train:
        checkpoint = checkpoint_to_resume(args)
        if trainer.is_world_process_zero():
            settings = training_settings(model_args, data_args, args, clips, model.config)
            remember_training(settings, checkpoint, args.output_dir)
        metrics |= train(trainer, checkpoint)
    if averaging:
        if args.do_eval and clips.reported is not None:
            metrics |= trainer.predict(clips.reported, metric_key_prefix="last_epoch").metrics
        averaging.load(model)
    if args.do_eval and clips.reported is not None:
        metrics |= evaluate(trainer, clips, names, problem_type)
    config = copy.deepcopy(model.config)  # as it was trained
    # What is saved from here on is for inference; the checkpoints beside it have the block, to resume with.
    if args.do_train and hasattr(model, "drop_reconstruction"):
        model.drop_reconstruction()
    results = collect_results(metrics, clips, config, model_args, data_args, args)
    if trainer.is_world_process_zero() and args.do_train:
        history, folder = trainer.state.log_history, Path(args.output_dir)
        write_history(history, folder / "history.csv")
        if any({"loss", "eval_loss"} & entry.keys() for entry in history):
            plot_learning_curves(history, folder / "learning_curve.png", main_metric(problem_type))
    if args.do_train or args.push_to_hub:
        publish(trainer, results)
    if trainer.is_world_process_zero():
        # Last: who finds it knows that the run has ended.
        write_json(Path(args.output_dir) / "results.json", results)
    return metrics


if __name__ == "__main__":
    main()
