"""What only training needs: data sets, augmentation, metrics and reports.

Nothing here is imported by the model or the feature extractor. It needs the `train` extra: datasets, evaluate,
scikit-learn and matplotlib.
"""

from .audioset import read_audioset
from .averaging import WeightAveraging, mean_weights
from .clips import decode_audio, validate_audio_files
from .collate import AudioCollator, SpecAugment
from .data import (
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
from .metrics import Accuracy, DPrime, MeanAUC, MeanAveragePrecision, compute_metrics_for, main_metric
from .muon import Muon
from .report import environment, plot_confusion_matrix, plot_learning_curves, write_predictions
from .sampler import EpochSampler, balanced_weights
from .scores import Scores, align_scores, average_scores, read_scores, write_scores
from .trainer import AudioTrainer

__all__ = [
    "Accuracy",
    "AudioCollator",
    "AudioTrainer",
    "DPrime",
    "EpochSampler",
    "MeanAUC",
    "MeanAveragePrecision",
    "Muon",
    "Scores",
    "SpecAugment",
    "WeightAveraging",
    "align_labels",
    "align_scores",
    "as_multi_label",
    "average_scores",
    "balanced_weights",
    "compute_metrics_for",
    "decode_audio",
    "environment",
    "is_multi_label",
    "label_by_recording",
    "label_names",
    "load_audio_dataset",
    "main_metric",
    "mean_weights",
    "plot_confusion_matrix",
    "plot_learning_curves",
    "read_audiofolder",
    "read_audioset",
    "read_csv",
    "read_esc50",
    "read_scores",
    "read_urbansound8k",
    "split_folds",
    "validate_audio_files",
    "without_only_split",
    "without_recordings_of",
    "write_predictions",
    "write_scores",
]
