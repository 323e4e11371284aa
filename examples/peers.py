#!/usr/bin/env python
r"""Models to compare CAT with: of its size, from the same spectrograms, with the same loss.

    python examples/peers.py --kind cnn --normalize_volume --output_dir runs/cnn-config

writes what `--config_name` of the other scripts needs to train one from scratch.

All read one log-mel spectrogram (64 bins, 25 ms window, 10 ms hop), as HTS-AT does, behind a batch norm of the bins:

cnn      four times 3x3 convolution, batch norm, ReLU and 2x2 max pooling; mean plus maximum over the map; dropout
hts-at   transformers' `ClapAudioModel` (Chen et al., 2022)
ast      transformers' `ASTModel` (Gong et al., 2021), with its overlapping 16x16 patches

The last two read a fixed length, that of the training crops: a longer clip is cut into pieces of it, whose outputs are
averaged by the frames that are not silent, since the training crops give up no sound for silence either. Padding is not
masked: this is for data sets whose clips have one length.
"""

import argparse
import math
from pathlib import Path

import torch
from torch import nn
from transformers import (
    ASTConfig,
    ASTModel,
    AutoConfig,
    AutoModelForAudioClassification,
    ClapAudioConfig,
    ClapAudioModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput

from transformers_cat import CATFeatureExtractor
from transformers_cat.configuration_cat import LOG_OFFSET
from transformers_cat.training.metrics import MULTI_LABEL

BINS = 64
SILENCE = math.log(1.1 * LOG_OFFSET)  # log power that digital silence stays below


class PeerConfig(PreTrainedConfig):
    """Which peer, and how many frames it reads at once."""

    model_type = "cat-peer"

    def __init__(self, kind: str = "cnn", num_frames: int = 256, **kwargs):
        super().__init__(**kwargs)
        self.kind = kind
        self.num_frames = num_frames


class CNN(nn.Module):
    """(B, T, 64) -> (B, 256)."""

    def __init__(self, config: PeerConfig, channels: tuple[int, ...] = (32, 64, 128, 256)):
        super().__init__()
        layers = []
        for before, after in zip((1, *channels), channels):
            convolution = nn.Conv2d(before, after, 3, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)]
        self.layers = nn.Sequential(*layers)
        self.dropout = nn.Dropout(0.3)
        self.width = channels[-1]

    def forward(self, spectrogram: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        features, maps = spectrogram[:, None], []
        for layer in self.layers:
            features = layer(features)
            if isinstance(layer, nn.MaxPool2d):
                maps.append(features.flatten(2).transpose(1, 2))  # (B, n, C)
        pooled = self.dropout(maps[-1].mean(1) + maps[-1].amax(1))
        return BaseModelOutputWithPooling(pooler_output=pooled, hidden_states=tuple(maps))


class HTSAT(nn.Module):
    """(B, T, 64) -> (B, 192); T is at most `num_frames`."""

    width = 192

    def __init__(self, config: PeerConfig):
        super().__init__()
        # Its image of S x S holds S * S / 64 frames of 64 bins; windows as wide as the last stage's map.
        size = 256 if config.num_frames > 256 else 128
        self.model = ClapAudioModel(
            ClapAudioConfig(
                spec_size=size,
                window_size=size // 32,
                num_mel_bins=BINS,
                patch_embeds_hidden_size=24,
                depths=[2, 2, 2, 2],
                num_attention_heads=[2, 4, 8, 16],
                hidden_size=self.width,
            )
        )

    def forward(self, spectrogram: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        output = self.model(spectrogram[:, None], **kwargs)
        if output.hidden_states is not None:  # maps, (B, C, time, frequency)
            output.hidden_states = tuple(state.flatten(2).transpose(1, 2) for state in output.hidden_states)
        return output


class AST(nn.Module):
    """(B, T, 64) -> (B, 192); T is `num_frames`."""

    width = 192

    def __init__(self, config: PeerConfig):
        super().__init__()
        self.frames = config.num_frames
        self.model = ASTModel(
            ASTConfig(
                hidden_size=self.width,
                num_hidden_layers=3,
                num_attention_heads=3,
                intermediate_size=4 * self.width,
                max_length=config.num_frames,
                num_mel_bins=BINS,
            )
        )

    def forward(self, spectrogram: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        return self.model(nn.functional.pad(spectrogram, (0, 0, 0, self.frames - spectrogram.shape[1])), **kwargs)


PEERS = {"cnn": CNN, "hts-at": HTSAT, "ast": AST}


class PeerModel(nn.Module):
    """(B, T, 64), the features of `CATFeatureExtractor` with one filter and one window -> `pooler_output` (B, d).

    On request also `hidden_states`, (B, tokens, width) each: those of all pieces.
    """

    def __init__(self, config: PeerConfig):
        super().__init__()
        self.config = config
        self.norm = nn.BatchNorm1d(BINS)
        self.body = PEERS[config.kind](config)

    def forward(
        self, input_values: torch.Tensor, attention_mask=None, output_hidden_states: bool = False, **kwargs
    ) -> BaseModelOutputWithPooling:
        input_values = input_values.to(self.norm.weight.dtype)
        spectrogram = self.norm(input_values.transpose(1, 2)).transpose(1, 2)
        frames = spectrogram.shape[1] if self.config.kind == "cnn" else self.config.num_frames
        pieces = [
            self.body(piece, output_hidden_states=output_hidden_states) for piece in spectrogram.split(frames, dim=1)
        ]
        pooled = torch.stack([piece.pooler_output for piece in pieces])
        sound = (input_values > SILENCE).any(-1).to(spectrogram.dtype)  # (B, T)
        weight = torch.stack([piece.sum(1, keepdim=True) for piece in sound.split(frames, dim=1)]) + 1e-3
        states = None
        if output_hidden_states:
            states = tuple(torch.cat(own, dim=1) for own in zip(*(piece.hidden_states for piece in pieces)))
        return BaseModelOutputWithPooling(pooler_output=(pooled * weight).sum(0) / weight.sum(0), hidden_states=states)


class PeerForAudioClassification(PreTrainedModel):
    """A peer with a linear head."""

    config_class = PeerConfig
    base_model_prefix = "peer"
    main_input_name = "input_values"
    accepts_loss_kwargs = False

    def __init__(self, config: PeerConfig):
        super().__init__(config)
        self.peer = PeerModel(config)
        self.classifier = nn.Linear(self.peer.body.width, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The head alone, which may be new: the bodies of transformers and PyTorch's layers initialise themselves."""
        if module is self.classifier:
            module.reset_parameters()

    def forward(self, input_values, attention_mask=None, labels=None, **kwargs) -> SequenceClassifierOutput:
        """`labels`: (B,) class indices, or (B, num_labels) probabilities; for several labels a clip, the latter."""
        logits = self.classifier(self.peer(input_values).pooler_output)
        several = self.config.problem_type == MULTI_LABEL
        objective = nn.functional.binary_cross_entropy_with_logits if several else nn.functional.cross_entropy
        loss = None if labels is None else objective(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


AutoConfig.register("cat-peer", PeerConfig)
AutoModelForAudioClassification.register(PeerConfig, PeerForAudioClassification)


def write_peer(
    kind: str, seconds: float, folder: str | Path, normalize_volume: bool = False, whitening: float = 0.0
) -> Path:
    """Writes what `--config_name` needs to train a peer from scratch: its configuration and feature extractor.

    Args:
        kind: One of `PEERS`.
        seconds: Length of the training crops.
        folder: To write to.
        normalize_volume, whitening: The feature extractor's.

    Returns:
        The folder.

    Raises:
        ValueError: There is no such peer, or it needs a length.
    """
    if kind not in PEERS:
        raise ValueError(f"There is no peer {kind!r}, only {', '.join(PEERS)}")
    if kind != "cnn" and not seconds > 0:
        raise ValueError(f"{kind} sees clips of one length: give it, instead of {seconds}, by --max_length_seconds")
    arguments = {"filters": ["mel"], "window_lengths": [800], "hop_lengths": [320], "num_bins": BINS}
    extractor = CATFeatureExtractor(**arguments, normalize_volume=normalize_volume, whitening=whitening)
    num_frames = round(seconds * extractor.sampling_rate / extractor.frame_shift)
    PeerConfig(kind=kind, num_frames=num_frames).save_pretrained(folder)
    extractor.save_pretrained(folder)
    return Path(folder)


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--kind", choices=list(PEERS), required=True)
    parser.add_argument("--max_length_seconds", type=float, default=2.5, help="length of the training crops")
    parser.add_argument("--normalize_volume", action="store_true", help="as the feature extractor of cat-nano does")
    parser.add_argument("--whitening", type=float, default=0.0, help="the feature extractor's share, from 0 to 1")
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args(argv)
    write_peer(args.kind, args.max_length_seconds, args.output_dir, args.normalize_volume, args.whitening)


if __name__ == "__main__":
    main()
