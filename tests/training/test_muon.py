"""Muon: orthogonal updates for matrices, AdamW for the rest."""

import copy

import pytest
import torch
from torch import nn

from transformers_cat import CATForAudioClassification
from transformers_cat.training import Muon
from transformers_cat.training.muon import RMS, orthogonalised, parameter_groups

from ..conftest import small_config


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_singular_vectors_stay_and_values_come_to_about_one(shape):
    left, _ = torch.linalg.qr(torch.randn(shape[0], min(shape)))
    right, _ = torch.linalg.qr(torch.randn(shape[1], min(shape)))
    matrix = left @ torch.diag(torch.logspace(0, -1.5, min(shape))) @ right.T
    values = left.T @ orthogonalised(1e-3 * matrix[None])[0] @ right
    assert values.diagonal().min() > 0.6 and values.diagonal().max() < 1.3
    assert (values - values.diagonal().diag()).abs().max() < 1e-4


def groups(weights: dict[bool, list], decay: float = 0.0) -> list[dict]:
    return [{"muon": muon, "weight_decay": decay, "params": params} for muon, params in weights.items()]


@pytest.mark.parametrize("shape", [(32, 32), (8, 128), (64, 4, 3, 3)])
def test_updates_are_as_large_as_those_of_adamw(shape):
    weight = nn.Parameter(torch.zeros(shape))
    weight.grad = torch.randn(shape)
    Muon(groups({True: [weight]}), lr=1e-2).step()
    assert weight.square().mean().sqrt().item() == pytest.approx(0.6e-2, rel=0.25)
    assert weight.grad is None


def test_momentum_is_nesterovs():
    first, second = torch.randn(2, 4, 6)
    weight = nn.Parameter(torch.zeros(4, 6))
    optimizer = Muon(groups({True: [weight]}), lr=1.0)
    weight.grad = first.clone()
    optimizer.step()
    before = weight.detach().clone()
    weight.grad = second.clone()
    optimizer.step()
    momentum = 0.95 * 0.05 * first + 0.05 * second
    expected = orthogonalised((0.05 * second + 0.95 * momentum)[None])[0]
    torch.testing.assert_close(before - weight, RMS * 6**0.5 * expected, atol=1e-4, rtol=1e-4)


def test_weights_of_one_shape_do_not_mix():
    gradients = [scale * torch.randn(4, 6) for scale in (1.0, 1e-3, 1e3)]
    alone, together = ([nn.Parameter(torch.zeros(4, 6)) for _ in gradients] for _ in range(2))
    for weights in (alone, together):
        for weight, gradient in zip(weights, gradients):
            weight.grad = gradient.clone()
    for weight in alone:
        Muon(groups({True: [weight]}), lr=1e-2).step()
    Muon(groups({True: together}), lr=1e-2).step()
    for one, other in zip(alone, together):
        torch.testing.assert_close(one, other)


def test_kernels_are_matrices_of_all_that_a_channel_reads():
    kernel, matrix = (nn.Parameter(torch.zeros(shape)) for shape in [(6, 4, 3, 3), (6, 36)])
    for seed in range(3):
        kernel.grad = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(seed))
        matrix.grad = kernel.grad.flatten(1).clone()
        if seed == 0:
            optimizers = [Muon(groups({True: [weight]}), lr=1e-2) for weight in (kernel, matrix)]
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(kernel.flatten(1), matrix)


def test_the_rest_is_adamw():
    others = [nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(4, 3))]
    copies = copy.deepcopy(others)
    plain = torch.optim.AdamW(copies, lr=1e-2, weight_decay=0.1)
    ours = Muon(groups({True: [nn.Parameter(torch.randn(3, 3))], False: others}, 0.1), lr=1e-2)
    for _ in range(3):
        for one, other in zip(others, copies):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        ours.step()
        plain.step()
    assert all(torch.equal(one, other) for one, other in zip(others, copies))


def test_matrices_decay_as_in_adamw():
    weight = nn.Parameter(torch.ones(3, 4))
    weight.grad = torch.zeros(3, 4)
    Muon(groups({True: [weight]}, 0.5), lr=0.1).step()
    assert torch.equal(weight, torch.full((3, 4), 1 - 0.1 * 0.5))


def test_what_has_no_gradient_stays():
    weight = nn.Parameter(torch.ones(3, 4))
    Muon(groups({True: [weight]}, 0.5), lr=0.1).step()
    assert torch.equal(weight, torch.ones(3, 4))


def test_it_goes_on_from_its_state():
    def run(steps: range, state: dict | None, start: list[torch.Tensor]) -> tuple[list[nn.Parameter], dict]:
        weights = [nn.Parameter(weight.detach().clone()) for weight in start]
        optimizer = Muon(groups({True: weights[:1], False: weights[1:]}, 0.1), lr=1e-2)
        if state:
            optimizer.load_state_dict(copy.deepcopy(state))
        for step in steps:
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        return weights, optimizer.state_dict()

    start = [torch.ones(3, 4), torch.ones(5)]
    whole, _ = run(range(6), None, start)
    resumed, _ = run(range(3, 6), *reversed(run(range(3), None, start)))
    assert all(torch.equal(one, other) for one, other in zip(whole, resumed))


def test_which_weights_of_a_model():
    model = CATForAudioClassification(
        small_config(patch_size=(8, 8), stem_channels=(4, 4, 4), depthwise_kernel_size=3, reconstruction_loss_weight=1)
    )
    model.cat.stages[0].blocks[0].mlp[0].weight.requires_grad_(False)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
    found = parameter_groups(model, decayed, 0.1)
    listed = [names[parameter] for group in found for parameter in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(names.values()) - set(listed) == {"cat.stages.0.blocks.0.mlp.0.weight"}
    for group in found:
        assert all((names[parameter] in decayed) == (group["weight_decay"] == 0.1) for parameter in group["params"])
    matrices = {names[parameter] for group in found if group["muon"] for parameter in group["params"]}
    assert {
        "cat.stages.0.blocks.0.attention.qkv.1.weight",
        "cat.stages.0.blocks.0.mlp.2.weight",
        "cat.stages.0.merging.reduction.weight",
        "cat.embeddings.projection.weight",
        "cat.embeddings.stem.convolutions.2.weight",
    } <= matrices
    outside = ("classifier", "reconstruction")
    for name in set(listed) - matrices:
        others = ("bias", "norm", "depthwise", "table", "filters", "gate", "exchange.qkv", *outside)
        assert any(part in name for part in others), name
    assert not any(part in name for name in matrices for part in ("bias", "depthwise", *outside))
