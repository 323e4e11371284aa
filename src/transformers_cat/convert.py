"""Starting weights from other Swin trunks: transformers' `SwinModel` (ImageNet) and `ClapAudioModel` (HTS-AT)."""

import os
import re
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel

from .modeling_cat import CATForAudioClassification, CATModel

# Names in a SwinModel (its newer and its older ones) and a ClapAudioModel -> one vocabulary.
_NAMES = (
    (r"^audio_encoder\.", ""),
    (r"^(embeddings\.patch_embeddings\.projection|patch_embed\.proj)\.", "embeddings.projection."),
    (r"^(embeddings|patch_embed)\.norm\.", "embeddings.norm."),
    (r"^(encoder\.)?layers\.", "stages."),
    (r"^layernorm\.", "norm."),
    (r"\.layernorm_before\.", ".norm_attention."),
    (r"\.layernorm_after\.", ".norm_mlp."),
    (r"\.downsample\.", ".merging."),
    (r"\.attention\.(self\.query|q_proj)\.", ".attention.q."),
    (r"\.attention\.(self\.key|k_proj)\.", ".attention.k."),
    (r"\.attention\.(self\.value|v_proj)\.", ".attention.v."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attention.output."),
    (r"\.(self|relative_position_bias)\.relative_position_bias_table$", ".position_bias.table"),
    (r"\.(intermediate\.dense|mlp\.fc1)\.", ".mlp.0."),
    (r"\.blocks\.(\d+)\.(output\.dense|mlp\.fc2)\.", r".blocks.\1.mlp.2."),
)


@dataclass
class LoadingReport:
    """What became of the weights: names of CAT's parameters, but for `unused`, names of the source's.

    Attributes:
        exact: Taken as they are (rows of the dense qkv matrix among the filters included).
        adapted: Resized, with what was done.
        new: Left at their initial values.
        unused: Of no use here.
    """

    exact: list[str] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.exact)} tensors taken as they are, {len(self.adapted)} adapted:"]
        lines += [f"  {line}" for line in self.adapted]
        lines += [f"{len(self.new)} new: {', '.join(self.new)}", f"{len(self.unused)} unused: {', '.join(self.unused)}"]
        return "\n".join(lines)


@torch.no_grad()
def load_trunk(
    model: CATModel | CATForAudioClassification, source: PreTrainedModel | str | os.PathLike, **kwargs
) -> LoadingReport:
    """Starts the trunk of `model` from the weights of a Swin; the position embedding's gate then starts at 0.

    The source needs the same widths and depths. What differs otherwise is adapted: the channels of the patch kernel to
    the K resolutions (their sum is kept), its size and the windows' position tables by interpolation, and the tables'
    heads by the channels that old and new heads share. HTS-AT has frequency along its image's height, CAT has time
    there: its kernels and tables are transposed.

    Args:
        model: Changed in place.
        source: A `SwinModel`, a `ClapAudioModel`, or a model that holds one of them as its base; or the id or folder of
            their checkpoint.
        kwargs: For `AutoModel.from_pretrained`, with an id or folder.

    Raises:
        ValueError: The source is no Swin, or has other widths or depths; the message names the first difference.
    """
    if isinstance(source, (str, os.PathLike)):
        source = AutoModel.from_pretrained(source, **kwargs)
    source = getattr(source, "audio_model", source.base_model)  # the audio tower of a whole CLAP
    if source.config.model_type not in ("swin", "clap_audio_model"):
        raise ValueError(
            f"Starting weights come from a SwinModel or a ClapAudioModel, not from {type(source).__name__} "
            f"(model type {source.config.model_type!r})."
        )
    model = model.base_model
    if list(source.config.depths) != list(model.config.depths):
        raise ValueError(
            f"`depths` is {list(model.config.depths)} in CAT and {list(source.config.depths)} in the source: give CAT "
            "those of the source."
        )
    transposed = source.config.model_type == "clap_audio_model"
    weights, report = _renamed(source), LoadingReport()
    for name, parameter in model.named_parameters():
        value, how = _value_for(name, parameter, weights, model, transposed)
        if value is None:
            report.new.append(name)
            continue
        if value.shape != parameter.shape:
            raise ValueError(
                f"{name} has shape {tuple(parameter.shape)} in CAT and {tuple(value.shape)} in the source: give CAT "
                "the source's `embed_dim`, `depths` and `mlp_ratio`."
            )
        parameter.copy_(value)
        (report.adapted if how else report.exact).append(f"{name}: {how}" if how else name)
    # What the source does not have starts as the identity.
    position, stem = model.embeddings.position, model.embeddings.stem
    if position is not None:
        nn.init.zeros_(position.gate)
    if stem is not None:
        nn.init.zeros_(stem.output.weight)
    report.unused += sorted(set(weights) - weights.used)
    return report


class _Weights(dict):
    """State dict that remembers what was asked for."""

    def __init__(self, *args):
        super().__init__(*args)
        self.used: set[str] = set()

    def take(self, name: str) -> torch.Tensor | None:
        self.used.add(name)
        return self.get(name)


def _renamed(source: PreTrainedModel) -> _Weights:
    weights = _Weights()
    for name, value in source.state_dict().items():
        if name.endswith("relative_position_index"):  # follows from the window; some releases save it all the same
            continue
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        weights[name] = value
    return weights


def _value_for(
    name: str, parameter: nn.Parameter, weights: _Weights, model: CATModel, transposed: bool
) -> tuple[torch.Tensor | None, str]:
    """The source's value for a parameter, and how it was adapted ("" if not)."""
    if match := re.fullmatch(r"(.*\.attention)\.qkv\.(\d+)\.(weight|bias)", name):
        parts = [weights.take(f"{match[1]}.{part}.{match[3]}") for part in "qkv"]
        if any(part is None for part in parts):
            return None, ""
        # The heads of filter g are the g-th part of the rows of each of q, k and v.
        filters, g = model.config.num_filters, int(match[2])
        return torch.cat([part.chunk(filters)[g] for part in parts]), ""
    value = weights.take(name)
    if value is None:
        return None, ""
    if name == "embeddings.projection.weight":
        return _patch_kernel(value, parameter.shape, transposed)
    if name.endswith("position_bias.table"):
        bias = model.get_submodule(name.removesuffix(".table"))
        width = model.get_submodule(name.removesuffix(".position_bias.table")).output.in_features
        return _position_table(value, bias.window, parameter.shape[1], width, transposed)
    if ".merging." in name and transposed and value.shape[-1] % 4 == 0:
        # The four tokens are concatenated as (0, 0), (1, 0), (0, 1), (1, 1) of (height, width).
        return value.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :].flatten(-2), ""
    return value, ""


def _patch_kernel(kernel: torch.Tensor, shape: torch.Size, transposed: bool) -> tuple[torch.Tensor, str]:
    """(C, channels, height, width) -> (C, K, frames, bins)."""
    kernel = kernel.transpose(2, 3) if transposed else kernel
    done = []
    if kernel.shape[1] != shape[1]:
        done.append(f"{kernel.shape[1]} channels to {shape[1]} resolutions, their sum kept")
        kernel = kernel.sum(1, keepdim=True).expand(-1, shape[1], -1, -1) / shape[1]
    if kernel.shape[2:] != shape[2:]:
        done.append(f"patch {tuple(kernel.shape[2:])} to {tuple(shape[2:])}")
        scale = kernel.shape[2] * kernel.shape[3] / (shape[2] * shape[3])  # a constant input keeps its output
        kernel = scale * nn.functional.interpolate(kernel, tuple(shape[2:]), mode="bicubic", align_corners=False)
    return kernel, ", ".join(done)


def _position_table(
    table: torch.Tensor, window: tuple[int, int], heads: int, width: int, transposed: bool
) -> tuple[torch.Tensor, str]:
    """((2 w - 1)^2, heads) -> ((2 w_t - 1) (2 w_f - 1), heads)."""
    side = round(table.shape[0] ** 0.5)
    grid = table.T.unflatten(1, (side, side))[None]  # (1, heads, height, width)
    grid = grid.transpose(2, 3) if transposed else grid
    target = (2 * window[0] - 1, 2 * window[1] - 1)
    done = []
    if grid.shape[2:] != target:
        done.append(f"offsets {tuple(grid.shape[2:])} to {target}")
        grid = nn.functional.interpolate(grid, target, mode="bicubic", align_corners=False)
    if grid.shape[1] != heads:
        done.append(f"{grid.shape[1]} heads to {heads}")
        owner = torch.arange(width) // (width // grid.shape[1])  # each channel's old head
        share = nn.functional.one_hot(owner, grid.shape[1]).to(grid).unflatten(0, (heads, -1)).mean(1)
        grid = torch.einsum("nh,bhtf->bntf", share, grid)
    return grid[0].flatten(1).T.contiguous(), ", ".join(done)
