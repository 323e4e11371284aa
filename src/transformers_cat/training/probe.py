"""Linear probe: how well a linear classifier does on the latents of a model that is not trained further."""

from collections.abc import Sequence

import numpy as np
import torch
from datasets import Dataset
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from .clips import decode_audio
from .collate import AudioCollator


@torch.no_grad()
def embed(
    model: PreTrainedModel, feature_extractor, dataset: Dataset, batch_size: int = 16, layers: bool = False
) -> np.ndarray:
    """The pooled latents Z (n, d) of the clips, in evaluation mode.

    What a model was trained to tell apart shapes its last layers most, so that for other classes more is known with the
    layers before: with `layers`, Z is followed by mean, maximum and standard deviation over the tokens of each hidden
    state, (n, d + 3 * the sum of their widths).

    Args:
        model: any model whose base model has a `pooler_output`, CAT and AST among them.
        feature_extractor: the model's.
        dataset: clips, not decoded.
        batch_size: clips at a time; with `layers` one, since hidden states come without a mask of their padding.
        layers: whether to read the hidden states, (1, ..., tokens, width) each, too.
    """
    decoded = decode_audio(dataset.select_columns("audio"), feature_extractor.sampling_rate)
    collator = AudioCollator(feature_extractor, training=False, num_labels=0)
    model.eval()
    batches = DataLoader(decoded, batch_size=1 if layers else batch_size, collate_fn=collator)
    parts = []
    for batch in batches:
        batch = {key: value.to(model.device) for key, value in batch.items()}
        outputs = model.base_model(**batch, output_hidden_states=layers)
        latents = [outputs.pooler_output]
        for state in outputs.hidden_states if layers else ():
            tokens = state.flatten(1, -2)  # (1, n, width)
            latents += [tokens.mean(1), tokens.amax(1), tokens.std(1, correction=0)]
        parts.append(torch.cat(latents, dim=1).float().cpu())
    return torch.cat(parts).numpy()


def linear_probe(latents: np.ndarray, labels: Sequence[int], folds: Sequence[int]) -> dict[int, float]:
    """The accuracy on each fold of a logistic regression that is fitted to the other folds.

    Latents are standardised by those of the other folds.

    Args:
        latents: (n, d).
        labels: class ids (n,).
        folds: (n,), of at least two different values.
    """
    labels, folds = np.asarray(labels), np.asarray(folds)
    accuracy = {}
    for fold in sorted(set(folds.tolist())):
        tested = folds == fold
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        classifier.fit(latents[~tested], labels[~tested])
        accuracy[fold] = float(classifier.score(latents[tested], labels[tested]))
    return accuracy
