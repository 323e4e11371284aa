"""Linear maps of tokens, by the faster of two ways to compute them, and without keeping what can be had again."""

from collections.abc import Callable
from math import prod

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import register_flop_formula

ONEDNN = torch.backends.mkldnn.is_available()


def linear(tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """(..., C) and (D, C) -> (..., D).

    For inference on a CPU in float32 by oneDNN, in the operation that `torch.compile` takes for it, and otherwise as
    PyTorch does: there by MKL, which takes up to twice the time on some processors that are not Intel's, and the same
    on others. That operation has no gradient, and knows no other precision and no weights that stand for others, as
    quantised ones do.
    """
    differentiated = torch.is_grad_enabled() and (tokens.requires_grad or weight.requires_grad)
    float32 = tokens.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    plain = ONEDNN and tokens.device.type == "cpu" and float32 and type(weight) in (torch.Tensor, nn.Parameter)
    if differentiated or not plain or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return nn.functional.linear(tokens, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(tokens, weight, bias, "none", [], "")


if ONEDNN:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def operations(tokens: tuple[int, ...], weight: tuple[int, ...], *_, **__) -> int:
        """Of one call, from the shapes: PyTorch counts those of its own linear maps alone."""
        return 2 * prod(tokens) * weight[0]


class CATLinear(nn.Linear):
    """A linear layer on tokens, by the faster of two ways to compute it."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return linear(tokens, self.weight, self.bias)


def linear_after(
    prepare: Callable[[torch.Tensor], torch.Tensor], layer: nn.Module, tokens: torch.Tensor
) -> torch.Tensor:
    """`layer(prepare(tokens))`, for which training keeps the tokens, but not what is made of them for the layer.

    The backward pass makes that again, which is cheap for a norm or an activation. The layer itself is not computed
    twice: checkpointing stops when it has what the layer keeps. Of an adapter's layer, which keeps more than its input,
    it would be; so that is computed as usual, as is what is compiled, where the compiler decides what to keep.
    """
    if type(layer) not in (CATLinear, nn.Linear) or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return layer(prepare(tokens))
    return checkpoint(lambda tokens: layer(prepare(tokens)), tokens, use_reentrant=False)


def make_plain(model: nn.Module) -> None:
    """Turns the linear layers of a model into `nn.Linear`: quantisers pass over what is derived from it."""
    for layer in model.modules():
        if isinstance(layer, CATLinear):
            layer.__class__ = nn.Linear
