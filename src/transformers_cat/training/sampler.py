"""Which clips an epoch draws, in which order, and the seed of each draw's augmentation.

All of it is a function of the run's seed and of the number of the epoch. So it is the same in all processes, each of
which takes every n-th batch, with any number of data workers, and after a resumption in mid-epoch.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

Draw = tuple[int, int]  # number of a clip, seed


def balanced_weights(labels: Sequence[int] | Sequence[Sequence[int]], num_labels: int) -> torch.Tensor:
    """Weights that draw rare classes as often as common ones: inverse class frequency.

    A class with N_k clips has w_k = 1000 / (N_k + 0.01); a clip has the sum over its labels, and 0 without any.

    Args:
        labels: a class id, or a list of them, for each clip.
        num_labels: number of classes.

    Returns:
        (clips,) float64, not normalised.

    Raises:
        ValueError: no clip has a label.
    """
    rows = [[row] if isinstance(row, int) else list(row) for row in labels]
    ids = torch.tensor([label for row in rows for label in row], dtype=torch.long)
    if not len(ids):
        raise ValueError("Sampling by inverse class frequency needs labels, and no clip has one")
    clip = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(row) for row in rows]))
    class_weight = 1000 / (torch.bincount(ids, minlength=num_labels).double() + 0.01)
    return torch.zeros(len(rows), dtype=torch.float64).index_add_(0, clip, class_weight[ids])


class EpochSampler(Sampler[Draw]):
    """Draws of one epoch: as many as there are clips.

    Args:
        size: number of clips.
        seed: seed of the run.
        weights: (size,), to draw by with replacement. By default every clip is drawn once.
    """

    def __init__(self, size: int, seed: int, weights: torch.Tensor | None = None):
        if weights is not None and len(weights) != size:
            raise ValueError(f"{len(weights)} sampling weights do not fit {size} clips: give one for each")
        self.size = size
        self.seed = seed
        self.weights = weights
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, counted from 0, that the next iteration draws."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Draw]:
        # Of a seed, torch's generator reads 32 bits: the two numbers have to be mixed in them.
        mixed = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1)
        generator = torch.Generator().manual_seed(int(mixed[0]))
        if self.weights is None:
            clips = torch.randperm(self.size, generator=generator)
        else:
            clips = torch.multinomial(self.weights, self.size, replacement=True, generator=generator)
        seeds = torch.randint(2**32, (self.size,), generator=generator)
        return zip(clips.tolist(), seeds.tolist())


class DrawnClips(Dataset):
    """Clips by draw: each example also holds its `seed`, by which the collator augments."""

    def __init__(self, clips: Dataset | Sequence[dict]):
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, draw: Draw) -> dict:
        clip, seed = draw
        return {**self.clips[clip], "seed": seed}
