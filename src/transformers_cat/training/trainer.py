"""A Trainer that augments only what it trains on, and logs the parts of the loss."""

from contextlib import contextmanager

import torch
from transformers import Trainer

from .collate import AudioCollator

LOSS_PARTS = ("classification_loss", "causal_loss", "reconstruction_loss")


class AudioTrainer(Trainer):
    """transformers' Trainer with a collator of its own for evaluation, and each part of the objective in the log.

    The parts (l_theta, l_c and l_rs of eq. 10, without their weights) are means over all micro-batches since the last
    log, of all processes. Models that do not return them train as with the plain Trainer.

    Args:
        eval_collator: Collator of evaluation and prediction; `data_collator` is that of training.
    """

    def __init__(self, *args, eval_collator: AudioCollator, **kwargs):
        super().__init__(*args, **kwargs)
        self.eval_collator = eval_collator
        self._sums: dict[str, torch.Tensor] = {}
        self._count = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            self._count += 1
            for name in LOSS_PARTS:
                if outputs.get(name) is not None:
                    self._sums[name] = self._sums.get(name, 0.0) + outputs[name].detach().float()
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._sums:
            for name, total in self._sums.items():
                logs[name] = round(self.accelerator.reduce(total / self._count, reduction="mean").item(), 4)
            self._sums, self._count = {}, 0
        super().log(logs, start_time)

    @contextmanager
    def _without_augmentation(self):
        training_collator, self.data_collator = self.data_collator, self.eval_collator
        try:
            yield
        finally:
            self.data_collator = training_collator

    def get_eval_dataloader(self, eval_dataset=None):
        with self._without_augmentation():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        with self._without_augmentation():
            return super().get_test_dataloader(test_dataset)
