"""Linear maps of tokens, by the faster of two ways to compute them, and without keeping what can be had again."""

from collections.abc import Callable
from itertools import count
from math import prod

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry, register_flop_formula

ONEDNN = torch.backends.mkldnn.is_available()


def linear(
    tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, wanted: bool = True
) -> torch.Tensor:
    """(..., C) and (D, C) -> (..., D).

    On a CPU in float32 by oneDNN, in the operation that `torch.compile` takes for it, and otherwise as PyTorch does:
    there by MKL, which takes up to twice the time on some processors that are not Intel's, and the same on others. That
    operation knows no other precision and no weights that stand for others, as quantised ones do.

    Of what is not `wanted`, the gradient is all that counts.
    """
    float32 = tokens.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    plain = ONEDNN and tokens.device.type == "cpu" and float32 and type(weight) in (torch.Tensor, nn.Parameter)
    if not plain or transformed() or not tokens.numel():
        return nn.functional.linear(tokens, weight, bias)
    if torch.is_grad_enabled():
        # Shaped here: PyTorch refuses changes in place, as adapters and hooks make, of a view that a function returns.
        return _OneDNN.apply(tokens, weight, bias, wanted).view(*tokens.shape[:-1], len(weight))
    return _onednn(tokens, weight, bias)


def transformed() -> bool:
    """Whether a compiler, a tracer, torch.func or forward-mode AD looks on, which know PyTorch's own operations."""
    seen = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
    return seen or forward_ad._current_level >= 0


def _onednn(tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(tokens, weight, bias, "none", [], "")


class _OneDNN(torch.autograd.Function):
    """(..., C) and (D, C) -> (N, D), with the gradient that oneDNN lacks: two more linear maps and a sum."""

    @staticmethod
    def forward(
        ctx, tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, wanted: bool
    ) -> torch.Tensor:
        to_tokens, to_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(tokens if to_weight else None, weight if to_tokens else None)
        ctx.shape = tokens.shape
        rows = tokens.reshape(-1, tokens.shape[-1])
        return _onednn(rows, weight, bias) if wanted else rows.new_empty(len(rows), len(weight))

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        tokens, weight = ctx.saved_tensors
        columns = gradient.t()  # (D, N)
        to_tokens = to_weight = to_bias = None
        if ctx.needs_input_grad[0]:
            to_tokens = linear(gradient, weight.t()).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            channels = tokens.reshape(-1, tokens.shape[-1]).t()  # (C, N)
            # oneDNN copies what it takes for the tokens, so that these had better be the fewer.
            few = len(columns) <= len(channels)
            to_weight = linear(columns, channels) if few else linear(channels, columns).t()
        if ctx.needs_input_grad[2]:
            to_bias = columns.sum(1)
        return to_tokens, to_weight, to_bias, None


def operations(tokens: tuple[int, ...], weight: tuple[int, ...], *_, **__) -> int:
    """Of one call of oneDNN's, from the shapes: PyTorch counts those of its own linear maps alone."""
    return 2 * prod(tokens) * weight[0]


# Once in a process, in which this file may be loaded several times: each checkpoint that brings it has its own copy.
if ONEDNN and torch.ops.mkldnn._linear_pointwise not in flop_registry:
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(operations)


class CATLinear(nn.Linear):
    """A linear layer on tokens, by the faster of two ways to compute it."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return linear(tokens, self.weight, self.bias)


def is_bare(layer: nn.Module) -> bool:
    """Whether a layer computes what its class does: no subclass, no hooks (as pruning has), no other `forward`."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    return type(layer) in (CATLinear, nn.Linear) and not hooked


def linear_after(
    prepare: Callable[[torch.Tensor], torch.Tensor], layer: nn.Module, tokens: torch.Tensor
) -> torch.Tensor:
    """`layer(prepare(tokens))`, for which training keeps the tokens, but not what is made of them for the layer.

    The backward pass makes that again, which is cheap for a norm or an activation; the layer's product is not computed
    twice. Of an adapter's layer, or one with hooks, which may keep more than its input, it would be; so that is
    computed as usual, as is what is compiled, where the compiler decides what to keep, and what torch.func transforms.
    """
    if not is_bare(layer) or not torch.is_grad_enabled() or transformed():
        return layer(prepare(tokens))
    calls = count()

    def compute(tokens: torch.Tensor) -> torch.Tensor:
        if next(calls) and type(layer) is CATLinear:
            return linear(prepare(tokens), layer.weight, layer.bias, wanted=False)
        return layer(prepare(tokens))

    return checkpoint(compute, tokens, use_reentrant=False)


def make_plain(model: nn.Module) -> None:
    """Turns the linear layers of a model into `nn.Linear`: quantisers pass over what is derived from it."""
    for layer in model.modules():
        if isinstance(layer, CATLinear):
            layer.__class__ = nn.Linear
