import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainingArguments

from transformers_cat import CATFeatureExtractor, CATForAudioClassification
from transformers_cat.training import AudioCollator, AudioTrainer, WeightAveraging, mean_weights

from ..conftest import small_config


class KeepWeights(TrainerCallback):
    """What the model was at the end of each epoch."""

    def __init__(self):
        self.epochs = []

    def on_epoch_end(self, args, state, control, model, **kwargs):
        self.epochs.append({name: value.clone() for name, value in model.state_dict().items()})


def make_trainer(folder, **arguments):
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    clips = [{"audio": generator.normal(0, 0.1, 6400).astype(np.float32), "label": i % 5} for i in range(4)]
    collator = AudioCollator(CATFeatureExtractor(), True, num_labels=5, time_mask=9)
    defaults = {"num_train_epochs": 3, "save_strategy": "no", "learning_rate": 1e-2}
    return AudioTrainer(
        CATForAudioClassification(small_config(problem_type="single_label_classification", depths=(1, 1, 1))),
        TrainingArguments(
            folder,
            per_device_train_batch_size=2,
            remove_unused_columns=False,
            label_names=["labels"],
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            **{**defaults, **arguments},
        ),
        data_collator=collator,
        eval_collator=collator,
        train_dataset=clips,
    )


def test_mean_of_files(tmp_path):
    values = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0]), torch.tensor([5.0, 1.0])]
    for i, value in enumerate(values):
        save_file({"weight": value, "half": value.bfloat16(), "count": torch.tensor(i)}, tmp_path / f"{i}.safetensors")
    mean = mean_weights([tmp_path / f"{i}.safetensors" for i in range(3)])
    torch.testing.assert_close(mean["weight"], torch.tensor([3.0, 3.0]))
    assert mean["half"].dtype == torch.float32  # halves would lose what the mean gains
    assert mean["count"] == 2


def test_the_last_epochs_are_averaged_with_their_running_statistics(tmp_path):
    trainer = make_trainer(tmp_path)
    averaging, kept = WeightAveraging(trainer, 2), KeepWeights()
    trainer.add_callback(averaging)
    trainer.add_callback(kept)
    trainer.train()
    assert {path.name for path in (tmp_path / "epoch_weights").iterdir()} == {"2.safetensors", "3.safetensors"}
    _, second, third = kept.epochs
    averaging.load(trainer.model)
    for name, value in trainer.model.state_dict().items():
        expected = (second[name] + third[name]) / 2 if value.is_floating_point() else third[name]
        torch.testing.assert_close(value, expected)
    norm = "cat.feature_norm.running_mean"
    assert not torch.equal(second[norm], third[norm]) and not torch.equal(trainer.model.state_dict()[norm], third[norm])


def test_an_interrupted_training_has_the_same_mean(tmp_path):
    whole = make_trainer(tmp_path / "whole", save_strategy="epoch")
    whole.add_callback(averaging := WeightAveraging(whole, 2))
    whole.train()
    averaging.load(whole.model)

    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    broken = make_trainer(tmp_path / "broken", save_strategy="epoch")
    broken.add_callback(WeightAveraging(broken, 2))
    broken.add_callback(Interrupt())
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = make_trainer(tmp_path / "broken", save_strategy="epoch")
    resumed.add_callback(averaging := WeightAveraging(resumed, 2))
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-4"))
    averaging.load(resumed.model)
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name


def test_an_epoch_that_ends_early_counts(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=3)
    trainer.add_callback(averaging := WeightAveraging(trainer, 2))
    trainer.train()
    assert {path.name for path in (tmp_path / "epoch_weights").iterdir()} == {"1.safetensors", "2.safetensors"}
    averaging.load(trainer.model)


def test_going_on_without_an_epoch_that_is_averaged_ends_at_once(tmp_path):
    first = make_trainer(tmp_path / "first", save_strategy="epoch")
    first.train()
    other = make_trainer(tmp_path / "other")
    other.add_callback(WeightAveraging(other, 2))
    with pytest.raises(FileNotFoundError, match=r"lacks \['2.safetensors'\]"):
        other.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-4"))
    other.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2"))
    assert other.state.global_step == 6


def test_epochs_that_are_not_there(tmp_path):
    trainer = make_trainer(tmp_path, num_train_epochs=2)
    trainer.add_callback(averaging := WeightAveraging(trainer, 2))
    trainer.train()
    (tmp_path / "epoch_weights" / "1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks \['1.safetensors'\]"):
        averaging.load(trainer.model)
    assert load_file(tmp_path / "epoch_weights" / "2.safetensors")


@pytest.mark.parametrize(("epochs", "message"), [(1, "2 is the least"), (4, "4 epochs .* where 3 are trained")])
def test_wrong_numbers(tmp_path, epochs, message):
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match=message):
        trainer.add_callback(WeightAveraging(trainer, epochs))
        trainer.train()


@pytest.mark.parametrize("sharded", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_sharded_weights_are_refused(tmp_path, sharded):
    trainer = make_trainer(tmp_path)
    setattr(trainer, sharded, True)
    with pytest.raises(ValueError, match="train without FSDP/DeepSpeed"):
        WeightAveraging(trainer, 2)
