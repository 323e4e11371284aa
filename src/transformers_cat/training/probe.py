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
def embed(model: PreTrainedModel, feature_extractor, dataset: Dataset, batch_size: int = 16) -> np.ndarray:
    """The pooled latents Z (n, d) of the clips, in evaluation mode.

    Args:
        model: any model whose base model has a `pooler_output`, CAT and AST among them.
        feature_extractor: the model's.
        dataset: clips, not decoded.
        batch_size: clips at a time.
    """
    decoded = decode_audio(dataset.select_columns("audio"), feature_extractor.sampling_rate)
    collator = AudioCollator(feature_extractor, training=False, num_labels=0)
    model.eval()
    batches = DataLoader(decoded, batch_size=batch_size, collate_fn=collator)
    moved = ({key: value.to(model.device) for key, value in batch.items()} for batch in batches)
    return torch.cat([model.base_model(**batch).pooler_output.float().cpu() for batch in moved]).numpy()


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
