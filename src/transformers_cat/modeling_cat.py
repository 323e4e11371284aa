"""The Causal Audio Transformer (CAT): MRMF patches, acoustic attention on a Swin trunk, classification head.

Layouts: B clips, G filters, K resolutions, T frames, F bins; t and f count tokens along time and frequency, C is a
stage's width. Token maps are (B, t, f, C), one for each filter (G, B, t, f, C).
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .causal import ReconstructionHead, causal_loss, class_targets, conditional_pns, linear_head
from .configuration_cat import CATConfig, drop_local_code, implied_problem_type, mrmf_arguments
from .linear import CATLinear, linear, linear_after, make_plain, transformed
from .mrmf import MRMFSpectrogram
from .whitening import whitened  # noqa: F401  of mrmf.py; old releases copy what this file itself imports

MAX_LOG_POWER = 10_000.0  # the logarithm of what float32 holds stays within 104 of zero
# Tokens that are computed at once in inference. On a CPU so few that what lies between the layers stays in the caches:
# a clip of 10 s has as many in the first stage of the default size. Elsewhere those of 64 such clips: a GPU's fused
# attention takes no more than 65,535 heads, and every window has its own.
CPU_SLICE = 2**12
SLICE = 2**18


@dataclass
class CATModelOutput(BaseModelOutputWithPooling):
    """
    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(B, t, f, d)`): Token map of the last stage, after the final
            layer norm; t = ceil(T / 32) and f = F / 32 for the default sizes.
        pooler_output (`torch.FloatTensor` of shape `(B, d)`): Z, its mean over the tokens that hold audio.
        token_mask (`torch.BoolTensor` of shape `(B, t)`, *optional*): Time steps of `last_hidden_state` that hold
            audio; `None` if all do.
        normalized_features (`torch.FloatTensor` of shape `(B, T, G * K * F)`): The normalised MRMF, zero on padding.
        frame_mask (`torch.BoolTensor` of shape `(B, T)`, *optional*): Its frames that hold audio; `None` if all do.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*): The trunk h, `(B, t, f, C)`: as embedded, then as each
            stage passes it on.
        attentions (`tuple(torch.FloatTensor)`, *optional*): For the last block of each stage, `(B * windows, heads,
            tokens, tokens)`; the first `heads / G` heads read the first filter, and so on. In stages of even depth,
            but the last, windows begin `stage.windows(t, f)[1]` tokens into the map, (time, frequency), and those that
            span an end of it hold the tokens of both ends.
    """

    token_mask: torch.BoolTensor | None = None
    normalized_features: torch.FloatTensor | None = None
    frame_mask: torch.BoolTensor | None = None


@dataclass
class CATSequenceClassifierOutput(SequenceClassifierOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*): With `labels`: L of eq. 10, the weighted sum of the three.
        classification_loss, causal_loss, reconstruction_loss (`torch.FloatTensor` of shape `()`, *optional*): Its parts
            l_theta, l_c and l_rs, each without its weight, as far as they are computed.
        logits (`torch.FloatTensor` of shape `(B, num_labels)`): Scores before softmax or sigmoid.
        frame_logits (`torch.FloatTensor` of shape `(B, t, num_labels)`, *optional*): With `output_frame_logits`: the
            head's scores of each time step, 0 on padding; their mean over the steps that hold audio is `logits`.
        token_mask (`torch.BoolTensor` of shape `(B, t)`, *optional*): With `output_frame_logits`: those steps.
        pooler_output (`torch.FloatTensor` of shape `(B, d)`): Z, the embedding that the head reads.
        pns (`torch.FloatTensor` of shape `(B, d)`, *optional*): With `output_pns`: a lower bound, 0 to 1, of the
            probability that each feature of Z is necessary and sufficient for the label.
        reconstruction (`torch.FloatTensor` of shape `(B, G, K, T, F)`, *optional*): With `output_reconstruction`.
        hidden_states, attentions: As in [`CATModelOutput`].
    """

    classification_loss: torch.FloatTensor | None = None
    causal_loss: torch.FloatTensor | None = None
    reconstruction_loss: torch.FloatTensor | None = None
    frame_logits: torch.FloatTensor | None = None
    token_mask: torch.BoolTensor | None = None
    pooler_output: torch.FloatTensor | None = None
    pns: torch.FloatTensor | None = None
    reconstruction: torch.FloatTensor | None = None


# Windows: plain functions of shapes


def is_certain(condition: bool | torch.SymBool | torch.Tensor) -> bool:
    """Whether a condition on shapes holds, whatever a symbolic length will be; a trace has tensors for shapes."""
    return bool(condition) if isinstance(condition, torch.Tensor) else statically_known_true(condition)


def pad_time(tokens: torch.Tensor, multiple: int, dim: int) -> torch.Tensor:
    """Zero-pads dimension `dim` at its end to a multiple."""
    length = tokens.shape[dim]
    # Written with a negated floor, the roundings of all stages collapse into one where the length is symbolic; and
    # what is only known at run time must not be branched on.
    missing = -(-length // multiple) * multiple - length
    if is_certain(missing == 0):
        return tokens
    return nn.functional.pad(tokens, (0, 0) * (tokens.ndim - 1 - dim) + (0, missing))


def crop_time(tokens: torch.Tensor, length: int, dim: int) -> torch.Tensor:
    """Takes the first `length` of dimension `dim`: what `pad_time` added goes again."""
    # Padding by a negative number: a slice would have to know which of two symbolic lengths is smaller.
    if is_certain(tokens.shape[dim] == length):
        return tokens
    return nn.functional.pad(tokens, (0, 0) * (tokens.ndim - 1 - dim) + (0, length - tokens.shape[dim]))


def window_partition(tokens: torch.Tensor, window: tuple[int, int]) -> torch.Tensor:
    """(B, t, f, C) -> (B, windows, tokens of a window, C); `window` divides (t, f).

    A view of the same memory where a window spans all of f.
    """
    b, t, f, c = tokens.shape
    tokens = tokens.view(b, t // window[0], window[0], f // window[1], window[1], c)
    return tokens.transpose(2, 3).reshape(b, -1, window[0] * window[1], c)


def window_reverse(windows: torch.Tensor, window: tuple[int, int], t: int, f: int) -> torch.Tensor:
    """(B, windows, tokens of a window, C) -> (B, t, f, C), the inverse of `window_partition`."""
    b, _, _, c = windows.shape
    windows = windows.unflatten(2, window).unflatten(1, (t // window[0], f // window[1]))
    return windows.transpose(2, 3).clone(memory_format=torch.contiguous_format).view(b, t, f, c)


def relative_position_index(window: tuple[int, int]) -> torch.Tensor:
    """Row of the relative-position table for each (query, key) of a window, flat: (tokens * tokens,) int64.

    Row `(dt + w_t - 1) * (2 * w_f - 1) + (df + w_f - 1)` belongs to the offset (dt, df) of query from key.
    """
    # Not by tensors: those of a model that is built without memory hold no values.
    t, f = np.indices(window).reshape(2, -1)
    dt, df = t[:, None] - t[None, :], f[:, None] - f[None, :]
    return torch.from_numpy(((dt + window[0] - 1) * (2 * window[1] - 1) + df + window[1] - 1).flatten())


def attention_mask_of_windows(
    token_mask: torch.Tensor | None, size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], like
) -> torch.Tensor | None:
    """Additive mask that keeps attention within what belongs together in a window.

    A cyclic shift brings the two ends of an axis into one window; they must not see each other, nor anything padding.
    Padding sees itself, so that no row of the softmax is empty.

    Args:
        token_mask: (B or 1, t) bool, or `None`.
        size: (t, f), which `window` divides.
        like: A tensor that gives dtype and device.

    Returns:
        (B or 1, windows, tokens, tokens), 0 or -inf, or `None` where everything belongs together.
    """
    if token_mask is None and shift == (0, 0):
        return None
    (t, f), device = size, like.device
    wrapped_t = torch.arange(t, device=device) >= t - shift[0]
    wrapped_f = torch.arange(f, device=device) >= f - shift[1]
    regions = 1 + wrapped_t[:, None] + 2 * wrapped_f[None, :]  # (t, f)
    if token_mask is None:
        regions = regions[None]
    else:
        regions = torch.where(token_mask.roll(-shift[0], 1)[..., None], regions, 0)
    regions = window_partition(regions[..., None], window)  # (B or 1, windows, tokens, 1)
    apart = regions != regions.transpose(2, 3)
    return torch.zeros(apart.shape, dtype=like.dtype, device=device).masked_fill(apart, float("-inf"))


def part_of_mask(
    mask: torch.Tensor | None, clips: slice, steps: slice, bins: int, window: tuple[int, int]
) -> torch.Tensor | None:
    """Of `attention_mask_of_windows`, what belongs to some clips and time steps, which are whole windows."""
    if mask is None or steps == slice(None):
        return mask
    windows = slice(*(bins // window[1] * (step // window[0]) for step in (steps.start, steps.stop)))
    return mask[clips if mask.shape[0] > 1 else slice(None), windows]


def any_of(mask: torch.Tensor | None, count: int) -> torch.Tensor | None:
    """(B, T) bool -> (B, ceil(T / count)): whether any of each `count` steps holds audio."""
    return None if mask is None else pad_time(mask, count, 1).unflatten(1, (-1, count)).any(-1)


def shift_windows(tokens: torch.Tensor, shift: tuple[int, int]) -> torch.Tensor:
    """Moves (..., t, f, C) cyclically by `shift` steps and bins towards the start; a negative shift moves it back."""
    return tokens if shift == (0, 0) else tokens.roll((-shift[0], -shift[1]), (-3, -2))


def padding_of(features: torch.Tensor) -> torch.Tensor | None:
    """The mask (B, T) of MRMF features that lost theirs, as in transformers' own scripts; `None` if nothing is padding.

    A frame of zeros is what the feature extractor pads with by default: in no frame of audio is the log power of all
    bins at once 0.
    """
    held = features.abs().amax(-1) != 0
    return None if bool(held.all()) or not bool(held.any()) else held


def zero_padding(tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Sets (..., B, t, f, C) to zero where `mask` (B, t) says that there is no audio."""
    return tokens if mask is None else tokens * mask[:, :, None, None].to(tokens.dtype)


def slices(module: nn.Module, like: torch.Tensor, size: tuple[int, int, int], steps: int) -> list[tuple[slice, slice]]:
    """The clips and the time steps that `module` computes at once, of (B, t, f) tokens on the device of `like`.

    All of them, but in inference some clips or, where one is long, a part of one, in multiples of `steps`.
    """
    # Gradients keep what lies between the layers anyway, and a graph that is being traced must not depend on how many
    # slices there are.
    if module.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return [(slice(None), slice(None))]
    b, t, f = size
    tokens = CPU_SLICE if like.device.type == "cpu" else SLICE
    clips = max(tokens // (t * f), 1)
    rows = max(tokens // (steps * f), 1) * steps
    return [(slice(i, i + clips), slice(j, j + rows)) for i in range(0, b, clips) for j in range(0, t, rows)]


def join_slices(parts: list[torch.Tensor], clips: int) -> torch.Tensor:
    """What was computed of each of `slices`, (..., clips, steps, f, C) -> (..., B, t, f, C), B = `clips`."""
    if len(parts) == 1:
        return parts[0]
    # One clip's time steps follow those of the other.
    return torch.cat([part.flatten(-4, -3) for part in parts], dim=-3).unflatten(-3, (clips, -1))


def split_streams(streams: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """X_g (G, B, t, f, C) -> trunk h, their mean (B, t, f, C), and offsets delta_g = X_g - h, `None` if G = 1."""
    if streams.shape[0] == 1:
        return streams[0], None
    trunk = streams.mean(0)
    return trunk, streams - trunk


def join_streams(trunk: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
    """X_g = h + delta_g: (B, t, f, C) and (G, B, t, f, C) -> (G, B, t, f, C)."""
    return trunk[None] if offsets is None else trunk + offsets


# Features to tokens


class CATBatchNorm(nn.BatchNorm1d):
    """Batch norm over the last dimension, in float32, without padding in its statistics.

    In training, it normalises by the statistics of the batch only where it `learns`: frozen weights, as those under an
    adapter, go on with the running statistics, which nobody would save with the adapter if they moved.
    """

    def forward(
        self, features: torch.Tensor, frame_mask: torch.Tensor | None = None, learns: bool = True
    ) -> torch.Tensor:
        """(B, T, ..., C), mask (B, T) bool or `None` -> the same shape in float32, zero on padding."""
        features = features.float()
        if not (self.training and learns):
            normalised = self._normalise(features, self.running_mean.float(), self.running_var.float())
            return normalised if frame_mask is None else normalised * self._weight(features, frame_mask)
        if frame_mask is None and features.shape[:-1].numel() == 1:  # which PyTorch's kernel refuses
            frame_mask = features.new_ones(1, 1, dtype=torch.bool)
        if frame_mask is None:  # PyTorch's own kernel: a fifth of the time of the formula below
            mean, variance = features.new_zeros(2, self.num_features)
            normalised = self._normalise(features, mean, variance, training=True)
            self._track(mean, variance)
            return normalised
        weight = self._weight(features, frame_mask)
        dims = tuple(range(features.ndim - 1))
        count = (weight.sum() * features.shape[2:-1].numel()).clamp(min=1)
        mean = (features * weight).sum(dims) / count
        variance = ((features - mean).square() * weight).sum(dims) / count
        self._track(mean, variance * count / (count - 1).clamp(min=1))
        return self._affine((features - mean) * (variance + self.eps).rsqrt()) * weight

    def _normalise(self, features, mean, variance, training: bool = False) -> torch.Tensor:
        """By the given statistics or, in training, by the batch's own, which then replace the given ones."""
        scale, shift = (self.weight.float(), self.bias.float()) if self.affine else (None, None)
        rows = features.reshape(-1, self.num_features)
        rows = nn.functional.batch_norm(rows, mean, variance, scale, shift, training, momentum=1.0, eps=self.eps)
        return rows.view(features.shape)

    def _affine(self, features: torch.Tensor) -> torch.Tensor:
        return features * self.weight.float() + self.bias.float() if self.affine else features

    @staticmethod
    def _weight(features: torch.Tensor, frame_mask: torch.Tensor) -> torch.Tensor:
        """(B, T, 1, ...): 1 where there is audio, 0 on padding."""
        return frame_mask.view(*frame_mask.shape, *[1] * (features.ndim - 2)).float()

    @torch.no_grad()
    def _track(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        """Moves the running averages towards a batch's mean and unbiased variance."""
        self.num_batches_tracked += 1
        # The first batches count in full, or a short training would leave the initial 0 and 1 in the average.
        rate = (1.0 / self.num_batches_tracked).clamp(min=self.momentum or 0.0)  # None: all batches count alike
        self.running_mean.copy_(torch.lerp(self.running_mean.float(), mean, rate))
        self.running_var.copy_(torch.lerp(self.running_var.float(), variance, rate))


class CATPositionEmbedding(nn.Module):
    """3-D position, eq. (3): pe[k, t, f] = g([sin(t); onehot(k)]) + sin(f), and a learned vector for each filter.

    The paper's text promises a network "aware of features extracted with different window sizes and filters"; its
    equation has no term for filters, hence the vectors. A gate scales the sum; with pre-trained weights it starts at 0.
    """

    def __init__(self, config: CATConfig):
        super().__init__()
        self.dim = config.embed_dim
        self.num_resolutions = config.num_resolutions
        self.projection = nn.Linear(config.embed_dim + config.num_resolutions, config.embed_dim)
        self.filters = nn.Parameter(torch.zeros(config.num_filters, config.embed_dim))
        self.gate = nn.Parameter(torch.ones(()))

    def sinusoids(self, length: int) -> torch.Tensor:
        """(length, C): sine and cosine pairs at wavelengths from 2 pi to 10000 * 2 pi (Vaswani et al., 2017)."""
        position = torch.arange(length, device=self.gate.device, dtype=torch.float32)[:, None]
        exponent = torch.arange(0, self.dim, 2, device=self.gate.device, dtype=torch.float32) / self.dim
        angle = position * 10_000.0**-exponent
        return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1).to(self.gate.dtype)

    def forward(self, t: int, f: int) -> tuple[torch.Tensor, torch.Tensor]:
        """-> two summands of pe: what depends on time and frequency (t, f, C), and on filter and resolution (G, K, C).

        g is linear, so it takes sin(t) and onehot(k) apart and never sees K * t rows.
        """
        # Made where it is used: a copy from the CPU would keep a GPU waiting.
        onehot = torch.eye(self.num_resolutions, dtype=self.gate.dtype, device=self.gate.device)
        inputs = torch.block_diag(self.sinusoids(t), onehot)
        time, resolutions = self.projection(inputs).split([t, self.num_resolutions])
        resolutions = resolutions - self.projection(torch.zeros_like(inputs[:1]))  # its bias counts once, with the time
        grid = time[:, None] + self.sinusoids(f)
        return self.gate * grid, self.gate * (self.filters[:, None] + resolutions)


class CATResolutionExchange(nn.Module):
    """Attention between the K resolutions of one filter at one time and frequency (Sec. III-A).

    Queries, keys and values are linear maps of each resolution's patch and of its position. What comes out is only ever
    needed summed over the resolutions, and the output projection is linear: so it projects the sum, and starts as zero.
    """

    def __init__(self, config: CATConfig):
        super().__init__()
        resolutions, width, patch = config.num_resolutions, 3 * config.exchange_dim, tuple(config.patch_size)
        self.qkv = nn.Parameter(torch.zeros(resolutions, patch[0] * patch[1], width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.position = nn.Linear(config.embed_dim, width, bias=False)
        self.output = CATLinear(config.exchange_dim, config.embed_dim)
        self.output.initial_std = 0.0

    def forward(self, patches: torch.Tensor, position: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        """Patches (G, B, t, f, K, P), position (t, f, C) and (G, K, C) -> what the exchange adds (G, B, t, f, C)."""
        g, b, t, f, k, _ = patches.shape
        qkv = torch.bmm(patches.flatten(0, 3).transpose(0, 1), self.qkv)  # (K, G * B * t * f, 3 D)
        qkv = qkv.view(k, g, b, t, f, -1) + self.bias
        if position is not None:
            grid, levels = (self.position(part) for part in position)
            qkv = qkv + grid + levels.transpose(0, 1)[:, :, None, None, None]
        query, key, value = qkv.chunk(3, dim=-1)
        scores = (query[:, None] * key[None]).sum(-1, keepdim=True) * query.shape[-1] ** -0.5  # (K, K, ..., 1)
        # sum over queries of sum over keys of weight * value
        received = (scores.softmax(dim=1).sum(0) * value).sum(0)
        return self.output(received)


class CATStem(nn.Module):
    """A residual convolutional stem: 3x3 convolutions over the K spectrograms of a filter, each with maximum pooling.

    After Xiao et al., "Early convolutions help transformers see better" (2021): few clips do not teach locality.
    Pooling instead of their strides lowers the loss on unheard clips. What it adds to the patch embedding has the scale
    of that, but starts as zero beside pre-trained weights.
    """

    def __init__(self, config: CATConfig):
        super().__init__()
        channels = [config.num_resolutions, *config.stem_channels]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1, bias=False) for before, after in zip(channels, channels[1:])
        )
        for convolution in self.convolutions:
            convolution.initial_std = (2 / convolution.weight[0].numel()) ** 0.5  # He et al., 2015
        self.norms = nn.ModuleList(CATBatchNorm(width) for width in channels[1:])
        self.activation = nn.ReLU()
        self.output = CATLinear(channels[-1], config.embed_dim)
        self.output.initial_std = (2 / channels[-1]) ** 0.5

    def forward(self, features: torch.Tensor, frame_mask: torch.Tensor | None) -> torch.Tensor:
        """(B, T, F, K), mask (B, T) -> (B, t, f, C)."""
        for convolution, norm in zip(self.convolutions, self.norms):
            # Channels last, as it comes: the permutations move no data. Zeros before the convolution, as padding has
            # them, or the maximum at the end of a clip would depend on its batch.
            features = pad_time(features, 2, 1).permute(0, 3, 1, 2)
            features = convolution(features.to(convolution.weight.dtype))
            features = nn.functional.max_pool2d(features, 2).permute(0, 2, 3, 1)
            frame_mask = any_of(frame_mask, 2)
            features = zero_padding(self.activation(norm(features, frame_mask, norm.weight.requires_grad)), frame_mask)
        return self.output(features.to(self.convolutions[0].weight.dtype))  # the layer's own may be quantised


class CATPatchProjection(nn.Conv2d):
    """A K-channel convolution with stride, on patches that are cut already.

    The weights of a layer are used only in its own forward: whatever keeps them elsewhere until then (offloading,
    sharding) fetches them there.
    """

    def cut(self, features: torch.Tensor) -> torch.Tensor:
        """(B, T, G, K, F) -> (G, B, t, f, K, P), P = frames times bins of a patch, which divide T and F."""
        time, bins = self.kernel_size
        patches = features.unflatten(4, (-1, bins)).unflatten(1, (-1, time))
        patches = patches.permute(3, 0, 1, 5, 4, 2, 6)  # from (B, t, time, G, K, f, bins)
        # Copied in any case: whether `flatten` has to would, for patches of one frame, depend on the length.
        return patches.clone(memory_format=torch.contiguous_format).flatten(5)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(G, B, t, f, K, P) -> (G, B, t, f, C)."""
        return linear(patches.flatten(4), self.weight.flatten(1), self.bias)


class CATEmbeddings(nn.Module):
    """Patches of the normalised MRMF, aggregated over the resolutions (Sec. III-A): one token map for each filter.

    A patch spans all K resolutions of one filter, so its projection is a K-channel convolution with stride, shared by
    the filters. That is the sum of K tokens, one for each resolution, to which the positions and the exchange between
    the resolutions are added; both are linear in what they add, so the sum is all that is ever computed.
    """

    def __init__(self, config: CATConfig):
        super().__init__()
        patch = tuple(config.patch_size)
        self.shape = (config.num_filters, config.num_resolutions, config.num_bins)
        self.projection = CATPatchProjection(config.num_resolutions, config.embed_dim, patch, stride=patch)
        # Tokens of unit variance, beside which the sinusoids neither drown nor are drowned.
        self.projection.initial_std = self.projection.weight[0].numel() ** -0.5
        self.position = CATPositionEmbedding(config) if config.use_position_embedding else None
        self.exchange = CATResolutionExchange(config) if config.exchange_dim and config.num_resolutions > 1 else None
        self.stem = CATStem(config) if config.stem_channels else None
        self.norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, features: torch.Tensor, frame_mask: torch.Tensor | None) -> torch.Tensor:
        """(B, T, G * K * F), mask (B, T) -> X_g (G, B, t, f, C)."""
        images = features.unflatten(2, self.shape)  # (B, T, G, K, F)
        time, bins = self.projection.kernel_size
        features = pad_time(images, time, 1)
        size = (features.shape[0], features.shape[1] // time, features.shape[4] // bins)
        position = None if self.position is None else self.position(*size[1:])
        parts = []
        for clips, steps in slices(self, features, size, 1):
            frames = steps if steps == slice(None) else slice(steps.start * time, steps.stop * time)
            here = None if position is None else (position[0][steps], position[1])
            tokens = self.tokens(features[clips, frames], here)
            if self.stem is not None:
                mask = None if frame_mask is None else frame_mask[clips]
                tokens = tokens + self.convolve(images[clips], mask, steps)
            parts.append(self.norm(tokens))
        return self.dropout(join_slices(parts, features.shape[0]))

    def convolve(self, images: torch.Tensor, frame_mask: torch.Tensor | None, steps: slice) -> torch.Tensor:
        """The stem's part of the tokens at `steps`: (B, T, G, K, F), mask (B, T) -> (G, B, steps, f, C)."""
        if steps != slice(None):
            # With a token before and after, beyond which the convolutions do not reach: 2**n - 1 frames, n of them.
            time = self.projection.kernel_size[0]
            first = max(steps.start - 1, 0)
            frames = slice(first * time, (steps.stop + 1) * time)
            images, steps = images[:, frames], slice(steps.start - first, steps.stop - first)
            frame_mask = None if frame_mask is None else frame_mask[:, frames]
        mask = None if frame_mask is None else frame_mask.repeat(self.shape[0], 1)
        images = torch.cat(images.permute(2, 0, 1, 4, 3).unbind())  # (G * B, T, F, K)
        return self.stem(images, mask)[:, steps].unflatten(0, (self.shape[0], -1))

    def tokens(self, features: torch.Tensor, position: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        """Of each patch alone: (B, T, G, K, F), position (t, f, C) and (G, K, C) -> (G, B, t, f, C)."""
        patches = self.projection.cut(features)
        tokens = self.projection(patches)
        if position is not None:
            grid, levels = position
            tokens = tokens + levels.shape[1] * grid + levels.sum(1)[:, None, None, None]
        if self.exchange is not None:
            tokens = tokens + self.exchange(patches, position)
        return tokens


# Trunk


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled dot products of queries, keys and values (B, windows * heads, N, D).

    Returns:
        (B, N, windows * heads, D), and the weights (B * windows, heads, N, N).
    """
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    # In this shape on their way, so that the gradient of what is returned can be asked for.
    weights = weights.unflatten(1, (-1, module.num_heads)).flatten(0, 1)
    output = nn.functional.dropout(weights, p=dropout, training=module.training).view(scores.shape) @ value
    return output.transpose(1, 2).contiguous(), weights


def unfused_attention_forward(*args, **kwargs) -> tuple[torch.Tensor, None]:
    """As `eager_attention_forward`, but without the weights, which fused kernels do not give either."""
    return eager_attention_forward(*args, **kwargs)[0], None


class CATRelativePositionBias(nn.Module):
    """Swin's learned bias for each head and offset within a window."""

    def __init__(self, window: tuple[int, int], num_heads: int):
        super().__init__()
        self.window = window
        self.table = nn.Parameter(torch.zeros((2 * window[0] - 1) * (2 * window[1] - 1), num_heads))
        self.register_buffer("index", relative_position_index(window), persistent=False)

    def forward(self, t: int) -> torch.Tensor:
        """For the first `t` time steps of a window -> (heads, tokens, tokens)."""
        index = self.index.view(self.window * 2)[:t, :, :t]
        # Contiguous, or its sum with a mask would not be.
        return self.table[index].flatten(2, 3).flatten(0, 1).permute(2, 0, 1).contiguous()


class CATAttention(nn.Module):
    """Acoustic attention (Fig. 1): the heads are divided evenly between the filters, with separate dot products.

    The heads of filter g take queries, keys and values from its own stream; `qkv[g]` holds their rows of what would be
    the one dense matrix of plain Swin attention. The heads are concatenated and projected together.
    """

    def __init__(self, config: CATConfig, stage: int):
        super().__init__()
        width = config.stage_width(stage)
        self.config = config
        self.num_heads = config.num_heads[stage]
        self.head_dim = width // self.num_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.qkv = nn.ModuleList(
            CATLinear(width, 3 * width // config.num_filters, bias=config.qkv_bias) for _ in config.filters
        )
        self.output = CATLinear(width, width)
        # Global attention takes positions from the embedding alone, as in AST: its window has no fixed size.
        window = config.window_shape(stage)
        self.position_bias = CATRelativePositionBias(window, self.num_heads) if window else None

    def forward(
        self,
        streams: torch.Tensor,
        norm: Callable[[torch.Tensor], torch.Tensor],
        window: tuple[int, int],
        mask: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            streams: (G, B, t, f, C).
            norm: What normalises them.
            window: Tokens along (t, f), which it divides.
            mask: From `attention_mask_of_windows`.

        Returns:
            (B, t, f, C), and the weights (B * windows, heads, tokens, tokens) if the kernel gives them.
        """
        t, f = streams.shape[2:4]
        # To the kernel, the windows are further heads: so the clips share a bias that is as large as one of them.
        query, key, value = self.heads(streams, norm, window).flatten(2, 3)
        bias = self.bias(mask, query.shape[1] // self.num_heads, window[0])
        output, weights = self.kernel(bias, **kwargs)(
            self,
            query,
            key,
            value,
            bias,
            dropout=self.config.attention_probs_dropout_prob if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )  # (B, N, windows * heads, D)
        output = output.unflatten(2, (-1, self.num_heads)).flatten(3).transpose(1, 2)
        return self.output(window_reverse(output, window, t, f)), weights

    def kernel(self, bias: torch.Tensor | None, output_attentions: bool = False, **kwargs) -> Callable:
        """The attention function for a bias."""
        implementation = self.config._attn_implementation
        needs_gradient = bias is not None and bias.requires_grad and bias.device.type == "cpu"
        # No fused kernel of a CPU has a gradient for the bias, and what PyTorch falls back to keeps more for it. But
        # transformers' own function says that it has no attentions to give.
        if implementation == "sdpa" and needs_gradient and not output_attentions:
            return unfused_attention_forward
        return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)

    def heads(self, streams: torch.Tensor, norm: Callable, window: tuple[int, int]) -> torch.Tensor:
        """Queries, keys and values of all filters: (3, B, windows, heads, N, D)."""
        qkv = []
        for stream, project in zip(streams, self.qkv):  # one after the other, for less memory at a time
            projected = linear_after(lambda stream: window_partition(norm(stream), window), project, stream)
            qkv.append(projected.unflatten(3, (3, -1, self.head_dim)).permute(3, 0, 1, 4, 2, 5))
        return torch.cat(qkv, dim=3)

    def bias(self, mask: torch.Tensor | None, windows: int, t: int) -> torch.Tensor | None:
        """Position bias and mask as one tensor, (B or 1, windows * heads, N, N)."""
        if mask is not None:
            mask = mask[:, :, None].expand(-1, -1, self.num_heads, -1, -1)  # (B or 1, windows, heads, N, N)
        if self.position_bias is None:
            return None if mask is None else mask.flatten(1, 2)
        bias = self.position_bias(t)
        return (bias.expand(1, windows, -1, -1, -1) if mask is None else bias + mask).flatten(1, 2)


class CATMLP(nn.Sequential):
    """Two linear maps with an activation between them."""

    def __init__(self, config: CATConfig, width: int):
        hidden = int(config.mlp_ratio * width)
        super().__init__(CATLinear(width, hidden), ACT2FN[config.hidden_act], CATLinear(hidden, width))

    def forward(self, tokens: torch.Tensor, norm: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Tokens (..., C), and what normalises them, -> (..., C)."""
        return linear_after(self[1], self[2], linear_after(norm, self[0], tokens))


class CATDropPath(nn.Module):
    """Stochastic depth (Huang et al., 2016): drops a residual branch for some clips of a batch."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        if not self.training or self.rate == 0.0:
            return branch
        keep = branch.new_empty(branch.shape[0], *[1] * (branch.ndim - 1)).bernoulli_(1 - self.rate)
        return branch * keep / (1 - self.rate)


class CATBlock(GradientCheckpointingLayer):
    """h + attention(LN(h + delta_g)), then h + MLP(LN(h)): Swin's block, but for the streams that attention reads."""

    def __init__(self, config: CATConfig, stage: int, drop_path_rate: float):
        super().__init__()
        width, kernel = config.stage_width(stage), config.depthwise_kernel_size
        self.depthwise = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width) if kernel else None
        if kernel:
            self.depthwise.initial_std = 0.0
        self.norm_attention = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attention = CATAttention(config, stage)
        self.norm_mlp = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = CATMLP(config, width)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = CATDropPath(drop_path_rate)

    def forward(
        self,
        trunk: torch.Tensor,
        offsets: torch.Tensor | None,
        token_mask: torch.Tensor | None,
        window: tuple[int, int],
        shift: tuple[int, int],
        window_mask: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Trunk (B, t, f, C), offsets (G, B, t, f, C) -> trunk, attention weights."""
        if self.depthwise is not None:
            local = self.depthwise(zero_padding(trunk, token_mask).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            trunk = trunk + self.drop_path(local)
        trunk = shift_windows(trunk, shift)
        offsets = None if offsets is None else shift_windows(offsets, shift)
        trunks, weights = [], []
        for clips, steps in slices(self, trunk, trunk.shape[:3], window[0]):
            part = None if offsets is None else offsets[:, clips, steps]
            mask = part_of_mask(window_mask, clips, steps, trunk.shape[2], window)
            output, weight = self.within_windows(trunk[clips, steps], part, window, mask, **kwargs)
            trunks.append(output)
            weights.append(weight)
        trunk = join_slices(trunks, trunk.shape[0])
        weights = weights[0] if len(weights) == 1 or weights[0] is None else torch.cat(weights)
        return shift_windows(trunk, (-shift[0], -shift[1])), weights

    def within_windows(
        self,
        trunk: torch.Tensor,
        offsets: torch.Tensor | None,
        window: tuple[int, int],
        mask: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention and MLP: no token sees beyond its window. As `forward`."""
        # The norms as functions: of a module among the arguments, accelerate would move the weights.
        norm_attention, norm_mlp = self.norm_attention.__call__, self.norm_mlp.__call__
        # No name for what is large and needed once: it would be kept to the end.
        attended, weights = self.attention(join_streams(trunk, offsets), norm_attention, window, mask, **kwargs)
        trunk = trunk + self.drop_path(self.dropout(attended))
        trunk = trunk + self.drop_path(self.dropout(self.mlp(trunk, norm_mlp)))
        return trunk, weights


class CATPatchMerging(nn.Module):
    """Swin's merging of 2x2 tokens, for each filter's stream; the merged streams are split into trunk and offsets."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = CATLinear(4 * width, 2 * width, bias=False)

    def forward(
        self, trunk: torch.Tensor, offsets: torch.Tensor | None, token_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, t, f, C) and (G, B, t, f, C) -> (B, t / 2, f / 2, 2 C) and (G, B, t / 2, f / 2, 2 C)."""
        parts = []
        for clips, steps in slices(self, trunk, trunk.shape[:3], 2):
            part = None if offsets is None else offsets[:, clips, steps]
            mask = None if token_mask is None else token_mask[clips, steps]
            # Zero stands in for what is not there, so that a token beside padding is what it is at the end of a batch.
            streams = zero_padding(join_streams(trunk[clips, steps], part), mask)
            streams = pad_time(pad_time(streams, 2, 2), 2, 3)
            quads = streams.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # (G, B, t / 2, 2, f / 2, 2, C)
            quads = quads.permute(0, 1, 2, 4, 5, 3, 6)  # (G, B, t / 2, f / 2, 2, 2, C)
            parts.append(linear_after(lambda quads: self.norm(quads.flatten(4)), self.reduction, quads))
        return split_streams(join_slices(parts, trunk.shape[0]))


class CATStage(nn.Module):
    """Blocks of one resolution, every other one with shifted windows, then patch merging (but in the last stage)."""

    def __init__(self, config: CATConfig, stage: int, drop_path_rates: list[float]):
        super().__init__()
        last = stage == len(config.depths) - 1
        self.window = config.window_shape(stage)
        self.shift = (0, 0)
        # The last stage's window spans the audio of the design length, so that it needs no shift. Whether to shift
        # must not depend on the length itself, or a clip would be treated otherwise in a batch with longer ones.
        if self.window and not last:
            self.shift = (self.window[0] // 2, self.window[1] // 2 if config.stage_bins(stage) > self.window[1] else 0)
        self.blocks = nn.ModuleList(CATBlock(config, stage, rate) for rate in drop_path_rates)
        self.merging = None if last else CATPatchMerging(config.stage_width(stage))

    def forward(
        self,
        trunk: torch.Tensor,
        offsets: torch.Tensor | None,
        token_mask: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Trunk (B, t, f, C), offsets (G, B, t, f, C), mask (B, t) -> trunk, offsets, weights of the last block."""
        length = trunk.shape[1]
        window, shift = self.windows(length, trunk.shape[2])
        # Whole windows from here to the end of the stage; what was added is padding like any other.
        multiple = window[0] if self.window else 1
        padded_mask = self.pad_mask(token_mask, length, multiple, trunk.device)
        trunk = pad_time(trunk, multiple, 1)
        offsets = None if offsets is None else pad_time(offsets, multiple, 2)
        size = tuple(trunk.shape[1:3])
        still = attention_mask_of_windows(padded_mask, size, window, (0, 0), trunk)
        shifted = still
        if shift != (0, 0) and len(self.blocks) > 1:
            shifted = attention_mask_of_windows(padded_mask, size, window, shift, trunk)
        weights = None
        for index, block in enumerate(self.blocks):
            by, mask = (shift, shifted) if index % 2 else ((0, 0), still)
            trunk, weights = block(trunk, offsets, padded_mask, window, by, mask, **kwargs)
        trunk = crop_time(trunk, length, 1)
        offsets = None if offsets is None else crop_time(offsets, length, 2)
        if self.merging is not None:
            trunk, offsets = self.merging(trunk, offsets, token_mask)
        return trunk, offsets, weights

    def windows(self, length: int, bins: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Window and shift for `length` time steps: with window_size=None all of them, else those of the stage.

        But for a clip that the stage sees in one part of a window, the rest of which would be padding, no more than
        that part: the result is the same. (Of a shifted window, as many time steps as it is shifted by stay together.)
        """
        if self.window is None:
            return (length, bins), (0, 0)
        undivided = (self.shift[0] if len(self.blocks) > 1 else 0) or self.window[0]
        if isinstance(length, int) and length <= undivided:  # a graph for every length has the whole window
            return (length, self.window[1]), (0, self.shift[1])
        return self.window, self.shift

    @staticmethod
    def pad_mask(
        token_mask: torch.Tensor | None, length: int, multiple: int, device: torch.device
    ) -> torch.Tensor | None:
        """(B, t) or `None` -> (B or 1, t) for whole windows, or `None` where nothing is padding."""
        if is_certain(length % multiple == 0):
            return token_mask
        if token_mask is None:
            token_mask = torch.ones(1, length, dtype=torch.bool, device=device)
        return pad_time(token_mask, multiple, 1)


# Models


class CATPreTrainedModel(PreTrainedModel):
    """Initial weights and what transformers needs to know of the architecture."""

    config: CATConfig
    base_model_prefix = "cat"
    main_input_name = "input_values"
    input_modalities = ("audio",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["CATEmbeddings", "CATStage"]
    _supports_sdpa = True
    _supports_flash_attn = False  # its kernels take no dense additive bias
    _supports_flex_attn = False
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": OutputRecorder(CATStage, index=0),
        "attentions": OutputRecorder(CATStage, index=2),
    }
    _input_embed_layer = "embeddings"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Children come before their parents, and what is initialised once stays: so a layer that needs another spread
        # than `initializer_range` carries it.
        initial_std = getattr(module, "initial_std", None)
        if initial_std is not None:
            init.normal_(module.weight, std=initial_std)
            if module.bias is not None:
                init.zeros_(module.bias)
            return
        super()._init_weights(module)
        if isinstance(module, MRMFSpectrogram):
            for name, constant in module.constants().items():
                init.copy_(getattr(module, name), torch.from_numpy(constant))
        elif isinstance(module, CATBatchNorm):
            init.zeros_(module.num_batches_tracked)
        elif isinstance(module, CATResolutionExchange):
            # Patches of unit variance give queries, keys and values of unit variance.
            init.normal_(module.qkv, std=module.qkv.shape[1] ** -0.5)
            init.zeros_(module.bias)
        elif isinstance(module, CATPositionEmbedding):
            init.normal_(module.filters, std=self.config.initializer_range)
            init.ones_(module.gate)
        elif isinstance(module, CATRelativePositionBias):
            init.normal_(module.table, std=self.config.initializer_range)
            init.copy_(module.index, relative_position_index(module.window))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """As in transformers, but of safetensors alone: unpickling weights could run code that came with them."""
        name = str(pretrained_model_name_or_path)
        pickled = os.path.isfile(name) and not name.endswith(".safetensors")
        if pickled or any(kwargs.get(option) is False for option in ("use_safetensors", "weights_only")):
            raise ValueError(
                f"The weights of {name} are loaded from safetensors alone, since unpickling could run code. Convert "
                "them with `safetensors.torch.save_file`, and leave out `use_safetensors=False` and "
                "`weights_only=False`."
            )
        kwargs["use_safetensors"] = True
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    def save_pretrained(self, *args, **kwargs) -> None:
        """As in transformers; but what is saved without its code does not name files that it lacks."""
        if self._auto_class is None:
            drop_local_code(self.config)
        super().save_pretrained(*args, **kwargs)


class CATModel(CATPreTrainedModel):
    """The acoustic Swin encoder, from waveforms or MRMF spectrograms to the latent Z."""

    def __init__(self, config: CATConfig):
        super().__init__(config)
        self.mrmf = MRMFSpectrogram(**mrmf_arguments(config))
        self.feature_norm = CATBatchNorm(config.feature_size, affine=False)  # a projection follows
        self.embeddings = CATEmbeddings(config)
        blocks = sum(config.depths)
        rates = [config.drop_path_rate * block / max(blocks - 1, 1) for block in range(blocks)]
        self.stages = nn.ModuleList()
        for stage, depth in enumerate(config.depths):
            before = sum(config.depths[:stage])
            self.stages.append(CATStage(config, stage, rates[before : before + depth]))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        if (quantization := getattr(config, "quantization_config", None)) is not None:
            if getattr(quantization, "load_in_8bit", False):
                raise ValueError(
                    "`load_in_8bit` of bitsandbytes takes no token maps, which have more than three dimensions: use "
                    "`load_in_4bit`, or the 8 bits of torchao."
                )
            make_plain(self)
        self.post_init()

    def features(
        self, input_values: torch.Tensor, attention_mask: torch.Tensor | None, whiten: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Either input -> MRMF (B, T, G * K * F) float32 and its mask (B, T) bool, `None` if nothing is padding.

        `whiten` is `False` for waveforms that are whitened already.
        """
        if not torch.compiler.is_compiling():
            self.validate(input_values, attention_mask)
        # Meta tensors have no values to look at. A look would break a graph that is being traced, and in training it
        # would keep a GPU waiting.
        look = not (transformed() or input_values.is_meta or (self.training and input_values.device.type != "cpu"))
        if attention_mask is not None:
            attention_mask = attention_mask.bool()
            if look and bool(attention_mask.all()):
                attention_mask = None  # it costs time
        elif look and input_values.ndim == 3 and self.config.log_offset != 1:  # whose silence is 0 as well
            attention_mask = padding_of(input_values)
        if input_values.ndim == 2:
            features, attention_mask = self.mrmf(input_values, attention_mask, whiten)
        elif attention_mask is None:
            features = input_values
        else:  # not by a product: what is on padding may be NaN
            features = input_values.masked_fill(~attention_mask[..., None], 0)
        # In training the loss shows it.
        if look and not self.training and not bool(features.abs().amax() < MAX_LOG_POWER):
            raise ValueError(
                f"`input_values` has NaN, infinite or huge values: its features must lie within {MAX_LOG_POWER:g} of "
                "zero, as log power does. Repair the audio, or leave it out."
            )
        return features, attention_mask

    def validate(self, input_values: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        """Raises ValueError, with types and shapes named, for inputs that the model cannot read."""
        if not isinstance(input_values, torch.Tensor) or not input_values.is_floating_point():
            kind = getattr(input_values, "dtype", type(input_values).__name__)
            raise ValueError(
                f"`input_values` must be a tensor of floats, the output of CATFeatureExtractor, not {kind}."
            )
        shape = tuple(input_values.shape)
        # As wide as features, two dimensions are one clip's without its batch, not waveforms of some milliseconds.
        if not len(shape) == 2 + (shape[-1:] == (self.config.feature_size,)):
            raise ValueError(
                f"`input_values` has shape {shape}, but must be MRMF features (clips, frames, "
                f"{self.config.feature_size}) or waveforms (clips, samples). Make them with a CATFeatureExtractor that "
                "has this model's `filters`, `window_lengths` and `num_bins`."
            )
        if 0 in shape:
            raise ValueError(
                f"`input_values` of shape {shape} is empty: pass at least one clip, of at least one frame."
            )
        is_tensor = isinstance(attention_mask, torch.Tensor)
        if attention_mask is not None and not (is_tensor and tuple(attention_mask.shape) == shape[:2]):
            found = f"of shape {tuple(attention_mask.shape)}" if is_tensor else f"a {type(attention_mask).__name__}"
            raise ValueError(
                f"`attention_mask` must be a tensor of shape {shape[:2]}, one value for each frame or sample of "
                f"`input_values`, not {found}."
            )

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        input_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CATModelOutput:
        r"""
        Args:
            input_values (`torch.Tensor` of shape `(B, T, G * K * F)` or `(B, N)`): Spectrograms or waveforms, as
                [`CATFeatureExtractor`] returns them with `do_mrmf=True` or `False`. N is not `G * K * F`, some 12 ms.
            attention_mask (`torch.Tensor` of shape `(B, T)` or `(B, N)`, *optional*): 1 where there is audio, 0 on
                padding. What a clip is padded with, or batched with, does not change its output. Without a mask, frames
                of zeros are padding, but not in training on an accelerator and in what is compiled or traced.

        Raises:
            ValueError: `input_values` is missing or empty, or has another shape or type than the above; in evaluation
                mode also where its audio is not finite.
        """
        if input_values is None:
            raise ValueError("Pass `input_values`: the output of CATFeatureExtractor.")
        features, frame_mask = self.features(input_values, attention_mask)
        weight = self.embeddings.projection.weight
        features = self.feature_norm(features, frame_mask, self._norm_learns())
        trunk, offsets = split_streams(self.embeddings(features.to(weight.dtype), frame_mask))
        token_mask = any_of(frame_mask, self.config.patch_size[0])
        for stage in self.stages:
            trunk, offsets, _ = stage(trunk, offsets, token_mask, **kwargs)
            if stage.merging is not None:
                token_mask = any_of(token_mask, 2)
        tokens = self.norm(trunk)
        if token_mask is not None:
            token_mask = token_mask.to(tokens.device)  # where a model is spread over several, the last stage's
        return CATModelOutput(
            last_hidden_state=tokens,
            pooler_output=self.pool(tokens, token_mask),
            token_mask=token_mask,
            normalized_features=features,
            frame_mask=frame_mask,
        )

    def _norm_learns(self) -> bool:
        """Whether the norm of the features, which has no weights of its own, follows the batches it is trained on.

        It does with the projection behind it; beside one that peft has copied (`modules_to_save`, whose wrapper has an
        `original_module`), only if it is copied too: its statistics would not be saved.
        """
        copied = any(hasattr(part, "original_module") for part in (self.embeddings, self.embeddings.projection))
        kept = not copied or hasattr(self.feature_norm, "original_module")
        return kept and self.embeddings.projection.weight.requires_grad

    @staticmethod
    def pool(tokens: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
        """Z: (B, t, f, C) -> (B, C), the mean over the tokens that hold audio."""
        if token_mask is None:
            return tokens.mean((1, 2))
        weight = token_mask.to(tokens.dtype)
        return (tokens.mean(2) * weight[..., None]).sum(1) / weight.sum(1, keepdim=True).clamp(min=1)


class CATForAudioClassification(CATPreTrainedModel):
    """CAT with a linear head on Z, for single-label, multi-label and regression problems.

    With labels, the loss is L = l_theta + w_c l_c + w_rs l_rs (eq. 10): classification, causal and reconstruction loss,
    with the weights of the configuration. In evaluation mode it is l_theta alone: that can be compared between models
    and does not depend, as l_c does, on what a clip is batched with.
    """

    # The losses are means over the batch. transformers would otherwise take a forward with **kwargs to divide by the
    # number of items in an accumulated batch itself, and scale multi-label gradients wrongly.
    accepts_loss_kwargs = False
    # The reconstruction block belongs to training: a checkpoint may lack it, and inference may leave it out.
    _keys_to_ignore_on_load_missing = [r"^reconstruction\."]
    _keys_to_ignore_on_load_unexpected = [r"^reconstruction\."]

    def __init__(self, config: CATConfig):
        super().__init__(config)
        self.cat = CATModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.reconstruction = None
        if config.reconstruction_loss_weight:
            last = 2 ** (len(config.depths) - 1)
            patch = (config.patch_size[0] * last, config.patch_size[1] * last)
            self.reconstruction = ReconstructionHead(
                config.hidden_size, config.num_filters, config.num_resolutions, patch
            )
        self.post_init()

    @property
    def num_labels(self) -> int:
        """The configuration's, also where a new head has changed it."""
        return self.config.num_labels

    @num_labels.setter
    def num_labels(self, value: int) -> None:
        self.config.num_labels = value

    def freeze_feature_encoder(self) -> None:
        """Stops the training of the embeddings and of their batch norms' statistics; the trunk and the head go on."""
        self.cat.embeddings.requires_grad_(False)

    def drop_reconstruction(self) -> None:
        """Removes the reconstruction block, of which inference has no use, and its loss from the configuration."""
        self.reconstruction = None
        self.config.reconstruction_loss_weight = 0.0

    @can_return_tuple
    def forward(
        self,
        input_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_frame_logits: bool = False,
        output_pns: bool = False,
        output_reconstruction: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CATSequenceClassifierOutput:
        r"""
        Args:
            input_values, attention_mask: As for [`CATModel`].
            labels (`torch.Tensor`, *optional*): `(B,)` class indices, or `(B, num_labels)` floats: probabilities for
                a `problem_type` of `"single_label_classification"` (as mixup makes them), 0 to 1 each for
                `"multi_label_classification"`, targets for `"regression"`. Without a `problem_type` in the
                configuration, it is inferred as everywhere in transformers.
            output_frame_logits (`bool`, defaults to `False`): Also return the scores of each time step.
            output_pns (`bool`, defaults to `False`): Also return how necessary and sufficient each feature of Z is for
                the labels, or, without labels, for what the model predicts. The next `num_donors` clips of the batch
                are what the feature is compared with, so a batch of one gives zeros.
            output_reconstruction (`bool`, defaults to `False`): Also return the reconstructed MRMF.

        Raises:
            ValueError: A reconstruction is asked for of a model without the block; or `labels` has another shape than
                the above; or, but for training on an accelerator, a class index that there is not, or probabilities
                whose sum is not 1.
        """
        outputs = self.cat(input_values, attention_mask=attention_mask, return_dict=True, **kwargs)
        latents = outputs.pooler_output
        logits = self.classifier(latents)
        labels = labels.to(logits.device) if isinstance(labels, torch.Tensor) else labels  # a list is refused below
        patches = None
        if output_reconstruction or (labels is not None and self.training and self.reconstruction is not None):
            patches = self.reconstruct(outputs)
        return CATSequenceClassifierOutput(
            **({} if labels is None else self.objective(outputs, logits, labels, patches)),
            logits=logits,
            frame_logits=self.frame_logits(outputs) if output_frame_logits else None,
            token_mask=outputs.token_mask if output_frame_logits else None,
            pooler_output=latents,
            pns=self.pns(latents, logits, labels) if output_pns else None,
            reconstruction=self.assemble(patches, outputs) if output_reconstruction else None,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def frame_logits(self, outputs: CATModelOutput) -> torch.Tensor:
        """The head's scores of each time step, zero where `token_mask` says that there is no audio."""
        scores = self.classifier(outputs.last_hidden_state.mean(2))
        return scores if outputs.token_mask is None else scores * outputs.token_mask[..., None].to(scores.dtype)

    def objective(
        self,
        outputs: CATModelOutput,
        logits: torch.Tensor,
        labels: torch.Tensor,
        patches: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        """L of eq. (10) as `loss`, and its parts by name; in evaluation l_theta alone."""
        loss = classification = self.classification_loss(logits, labels)
        parts = {"classification_loss": classification}
        if not self.training:
            return {"loss": loss, **parts}
        # The first call may infer the problem type, so the others follow. A regression has no event to cause.
        if self.config.causal_loss_weight and self.config.problem_type != "regression":
            parts["causal_loss"] = self.causal_loss(outputs.pooler_output, labels)
            loss = loss + self.config.causal_loss_weight * parts["causal_loss"]
        if self.reconstruction is not None:
            patches = patches.to(outputs.normalized_features.device)
            target = self.spectrograms(outputs.normalized_features)
            reconstruction_loss = self.reconstruction.loss(patches, target, outputs.frame_mask)
            parts["reconstruction_loss"] = reconstruction_loss.to(loss.device)
            loss = loss + self.config.reconstruction_loss_weight * parts["reconstruction_loss"]
        return {"loss": loss, **parts}

    def classification_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """l_theta of eq. (10)."""
        if not torch.compiler.is_compiling():
            self.validate_labels(labels, len(logits))
        if self.config.problem_type == "single_label_classification" and labels.is_floating_point():
            return nn.functional.cross_entropy(logits, labels.to(logits))
        if self.config.problem_type == "multi_label_classification":
            labels = labels.to(logits)
        return self.loss_function(labels, logits, self.config)

    def validate_labels(self, labels: torch.Tensor, clips: int) -> None:
        """Raises ValueError, with what is wrong named, for labels that the loss cannot read."""
        if not isinstance(labels, torch.Tensor):
            raise ValueError(f"`labels` must be a tensor, not {type(labels).__name__}.")
        problem_type = implied_problem_type(self.config)
        indices = not labels.is_floating_point() and problem_type in (None, "single_label_classification")
        if self.num_labels == 1 and labels.is_floating_point() and problem_type == "single_label_classification":
            raise ValueError(
                "`labels` are floats and `num_labels` is 1, as in a regression, but `problem_type` is "
                "'single_label_classification': pass `problem_type='regression'` to `from_pretrained`."
            )
        flat = indices or (self.num_labels == 1 and problem_type != "multi_label_classification")
        shapes = [(clips,), (clips, 1)] if flat else [(clips, self.num_labels)]
        if tuple(labels.shape) not in shapes:
            raise ValueError(
                f"`labels` has shape {tuple(labels.shape)} and type {labels.dtype}, but {clips} clips and `num_labels` "
                f"{self.num_labels} need {' or '.join(map(str, shapes))}: class indices are integers (clips,), "
                "probabilities, multi-hot labels and targets floats (clips, num_labels)."
            )
        # There are no values to look at, or a look would keep a GPU waiting.
        if labels.is_meta or (labels.device.type != "cpu" and self.training):
            return
        if not indices:
            if problem_type == "single_label_classification" and bool(((labels.sum(1) - 1).abs() > 0.01).any()):
                raise ValueError(
                    "`labels` are no probabilities, since their rows do not sum to 1, but `problem_type` is "
                    "'single_label_classification'. For several labels of a clip, or none, pass "
                    "`problem_type='multi_label_classification'` to `from_pretrained`."
                )
            return
        wrong = labels[((labels < 0) & (labels != -100)) | (labels >= self.num_labels)]
        if wrong.numel():
            raise ValueError(
                f"`labels` has the class index {int(wrong[0])}, but `num_labels` is {self.num_labels}: indices go from "
                f"0 to {self.num_labels - 1}, and -100 leaves a clip out."
            )

    def causal_loss(self, latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """l_c, eq. (8)."""
        return causal_loss(
            latents,
            *linear_head(self.classifier, latents),
            class_targets(labels, self.num_labels),
            estimator=self.config.causal_estimator,
            num_donors=self.config.num_donors,
            form=self.config.causal_form,
            reduction=self.config.causal_reduction,
            multi_label=self.config.problem_type == "multi_label_classification",
        )

    def pns(self, latents: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """max(0, U) of each feature for the labels, or for the prediction: (B, d)."""
        multi_label = self.config.problem_type == "multi_label_classification"
        if labels is not None and self.config.problem_type != "regression":
            targets = class_targets(labels, self.num_labels)
        elif multi_label:
            targets = (logits > 0).float()
        else:
            targets = class_targets(logits.argmax(-1), self.num_labels)
        weight, bias = linear_head(self.classifier, latents)
        return conditional_pns(
            latents, weight, bias, targets, num_donors=self.config.num_donors, multi_label=multi_label
        ).clamp(min=0)

    def reconstruct(self, outputs: CATModelOutput) -> torch.Tensor:
        """Phi(f(X)) of eq. (7), in patches: the last token map -> (B, t, f, G, K, frames, bins)."""
        if self.reconstruction is None:
            raise ValueError(
                "This model has no reconstruction block: its configuration has `reconstruction_loss_weight` 0. Load it "
                "with a positive one, from a checkpoint that was trained with it."
            )
        return self.reconstruction(outputs.last_hidden_state)

    def assemble(self, patches: torch.Tensor, outputs: CATModelOutput) -> torch.Tensor:
        """Patches of a reconstruction -> (B, G, K, T, F)."""
        return self.reconstruction.assemble(patches, outputs.normalized_features.shape[1], self.config.num_bins)

    def spectrograms(self, features: torch.Tensor) -> torch.Tensor:
        """X of eq. (7): (B, T, G * K * F) -> (B, G, K, T, F)."""
        shape = (self.config.num_filters, self.config.num_resolutions, self.config.num_bins)
        return features.unflatten(2, shape).permute(0, 2, 3, 1, 4)


__all__ = ["CATForAudioClassification", "CATModel", "CATPreTrainedModel"]
