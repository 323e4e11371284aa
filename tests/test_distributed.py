"""Two processes, or accumulated gradients, train as one process with the whole batch does."""

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from transformers import TrainerCallback, TrainingArguments

from transformers_cat import CATForAudioClassification
from transformers_cat.training import AudioTrainer

from .conftest import awaken, small_config

# Without the stem, since the statistics of its batch norms differ with the batches.
TINY = {"embed_dim": 8, "depths": (1, 1), "num_heads": (2, 4), "stem_channels": ()}
TINY["problem_type"] = "multi_label_classification"
# The causal loss compares the clips of a batch, so it is another one with other batches.
WITHOUT_CAUSAL_LOSS = {**TINY, "causal_loss_weight": 0.0}


class KeepGradients(TrainerCallback):
    """The gradients of the last step, as the optimiser gets them."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {name: value.grad.numpy().copy() for name, value in model.named_parameters()}


def train_one_step(folder: str, batch_size: int, accumulation: int, overrides: dict) -> dict:
    """One step on the same four clips, whatever the batches; from every process its log and its gradients."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = awaken(CATForAudioClassification(small_config(drop_path_rate=0.0, **overrides)))
    model.classifier.weight.data *= 20  # predictions that a feature can change, so that the causal loss is seen
    norm = model.cat.feature_norm.eval()
    norm.train = lambda mode=True: norm  # the statistics of a batch would differ with the batches
    clips = [{"input_values": torch.randn(16, 384) - 5, "labels": torch.rand(5).round()} for _ in range(4)]
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        logging_steps=1,
        max_grad_norm=0.0,
        optim="sgd",
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    keeper = KeepGradients()
    trainer = AudioTrainer(model, arguments, train_dataset=clips, callbacks=[keeper], eval_collator=None)
    trainer.train()
    return {"log": trainer.state.log_history[0], "gradients": keeper.gradients, "processes": arguments.world_size}


def train_in_each_way(folder: str) -> tuple[dict, dict]:
    """What each of the two processes does: without and with the causal loss."""
    return train_one_step(folder, 2, 1, WITHOUT_CAUSAL_LOSS), train_one_step(folder, 2, 1, TINY)


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory) -> list[tuple[dict, dict]]:
    """As `torchrun --nproc_per_node 2` starts them."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="test",
        start_method="spawn",
    )
    results = elastic_launch(config, train_in_each_way)(str(tmp_path_factory.mktemp("distributed")))
    return [results[rank] for rank in (0, 1)]


@pytest.fixture(scope="module")
def of_one_process(tmp_path_factory) -> dict:
    return train_one_step(str(tmp_path_factory.mktemp("one")), 4, 1, WITHOUT_CAUSAL_LOSS)


def assert_same_step(found: dict, expected: dict) -> None:
    assert found["log"]["loss"] == pytest.approx(expected["log"]["loss"], abs=2e-4)
    for name in ("classification_loss", "reconstruction_loss"):
        assert found["log"][name] == pytest.approx(expected["log"][name], abs=2e-4)
    assert found["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        np.testing.assert_allclose(found["gradients"][name], gradient, atol=1e-5, rtol=1e-3, err_msg=name)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.17"),
    reason="the Trainer of transformers 5.4 divides gradients by the accumulation steps a second time",
)
def test_accumulation_is_one_large_batch(of_one_process, tmp_path):
    assert of_one_process["log"]["loss"] > 0.1
    assert_same_step(train_one_step(str(tmp_path), 2, 2, WITHOUT_CAUSAL_LOSS), of_one_process)


def test_two_processes_are_one_large_batch(of_two_processes, of_one_process):
    for without_causal_loss, _ in of_two_processes:
        assert without_causal_loss["processes"] == 2
        assert_same_step(without_causal_loss, of_one_process)


def test_causal_loss_in_two_processes(of_two_processes):
    (_, first), (_, second) = of_two_processes
    parts = ("classification_loss", "causal_loss", "reconstruction_loss")
    # Each process logs the mean over both, which the loss is made of.
    assert {name: first["log"][name] for name in parts} == {name: second["log"][name] for name in parts}
    assert first["log"]["causal_loss"] != 0
    assert sum(first["log"][name] for name in parts) == pytest.approx(first["log"]["loss"], abs=3e-4)
    for name, gradient in first["gradients"].items():
        assert gradient.any(), name
        np.testing.assert_array_equal(gradient, second["gradients"][name], err_msg=name)


def test_parts_are_means_over_accumulated_batches(tmp_path):
    log = train_one_step(str(tmp_path), 2, 2, TINY)["log"]
    parts = ("classification_loss", "causal_loss", "reconstruction_loss")
    assert sum(log[name] for name in parts) == pytest.approx(log["loss"], abs=3e-4)
