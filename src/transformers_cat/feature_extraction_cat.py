"""Feature extractor of the Causal Audio Transformer: waveforms to MRMF spectrograms."""

import copy

import numpy as np
import torch
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor
from transformers.feature_extraction_utils import BatchFeature
from transformers.utils import TensorType, logging

from .configuration_cat import (
    F_MAX,
    F_MIN,
    FILTERS,
    FRAME_SHIFT,
    HOP_LENGTHS,
    LOG_OFFSET,
    NORMALIZE_VOLUME,
    NUM_BINS,
    SAMPLING_RATE,
    WHITENING,
    WINDOW_LENGTHS,
    CATConfig,
    drop_local_code,
    mrmf_arguments,
    validate_integers,
    validate_mrmf,
    validate_numbers,
)
from .mrmf import MRMFSpectrogram
from .whitening import whitened  # noqa: F401  of mrmf.py; old releases copy what this file itself imports

logger = logging.get_logger(__name__)

MAX_AMPLITUDE = 100.0  # full scale is 1; anything near an integer format's range was not scaled
MAX_CHANNELS = 8  # a 2-D array with at most so many columns and more rows is one clip with channels, not a batch


class CATFeatureExtractor(SequenceFeatureExtractor):
    r"""
    Turns mono waveforms into the `input_values` of [`CATModel`]: multi-resolution multi-filter log-power spectrograms
    (eqs. 1-2 of the paper) on a 10 ms grid, not normalised: the model's own batch norm does that.

    Args:
        sampling_rate (`int`, defaults to 32000): Rate of the waveforms, in Hz.
        window_lengths, hop_lengths (`tuple[int, ...]`, default to `(400, 800, 1600)` and `(160, 320, 640)`): The K
            analysis windows and their hops, in samples.
        frame_shift (`int`, defaults to 320): The time grid, in samples.
        filters (`tuple[str, ...]`, defaults to `("mel", "linear")`): The G filter banks.
        num_bins (`int`, defaults to 64): F, filters of each bank.
        f_min, f_max (`float`, default to 50 and 14000): Their lowest and highest frequency, in Hz.
        log_offset (`float`, defaults to 1e-5): Power added before the logarithm.
        normalize_volume (`bool`, defaults to `False`): Scale each clip to a root mean square of 0.1 first, so that how
            loud it is makes no difference.
        whitening (`float`, defaults to 0): The share of each clip's own average spectrum, in decibels, that is taken
            away, so that it matters less how bright microphone and room made it. A training that crops or mixes clips
            whitens them first, by `extractor.mrmf.whitened`, and takes the features of the result by an extractor
            without whitening, as `AudioCollator` does.
        do_mrmf (`bool`, defaults to `True`): `False` returns padded waveforms, and the model computes the same
            spectrograms on its own device.
        padding_value (`float`, defaults to 0): Value of masked frames and samples. With the mask, the model never
            looks at it; without, frames of 0 are what it takes for padding.
        return_attention_mask (`bool`, defaults to `True`): Without a mask nobody can tell padding from silence.

    `feature_size` is G * K * F with `do_mrmf`, else 1; it follows from the other arguments.

    Raises:
        ValueError: The arguments contradict each other.
    """

    model_input_names = ["input_values", "attention_mask"]

    def __init__(
        self,
        sampling_rate: int = SAMPLING_RATE,
        window_lengths: tuple[int, ...] = WINDOW_LENGTHS,
        hop_lengths: tuple[int, ...] = HOP_LENGTHS,
        frame_shift: int = FRAME_SHIFT,
        filters: tuple[str, ...] = FILTERS,
        num_bins: int = NUM_BINS,
        f_min: float = F_MIN,
        f_max: float = F_MAX,
        log_offset: float = LOG_OFFSET,
        normalize_volume: bool = NORMALIZE_VOLUME,
        whitening: float = WHITENING,
        do_mrmf: bool = True,
        padding_value: float = 0.0,
        return_attention_mask: bool = True,
        **kwargs,
    ):
        validate_numbers(-1e37, 1e37, padding_value=padding_value)
        kwargs.pop("feature_size", None)
        super().__init__(feature_size=1, sampling_rate=sampling_rate, padding_value=padding_value, **kwargs)
        self.window_lengths, self.hop_lengths, self.frame_shift = window_lengths, hop_lengths, frame_shift
        self.filters, self.num_bins, self.f_min, self.f_max = filters, num_bins, f_min, f_max
        self.log_offset, self.normalize_volume, self.whitening = log_offset, normalize_volume, whitening
        validate_mrmf(**mrmf_arguments(self))
        # Lists of Python's integers, as JSON has them.
        self.window_lengths, self.hop_lengths = (list(map(int, lengths)) for lengths in (window_lengths, hop_lengths))
        self.filters = list(filters)
        self.do_mrmf = do_mrmf
        self.return_attention_mask = return_attention_mask
        self._mrmf = None

    @property
    def mrmf(self) -> MRMFSpectrogram:
        """The front end for the attributes as they are now, kept until one of them changes."""
        arguments = mrmf_arguments(self)
        arguments = {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()}
        kept = self._mrmf
        # On the device "meta" it has lost its values.
        if kept is None or next(kept.buffers()).is_meta or arguments != mrmf_arguments(kept):
            with torch.inference_mode(False):  # or no gradient could ever be taken through what is kept
                self._mrmf = MRMFSpectrogram(**arguments)
        return self._mrmf

    @property
    def feature_size(self) -> int:
        """Values of a frame, or 1 for waveforms."""
        return len(self.filters) * len(self.window_lengths) * self.num_bins if self.do_mrmf else 1

    @feature_size.setter
    def feature_size(self, value: int) -> None:
        """Nothing, as it follows from the other attributes: the base class sets what it is given."""

    @classmethod
    def from_config(cls, config: CATConfig, **kwargs) -> "CATFeatureExtractor":
        """The front end that a model's configuration describes; other arguments as those of the class."""
        return cls(**mrmf_arguments(config), **kwargs)

    def __getstate__(self) -> dict:
        """Without the front end, which follows: `datasets` would take an extractor that was called for another one."""
        return {**self.__dict__, "_mrmf": None}

    def to_dict(self) -> dict:
        """The arguments, without the filter banks and windows that follow from them."""
        dictionary = {name: value for name, value in self.__dict__.items() if name != "_mrmf"}
        return {
            **copy.deepcopy(dictionary),
            "feature_size": self.feature_size,
            "feature_extractor_type": type(self).__name__,
        }

    def save_pretrained(self, *args, **kwargs) -> list[str]:
        """As in transformers; but what is saved without its code does not name files that it lacks."""
        if self._auto_class is None:
            drop_local_code(self)
        return super().save_pretrained(*args, **kwargs)

    def __call__(
        self,
        raw_speech: np.ndarray | torch.Tensor | list,
        sampling_rate: int | None = None,
        padding: bool | str = True,
        max_length: int | None = None,
        truncation: bool = False,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | TensorType | None = None,
        device: str | torch.device = "cpu",
        **kwargs,
    ) -> BatchFeature:
        r"""
        Args:
            raw_speech: One mono clip (1-D array, tensor or list of floats) or a batch of them (list, or 2-D array or
                tensor (B, N)). Floats in [-1, 1], or integer PCM (int8, uint8, int16, int32), which is scaled.
            sampling_rate: The rate of `raw_speech`, in Hz. Please pass it: a wrong one is then refused.
            padding: `True` or `"longest"` pads to the longest clip, `"max_length"` to `max_length`, `False` not at all.
            max_length: In samples; to pad and, with `truncation`, to cut to.
            truncation: Cuts clips longer than `max_length`. By default nothing is cut.
            pad_to_multiple_of: Pads to a multiple of so many samples.
            return_attention_mask: Overrides the extractor's setting.
            return_tensors: `"pt"` or `"np"`; by default numpy arrays, in a list where `padding=False`.
            device: Where the spectrograms are computed and, with `return_tensors="pt"`, returned.

        Returns:
            `input_values` (B, T, G * K * F) float32 with T = ceil(N / frame_shift), or, with `do_mrmf=False`, (B, N);
            and `attention_mask` (B, T) or (B, N) int32, 1 on the clips' own frames or samples.

        Raises:
            ValueError: Wrong sampling rate, more than one channel, an empty clip, values that are not finite or not
                scaled, a type that is no audio, or a length that is not positive.
        """
        self._check_sampling_rate(sampling_rate)
        if self.padding_side != "right":
            raise ValueError(f'`padding_side` is {self.padding_side!r}, but clips are padded at their end: "right".')
        lengths = {"max_length": max_length, "pad_to_multiple_of": pad_to_multiple_of}
        validate_integers(1, 2**31, **{name: value for name, value in lengths.items() if value is not None})
        clips = self._as_clips(raw_speech)
        # `pad` takes vectors where feature_size > 1: a sample is then a vector of one.
        batch = self.pad(
            {"input_values": [clip[:, None] for clip in clips] if self.feature_size > 1 else clips},
            padding=padding,
            max_length=max_length,
            truncation=truncation,
            pad_to_multiple_of=pad_to_multiple_of,
            return_attention_mask=True,
        )
        values, masks = batch["input_values"], batch["attention_mask"]
        if padding in (False, "do_not_pad"):
            parts = [self._features(value[None], mask[None], device) for value, mask in zip(values, masks)]
            values, masks = [part[0][0] for part in parts], [part[1][0] for part in parts]
        else:
            sizes = sorted({len(value) for value in values})
            if len(sizes) > 1:  # "max_length" that is none
                raise ValueError(
                    f"Clips of up to {sizes[-1]} samples do not fit into `max_length` {max_length}: pass "
                    "`truncation=True` or a larger one."
                )
            values, masks = self._features(np.stack(values), np.stack(masks), device)
        if return_tensors != "pt":
            values, masks = _to_numpy(values), _to_numpy(masks)
        data = {"input_values": values}
        if self.return_attention_mask if return_attention_mask is None else return_attention_mask:
            data["attention_mask"] = masks
        return BatchFeature(data, tensor_type=return_tensors)

    def _features(
        self, waveforms: np.ndarray, masks: np.ndarray, device: str | torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, N[, 1]) samples and (B, N) mask -> `input_values` and mask, on `device`."""
        values = torch.from_numpy(waveforms).to(device)
        # Clips of one length are the common case, and masking them would copy all there is.
        sample_mask = None if self.do_mrmf and masks.all() else torch.from_numpy(masks).to(device)
        if not self.do_mrmf:
            return values, sample_mask
        with torch.inference_mode(False):
            mrmf = self.mrmf.to(device)
        values, frame_mask = mrmf(values.squeeze(-1), sample_mask)
        if frame_mask is None:
            return values, torch.ones(values.shape[:2], dtype=torch.int32, device=values.device)
        return values.masked_fill_(~frame_mask[..., None], self.padding_value), frame_mask.int()

    def _check_sampling_rate(self, sampling_rate: int | None) -> None:
        if sampling_rate is None:
            logger.warning(
                f"Pass `sampling_rate` to {type(self).__name__}: audio that is not at {self.sampling_rate} Hz would "
                "otherwise be misread without an error."
            )
        elif sampling_rate != self.sampling_rate:
            raise ValueError(
                f"The audio has a sampling rate of {sampling_rate!r} Hz, but this feature extractor works at "
                f"{self.sampling_rate} Hz. Resample it, for instance with "
                f"`transformers_cat.load_audio(path, sampling_rate={self.sampling_rate})` or "
                "`torchaudio.functional.resample`."
            )

    def _as_clips(self, raw_speech) -> list[np.ndarray]:
        """Whatever the peers take for audio -> list of 1-D float32 arrays in [-1, 1]."""
        if isinstance(raw_speech, (np.ndarray, torch.Tensor)):
            if raw_speech.ndim == 2 and 0 < raw_speech.shape[1] <= MAX_CHANNELS < raw_speech.shape[0]:
                raise ValueError(
                    f"An array of shape {tuple(raw_speech.shape)} looks like one clip with {raw_speech.shape[1]} "
                    "channels. Average them, `audio.mean(axis=1)`; a batch has shape (clips, samples)."
                )
            if raw_speech.ndim > 2:
                raise ValueError(
                    f"An array of shape {tuple(raw_speech.shape)} is neither a mono clip (samples,) nor a batch "
                    "(clips, samples). Average its channels first."
                )
            items = list(raw_speech) if raw_speech.ndim == 2 else [raw_speech]
        elif isinstance(raw_speech, (list, tuple)):
            one_clip = len(raw_speech) > 0 and np.isscalar(raw_speech[0])
            items = [raw_speech] if one_clip else list(raw_speech)
        else:
            raise ValueError(
                f"Expected a waveform (array, tensor or list of floats) or a batch of them, not "
                f"{type(raw_speech).__name__}. Read a file with `transformers_cat.load_audio(path)`."
            )
        if not items:
            raise ValueError("The batch is empty: pass at least one clip.")
        return [self._as_clip(item, index) for index, item in enumerate(items)]

    @staticmethod
    def _as_clip(item, index: int) -> np.ndarray:
        """One item of a batch -> 1-D float32 array in [-1, 1]."""
        try:
            if isinstance(item, torch.Tensor):
                item = item.detach().cpu()
                item = item.float() if item.is_floating_point() else item  # numpy has no bfloat16
            clip = np.asarray(item)
            if clip.dtype.kind in "iu" and isinstance(item, (list, tuple)) and not isinstance(item[0], np.generic):
                clip = clip.astype(np.float32)  # of Python, whose integers have no width
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"Clip {index} is not a waveform: {error}") from error
        if clip.ndim == 0:
            raise ValueError(f"Clip {index} is a single {type(item).__name__}, not a waveform (samples,).")
        if clip.ndim > 1:
            raise ValueError(
                f"Clip {index} has shape {clip.shape}, but must be mono, (samples,). Average its channels first."
            )
        if clip.size == 0:
            raise ValueError(f"Clip {index} is empty: it has no samples. Leave it out of the batch.")
        if clip.dtype.kind in "iu" and clip.dtype.itemsize <= 4:
            full_scale = 2.0 ** (8 * clip.dtype.itemsize - 1)
            clip = clip / full_scale - (1.0 if clip.dtype.kind == "u" else 0.0)
        elif clip.dtype.kind != "f":
            raise ValueError(
                f"Clip {index} has dtype {clip.dtype}, which is no audio format. Pass floats in [-1, 1] or integer PCM "
                "of at most 32 bits."
            )
        with np.errstate(over="ignore"):
            clip = np.ascontiguousarray(clip, dtype=np.float32)
        peak = np.abs(clip).max()
        if not np.isfinite(peak):
            raise ValueError(f"Clip {index} contains NaN or infinite samples. Repair it or leave it out.")
        if peak > MAX_AMPLITUDE:
            raise ValueError(
                f"Clip {index} has samples up to {peak:.6g}, but full scale is 1. Divide integer samples by their "
                "range (32768 for 16 bits), or pass them with their integer dtype."
            )
        return clip


def _to_numpy(values: torch.Tensor | list[torch.Tensor]) -> np.ndarray | list[np.ndarray]:
    return [value.cpu().numpy() for value in values] if isinstance(values, list) else values.cpu().numpy()


__all__ = ["CATFeatureExtractor"]
