"""The mean of the weights of the last epochs, as a TrainerCallback."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, Trainer, TrainerCallback

FOLDER = "epoch_weights"


class WeightAveraging(TrainerCallback):
    """Keeps the weights at the end of each of the last epochs, and averages them.

    They are files in the run's folder, `epoch_weights/<epoch>.safetensors`, so an interrupted training needs nothing
    else to go on. Averaged are parameters and floating-point buffers. The running statistics of a batch norm behind the
    first weights (the stem's) should be those of the mean weights; their own mean stands in for them, since over the
    last epochs of a decayed learning rate they hardly differ. Integers (the counter of batches) are those of the last
    epoch.

    Args:
        trainer: whose model is averaged. Add the callback with `trainer.add_callback`.
        epochs: number of epochs, all of which must end after `epochs` were trained.

    Raises:
        ValueError: fewer than 2 epochs, more than are trained, or weights that are sharded over processes.
        FileNotFoundError: a training goes on behind an epoch that enters the mean, and its weights are not there.
    """

    def __init__(self, trainer: Trainer, epochs: int):
        if epochs < 2:
            raise ValueError(f"There is nothing to average in {epochs} epochs; 2 is the least")
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError("Weights that are sharded over processes cannot be averaged; train without FSDP/DeepSpeed")
        self.trainer = trainer
        self.epochs = epochs
        self.folder = Path(trainer.args.output_dir) / FOLDER

    def on_train_begin(self, args, state, control, **kwargs):
        if self.epochs > state.num_train_epochs:
            raise ValueError(f"{self.epochs} epochs cannot be averaged where {state.num_train_epochs} are trained")
        self._averaged(math.floor(state.epoch or 0))  # or a training that goes on would have been for nothing

    def on_epoch_end(self, args, state, control, **kwargs):
        epoch = math.ceil(state.epoch)  # the last one may end early, by max_steps
        if epoch > state.num_train_epochs - self.epochs and state.is_world_process_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            weights = self.trainer.accelerator.unwrap_model(self.trainer.model).state_dict()
            path = self._path(epoch)
            partial = path.with_suffix(".partial")
            save_file({name: value.contiguous() for name, value in weights.items()}, partial)
            os.replace(partial, path)

    def load(self, model: PreTrainedModel) -> None:
        """Give the model the mean of the last epochs.

        Raises:
            FileNotFoundError: the weights of an epoch are not there.
        """
        model.load_state_dict(mean_weights(self._averaged(self.trainer.state.num_train_epochs)))

    def _averaged(self, trained: int) -> list[Path]:
        """The files of those epochs up to `trained` that enter the mean; FileNotFoundError where some are absent."""
        first = self.trainer.state.num_train_epochs - self.epochs + 1
        paths = [self._path(epoch) for epoch in range(first, trained + 1)]
        absent = [path.name for path in paths if not path.is_file()]
        if absent:
            raise FileNotFoundError(
                f"{self.folder} lacks {absent}: these epochs were trained without averaging. Average fewer epochs, or "
                "train again in another folder"
            )
        return paths

    def _path(self, epoch: int) -> Path:
        return self.folder / f"{epoch}.safetensors"


def mean_weights(paths: Sequence[str | Path]) -> dict[str, torch.Tensor]:
    """Mean of the floating-point tensors of several safetensors files, in float32 and one at a time; integers are those
    of the last file."""
    mean = {}
    for count, path in enumerate(paths, start=1):
        for name, value in load_file(path).items():
            if count == 1 or not value.is_floating_point():
                mean[name] = value.float() if value.is_floating_point() else value
            else:
                mean[name] += (value.float() - mean[name]) / count
    return mean
