"""Linear classifiers of the latents of a model that is not trained further: as a measure of it, and as its new head."""

from collections.abc import Sequence

import numpy as np
import torch
import torchaudio.functional as audio_functional
from datasets import Dataset
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from .clips import decode_audio
from .collate import AudioCollator
from .data import is_multi_label, label_names
from .metrics import MULTI_LABEL, SINGLE_LABEL
from .tables import some

# Up to what a model hears in training by default. Round numbers, since resampling by others is slow.
SPEEDS = (0.8, 0.9, 1.0, 1.1, 1.25)


@torch.no_grad()
def embed(
    model: PreTrainedModel,
    feature_extractor,
    dataset: Dataset,
    batch_size: int = 1,
    layers: bool = False,
    speeds: Sequence[float] | None = None,
) -> np.ndarray:
    """The pooled latents Z (n, d) of the clips, in evaluation mode.

    What a model was trained to tell apart shapes its last layers most, so that for other classes more is known with the
    layers before: with `layers`, Z is followed by mean, maximum and standard deviation over the tokens of each hidden
    state, (n, d + 3 * the sum of their widths).

    Args:
        model: any model whose base model has a `pooler_output`, CAT and AST among them.
        feature_extractor: the model's.
        dataset: clips, not decoded.
        batch_size: clips at a time. 1, the default, is exact for every model; some see the padding of a batch. With
            `layers` it is 1 in any case, since hidden states come without a mask of their padding.
        layers: whether to read the hidden states, (1, ..., tokens, width) each, too.
        speeds: factors by which each clip is played faster, higher with it. The latents of all of them are returned,
            (n, speeds, d). By default clips are heard as they are.
    """
    decoded = decode_audio(dataset.select_columns("audio"), feature_extractor.sampling_rate)
    collator = AudioCollator(feature_extractor, training=False, num_labels=0)

    def played(clip: dict, speed: float) -> dict:
        waveform, _ = audio_functional.speed(torch.as_tensor(clip["audio"]), feature_extractor.sampling_rate, speed)
        return {"audio": waveform}

    model.eval()
    parts = []
    for clips in DataLoader(decoded, batch_size=1 if layers else batch_size, collate_fn=list):
        versions = [clips] if speeds is None else [[played(clip, speed) for clip in clips] for speed in speeds]
        parts.append(torch.stack([_latents(model, collator(version), layers) for version in versions], dim=1))
    latents = torch.cat(parts).numpy()  # (n, speeds, d)
    return latents[:, 0] if speeds is None else latents


def _latents(model: PreTrainedModel, batch: dict[str, Tensor], layers: bool) -> Tensor:
    """Of a batch (B, d), or of a single clip with what its hidden states say."""
    batch = {key: value.to(model.device) for key, value in batch.items()}
    outputs = model.base_model(**batch, output_hidden_states=layers)
    latents = [outputs.pooler_output]
    for state in outputs.hidden_states if layers else ():
        tokens = state.flatten(1, -2)  # (1, n, width)
        latents += [tokens.mean(1), tokens.amax(1), tokens.std(1, correction=0)]
    return torch.cat(latents, dim=1).float().cpu()


def linear_probe(latents: np.ndarray, labels: Sequence[int], folds: Sequence[int]) -> dict[int, float]:
    """The accuracy on each fold of a logistic regression that is fitted to the other folds.

    Latents are standardised by those of the other folds.

    Args:
        latents: (n, d), or (n, versions, d) of several versions of each clip: all of those of the other folds are
            fitted, and the answer for a clip is the class of the highest mean probability.
        labels: class ids (n,).
        folds: (n,), of at least two different values.
    """
    labels, folds = np.asarray(labels), np.asarray(folds)
    versions = latents.reshape(len(latents), -1, latents.shape[-1])
    accuracy = {}
    for fold in sorted(set(folds.tolist())):
        tested = folds == fold
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        classifier.fit(np.concatenate(versions[~tested]), np.repeat(labels[~tested], versions.shape[1]))
        probabilities = classifier.predict_proba(np.concatenate(versions[tested]))  # (clips * versions, classes)
        answers = probabilities.reshape(*versions[tested].shape[:2], -1).mean(1).argmax(1)
        accuracy[fold] = float((classifier.classes_[answers] == labels[tested]).mean())
    return accuracy


def fit_head(
    model: PreTrainedModel, feature_extractor, dataset: Dataset, speeds: Sequence[float] = SPEEDS, batch_size: int = 1
) -> None:
    """Give a model a new head for the classes of the clips, without training anything else.

    The head is the logistic regression of the linear probe on Z, or one for each label where clips may have several.
    The model can then be saved, and be used and trained further as any other.

    Args:
        model: CAT, or another whose head `classifier` is a linear layer of its `pooler_output`.
        feature_extractor: the model's.
        dataset: clips with labels, not decoded.
        speeds: factors by which each clip is played faster, all of which are fitted.
        batch_size: clips at a time, as for `embed`.

    Raises:
        ValueError: the head is no linear layer, a clip has no class, or a class has no clip (of several labels: all or
            none have it).
    """
    if not isinstance(getattr(model, "classifier", None), nn.Linear):
        raise ValueError(f"{type(model).__name__} has no linear layer `classifier` to be replaced")
    names, multi_label = label_names(dataset), is_multi_label(dataset)
    labels = dataset.with_format(None)["label"][:]
    present = np.array([np.isin(np.arange(len(names)), own) for own in labels])  # (n, classes)
    unknown = [name for name, own in zip(names, present.T) if not own.any() or (multi_label and own.all())]
    if unknown or (len(names) < 2 and not multi_label):
        raise ValueError(
            f"Nothing tells these classes from others, since no clip has them, or each: {some(unknown or names)}"
        )
    if not (multi_label or present.any(1).all()):
        raise ValueError("The data set has clips without a label, which is stored as -1: choose another split")
    versions = np.concatenate(embed(model, feature_extractor, dataset, batch_size, speeds=speeds))
    scaler = StandardScaler()
    standardised = scaler.fit_transform(versions)
    targets = np.repeat(present if multi_label else present.argmax(1), len(speeds), axis=0)
    weights, biases = [], []
    for target in targets.T if multi_label else [targets]:
        classifier = LogisticRegression(max_iter=2000).fit(standardised, target)
        weights.append(classifier.coef_)
        biases.append(classifier.intercept_)
    weight, bias = np.concatenate(weights), np.concatenate(biases)
    if not multi_label and len(names) == 2:  # these are of the second class against the first
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    weight = weight / scaler.scale_
    head = nn.Linear(weight.shape[1], len(names)).to(model.classifier.weight)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight))
        head.bias.copy_(torch.from_numpy(bias - weight @ scaler.mean_))
    model.classifier = head
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: i for i, name in enumerate(names)}
    model.config.problem_type = MULTI_LABEL if multi_label else SINGLE_LABEL
