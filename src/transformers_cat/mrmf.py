"""Multi-resolution multi-filter (MRMF) spectrograms, eqs. (1) and (2) of the paper."""

from functools import reduce
from math import lcm

import numpy as np
import torch
from torch import nn
from transformers.audio_utils import hertz_to_mel, mel_filter_bank, mel_to_hertz
from transformers.utils.generic import maybe_autocast

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
    mrmf_arguments,
    validate_mrmf,
)
from .whitening import whitened, whitening_constants

# Frames of the grid that are transformed at once. On a CPU so few that spectra of some megabytes stay in its caches;
# elsewhere so many that a batch is not cut up, but the spectra of an hour, gigabytes, are never held together.
CPU_SLICE = 2**9
SLICE = 2**16
CPU_BAND = 16  # filters whose product with the spectrum is computed at once, over no more frequencies than they span
VOLUME = 0.1  # root mean square of a clip with `normalize_volume`, of full scale: -20 dB
SILENCE = 1e-5  # root mean square below which a clip is not scaled further: a third of a step of 16 bits
MIN_FFT_LENGTH = 1024  # samples: with fewer, the lowest mel filters hold no frequency of the transform


def fft_length(window_length: int) -> int:
    """Length of the transform for a window, in samples: a power of two, at least `MIN_FFT_LENGTH`."""
    return max(MIN_FFT_LENGTH, 2 ** (window_length - 1).bit_length())


def filter_edges(name: str, num_bins: int, f_min: float, f_max: float) -> np.ndarray:
    """Frequencies of a bank, in Hz, (num_bins + 2,): filter i goes from entry i to entry i + 2, its centre is i + 1."""
    if name == "mel":
        return mel_to_hertz(np.linspace(hertz_to_mel(f_min), hertz_to_mel(f_max), num_bins + 2))
    return np.linspace(f_min, f_max, num_bins + 2)


def filter_bank(name: str, n_fft: int, sampling_rate: int, num_bins: int, f_min: float, f_max: float) -> np.ndarray:
    """Triangular filters whose centres are evenly spaced in mel (HTK's scale) or in hertz.

    Returns:
        (n_fft // 2 + 1, num_bins), float32.
    """
    if name == "mel":
        bank = mel_filter_bank(n_fft // 2 + 1, num_bins, f_min, f_max, sampling_rate, mel_scale="htk")
    else:
        edges = filter_edges(name, num_bins, f_min, f_max)
        frequencies = np.linspace(0, sampling_rate / 2, n_fft // 2 + 1)[:, None]
        bank = np.minimum(frequencies - edges[:-2], edges[2:] - frequencies).clip(min=0) / (edges[1] - edges[0])
    return bank.astype(np.float32)


def span(used: np.ndarray) -> slice:
    """(D,) bool -> the slice from the first to the last that is true."""
    at = np.flatnonzero(used).tolist()
    return slice(at[0], at[-1] + 1) if at else slice(0)


def at_volume(waveform: torch.Tensor, sample_mask: torch.Tensor | None) -> torch.Tensor:
    """Scales (B, N), zero where the mask (B, N) is, to a root mean square of `VOLUME` over each clip's own samples."""
    power = waveform.square().mean(-1, keepdim=True)
    if sample_mask is not None:
        power = power / sample_mask.float().mean(-1, keepdim=True).clamp(min=1e-9)
    return waveform * (VOLUME / power.clamp(min=SILENCE**2).sqrt())  # in this order, silence has a gradient


def frames_to_grid(power: torch.Tensor, hop_length: int, frame_shift: int, num_frames: int) -> torch.Tensor:
    """Brings a spectrogram to the common time grid: averages where it is finer, interpolates where it is coarser.

    Power is what is averaged, so a cell of the grid holds the mean energy of its time span.

    Args:
        power: (B, L, D), frames whose centres are `hop_length / 2 + i * hop_length`, i from 0; where the hop is longer
            than the shift, from -1, to the frame after the last cell, so that nothing has to be invented at the ends.
        num_frames: T, the cells of the grid.

    Returns:
        (B, T, D).
    """
    if hop_length <= frame_shift:
        ratio = frame_shift // hop_length
        # A sum of slices: `mean` over a dimension that is not the last takes several times as long on a CPU.
        return power if ratio == 1 else reduce(torch.add, power.unflatten(1, (num_frames, ratio)).unbind(2)).div_(ratio)
    ratio = hop_length // frame_shift
    before, here, after = power[:, :-2], power[:, 1:-1], power[:, 2:]
    cells = []
    for phase in range(ratio):
        # The cell's centre lies `offset` hops from the centre of the frame that spans it.
        offset = (phase + 0.5) / ratio - 0.5
        cells.append(here.lerp(before if offset < 0 else after, abs(offset)))
    cells = torch.stack(cells, dim=2).flatten(1, 2)
    # Padding by a negative number: a slice would have to know which of two symbolic lengths is smaller.
    return nn.functional.pad(cells, (0, 0, 0, num_frames - cells.shape[1]))


class MRMFSpectrogram(nn.Module):
    """Log-power spectrograms of one waveform under G filter banks and K window lengths on one time grid.

    x_MR = {FFT_w(s)}, w in {w_1 .. w_K} (eq. 1); x_MRMF = {mel(x_MR), x_MR} (eq. 2), where both filters have the same
    number of bins and the spectrograms are "projected to the same temporal dimension". Frame t of every resolution is
    centred at sample `(t + 1/2) * frame_shift`. The signal counts as zero outside of the clip, so no frame depends on
    what the clip is padded with.

    Always computes in float32, whatever the module is cast to: |STFT|^2 overflows half precision. Has no parameters,
    and its buffers follow from its arguments: they are not saved.

    Args:
        sampling_rate: Samples per second.
        window_lengths, hop_lengths: The K analysis windows (Hann) and their hops, in samples.
        frame_shift: The time grid, in samples.
        filters: The G filter banks, of "mel" and "linear".
        num_bins: F, filters of each bank, between `f_min` and `f_max` in Hz.
        log_offset: Power added before the logarithm.
        normalize_volume: Whether each clip is scaled to a root mean square of 0.1 first, so that how loud it is makes
            no difference.
        whitening: The share of each clip's own average spectrum, in decibels, that is taken away.

    Raises:
        ValueError: The arguments contradict each other.
    """

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
    ):
        super().__init__()
        self.sampling_rate = sampling_rate
        self.window_lengths, self.hop_lengths, self.frame_shift = window_lengths, hop_lengths, frame_shift
        self.filters, self.num_bins, self.f_min, self.f_max = filters, num_bins, f_min, f_max
        self.log_offset, self.normalize_volume, self.whitening = log_offset, normalize_volume, whitening
        validate_mrmf(**mrmf_arguments(self))
        constants = self.constants()
        for name, constant in constants.items():
            self.register_buffer(name, torch.from_numpy(constant), persistent=False)
        # For each resolution, the columns in which each `CPU_BAND` filters of its bank are not zero.
        self.bands = []
        for bank in (constants[f"bank_{k}"] for k in range(len(window_lengths))):
            self.bands.append([span(bank[i : i + CPU_BAND].any(0)) for i in range(0, len(bank), CPU_BAND)])

    def constants(self) -> dict[str, np.ndarray]:
        """The buffers by name, for each resolution k: `window_k` (n_fft_k,), `bank_k` (G * F, n_fft_k // 2 + 1);
        and, with whitening, what that needs.

        Float32, and not tensors: those of a model that is built without memory hold no values.
        """
        constants = {}
        for k, window_length in enumerate(self.window_lengths):
            arguments = (fft_length(window_length), self.sampling_rate, self.num_bins, self.f_min, self.f_max)
            hann = np.hanning(window_length + 1)[:-1]  # periodic
            # Zeros follow, so that a frame is as long as its transform: a shift of phase, which power does not see.
            hann = np.pad(hann, (0, arguments[0] - window_length))
            constants[f"window_{k}"] = hann.astype(np.float32)
            constants[f"bank_{k}"] = np.concatenate([filter_bank(name, *arguments).T for name in self.filters])
        if self.whitening:
            # A quarter of a second: so long is the filter.
            own = whitening_constants(fft_length(self.sampling_rate // 4), self.sampling_rate)
            constants.update({f"whitening_{name}": constant for name, constant in own.items()})
        return constants

    def _apply(self, fn, recurse=True):
        # `model.half()` and its like move the buffers but must not round them.
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers():
            if buffer.dtype != torch.float32:
                self.register_buffer(name, torch.from_numpy(self.constants()[name]).to(buffer.device), persistent=False)
        return self

    def num_frames(self, num_samples: int) -> int:
        """T = ceil(N / frame_shift): a frame for each started step of the grid."""
        return -(-num_samples // self.frame_shift)

    def whitened(self, waveform: torch.Tensor) -> torch.Tensor:
        """Clips (B, N), zero on padding, float32, without a share `whitening` of each one's average spectrum."""
        if not self.whitening:
            return waveform
        constants = [getattr(self, f"whitening_{name}") for name in ("window", "bands", "curve")]
        # On a CPU a clip at a time, to stay in its caches; a graph that is being traced must not depend on how many.
        alone = waveform.device.type == "cpu" and not torch.compiler.is_compiling()
        parts = waveform.split(1) if alone else [waveform]
        return torch.cat([whitened(part, self.whitening, *constants) for part in parts])

    def spectrogram(self, waveform: torch.Tensor, k: int, num_frames: int, lead: int = 0) -> torch.Tensor:
        """Eq. (1) for the window w_k, and the filter banks: (B, N) float32 -> (B, T, G * F) power.

        The `num_frames` cells of the grid start `lead` samples into the waveform.
        """
        window_length, hop_length = self.window_lengths[k], self.hop_lengths[k]
        coarse = hop_length > self.frame_shift
        if coarse:  # one frame more on each side, to interpolate with
            count = -(-num_frames * self.frame_shift // hop_length) + 2
        else:
            count = num_frames * self.frame_shift // hop_length
        left = (window_length - hop_length) // 2 + (hop_length if coarse else 0) - lead
        n_fft = fft_length(window_length)
        right = (count - 1) * hop_length + n_fft - left - waveform.shape[-1]
        frames = nn.functional.pad(waveform, (left, right)).unfold(-1, n_fft, hop_length)
        spectrum = torch.fft.rfft(frames * getattr(self, f"window_{k}"))
        squares = torch.view_as_real(spectrum).square_()  # in place: what is in the caches stays there
        # Bank and grid are both linear: whichever leaves less to compute goes first.
        if not coarse:
            squares = frames_to_grid(squares, hop_length, self.frame_shift, num_frames)
        power = self.filtered(squares[..., 0] + squares[..., 1], k)
        return frames_to_grid(power, hop_length, self.frame_shift, num_frames) if coarse else power

    def filtered(self, power: torch.Tensor, k: int) -> torch.Tensor:
        """Power of each frequency (B, L, n_fft_k // 2 + 1) -> of each filter (B, L, G * F)."""
        bank = getattr(self, f"bank_{k}")
        if power.device.type != "cpu" or torch.compiler.is_compiling():
            return nn.functional.linear(power, bank)
        # Triangles are narrow: most of the product would be with zeros.
        flat, parts = power.flatten(0, 1), zip(bank.split(CPU_BAND), self.bands[k])
        filtered = torch.cat([flat[:, band] @ rows[:, band].T for rows, band in parts], dim=-1)
        return filtered.unflatten(0, power.shape[:2])

    def log_power(self, waveform: torch.Tensor, num_frames: int, lead: int = 0) -> torch.Tensor:
        """All resolutions of a stretch of the grid: as `spectrogram`, but (B, T, G * K * F), and its logarithm."""
        resolutions = range(len(self.window_lengths))
        powers = [self.spectrogram(waveform, k, num_frames, lead).split(self.num_bins, dim=-1) for k in resolutions]
        return (torch.cat([power for bank in zip(*powers) for power in bank], dim=-1) + self.log_offset).log()

    def sliced_log_power(self, waveform: torch.Tensor) -> torch.Tensor:
        """`log_power` of (B, N), computed for some clips or, where one is long, for a part of it at a time."""
        num_frames = self.num_frames(waveform.shape[-1])
        size = CPU_SLICE if waveform.device.type == "cpu" else SLICE
        # The frames of all resolutions start together only so often.
        period = lcm(self.frame_shift, *self.hop_lengths) // self.frame_shift
        step = max(size // period, 1) * period
        reach = max(fft_length(window) + 2 * hop for window, hop in zip(self.window_lengths, self.hop_lengths))
        slices = []
        for clips in waveform.split(max(size // max(num_frames, 1), 1)):
            for start in range(0, num_frames, step):
                stop = min(start + step, num_frames)
                first = max(start * self.frame_shift - reach, 0)
                part = clips[:, first : stop * self.frame_shift + reach]
                slices.append(self.log_power(part, stop - start, start * self.frame_shift - first).flatten(0, 1))
        return torch.cat(slices).unflatten(0, (-1, num_frames))

    def forward(
        self, waveform: torch.Tensor, sample_mask: torch.Tensor | None = None, whiten: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            waveform: (B, N), floats in [-1, 1].
            sample_mask: (B, N), non-zero where the samples are a clip's own; `None` if all are.
            whiten: `False` where the clips are `whitened` already.

        Returns:
            The MRMF spectrograms (B, T, G * K * F), float32, filter outermost, bin innermost; and the mask (B, T),
            bool, of frames that hold any of the clip's samples, `None` for `None`.
        """
        frame_mask = None
        if sample_mask is not None:
            sample_mask = sample_mask.bool()
            waveform = waveform.masked_fill(~sample_mask, 0)
            num_samples = sample_mask.shape[-1]
            # By the number of frames, and no other expression of it, where the length is symbolic.
            missing = self.num_frames(num_samples) * self.frame_shift - num_samples
            padded = nn.functional.pad(sample_mask, (0, missing))
            frame_mask = padded.unflatten(-1, (-1, self.frame_shift)).any(-1)
        with maybe_autocast(waveform.device.type, enabled=False):
            waveform = waveform.float()
            if whiten and self.whitening:
                waveform = self.whitened(waveform)
                if sample_mask is not None:
                    waveform = waveform.masked_fill(~sample_mask, 0)
            if self.normalize_volume:
                waveform = at_volume(waveform, sample_mask)
            # A graph that is being traced must not depend on how many slices there are.
            if torch.compiler.is_compiling():
                features = self.log_power(waveform, self.num_frames(waveform.shape[-1]))
            else:
                features = self.sliced_log_power(waveform)
        return features, frame_mask
