import datasets
import numpy as np
import pytest
import torch
from transformers import ASTConfig, ASTForAudioClassification, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from transformers_cat import CATFeatureExtractor, CATForAudioClassification
from transformers_cat.training import AudioCollator, AudioTrainer, Muon, SpecAugment

from ..conftest import small_config


def noise(seed: int) -> dict:
    generator = np.random.default_rng(seed)
    return {"audio": generator.normal(0, 0.1, 8_000 + 500 * seed).astype(np.float32), "label": seed % 5}


OFF = {"mixup_probability": 0.0, "time_roll": 0.0, "gain_db": 0.0, "time_mask": 0, "freq_mask": 0}


@pytest.fixture
def make_trainer(tmp_path):
    def make(
        config=None, augmentation=None, do_mrmf=True, sampling_weights=None, spec_augment=None, muon=False, **arguments
    ):
        torch.manual_seed(0)
        extractor = CATFeatureExtractor(do_mrmf=do_mrmf, whitening=(config or {}).get("whitening", 0.0))
        defaults = {"per_device_train_batch_size": 2, "max_steps": 2, "logging_steps": 2, "learning_rate": 0.0}
        return AudioTrainer(
            CATForAudioClassification(small_config(problem_type="single_label_classification", **(config or {}))),
            TrainingArguments(
                remove_unused_columns=False,
                label_names=["labels"],
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
                **{"output_dir": tmp_path, "save_strategy": "no", **defaults, **arguments},
            ),
            data_collator=AudioCollator(
                extractor,
                training=True,
                num_labels=5,
                **{"mixup_probability": 1.0, "time_mask": 9, **(augmentation or {})},
            ),
            eval_collator=AudioCollator(extractor, training=False, num_labels=5),
            sampling_weights=sampling_weights,
            spec_augment=spec_augment,
            muon=muon,
            train_dataset=[noise(seed) for seed in range(8)],
            eval_dataset=[noise(seed) for seed in range(3)],
            processing_class=extractor,
        )

    return make


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_parts_in_the_log_sum_to_the_loss(make_trainer, accumulation):
    trainer = make_trainer(gradient_accumulation_steps=accumulation)
    trainer.train()
    (logged,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    parts = ("classification_loss", "causal_loss", "reconstruction_loss")
    assert sum(logged[name] for name in parts) == pytest.approx(logged["loss"], abs=2e-3)
    assert logged["classification_loss"] > 1 and logged["reconstruction_loss"] > 0.5


def test_the_parts_of_several_gpus_are_their_means(make_trainer):
    """DataParallel gathers them in a vector."""

    def gather(model, inputs, output):
        output["causal_loss"] = torch.tensor([1.0, 2.0])

    trainer = make_trainer()
    trainer.model.register_forward_hook(gather)
    trainer.train()
    (logged,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged["causal_loss"] == 1.5


@pytest.mark.parametrize("mixup", [0.0, 1.0])
def test_smoothed_labels_keep_all_parts_of_the_loss(make_trainer, mixup):
    """By class ids and by mixup's probabilities; in evaluation the labels are what they are."""
    trainer = make_trainer(label_smoothing_factor=0.2, augmentation={**OFF, "mixup_probability": mixup})
    seen = []
    trainer.model.register_forward_pre_hook(lambda _, __, inputs: seen.append(inputs["labels"]), with_kwargs=True)
    trainer.train()
    (logged,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert "causal_loss" in logged and logged["reconstruction_loss"] > 0.5
    for labels in seen:
        torch.testing.assert_close(labels.sum(1), torch.ones(2))
        assert labels.min() == pytest.approx(0.04) and (mixup or labels.max() == pytest.approx(0.84))
    seen.clear()
    trainer.evaluate()
    assert all(labels.dtype == torch.int64 for labels in seen) and seen


class Linear(torch.nn.Module):
    """Of another kind than CAT: the mean spectrum and a linear layer."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.head = torch.nn.Linear(CATFeatureExtractor().feature_size, config.num_labels)

    def forward(self, input_values, attention_mask=None, labels=None):
        logits = self.head(input_values.mean(1))
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


@pytest.mark.parametrize("mixup", [0.0, 1.0])
def test_smoothed_labels_of_another_model(make_trainer, mixup):
    """Mixup's probabilities are smoothed, which the plain Trainer cannot; class ids are left to it."""
    own = make_trainer(label_smoothing_factor=0.2, augmentation={**OFF, "mixup_probability": mixup})
    collators = {"data_collator": own.data_collator, "eval_collator": own.eval_collator}
    trainer = AudioTrainer(Linear(own.model.config), own.args, train_dataset=own.train_dataset, **collators)
    batch = own.data_collator([noise(0), noise(1)])
    labels = batch["labels"] if mixup else torch.nn.functional.one_hot(batch["labels"], 5).float()
    loss = trainer.compute_loss(trainer.model.train(), dict(batch))
    logits = trainer.model.head(batch["input_values"].mean(1))
    smoothed = 0.8 * labels + 0.2 / 5
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, smoothed))


@pytest.mark.parametrize("accumulation", [1, 4])
def test_accumulated_losses_of_several_labels_are_a_mean(make_trainer, accumulation):
    """Also of a model of transformers that says it takes what its loss does not."""
    torch.manual_seed(0)
    config = ASTConfig(
        num_labels=5,
        problem_type="multi_label_classification",
        hidden_size=8,
        num_hidden_layers=1,
        max_length=16,
        num_attention_heads=2,
        num_mel_bins=16,
    )
    clips = [{"input_values": torch.zeros(16, 16), "labels": torch.ones(5)}] * 8
    size = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    own = make_trainer(max_steps=1, logging_steps=1, **size)
    trainer = AudioTrainer(ASTForAudioClassification(config).eval(), own.args, train_dataset=clips, eval_collator=None)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.69, abs=0.1)  # log 2, of logits near 0


def test_smoothed_labels_of_an_adapted_model(make_trainer):
    peft = pytest.importorskip("peft")
    whole = make_trainer()
    model = peft.get_peft_model(whole.model, peft.LoraConfig(r=2, target_modules="all-linear"))
    whole.args.label_smoothing_factor = 0.2
    trainer = AudioTrainer(
        model,
        whole.args,
        data_collator=whole.data_collator,
        eval_collator=whole.eval_collator,
        train_dataset=whole.train_dataset,
    )
    trainer.train()
    (logged,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert "causal_loss" in logged and logged["reconstruction_loss"] > 0.5


def test_spectrograms_on_the_device_of_an_adapted_model(make_trainer):
    """Also with the arguments' default for the columns of the clips, which are the collator's."""
    peft = pytest.importorskip("peft")
    whole = make_trainer(do_mrmf=False, augmentation=OFF)
    whole.args.remove_unused_columns = True
    trainer = AudioTrainer(
        peft.get_peft_model(whole.model, peft.LoraConfig(r=2, target_modules="all-linear")),
        whole.args,
        data_collator=whole.data_collator,
        eval_collator=whole.eval_collator,
        spec_augment=SpecAugment(CATFeatureExtractor(), 0, 0),
        train_dataset=datasets.Dataset.from_list(whole.train_dataset).with_format("numpy"),
    )
    trainer.train()
    assert trainer.state.global_step == 2


def test_the_data_seed_decides_what_is_drawn(make_trainer):
    def drawn(**seeds):
        return [batch["labels"].tolist() for batch in batches(make_trainer(augmentation=OFF, **seeds))]

    assert drawn(seed=1, data_seed=7) == drawn(seed=2, data_seed=7) != drawn(seed=1, data_seed=8)


def test_each_log_has_the_parts_since_the_last_one(make_trainer):
    """Of training alone, also where the model is evaluated in between."""
    trainer = make_trainer(max_steps=4, eval_strategy="steps", eval_steps=1, learning_rate=1e-2)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    parts = ("classification_loss", "causal_loss", "reconstruction_loss")
    assert len(logged) == 2
    for entry in logged:
        assert sum(entry[name] for name in parts) == pytest.approx(entry["loss"], abs=2e-3)


def test_evaluation_is_not_augmented(make_trainer):
    trainer = make_trainer()
    batch = next(iter(trainer.get_eval_dataloader()))
    assert batch["labels"].dtype == torch.int64  # mixup would make them soft
    again = next(iter(trainer.get_eval_dataloader()))
    assert (batch["input_values"] == again["input_values"]).all()
    assert next(iter(trainer.get_train_dataloader()))["labels"].dtype == torch.float32


def test_no_clip_is_dropped_in_evaluation(make_trainer):
    trainer = make_trainer(dataloader_drop_last=True, per_device_train_batch_size=5, per_device_eval_batch_size=2)
    assert [len(batch["labels"]) for batch in trainer.get_train_dataloader()] == [5]
    for loader in (trainer.get_eval_dataloader(), trainer.get_test_dataloader(trainer.eval_dataset)):
        assert [len(batch["labels"]) for batch in loader] == [2, 1]


def test_predictions_are_the_logits_alone(make_trainer):
    predictions = make_trainer().predict([noise(1), noise(2)]).predictions
    assert isinstance(predictions, np.ndarray) and predictions.shape == (2, 5)


def batches(trainer, epoch=0):
    loader = trainer.get_train_dataloader()
    loader.set_epoch(epoch)
    return list(loader)


def test_an_epoch_is_the_same_with_any_number_of_workers(make_trainer):
    alone, helped = (batches(make_trainer(dataloader_num_workers=workers)) for workers in (0, 2))
    again = batches(make_trainer(), epoch=1)
    assert len(alone) == len(helped) == 4
    for one, other, later in zip(alone, helped, again):
        for name in ("input_values", "labels"):
            assert torch.equal(one[name], other[name])
        assert one["input_values"].shape != later["input_values"].shape or not torch.equal(
            one["input_values"], later["input_values"]
        )


def test_batches_of_an_epoch_are_augmented_differently(make_trainer):
    trainer = make_trainer(augmentation={**OFF, "time_roll": 1.0})
    trainer.train_dataset = [noise(1)] * 4
    first, second = (batch["input_values"] for batch in batches(trainer))
    assert not torch.equal(first, second)


def test_augmentation_leaves_the_model_its_random_numbers(make_trainer):
    collate = make_trainer().data_collator
    state = torch.get_rng_state()
    collate([{**noise(seed), "seed": 5} for seed in range(2)])
    assert torch.equal(torch.get_rng_state(), state)


def test_sampling_weights(make_trainer):
    weights = torch.tensor([1.0, 0, 0, 3.0, 0, 0, 0, 0])
    trainer = make_trainer(augmentation=OFF, sampling_weights=weights, num_train_epochs=3)
    labels = [label for epoch in range(6) for batch in batches(trainer, epoch) for label in batch["labels"].tolist()]
    assert len(labels) == 48 and set(labels) == {0, 3}
    assert 24 < labels.count(3) < 46  # 36 are expected, with a standard deviation of 3
    with pytest.raises(ValueError, match="contradict train_sampling_strategy='sequential'"):
        make_trainer(sampling_weights=weights, train_sampling_strategy="sequential")


def test_other_sampling_strategies_are_those_of_transformers(make_trainer):
    trainer = make_trainer(augmentation=OFF, train_sampling_strategy="sequential")
    labels = [label for batch in trainer.get_train_dataloader() for label in batch["labels"].tolist()]
    assert labels == [seed % 5 for seed in range(8)]


class Interrupt(TrainerCallback):
    """Stops a training as a signal would, in the middle of its second epoch and after a checkpoint."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 7:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"gradient_accumulation_steps": 2, "save_steps": 3, "max_steps": 6},
        {"dataloader_num_workers": 1},
        {"muon": True},
    ],
    ids=["plain", "accumulation", "workers", "muon"],
)
def test_resumption_in_mid_epoch_reaches_the_same_weights(make_trainer, tmp_path, arguments):
    """Dropout of whole branches, mixup, masks and the order of the clips go on as if nothing had happened."""
    arguments = {
        "max_steps": 10,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 6,
        "sampling_weights": torch.arange(1.0, 9.0),
        "config": {"drop_path_rate": 0.3, "depths": (1, 1, 1)},
        **arguments,
    }
    whole = make_trainer(**arguments)
    whole.train()
    checkpoint = tmp_path / f"checkpoint-{arguments['save_steps']}"
    torch.manual_seed(99)
    resumed = make_trainer(**arguments)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    before = resumed.model.state_dict()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_an_interrupted_training_goes_on(make_trainer, tmp_path):
    arguments = {"max_steps": 10, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 3}
    broken = make_trainer(**arguments)
    broken.add_callback(Interrupt())
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    assert (tmp_path / "checkpoint-6").is_dir()
    resumed = make_trainer(**arguments)
    resumed.train(resume_from_checkpoint=True)
    whole = make_trainer(**{**arguments, "output_dir": tmp_path / "whole"})
    whole.train()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


@pytest.mark.parametrize("whitening", [0.0, 0.5])
def test_spectrograms_on_the_device_are_those_of_the_extractor(make_trainer, whitening):
    """Without augmentation, the same losses in training and evaluation."""
    arguments = {"augmentation": OFF, "learning_rate": 1e-2, "max_steps": 4, "logging_steps": 1}
    arguments["config"] = {"drop_path_rate": 0.0, "whitening": whitening}
    waveforms = make_trainer(do_mrmf=False, spec_augment=SpecAugment(CATFeatureExtractor(), 0, 0), **arguments)
    features = make_trainer(**arguments)
    losses = []
    for trainer in (waveforms, features):
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        losses[-1].append(trainer.evaluate()["eval_loss"])
    assert next(iter(waveforms.get_train_dataloader()))["input_values"].ndim == 2
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_waveforms_are_not_whitened_twice(make_trainer):
    with pytest.raises(ValueError, match="would whiten what the collator has whitened: pass a `spec_augment`"):
        make_trainer({"whitening": 0.5}, augmentation=OFF, do_mrmf=False)


def test_a_collator_that_does_not_whiten_leaves_it_to_the_model(make_trainer):
    no_masks = SpecAugment(CATFeatureExtractor(), 0, 0)
    trainer = make_trainer({"whitening": 0.5}, augmentation=OFF, do_mrmf=False, spec_augment=no_masks)
    plain = AudioCollator(trainer.data_collator.feature_extractor, training=False, num_labels=5)
    again = AudioTrainer(trainer.model, trainer.args, plain, eval_collator=plain, spec_augment=trainer.spec_augment)
    batch = plain(trainer.train_dataset[:2])
    trainer.model.train()
    expected, mask = trainer.model.cat.features(batch["input_values"], batch["attention_mask"])
    features = again._with_masked_features(trainer.model, batch)["input_values"]
    torch.testing.assert_close(features[mask], expected[mask])


def test_masks_on_the_device_are_those_of_the_collator(make_trainer):
    masks = {"time_mask": 20, "freq_mask": 8}
    trainer = make_trainer(augmentation=OFF, do_mrmf=False, spec_augment=SpecAugment(CATFeatureExtractor(), **masks))
    waveforms = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    torch.manual_seed(5)
    masked = trainer._with_masked_features(trainer.model, waveforms)
    features, mask = trainer.model.cat.features(waveforms["input_values"], waveforms["attention_mask"])
    torch.manual_seed(5)
    expected = SpecAugment(CATFeatureExtractor(), **masks)(features, mask)
    assert torch.equal(masked["input_values"], expected) and torch.equal(masked["attention_mask"], mask)
    assert not torch.equal(expected, features)
    assert waveforms["input_values"].ndim == 2  # the batch is left as it was

    seen = []
    trainer.model.cat.feature_norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    torch.manual_seed(5)
    trainer.compute_loss(trainer.model, waveforms)
    assert torch.equal(seen[0][mask], expected[mask])
    trainer.compute_loss(trainer.model.eval(), waveforms)
    torch.testing.assert_close(seen[1][mask], features[mask])


@pytest.mark.parametrize("muon", [True, False])
def test_muon_takes_the_arguments(make_trainer, muon):
    trainer = make_trainer(muon=muon, learning_rate=2e-3, weight_decay=0.3, adam_beta1=0.8, adam_epsilon=1e-7)
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, Muon) == muon
    decays = [(group.get("muon", False), group["weight_decay"]) for group in optimizer.param_groups]
    assert decays == ([(True, 0.3), (False, 0.3), (False, 0.0)] if muon else [(False, 0.3), (False, 0.0)])
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"][0], group["eps"]) == (2e-3, 0.8, 1e-7)


def test_muon_is_refused_where_weights_are_sharded(make_trainer, monkeypatch):
    create = AudioTrainer.create_accelerator_and_postprocess

    def sharded(trainer):
        create(trainer)
        trainer.is_fsdp_enabled = True

    monkeypatch.setattr(AudioTrainer, "create_accelerator_and_postprocess", sharded)
    with pytest.raises(ValueError, match="Muon needs whole matrices.*muon=False"):
        make_trainer(muon=True)


def test_several_processes_evaluate_what_has_no_loss_function(make_trainer, monkeypatch):
    """As `CausalModule`, whose loss stays the mean over batches."""
    trainer = make_trainer()
    found = EvalLoopOutput(np.zeros((2, 5), np.float32), np.array([0, 4]), {"eval_loss": 7.0}, 2)
    monkeypatch.setattr(Trainer, "evaluation_loop", lambda *args, **kwargs: found)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    assert trainer.evaluation_loop().metrics["eval_loss"] == pytest.approx(np.log(5))
    trainer.model, found.metrics["eval_loss"] = torch.nn.Linear(1, 1), 7.0
    assert trainer.evaluation_loop().metrics["eval_loss"] == 7.0
