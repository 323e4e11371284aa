import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from transformers_cat import CATFeatureExtractor, CATForAudioClassification
from transformers_cat.training import AudioCollator, AudioTrainer

from ..conftest import small_config


def noise(seed: int) -> dict:
    generator = np.random.default_rng(seed)
    return {"audio": generator.normal(0, 0.1, 8_000 + 500 * seed).astype(np.float32), "label": seed % 5}


@pytest.fixture
def make_trainer(tmp_path):
    def make(**arguments) -> AudioTrainer:
        torch.manual_seed(0)
        extractor = CATFeatureExtractor()
        collators = [
            AudioCollator(extractor, training, num_labels=5, mixup_probability=float(training), time_mask=9)
            for training in (True, False)
        ]
        return AudioTrainer(
            CATForAudioClassification(small_config(problem_type="single_label_classification")),
            TrainingArguments(
                tmp_path,
                per_device_train_batch_size=2,
                max_steps=2,
                logging_steps=2,
                learning_rate=0.0,
                remove_unused_columns=False,
                label_names=["labels"],
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                **arguments,
            ),
            data_collator=collators[0],
            eval_collator=collators[1],
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


def test_evaluation_is_not_augmented(make_trainer):
    trainer = make_trainer()
    batch = next(iter(trainer.get_eval_dataloader()))
    assert batch["labels"].dtype == torch.int64  # mixup would make them soft
    again = next(iter(trainer.get_eval_dataloader()))
    assert (batch["input_values"] == again["input_values"]).all()
    assert next(iter(trainer.get_train_dataloader()))["labels"].dtype == torch.float32


def test_predictions_are_the_logits_alone(make_trainer):
    predictions = make_trainer().predict([noise(1), noise(2)]).predictions
    assert isinstance(predictions, np.ndarray) and predictions.shape == (2, 5)
