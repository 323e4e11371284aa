"""A Trainer that draws and augments its clips reproducibly, and logs the parts of the loss."""

from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from ..modeling_cat import CATForAudioClassification
from .collate import AudioCollator, SpecAugment
from .metrics import MULTI_LABEL
from .muon import Muon, parameter_groups
from .sampler import DrawnClips, EpochSampler

LOSS_PARTS = ("classification_loss", "causal_loss", "reconstruction_loss")


class AudioTrainer(Trainer):
    """transformers' Trainer with augmentation that can be repeated, and each part of the objective in the log.

    What an epoch draws, and how each draw is augmented, depends on the seed (`data_seed`, else `seed`) and the epoch
    alone: an interrupted training goes on, also from the middle of an epoch, as if nothing had happened.

    The parts (l_theta, l_c and l_rs of eq. 10, without their weights) are means over all micro-batches since the last
    log, of all processes. Models that do not return them train as with the plain Trainer. Running averages of batch
    norms are means over the processes, so all of them evaluate the same model. The labels that CAT trains with, and any
    model that trains with mixup, are smoothed by `label_smoothing_factor` before it sees them: the plain Trainer takes
    the labels away from the model to do so, and with them l_c and l_rs, and knows no labels but class ids. Several
    labels of a clip are not smoothed, of which transformers warns, nor is what is evaluated. The collators get whole
    rows, whatever `remove_unused_columns` says.

    Args:
        eval_collator: Collator of evaluation and prediction; `data_collator` is that of training.
        sampling_weights: (clips,) to draw the training clips by, with replacement, as `balanced_weights` returns them.
            By default an epoch has every clip once.
        spec_augment: Masks for batches of waveforms, whose spectrograms are then computed on the model's device. Needed
            (with widths of 0 for no masks) where the front end whitens, which the collator of training has done.
        muon: Whether `Muon` is the optimizer instead of the arguments' `optim`, with their learning rate, betas and
            weight decay.

    Raises:
        ValueError: There is not one sampling weight for each training clip, or they contradict
            `train_sampling_strategy`; Muon is asked for where weights are sharded; or clips would be whitened twice.
    """

    def __init__(
        self,
        *args,
        eval_collator: AudioCollator,
        sampling_weights: torch.Tensor | None = None,
        spec_augment: SpecAugment | None = None,
        muon: bool = False,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        if sampling_weights is not None and self.args.train_sampling_strategy != "random":
            raise ValueError(
                f"Sampling weights contradict train_sampling_strategy={self.args.train_sampling_strategy!r}: choose one"
            )
        if muon and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError("Muon needs whole matrices, which FSDP and DeepSpeed shard: train with muon=False")
        self._whitened = getattr(self.data_collator, "whitens", False)
        if self._whitened and not self.data_collator.feature_extractor.do_mrmf and spec_augment is None:
            raise ValueError(
                "The model would whiten what the collator has whitened: pass a `spec_augment`, which makes the trainer "
                "compute spectrograms without that, with widths of 0 for no masks; or use do_mrmf=True"
            )
        if getattr(getattr(self.model, "config", None), "problem_type", None) == MULTI_LABEL:
            # transformers' loss of several labels is a mean over the batch, whatever its models say: accumulated
            # batches have to be divided by their number.
            self.model_accepts_loss_kwargs = False
        self._smoothing = 0.0
        self.args.remove_unused_columns = False
        if self.label_smoother is not None and self._takes_probabilities:
            self._smoothing, self.label_smoother = self.args.label_smoothing_factor, None
        self.eval_collator = eval_collator
        self.sampling_weights = sampling_weights
        self.spec_augment = spec_augment
        self.muon = muon
        self._sampler: EpochSampler | None = None
        self.add_callback(_SetEpoch(self))
        self._sums: dict[str, torch.Tensor] = {}
        self._count = 0

    @property
    def _takes_probabilities(self) -> bool:
        """Whether the model can be given smoothed labels: as CAT can, and whatever is trained with mixup."""
        mixes = getattr(self.data_collator, "mixup_probability", 0) > 0
        return mixes or isinstance(_without_adapter(self.model), CATForAudioClassification)

    # Data

    def get_train_dataloader(self):
        clips = self.train_dataset
        if self._draws_by_epoch:
            self.train_dataset = DrawnClips(clips)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = clips

    def _get_train_sampler(self, train_dataset=None):
        if not self._draws_by_epoch:
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._sampler = EpochSampler(len(self.train_dataset), seed, self.sampling_weights)
        return self._sampler

    @property
    def _draws_by_epoch(self) -> bool:
        return self.args.train_sampling_strategy == "random" and hasattr(self.train_dataset, "__len__")

    @contextmanager
    def _for_evaluation(self):
        """Without augmentation, and of all clips: `dataloader_drop_last` is for training."""
        collator, drop_last = self.data_collator, self.args.dataloader_drop_last
        self.data_collator, self.args.dataloader_drop_last = self.eval_collator, False
        try:
            yield
        finally:
            self.data_collator, self.args.dataloader_drop_last = collator, drop_last

    def get_eval_dataloader(self, eval_dataset=None):
        with self._for_evaluation():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        with self._for_evaluation():
            return super().get_test_dataloader(test_dataset)

    # Steps

    def create_optimizer(self, *args, **kwargs):
        if self.muon and self.optimizer is None:
            decayed = set(self.get_decay_parameter_names(self.model))
            self.optimizer = Muon(
                parameter_groups(self.model, decayed, self.args.weight_decay),
                lr=self.args.learning_rate,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
            )
        return super().create_optimizer(*args, **kwargs)

    def training_step(self, model, *args, **kwargs):
        loss = super().training_step(model, *args, **kwargs)
        if self.args.world_size > 1:
            self._average_running_statistics()
        return loss

    @torch.no_grad()
    def _average_running_statistics(self) -> None:
        """Each process has seen its own batch; without this, each would evaluate with statistics of its own."""
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                for buffer in (module.running_mean, module.running_var):
                    buffer.copy_(self.accelerator.reduce(buffer, reduction="mean"))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if model.training and self.spec_augment is not None:
            inputs = self._with_masked_features(model, inputs)
        if model.training and self._smoothing:
            inputs = {**inputs, "labels": self._smoothed(inputs["labels"])}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            self._count += 1
            for name in LOSS_PARTS:
                if outputs.get(name) is not None:
                    self._sums[name] = (
                        self._sums.get(name, 0.0) + outputs[name].detach().float().mean()
                    )  # of several GPUs
        return (loss, outputs) if return_outputs else loss

    def _smoothed(self, labels: torch.Tensor) -> torch.Tensor:
        """Class ids (B,) or probabilities (B, C) -> probabilities (B, C), of which a share is spread over all."""
        classes = self.model.config.num_labels
        if labels.ndim == 1:
            labels = nn.functional.one_hot(labels, classes).float()
        return (1 - self._smoothing) * labels + self._smoothing / classes

    @torch.no_grad()
    def _with_masked_features(self, model, inputs: dict) -> dict:
        """Waveforms (B, N) -> what the collator would have made of them: masked spectrograms, on the model's device."""
        inputs = dict(inputs)
        encoder = _without_adapter(self.accelerator.unwrap_model(model)).base_model
        features, mask = encoder.features(
            inputs["input_values"], inputs.pop("attention_mask", None), not self._whitened
        )
        inputs["input_values"] = self.spec_augment(features, mask)
        return inputs if mask is None else {**inputs, "attention_mask": mask}

    def evaluation_loop(self, *args, **kwargs):
        output = super().evaluation_loop(*args, **kwargs)
        known = output.predictions is not None and output.label_ids is not None
        if self.args.world_size > 1 and known and hasattr(self.model, "loss_function"):
            # The mean over batches counts the clips that fill up the last one.
            predictions = output.predictions
            logits = torch.from_numpy(predictions[0] if isinstance(predictions, tuple) else predictions)
            loss = self.model.loss_function(torch.from_numpy(output.label_ids), logits, self.model.config)
            output.metrics[f"{kwargs.get('metric_key_prefix', 'eval')}_loss"] = loss.item()
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._sums:
            for name, total in self._sums.items():
                logs[name] = round(self.accelerator.reduce(total / self._count, reduction="mean").item(), 4)
            self._sums, self._count = {}, 0
        super().log(logs, start_time)

    def create_model_card(self, *args, **kwargs) -> None:
        """Keeps a card that is there: one written from the results of the run says more than the draft made here."""
        if not (Path(self.args.output_dir) / "README.md").exists():
            super().create_model_card(*args, **kwargs)


def _without_adapter(model: nn.Module) -> nn.Module:
    """The model that peft has put its adapter around, if it has."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class _SetEpoch(TrainerCallback):
    """Tells the sampler its epoch. accelerate does so too, but not in several processes when it skips the batches that
    an interrupted epoch had."""

    def __init__(self, trainer: AudioTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.trainer._sampler is not None:
            self.trainer._sampler.set_epoch(int(state.epoch or 0))
