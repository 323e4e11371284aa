"""From decoded clips to a batch: augmentation of waveforms, one call of the feature extractor, masks on features.

Examples with a `seed`, as `AudioTrainer` draws them, are augmented by it: a resumed run sees what the uninterrupted one
would have seen, with any number of data workers. Otherwise all randomness comes from torch's global generator.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
import torch
import torchaudio.functional as audio_functional
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..mrmf import filter_edges

# A time band never covers more of a clip than this, however short the clip is.
MAX_MASKED_SHARE = 0.5
# Digital silence, of full scale: the smallest step of 16 bits, which lossy codecs may leave in what was zero.
SILENCE = 2**-15
PEAK = 0.5  # of full scale, of a whitened recording where volume makes no difference


@dataclass
class AudioCollator:
    """Collate `{"audio": waveform (N,), "label": ...}` into a batch for the model.

    In training, in this order: the extractor's whitening, if it has that, a random crop at a random speed, a cyclic
    time roll, a gain, mixup of waveforms and labels, the rest of the feature extractor, SpecAugment. In evaluation: the
    feature extractor and nothing else.

    A label is a class id, a list of class ids (several labels), or a row of float targets (num_labels,).

    Args:
        feature_extractor: a `CATFeatureExtractor`; any feature extractor of Transformers works with the masks off.
        training: whether to augment.
        num_labels: number of classes C.
        mixup_probability: probability, per clip, of being mixed with another clip of the batch. The paper's 0.5.
        mixup_alpha: the share of a mixed clip is drawn from Beta(alpha, alpha); 1 is uniform, as in the paper's
            reference [29].
        time_roll: largest cyclic shift, as a share of the clip's length.
        gain_db: largest gain, up or down, in dB: recordings differ in volume, and a model that has not heard that takes
            it for a property of the sound. By default 12, or none where the extractor normalises the volume.
        time_mask: bound on the width of SpecAugment's time band, in frames (10 ms); at most half of a clip.
        freq_mask: bound on the width of SpecAugment's frequency band, in bins of the first filter bank.
        speed: largest factor, up or down, by which a clip is played faster, higher with it; drawn log-uniformly. The
            1.25 of the strong augmentation of Tokozume et al. (2018).
        max_length_seconds: longer clips are cut to this length at a random place in training. A crop never gives up
            sound for digital silence: where a clip starts or ends with it, as files that were filled up to a common
            length do, it holds all of the sound, at a random place, or nothing but sound. Evaluation reads whole clips.

    A zero (or 1 for the speed, None for the length) switches an augmentation off.

    Returns:
        A dict with the extractor's outputs, `input_values` (B, T, D) and, where anything is padding, `attention_mask`
        (B, T); and `labels`: int64 (B,), or float32 (B, C) where a clip has several labels or mixup is on. Without
        labels in the examples, none.

    Raises:
        ValueError: an augmentation's value is out of range, or masks are asked for without features to mask.
    """

    feature_extractor: object
    training: bool
    num_labels: int
    mixup_probability: float = 0.5
    mixup_alpha: float = 1.0
    time_roll: float = 1.0
    gain_db: float | None = None
    time_mask: int = 48
    freq_mask: int = 12
    speed: float = 1.25
    max_length_seconds: float | None = None

    def __post_init__(self):
        if not 0 <= self.mixup_probability <= 1:
            raise ValueError(f"mixup_probability is a probability, not {self.mixup_probability}")
        if self.mixup_probability and self.mixup_alpha <= 0:
            raise ValueError(f"mixup_alpha must be positive, not {self.mixup_alpha}; mixup_probability=0 is no mixup")
        if not 0 <= self.time_roll <= 1:
            raise ValueError(f"time_roll is a share of the clip in [0, 1], not {self.time_roll}")
        if self.gain_db is None:
            self.gain_db = 0.0 if getattr(self.feature_extractor, "normalize_volume", False) else 12.0
        if self.gain_db < 0:
            raise ValueError(f"gain_db must not be negative, not {self.gain_db}")
        if self.speed < 1:
            raise ValueError(f"speed is a factor of at least 1, not {self.speed}; 1 plays every clip as it is")
        if self.max_length_seconds is not None and self.max_length_seconds <= 0:
            raise ValueError(f"max_length_seconds must be positive or None, not {self.max_length_seconds}")
        masks = self.training and (self.time_mask or self.freq_mask)
        if masks and not getattr(self.feature_extractor, "do_mrmf", False):
            raise ValueError(
                "SpecAugment needs the feature extractor's multi-resolution features: use a CATFeatureExtractor with "
                "do_mrmf=True, or switch the masks off with time_mask=0 and freq_mask=0 (and, for waveforms, give an "
                "AudioTrainer its own SpecAugment)"
            )
        self._front_end = self.feature_extractor
        self.whitens = self.training and getattr(self.feature_extractor, "whitening", 0) > 0
        if self.whitens:
            self._front_end = copy(self.feature_extractor)
            self._front_end.whitening = 0.0
        self._spec_augment = None
        if masks:
            self._spec_augment = SpecAugment(self.feature_extractor, self.time_mask, self.freq_mask)

    def __call__(self, examples: Sequence[dict]) -> dict[str, Tensor]:
        if "seed" not in examples[0]:
            return self._collate(examples)
        # Not torch.manual_seed, which would also seed the accelerators, whose generators the model draws from.
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(examples[0]["seed"])
        try:
            return self._collate(examples)
        finally:
            torch.set_rng_state(state)

    def _collate(self, examples: Sequence[dict]) -> dict[str, Tensor]:
        waveforms = [torch.as_tensor(example["audio"], dtype=torch.float32) for example in examples]
        labels = self._labels([example["label"] for example in examples]) if "label" in examples[0] else None
        if self.training:
            if self.whitens:
                waveforms = [self._whiten(waveform) for waveform in waveforms]
            waveforms = [self._roll(self._crop(waveform)) for waveform in waveforms]
            waveforms, labels = self._gain_and_mixup(waveforms, labels)
        batch = self._front_end(
            [waveform.numpy() for waveform in waveforms],
            sampling_rate=self._front_end.sampling_rate,
            padding=True,
            return_tensors="pt",
        )
        batch = dict(batch)
        if self._spec_augment is not None:
            batch["input_values"] = self._spec_augment(batch["input_values"], batch.get("attention_mask"))
        if "attention_mask" in batch and batch["attention_mask"].all():
            del batch["attention_mask"]  # a mask costs time, and a look at it later would keep a GPU waiting
        if labels is not None:
            batch["labels"] = labels
        return batch

    def _labels(self, labels: list) -> Tensor:
        """Class ids (B,), or targets (B, C) where a clip may have several labels."""
        if all(isinstance(label, int) or getattr(label, "ndim", None) == 0 for label in labels):
            ids = torch.as_tensor([int(label) for label in labels])
            self._check_ids(ids)
            return ids
        return torch.stack([self._target_row(torch.as_tensor(label)) for label in labels])

    def _target_row(self, label: Tensor) -> Tensor:
        if label.is_floating_point() and label.numel():
            if label.shape != (self.num_labels,):
                raise ValueError(f"A row of float targets has shape {tuple(label.shape)}, not ({self.num_labels},)")
            return label.float()
        self._check_ids(label)
        return torch.zeros(self.num_labels).index_fill_(0, label.long(), 1.0)

    def _check_ids(self, ids: Tensor) -> None:
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.num_labels:
            raise ValueError(
                f"Labels {ids.tolist()} do not all lie in [0, {self.num_labels}), the classes of the model"
            )

    def _whiten(self, waveform: Tensor) -> Tensor:
        """A whole recording, since a crop or a mixture says less of microphone and room; then as loud as the others."""
        waveform = self.feature_extractor.mrmf.whitened(waveform[None])[0]
        if self.feature_extractor.normalize_volume:
            waveform = waveform * (PEAK / waveform.abs().max().clamp(min=SILENCE))
        return waveform

    def _crop(self, waveform: Tensor) -> Tensor:
        """A crop at a random speed, of all the sound or of nothing else."""
        speed = self.speed ** float(2 * torch.rand(()) - 1) if self.speed > 1 else 1.0
        length = max(round(len(waveform) / speed), 1)
        if self.max_length_seconds is not None:
            length = min(length, round(self.max_length_seconds * self.feature_extractor.sampling_rate))
        if speed == 1 and length == len(waveform):
            return waveform
        sound = _without_silent_ends(waveform)
        span = round(length * speed)  # of the original, for a crop
        if len(sound) > span:
            start = int(torch.randint(len(sound) - span + 1, ()))
            sound = sound[start : start + span]
        if speed != 1:
            size = min(max(round(len(sound) / speed), 1), length)
            sound = torch.nn.functional.interpolate(sound[None, None], size=size, mode="linear")[0, 0]
        missing = length - len(sound)
        before = int(torch.randint(missing + 1, ())) if missing else 0
        return torch.nn.functional.pad(sound, (before, missing - before))

    def _roll(self, waveform: Tensor) -> Tensor:
        if not self.time_roll:
            return waveform
        return waveform.roll(int(self.time_roll * len(waveform) * torch.rand(())))

    def _gain_and_mixup(self, waveforms: list[Tensor], labels: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
        lengths = torch.tensor([len(waveform) for waveform in waveforms])
        stacked = pad_sequence(waveforms, batch_first=True)  # (B, N)
        if self.gain_db:
            decibels = self.gain_db * (2 * torch.rand(len(stacked), 1) - 1)
            stacked = stacked * 10 ** (decibels / 20)
        if self.mixup_probability and labels is not None:
            if labels.ndim == 1:
                labels = torch.nn.functional.one_hot(labels, self.num_labels).float()
            stacked, lengths, labels = self._mixup(stacked, lengths, labels)
        return [row[:length] for row, length in zip(stacked, lengths.tolist(), strict=True)], labels

    def _mixup(self, waveforms: Tensor, lengths: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mix (B, N) and (B, C) with the same shares; a mixed clip is as long as the longer of its two."""
        size = len(waveforms)
        if size == 1:
            return waveforms, lengths, labels
        mixed = torch.rand(size) < self.mixup_probability
        share = torch.distributions.Beta(self.mixup_alpha, self.mixup_alpha).sample((size,))
        share = torch.where(mixed, share, 1.0)[:, None]  # (B, 1)
        # A cyclic shift by a random non-zero step: nobody is their own partner.
        partner = (torch.arange(size) + torch.randint(1, size, ())) % size
        return (
            share * waveforms + (1 - share) * waveforms[partner],
            torch.where(mixed, torch.maximum(lengths, lengths[partner]), lengths),
            share * labels + (1 - share) * labels[partner],
        )


def _without_silent_ends(waveform: Tensor) -> Tensor:
    """From the first sample that is not silent to the last; all of it if every sample is."""
    loud = (waveform.abs() > SILENCE).nonzero()
    return waveform[int(loud[0]) : int(loud[-1]) + 1] if len(loud) else waveform


@dataclass
class SpecAugment:
    """Replace one time band and one band of frequencies per clip, the same in all filters and resolutions.

    What one filter bank hides, another should not show: the band is some bins of the first, and of the others those
    whose centres are nearest to these; none, where it falls between the centres of a coarser bank.

    The value is each feature's mean over the valid frames of the batch, which the model's normalisation maps close to
    zero; frames of padding are left alone.

    Args:
        front_end: a `CATFeatureExtractor` or `MRMFSpectrogram`, for its G filter banks of F bins.
        time_mask: bound on the width of the time band, in frames; at most half of a clip. 0 for none.
        freq_mask: bound on the width of the frequency band, in bins of the first bank. 0 for none.

    Raises:
        ValueError: a width is negative, or the frequency band may be wider than the bank.
    """

    front_end: object
    time_mask: int
    freq_mask: int

    def __post_init__(self):
        for name in ("time_mask", "freq_mask"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        front_end, bins = self.front_end, self.front_end.num_bins
        if self.freq_mask > bins:
            raise ValueError(f"freq_mask={self.freq_mask} is wider than {bins} bins")
        edges = [filter_edges(name, bins, front_end.f_min, front_end.f_max) for name in front_end.filters]
        centres = torch.from_numpy(np.stack(edges)[:, 1:-1])  # (G, F)
        self._nearest = (centres[..., None] - centres[0]).abs().argmin(-1)  # of the first bank, to each bin: (G, F)

    def __call__(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, G*K*F) and the mask (B, T) of valid frames -> (B, T, G*K*F). Draws on the CPU, works on any device."""
        size, frames, _ = features.shape
        valid = torch.ones(size, frames, device=features.device) if mask is None else mask.to(features.dtype)
        times = self._time_band(valid.sum(dim=1).int().tolist(), frames)[..., None]
        keep = times & self._frequency_band(size)  # (B, T, G, F)
        masked = (~keep.to(features.device) & valid.bool()[:, :, None, None])[:, :, :, None]  # (B, T, G, 1, F)
        mean = (features * valid[:, :, None]).sum(dim=(0, 1)) / valid.sum()
        banks = features.unflatten(2, (len(self._nearest), -1, self.front_end.num_bins))  # (B, T, G, K, F)
        return torch.where(masked, mean.view(banks.shape[2:]), banks).flatten(2)

    def _time_band(self, lengths: list[int], frames: int) -> Tensor:
        """(B, T, 1), False in one band per clip, drawn within the clip's own frames."""
        keep = torch.ones(len(lengths), frames, 1)
        for clip, length in zip(keep, lengths):
            clip[:length] = audio_functional.mask_along_axis(clip[:length], self.time_mask, 0.0, 0, MAX_MASKED_SHARE)
        return keep.bool()

    def _frequency_band(self, size: int) -> Tensor:
        """(B, 1, G, F), False in one band per clip."""
        ones = torch.ones(size, 1, self.front_end.num_bins)
        return audio_functional.mask_along_axis_iid(ones, self.freq_mask, 0.0, 2).bool()[..., self._nearest]
