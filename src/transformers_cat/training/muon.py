"""Muon (Jordan et al., 2024) for the matrices of a model's body, AdamW for everything else."""

from collections import defaultdict

import torch
from torch import nn
from transformers import PreTrainedModel

MOMENTUM = 0.95
STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the iteration, as its authors chose them for few steps
# Root mean square of an update at a learning rate of 1. That of AdamW's is about 0.2 (Liu et al., 2025); three times as
# much did better here.
RMS = 0.6


class Muon(torch.optim.AdamW):
    """AdamW, but the updates of some weights are made orthogonal: every direction of a matrix learns at one pace.

    `torch.optim.Muon` takes no kernels, and multiplies in bfloat16 also where a CPU takes 25 times as long for it.

    A kernel of a convolution counts as the matrix (channels out, all that a channel reads). The updates of all matrices
    have one root mean square, in proportion to AdamW's, so that both go by one learning rate and weight decay.

    Args:
        params: Parameter groups as for `torch.optim.AdamW`; those with `"muon": True` hold matrices and kernels.
        **kwargs: As for `torch.optim.AdamW`; `fused` ones leave it to the optimizer to undo a scaling of gradients,
            which this one does not.

    A step takes the gradients of the matrices with it: they are `None` after it.
    """

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike = defaultdict(list)  # by shape, so that a GPU has few and large products to compute
            for weight in group["params"] if group.get("muon") else ():
                if weight.grad is not None:
                    alike[weight.flatten(1).shape].append(weight)
            for weights in alike.values():
                self._update(weights, group["lr"], group["weight_decay"])
        super().step()
        return loss

    def _update(self, weights: list[torch.Tensor], learning_rate: float, weight_decay: float) -> None:
        """One step of weights that are matrices of one shape."""
        updates = orthogonalised(torch.stack([self._direction(weight).flatten(1) for weight in weights]))
        # A semi-orthogonal matrix has a root mean square of 1 / sqrt(its longer side).
        scale = RMS * max(updates.shape[1:]) ** 0.5
        for weight, update in zip(weights, updates):
            weight.mul_(1 - learning_rate * weight_decay)
            weight.add_(update.reshape(weight.shape), alpha=-learning_rate * scale)
            weight.grad = None  # so that AdamW passes over it

    def _direction(self, weight: torch.Tensor) -> torch.Tensor:
        """Nesterov's momentum."""
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros(())  # which AdamW looks for in each state that it loads
            state["momentum"] = torch.zeros_like(weight)
        momentum = state["momentum"].lerp_(weight.grad, 1 - MOMENTUM)
        return weight.grad.lerp(momentum, MOMENTUM)


def orthogonalised(matrices: torch.Tensor) -> torch.Tensor:
    """Semi-orthogonal matrices near (n, M, N): their singular values, whatever they were, are between 0.7 and 1.2.

    In float32 on a CPU, since many cannot multiply in bfloat16, and in that elsewhere.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.to(torch.float32 if matrices.device.type == "cpu" else torch.bfloat16)
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def parameter_groups(model: PreTrainedModel, decayed: set[str], weight_decay: float) -> list[dict]:
    """The groups of `Muon` for a model: linear maps and dense convolutions of its body are its matrices.

    Tables, scales, depthwise kernels and what is outside of the body, as its head, are left to AdamW.

    Args:
        decayed: Names of the parameters that weight decay is for.
        weight_decay: Theirs.
    """
    dense = {
        module.weight
        for module in model.base_model.modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups == 1)
    }
    groups = {(muon, decay): [] for muon in (True, False) for decay in (True, False)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[parameter in dense, name in decayed].append(parameter)
    return [
        {"muon": muon, "weight_decay": weight_decay if decay else 0.0, "params": parameters}
        for (muon, decay), parameters in groups.items()
        if parameters
    ]
