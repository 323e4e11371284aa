"""Linear maps of tokens, by the faster of two ways to compute them."""

import torch
from torch import nn


def linear(tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """(..., C) and (D, C) -> (..., D).

    For inference on a CPU in float32 as the 1x1 convolution that it is: PyTorch computes that by oneDNN and a matrix
    product by MKL, which takes up to twice the time on some processors that are not Intel's, and the same on others. In
    training the convolution's gradients cost more than that saves.
    """
    differentiated = torch.is_grad_enabled() and (tokens.requires_grad or weight.requires_grad)
    if differentiated or tokens.device.type != "cpu" or tokens.dtype != torch.float32 or torch.compiler.is_exporting():
        return nn.functional.linear(tokens, weight, bias)
    pixels = tokens.reshape(1, -1, 1, tokens.shape[-1]).permute(0, 3, 1, 2)  # channels last, so that nothing is copied
    output = nn.functional.conv2d(pixels, weight[:, :, None, None], bias)
    return output.permute(0, 2, 3, 1).reshape(*tokens.shape[:-1], -1)


class CATLinear(nn.Linear):
    """A linear layer on tokens, by the faster of two ways to compute it."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return linear(tokens, self.weight, self.bias)
