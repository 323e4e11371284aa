"""Scores of one model for an ensemble: of any audio classifier of transformers, or of PANNs' CNN14."""

import numpy as np
import torch
from datasets import Dataset
from transformers import AudioClassificationPipeline

from ..configuration_cat import class_names
from .clips import decode_audio
from .metrics import MULTI_LABEL, SINGLE_LABEL
from .scores import Scores

_FUNCTIONS = {SINGLE_LABEL: "softmax", MULTI_LABEL: "sigmoid"}
_PANN_RATE = 32_000  # Hz
_PANN_SHORTEST = 32 * 320  # samples: CNN14 halves the time axis five times, and a frame is 320 samples


def pipeline_scores(
    classifier: AudioClassificationPipeline, dataset: Dataset, problem_type: str, batch_size: int = 1
) -> Scores:
    """The probabilities that a model gives to the clips, at its own sampling rate and with its own features.

    Args:
        classifier: `pipeline("audio-classification", model=...)`.
        dataset: clips with labels.
        problem_type: whether classes exclude each other, for a model whose configuration does not say it.
        batch_size: of the model. 1, the default, is exact for every model; some see the padding of a batch.

    Raises:
        ValueError: the model gives two classes the same name, or is one for regression.
    """
    config = classifier.model.config
    names = class_names(config)
    if len(set(names)) < len(names):
        raise ValueError(f"{config.name_or_path} has classes of the same name: name them apart in its id2label")
    # Said explicitly, since the pipeline takes a softmax in any case before transformers 5.23.
    function = _FUNCTIONS.get(config.problem_type or problem_type)
    if function is None:
        raise ValueError(f"{config.name_or_path} gives no probabilities: its problem type is {config.problem_type!r}")
    rate = classifier.feature_extractor.sampling_rate
    decoded = decode_audio(dataset, rate)
    clips = ({"raw": decoded[i]["audio"], "sampling_rate": rate} for i in range(len(decoded)))
    rows = []
    for answer in classifier(clips, top_k=None, function_to_apply=function, batch_size=batch_size):
        score_of = {item["label"]: item["score"] for item in answer}
        rows.append([score_of[name] for name in names])
    return Scores.of(dataset, np.array(rows), names)


def panns_scores(dataset: Dataset, checkpoint: str | None = None) -> Scores:
    """The probabilities of AudioSet's 527 classes that PANNs' CNN14 (Kong et al., 2020) gives to the clips.

    By the package `panns_inference` (the `panns` extra), which downloads AudioSet's class names when it is imported
    and, without a checkpoint, CNN14's weights (mAP 0.431 on AudioSet), both to `~/panns_data`, by the `wget` program.
    Clips shorter than 0.32 s are padded with silence: the network's pooling needs as much.

    Args:
        dataset: clips with labels.
        checkpoint: file with weights of CNN14.

    Raises:
        ImportError: the package is not installed.
    """
    try:
        from panns_inference import AudioTagging, labels
    except ImportError as error:
        raise ImportError("PANNs needs panns_inference: pip install -e '.[panns]' in the checkout") from error
    tagger = AudioTagging(checkpoint_path=checkpoint, device="cuda" if torch.cuda.is_available() else "cpu")
    decoded, rows = decode_audio(dataset, _PANN_RATE), []
    for i in range(len(decoded)):
        clip = decoded[i]["audio"]
        padded = np.pad(clip, (0, max(0, _PANN_SHORTEST - len(clip))))
        probabilities, _ = tagger.inference(padded[None])  # (1, N) -> (1, 527)
        rows.append(probabilities[0])
    return Scores.of(dataset, np.array(rows), labels)
